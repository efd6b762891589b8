"""Regenerates the Python of this folder's `.proto` files: `python -m protos [--out DIR]`."""

import argparse
import re
import sys
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

HERE = Path(__file__).parent


def generate(out: Path) -> None:
    """Writes `protos/*_pb2.py`, `*_pb2_grpc.py` and their stubs below `out`.

    A file without a service gets no grpc module: the plugins would write an empty one.

    Raises:
        RuntimeError: protoc or one of its plugins failed; it has printed why.
    """
    sources = sorted(f"protos/{path.name}" for path in HERE.glob("*.proto"))
    bin_dir = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{HERE.parent}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")
    for path in HERE.glob("*.proto"):
        if not re.search(r"^service ", path.read_text(encoding="utf-8"), re.MULTILINE):
            for suffix in (".py", ".pyi"):
                (out / "protos" / f"{path.stem}_pb2_grpc{suffix}").unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder that holds protos/")
    generate(parser.parse_args().out)
