import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_help import Fleet
from postgres_help import Server, binaries


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Starts coordinators and clients, and ends them with the test."""
    started = Fleet(tmp_path)
    yield started
    started.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    programs = binaries()
    if programs is None:
        pytest.skip("there is no PostgreSQL here: apt-get install postgresql")
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    # Not below pytest's own directory, which only root may enter.
    with tempfile.TemporaryDirectory(prefix="comigs-postgres-") as directory:
        started = Server(Path(directory), programs)
        started.start()
        yield started
        started.stop()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.url(f"test_{abs(hash(request.node.name))}")
