"""What a benchmark compiled is found again while nothing that it was made from has changed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks import compiled
from benchmarks.compiled import sources_digest
from edge_runtime import doctor


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages that stand for the compiler and the device's part."""
    for package in ("export", "edge_runtime"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        monkeypatch.setattr(getattr(compiled, package), "__file__", f"{tmp_path}/{package}/it.py")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("export/tiers.json", True),
        ("export/sample_text.txt", True),
        ("export/gpt2_mini/tokenizer.json", True),
        ("export/programs.py", True),
        ("edge_runtime/quantization.py", True),
        ("export/__pycache__/programs.pyc", False),
        ("export/gpt2_mini/model.safetensors", False),  # a base has its own hash
    ],
)
def test_a_change_of_what_decides_about_a_bundle_is_seen(
    sources: Path, file: str, counts: bool
) -> None:
    path = sources / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("old")
    before = sources_digest()
    assert sources_digest() == before
    path.write_text("new")
    assert (sources_digest() != before) == counts


@pytest.mark.parametrize("library", ["torch", "onnxruntime", "executorch"])
def test_another_version_of_a_library_is_seen(
    sources: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = doctor.version
    found = {sources_digest()}
    monkeypatch.setattr(doctor, "version", lambda each: "0" if each == library else known(each))
    found.add(sources_digest())

    def without(name: str) -> str:
        if name == library:
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(doctor, "version", without)
    found.add(sources_digest())
    assert len(found) == 3
