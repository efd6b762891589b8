from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_help import Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Starts coordinators and clients, and ends them with the test."""
    started = Fleet(tmp_path)
    yield started
    started.close()
