"""The committed Python of protos/ is what its `.proto` files generate today."""

from pathlib import Path

from protos.__main__ import HERE, generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in HERE.glob("*_pb2*.py*")}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name, text in fresh.items() if committed[name] != text]
    assert not stale, "run `python -m protos`"
