"""Regenerates the Python of this folder's `.proto` files: `python -m protos [--out DIR]`.

`--release` also notes the present contract as released: `buf breaking` (see buf.yaml) holds later
ones to it.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RELEASED = HERE / "released.binpb"


def generate(out: Path) -> None:
    """Writes `protos/*_pb2.py`, `*_pb2_grpc.py` and their stubs below `out`.

    A file without a service gets no grpc module: the plugins would write an empty one.

    Raises:
        RuntimeError: protoc or one of its plugins failed; it has printed why.
    """
    sources = sorted(f"protos/{path.name}" for path in HERE.glob("*.proto"))
    arguments = [
        "protoc",
        f"-I{HERE.parent}",
        f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")
    for path in HERE.glob("*.proto"):
        if not re.search(r"^service ", path.read_text(encoding="utf-8"), re.MULTILINE):
            for suffix in (".py", ".pyi"):
                (out / "protos" / f"{path.stem}_pb2_grpc{suffix}").unlink(missing_ok=True)


def release() -> None:
    """Writes RELEASED: the descriptors of all `.proto` files, without comments."""
    subprocess.run(
        [BIN / "buf", "build", HERE, "--exclude-source-info", "--output", RELEASED], check=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder that holds protos/")
    parser.add_argument("--release", action="store_true", help="note the contract as released")
    arguments = parser.parse_args()
    generate(arguments.out)
    if arguments.release:
        release()
