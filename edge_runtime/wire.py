"""What crosses the network: the shared tensors, as safetensors bytes, and nothing else.

Both ends take the list from the manifest. `encode` cannot address another tensor; `decode` refuses
by name, shape, type and value whatever is not exactly that list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from edge_runtime.adapters import Vector, Vectors, views
from edge_runtime.bundle import shared_tensors
from edge_runtime.errors import AdapterError
from protos import manifest_pb2 as pb

CHUNK_BYTES = 256 * 1024
# Of the headers of good payloads, so many are kept; devices of one version send the same one.
KEPT_HEADERS = 16
LONGEST_HEADER = 1024 * 1024


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
        stored = dict(deserialize(payload))  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"not a safetensors payload: {error}") from error
    _check_names(manifest, stored)
    vectors = {role.name: np.zeros(role.size, np.float32) for role in manifest.roles if role.shared}
    for name, view in views(manifest, vectors).items():
        tensor = stored[name]
        _check_type(name, tensor["dtype"], tensor["shape"], view.shape)
        value = np.frombuffer(tensor["data"], "<f4").reshape(view.shape)
        _check_finite(name, value)
        view[...] = value
    return vectors


def check(manifest: pb.Manifest, path: Path) -> None:
    """Whether `decode` would take the content of the file; one tensor is in memory at a time.

    Raises:
        AdapterError: as `decode`.
        FileNotFoundError: there is no such file.
    """
    try:
        with safe_open(path, "np") as file:
            _check_names(manifest, file.keys())
            for tensor in shared_tensors(manifest):
                stored = file.get_slice(tensor.name)
                shape = tuple(tensor.shape)
                _check_type(tensor.name, stored.get_dtype(), stored.get_shape(), shape)
            if not _all_finite(path):
                for tensor in shared_tensors(manifest):
                    _check_finite(tensor.name, file.get_tensor(tensor.name))
    except SafetensorError as error:
        raise AdapterError(f"not a safetensors payload: {error}") from error


class Checker:
    """`check`, for payloads of one manifest that come in piece by piece.

    Their numbers are looked at while they are in memory. Which tensors there are, of what type and
    shape, depends on the header and the size alone: what a good payload had needs no second look.
    """

    def __init__(self, manifest: pb.Manifest) -> None:
        self._manifest = manifest
        self._good: tuple[tuple[bytes, int], ...] = ()

    def end(self, payload: Incoming, path: Path) -> None:
        """Raises as `check`; all has come, and is in the file."""
        seen = payload.header, payload.size
        if not payload.finite or seen not in self._good:
            check(self._manifest, path)
            if payload.header:
                self._good = (seen, *self._good[: KEPT_HEADERS - 1])


class Incoming:
    """What is known of a payload that comes in."""

    def __init__(self) -> None:
        self.size = 0
        self.header = b""
        """Of safetensors, once it is there."""
        self.finite = True
        """Whether the numbers so far surely hold no NaN and no infinity."""
        self._first = bytearray()

    def add(self, piece: memoryview) -> None:
        self.size += len(piece)
        if not self.header:
            self._first += piece
            end = 8 + int.from_bytes(self._first[:8], "little")
            if end > LONGEST_HEADER or len(self._first) < end:
                # Without a header `check` looks at all of it.
                self._first = self._first[:LONGEST_HEADER]
                return
            self.header = bytes(self._first[:end])
            piece = memoryview(self._first)[end:]
            self._first = bytearray()
        if len(piece) % 4:
            self.finite = False
        elif self.finite:
            with np.errstate(over="ignore", invalid="ignore"):
                # A NaN or an infinity makes the sum one, and so may numbers that are huge.
                self.finite = bool(np.isfinite(np.frombuffer(piece, "<f4").sum()))


def _all_finite(path: Path) -> bool:
    """Whether a file of safetensors surely holds no NaN and no infinity; it is not for sure that it
    does otherwise."""
    with path.open("rb", buffering=0) as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header)
        block = np.empty(CHUNK_BYTES // 4, "<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            while size := file.readinto(block.data):
                numbers = block[: size // 4]
                if size % 4 or not np.isfinite(np.dot(numbers, numbers)):
                    return False
    return True


def _check_names(manifest: pb.Manifest, stored: Iterable[str]) -> None:
    expected = {tensor.name for tensor in shared_tensors(manifest)}
    found = set(stored)
    for name in sorted(found - expected):
        raise AdapterError(f"{name} is not a shared tensor of this bundle")
    for name in sorted(expected - found):
        raise AdapterError(f"shared tensor {name} is missing")


def _check_type(name: str, dtype: str, shape: list[int], wanted: tuple[int, ...]) -> None:
    """Both ends call types as safetensors does."""
    if dtype != "F32" or tuple(shape) != wanted:
        raise AdapterError(f"{name} is {dtype}{list(shape)} instead of F32{list(wanted)}")


def _check_finite(name: str, value: NDArray[np.float32]) -> None:
    # A NaN or an infinity makes the sum of squares one. That is four times as fast, and only when
    # the sum is beyond float32 the question is open.
    flat = value.ravel()
    with np.errstate(over="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return
    if not np.isfinite(value).all():
        raise AdapterError(f"{name} holds a NaN or an infinity")


def shared_roles(manifest: pb.Manifest) -> list[str]:
    return [role.name for role in manifest.roles if role.shared]


def shared_parts(manifest: pb.Manifest) -> dict[str, slice]:
    """Where each shared role is in the flat vector of them all, one after the other."""
    parts, size = {}, 0
    for role in manifest.roles:
        if role.shared:
            parts[role.name] = slice(size, size + role.size)
            size += role.size
    return parts


def max_bytes(manifest: pb.Manifest) -> int:
    """Largest size in bytes that an honest payload can have: the numbers plus their header."""
    tensors = shared_tensors(manifest)
    numbers = sum(role.size for role in manifest.roles if role.shared)
    return 4 * numbers + 1024 + sum(len(tensor.name) + 256 for tensor in tensors)


def chunks(payload: bytes) -> Iterator[bytes]:
    """`payload` in pieces of at most CHUNK_BYTES."""
    for start in range(0, len(payload), CHUNK_BYTES):
        yield payload[start : start + CHUNK_BYTES]
