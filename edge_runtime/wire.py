"""What crosses the network: the shared tensors, as safetensors bytes, and nothing else.

Both ends take the list from the manifest. `encode` cannot address another tensor; `decode` refuses
by name, shape, type and value whatever is not exactly that list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.adapters import Vector, Vectors, views
from edge_runtime.bundle import shared_tensors
from edge_runtime.errors import AdapterError
from protos import manifest_pb2 as pb

CHUNK_BYTES = 256 * 1024


def encode(manifest: pb.Manifest, vectors: Mapping[str, Vector]) -> bytes:
    """The shared tensors out of `vectors` (which may hold other roles too; they stay)."""
    named = views(manifest, {role: vectors[role] for role in shared_roles(manifest)})
    return save({tensor.name: named[tensor.name] for tensor in shared_tensors(manifest)})


def decode(manifest: pb.Manifest, payload: bytes) -> Vectors:
    """Shared role -> vector.

    Raises:
        AdapterError: with the reason, if `payload` is anything but the shared tensors of this
            manifest, complete, float32, of the right shapes and finite.
    """
    if len(payload) > max_bytes(manifest):
        raise AdapterError(
            f"{len(payload)} bytes are more than the shared tensors need ({max_bytes(manifest)})"
        )
    try:
        stored = load(payload)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"not a safetensors payload: {error}") from error
    expected = {tensor.name: tensor for tensor in shared_tensors(manifest)}
    for name in sorted(stored.keys() - expected.keys()):
        raise AdapterError(f"{name} is not a shared tensor of this bundle")
    for name in sorted(expected.keys() - stored.keys()):
        raise AdapterError(f"shared tensor {name} is missing")
    vectors = {role.name: np.zeros(role.size, np.float32) for role in manifest.roles if role.shared}
    for name, view in views(manifest, vectors).items():
        value = stored[name]
        if value.dtype != np.float32 or value.shape != view.shape:
            raise AdapterError(
                f"{name} is {value.dtype}{list(value.shape)} instead of float32{list(view.shape)}"
            )
        if not np.isfinite(value).all():
            raise AdapterError(f"{name} holds a NaN or an infinity")
        view[...] = value
    return vectors


def shared_roles(manifest: pb.Manifest) -> list[str]:
    return [role.name for role in manifest.roles if role.shared]


def max_bytes(manifest: pb.Manifest) -> int:
    """Largest size in bytes that an honest payload can have: the numbers plus their header."""
    tensors = shared_tensors(manifest)
    numbers = sum(role.size for role in manifest.roles if role.shared)
    return 4 * numbers + 1024 + sum(len(tensor.name) + 256 for tensor in tensors)


def chunks(payload: bytes) -> Iterator[bytes]:
    """`payload` in pieces of at most CHUNK_BYTES."""
    for start in range(0, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]
