"""Updates on disk, as flat vectors that are read in pieces, so that memory stays bounded.

An update is one vector of D numbers: the shared roles one after the other, in manifest order. Its
file is what the device sent (see `wire.encode`), in whatever order its tensors are.
"""

from __future__ import annotations

import errno
import io
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator import direct
from edge_runtime import wire
from edge_runtime.adapters import Vector, Vectors
from edge_runtime.bundle import shared_tensors
from edge_runtime.errors import AdapterError, ComigsError, StorageError
from protos import manifest_pb2 as pb

# Of a file, so many are read at once.
READ_NUMBERS = 2**17
# Smaller pieces are read through the page cache.
DIRECT_BYTES = 2**18
# Reasons for which a file cannot be read, now or ever.
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}

Flat = NDArray[np.float64]
"""D numbers, or a piece of them."""


@dataclass(frozen=True)
class Contribution:
    """One device's accepted update."""

    device: str
    path: Path
    """File with the payload, which `wire.decode` accepted."""
    tokens: int
    """That it was trained on, more than 0."""
    manifest: pb.Manifest | None = None
    """Of the device's bundle, if that may be of another rank than the round's generalist."""
    began: Path | None = None
    """Payload of the generalist that it started from; None: the round's."""
    staleness: int = 0
    """How many generalists came after that one, up to the round's."""


class Update(Protocol):
    """What a strategy sees of a contribution."""

    @property
    def tokens(self) -> int: ...

    @property
    def decay(self) -> float:
        """By what its weight in a mean is multiplied."""

    def began(self, incoming: Flat, start: int, stop: int) -> Flat:
        """Coordinates of what its device started from in a round that starts from `incoming`."""

    def read(self, start: int, stop: int, out: Flat | None = None) -> Flat:
        """Its coordinates `start` to `stop`, in `out` or else in a new array."""


class Strategy(Protocol):
    """Makes one vector out of the updates of a round. Called as the package's docstring says."""

    @property
    def least_updates(self) -> int:
        """Fewest updates for which it is defined."""

    def configure_round(self, incoming: Flat) -> None:
        """Begins a round whose devices started from `incoming`."""

    def accept(self, update: Update) -> None:
        """Takes the next update, at least until `aggregate` has returned."""

    def aggregate(self) -> Flat:
        """The vector that the accepted updates amount to."""


@dataclass(frozen=True)
class Pair:
    """Where a flat vector has one LoRA pair: A is (rank, inputs), B is (outputs, rank)."""

    A: ClassVar = ".lora_A.weight"
    B: ClassVar = ".lora_B.weight"

    a: slice
    b: slice
    rank: int
    inputs: int
    outputs: int

    def of(self, vector: Flat) -> tuple[Flat, Flat]:
        """Views of A and B."""
        a = vector[self.a].reshape(self.rank, self.inputs)
        return a, vector[self.b].reshape(self.outputs, self.rank)


@dataclass(frozen=True)
class Pieces:
    """Of a flat vector in a file: first coordinate, the one after the last, first byte."""

    firsts: list[int]
    stops: list[int]
    places: list[int]


class Layout:
    """Which coordinates of a flat vector each shared tensor and role has."""

    def __init__(self, manifest: pb.Manifest) -> None:
        self.roles = wire.shared_parts(manifest)
        self.size = max((part.stop for part in self.roles.values()), default=0)
        places = sorted(
            (self.roles[tensor.role].start + tensor.offset, tensor.name, tuple(tensor.shape))
            for tensor in shared_tensors(manifest)
        )
        self.firsts = [first for first, _, _ in places]
        """Of each tensor, in this order: its first coordinate; likewise the next three."""
        self.names = [name for _, name, _ in places]
        self.shapes = [shape for _, _, shape in places]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.places = {name: index for index, name in enumerate(self.names)}
        self.scale = manifest.mixture.alpha / math.sqrt(manifest.mixture.rank or 1)
        self.max_bytes = wire.max_bytes(manifest)
        self._found: tuple[bytes, Pieces] | None = None

    def pairs(self) -> list[Pair]:
        """The LoRA pairs, in the order of their coordinates; `bundle.family_sha256` sees to it that
        there is nothing else."""
        pairs = []
        for name in self.names:
            if name.endswith(Pair.A):
                a, b = self.places[name], self.places[name.removesuffix(Pair.A) + Pair.B]
                (rank, inputs), (outputs, _) = self.shapes[a], self.shapes[b]
                pairs.append(Pair(self._part(a), self._part(b), rank, inputs, outputs))
        return pairs

    def _part(self, index: int) -> slice:
        return slice(self.firsts[index], self.firsts[index] + self.sizes[index])

    def find(self, header: bytes) -> Pieces:
        """Where a file with this header of safetensors has the numbers.

        Raises:
            LookupError, TypeError, ValueError, ...: it has not; of JSON, anything may come.
        """
        if self._found is None or self._found[0] != header:  # of most files it is the same
            self._found = header, self._find(json.loads(header), 8 + len(header))
        return self._found[1]

    def _find(self, header: Any, data: int) -> Pieces:
        """`data` is where the header ends, from which its places count."""
        pieces = Pieces([], [], [])
        for name, first, size in zip(self.names, self.firsts, self.sizes, strict=True):
            place = data + int(np.int64(header[name]["data_offsets"][0]))
            follows = bool(pieces.stops) and pieces.stops[-1] == first
            if follows and place == pieces.places[-1] + 4 * (first - pieces.firsts[-1]):
                pieces.stops[-1] += size
            else:
                pieces.firsts.append(first)
                pieces.stops.append(first + size)
                pieces.places.append(place)
        return pieces

    def flatten(self, vectors: Mapping[str, Vector]) -> Flat:
        return np.concatenate([vectors[role] for role in self.roles], dtype=np.float64)

    def split(self, flat: Vector) -> Vectors:
        """Shared role -> its piece of `flat`."""
        return {role: flat[part] for role, part in self.roles.items()}


class DamagedUpdateError(AdapterError):
    """The file of an update, or of what it started from, is missing or not what it was."""

    def __init__(self, contribution: Contribution, damaged: Path | None = None) -> None:
        """`damaged` is the file if it is not the contribution's own."""
        path = damaged or contribution.path
        super().__init__(f"{path} is missing or damaged, though it was accepted")
        self.device = contribution.device


def is_lost(error: OSError) -> bool:
    """Whether a file that could not be read is gone, rather than out of reach for now."""
    return error.errno is None or error.errno in LOST


def trouble(contribution: Contribution, error: Exception, began: Path | None = None) -> ComigsError:
    """What an update's file, or `began`, that cannot be read comes to: the update was acknowledged,
    so it is given up only if that is gone, or the disk has lost it."""
    if isinstance(error, OSError) and not is_lost(error):
        return StorageError(f"cannot read {began or contribution.path}: {error.strerror}")
    return DamagedUpdateError(contribution, began)


class StoredUpdate:
    """A contribution whose numbers are read from its file when they are asked for."""

    decay = 1.0

    def __init__(self, layout: Layout, contribution: Contribution) -> None:
        """
        Raises:
            DamagedUpdateError: the file is missing, or not what was accepted.
            StorageError: it cannot be read now.
        """
        self.tokens = contribution.tokens
        self._contribution = contribution
        try:
            with contribution.path.open("rb", buffering=0) as file:
                self._pieces = layout.find(_header_of(file, layout.max_bytes))
        except (
            OSError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise trouble(contribution, error) from error

    def began(self, incoming: Flat, start: int, stop: int) -> Flat:
        return incoming[start:stop]

    def read(self, start: int, stop: int, out: Flat | None = None) -> Flat:
        """
        Raises:
            DamagedUpdateError: the file is missing or truncated.
            StorageError: it cannot be read now.
        """
        numbers = np.empty(stop - start) if out is None else out
        done = start
        firsts = self._pieces.firsts
        reached = range(max(0, bisect_right(firsts, start) - 1), bisect_left(firsts, stop))
        try:
            large = 4 * (stop - start) >= DIRECT_BYTES
            with direct.opened(self._contribution.path, directly=large) as file:
                for index in reached:
                    first, place = firsts[index], self._pieces.places[index]
                    begin, end = max(start, first), min(stop, self._pieces.stops[index])
                    numbers[done - start : begin - start] = 0  # of no tensor
                    for at in range(begin, end, READ_NUMBERS):
                        done = min(at + READ_NUMBERS, end)
                        stored = direct.read(file, place + 4 * (at - first), 4 * (done - at))
                        if len(stored) != 4 * (done - at):
                            raise DamagedUpdateError(self._contribution)
                        numbers[at - start : done - start] = np.frombuffer(stored, "<f4")
        except (OSError, OverflowError, ValueError) as error:
            raise trouble(self._contribution, error) from error
        numbers[done - start :] = 0
        return numbers


def _header_of(file: io.FileIO, most: int) -> bytes:
    """The header of safetensors, which has its own size before it, in 8 bytes."""
    size = int.from_bytes(file.read(8), "little")
    if size > most:
        raise ValueError("a header longer than the payload")
    return file.read(size)


def blocks(size: int, rows: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Pieces [start, stop) of `size` coordinates; `rows` such in float64 fill `block_bytes`."""
    width = max(1, block_bytes // (8 * rows))
    for start in range(0, size, width):
        yield start, min(start + width, size)
