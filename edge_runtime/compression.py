"""Updates made small: a device sends the step from the generalist that it downloaded, rounded.

| name | sent, of D coordinates | bytes per coordinate |
|---|---|---|
| `float16` | all, in half precision | 2 |
| `int8` | all, as 8 bits, and a scale for each BLOCK of them | 1.02 |
| `top-k` | the TOP_SHARE largest in magnitude, in half precision, and their indices | 0.19 |

What rounding leaves out is not lost. It is added to the next step before that is rounded: error
feedback (Seide et al. 2014; Stich et al. 2018, algorithm 1; Karimireddy et al. 2019, algorithm 2),

    sent = C(step + residual),  residual' = step + residual - sent

which is why a device keeps the residual, and replaces it only once the update counts.

The payload is safetensors with the few flat tensors that `_layout` names, and says nothing of its
size that the receiver does not know: it can be no larger unpacked than any update of its bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from edge_runtime.adapters import Vector
from edge_runtime.errors import AdapterError
from protos import coordinator_pb2 as pb

NAMES: dict[str, pb.Compression.ValueType] = {
    "float16": pb.COMPRESSION_FLOAT16,
    "int8": pb.COMPRESSION_INT8,
    "top-k": pb.COMPRESSION_TOP_K,
}
BLOCK = 256
TOP_SHARE = 1 / 32
LARGEST_HALF = float(np.finfo(np.float16).max)
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U32": "<u4"}


@dataclass
class Feedback:
    """What a device keeps so that it can send steps; both (D,)."""

    incoming: Vector
    """The generalist that the present round started from."""
    residual: Vector
    """What has been left out of the updates that count."""


def compress(kind: pb.Compression.ValueType, step: Vector) -> bytes:
    """The payload for `step`, (D,) finite. The same step gives the same bytes."""
    if kind == pb.COMPRESSION_FLOAT16:
        return save({"step": _half(step)})
    if kind == pb.COMPRESSION_INT8:
        blocks = np.zeros((-(-step.size // BLOCK), BLOCK), np.float32)
        blocks.reshape(-1)[: step.size] = step
        scale = np.abs(blocks).max(axis=1) / np.float32(127)
        with np.errstate(over="ignore"):  # of the largest number there is, it was rounded up
            scale = np.where(np.isfinite(127 * scale), scale, np.nextafter(scale, np.float32(0)))
        # A block of zeros, or of numbers too small for a scale of their own, is sent as zeros.
        divisor = np.where(scale > 0, scale, np.float32(1))[:, None]
        levels = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
        return save({"step": levels.reshape(-1)[: step.size], "scale": scale})
    if kind == pb.COMPRESSION_TOP_K:
        count = max(1, round(step.size * TOP_SHARE))
        # Stable, so that which of equals are sent does not depend on the machine.
        largest = np.argsort(-np.abs(step), kind="stable")[:count]
        index = np.sort(largest).astype(np.uint32)
        return save({"index": index, "step": _half(step[index])})
    raise ValueError(f"{kind} is no compression")


def decompress(kind: pb.Compression.ValueType, payload: bytes, size: int) -> Vector:
    """The step that `compress` made `payload` of, (D,), finite; D is `size`.

    Raises:
        AdapterError: `payload` is anything else.
    """
    try:
        stored = dict(deserialize(payload))  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"not a safetensors payload: {error}") from error
    tensors = _checked(kind, stored, size)
    step = tensors["step"]
    if kind == pb.COMPRESSION_FLOAT16:
        result = step.astype(np.float32)
    elif kind == pb.COMPRESSION_INT8:
        scale = np.repeat(tensors["scale"], BLOCK)[:size]
        with np.errstate(over="ignore", invalid="ignore"):
            result = step.astype(np.float32) * scale
    else:
        index = tensors["index"]
        if index[-1] >= size or (index[1:] <= index[:-1]).any():
            raise AdapterError(
                f"the indices are not in growing order from 0 to less than {size}, each once"
            )
        result = np.zeros(size, np.float32)
        result[index] = step
    if not np.isfinite(result).all():
        raise AdapterError("the step holds a NaN or an infinity")
    return result


def _layout(kind: pb.Compression.ValueType, size: int, sent: int) -> dict[str, tuple[str, int]]:
    """Tensor -> dtype, length; `sent` is how many coordinates a top-k payload has."""
    if kind == pb.COMPRESSION_FLOAT16:
        return {"step": ("F16", size)}
    if kind == pb.COMPRESSION_INT8:
        return {"step": ("I8", size), "scale": ("F32", -(-size // BLOCK))}
    return {"index": ("U32", sent), "step": ("F16", sent)}


def _checked(
    kind: pb.Compression.ValueType, stored: Mapping[str, dict[str, Any]], size: int
) -> dict[str, NDArray[Any]]:
    """The tensors of a payload, if they are those that it should have."""
    shapes = {name: tensor["shape"] for name, tensor in stored.items()}
    index = shapes.get("index")
    sent = index[0] if isinstance(index, list) and len(index) == 1 else 0
    if kind == pb.COMPRESSION_TOP_K and not 0 < sent <= size:
        raise AdapterError(f"it has {sent} indices instead of 1 to {size}")
    wanted = _layout(kind, size, sent)
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[0]
        raise AdapterError(f"{odd} is not a tensor of this compression, or is missing")
    tensors = {}
    for name, (dtype, length) in wanted.items():
        found = stored[name]
        if found["dtype"] != dtype or found["shape"] != [length]:
            raise AdapterError(
                f"{name} is {found['dtype']}{found['shape']} instead of {dtype}[{length}]"
            )
        tensors[name] = np.frombuffer(found["data"], DTYPES[dtype])
    return tensors


def _half(step: Vector) -> NDArray[np.float16]:
    return np.clip(step, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
