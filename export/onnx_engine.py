"""Programs as ONNX files that share one file of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import external_data_helper
from torch import Tensor, fx

from export.onnx_branches import add_switch
from export.onnx_graph import translate
from export.programs import Specification
from export.rounding import Judged

WEIGHTS_FILE = "onnx/weights.bin"
# Page-aligned, so that a weight can be mapped into memory on its own.
ALIGNMENT = 4096
# Smaller constants stay inside the graph, where shape inference can see them.
INLINE_BYTES = 1024


class WeightStore:
    """One file that holds every distinct weight once, whatever number of programs use it.

    A weight that is a part of one that is there already is not stored again, either.
    """

    def __init__(self, bundle: Path) -> None:
        self.path = bundle / WEIGHTS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        # Where contents begin: by their own hash, and by that of any of their pages.
        self.wholes: dict[bytes, int] = {}
        self.pages: dict[bytes, int] = {}

    def place(self, content: bytes) -> int:
        """Offset of `content` in the file, after appending it if it is new."""
        key = _digest(content)
        if key in self.wholes:
            return self.wholes[key]
        first = self.pages.get(_digest(content[:ALIGNMENT]))
        if first is None or not self._holds(content, first):
            first = self._append(content)
        self.wholes[key] = first
        return first

    def _holds(self, content: bytes, offset: int) -> bool:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(len(content)) == content

    def _append(self, content: bytes) -> int:
        with self.path.open("ab") as file:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            file.write(content)
        for start in range(0, len(content), ALIGNMENT):
            page = content[start : start + ALIGNMENT]
            self.pages.setdefault(_digest(page), offset + start)
        return offset


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def write_program(
    graph_module: fx.GraphModule,
    specification: Specification,
    examples: Sequence[Sequence[Tensor]],
    input_names: Sequence[str],
    *,
    file: Path,
    store: WeightStore,
    int8: bool,
    judged: Judged,
) -> Path | None:
    """Writes a program to `file`, its weights to `store`, the large ones in int8 if asked for.

    Args:
        graph_module: `flat_graph` of it, with `onnx_graph.DECOMPOSITIONS`.
        examples: inputs on which to see what int8 is too coarse for.
        judged: where other programs of the same kind have shown int8 to be too coarse.

    Returns:
        The file, beside it, of the same program with unsigned weights, if that is another.
    """
    models = translate(
        graph_module,
        input_names,
        specification.outputs,
        int8=int8,
        blocks=specification.blocks,
        examples=examples,
        judged=judged,
        length=specification.length,
    )
    for model, path in zip(models, (file, file.with_suffix(".unsigned.onnx")), strict=False):
        if specification.optional:
            add_switch(model, specification.optional)
        _externalise(model, store, path)
        path.write_bytes(model.SerializeToString())
    return path if path != file else None


def _externalise(model: onnx.ModelProto, store: WeightStore, file: Path) -> None:
    # ONNX resolves locations relative to the model file; both lie in the same folder.
    location = store.path.relative_to(file.parent).as_posix()
    for tensor in model.graph.initializer:
        content = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        if len(content) <= INLINE_BYTES:
            continue
        tensor.raw_data = content
        external_data_helper.set_external_data(
            tensor, location, offset=store.place(content), length=len(content)
        )
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
