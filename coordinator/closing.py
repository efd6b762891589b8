"""What comes of a round: from its rows and files to the next generalist."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from coordinator.aggregation import (
    AggregationError,
    Contribution,
    DamagedUpdateError,
    Outcome,
    Recipe,
    aggregate,
    conclude_sum,
)
from coordinator.secure_aggregation import SecureAggregation
from coordinator.state import State
from coordinator.tables import Round, Update
from edge_runtime import wire
from edge_runtime.errors import AdapterError, StorageError
from protos import manifest_pb2


class Closing:
    """Closes the rounds of one State. Nothing here changes it."""

    def __init__(
        self,
        *,
        state: State,
        manifest: manifest_pb2.Manifest,
        manifests: Mapping[str, manifest_pb2.Manifest],
        recipe: Recipe,
        masked: SecureAggregation | None,
    ) -> None:
        """
        Args:
            manifest: whose layout the generalist has.
            manifests: contract -> manifest, of the bundles that devices may have; that one too.
            masked: None: updates come as they are.
        """
        self._state = state
        self._manifest = manifest
        self._manifests = manifests
        self._recipe = recipe
        self._masked = masked

    def close(self, current: Round, updates: list[Update]) -> Outcome:
        memory = self._memory_of(current)
        incoming = wire.decode(self._manifest, self.read_start(current))
        if self._masked is not None:
            summed = self._masked.total(current.number, updates)
            outcome = conclude_sum(
                self._manifest,
                self._recipe,
                incoming=incoming,
                total=summed.total,
                divisor=summed.divisor,
                clipped=summed.clipped,
                clipped_coordinates=summed.clipped_coordinates,
                memory=memory,
            )
            return replace(outcome, faults=summed.faults)
        return aggregate(
            self._manifest,
            self._recipe,
            incoming=incoming,
            contributions=[self._contribution(current, update) for update in updates],
            memory=memory,
        )

    def start_of(self, current: Round) -> Path:
        return self._state.directory / current.generalist_file

    def read_start(self, wanted: Round) -> bytes:
        """What the round starts from; raises as `read_start`."""
        return read_start(self._state.directory, wanted)

    def _memory_of(self, current: Round) -> bytes | None:
        """What the server optimizer remembers."""
        if current.memory_file is None:
            return None
        path = self._state.directory / current.memory_file
        return _read(path, "what the server optimizer remembers")

    def _contribution(self, current: Round, update: Update) -> Contribution:
        directory = self._state.directory
        given = Contribution(
            device=update.device,
            path=directory / update.file,
            tokens=update.tokens,
            manifest=self._manifest_of(update),
        )
        if update.round == current.number:
            return given
        began = self._state.round(update.round)
        if began is None or began.generalist_sha256 == current.generalist_sha256:
            return given
        start = directory / began.generalist_file
        try:
            read_start(directory, began)
        except AdapterError as error:
            raise DamagedUpdateError(given, start) from error
        return replace(given, began=start, staleness=current.done - began.done)

    def _manifest_of(self, update: Update) -> manifest_pb2.Manifest:
        manifest = self._manifests.get(update.contract_sha256)
        if manifest is None:
            raise AggregationError("an update was made with a bundle that is not served any more")
        return manifest


def read_start(directory: Path, wanted: Round) -> bytes:
    """The generalist that a round starts from, out of the state directory.

    Raises:
        AdapterError: it is missing, or not what was stored.
        StorageError: it cannot be read now.
    """
    path = directory / wanted.generalist_file
    payload = _read(path, f"the generalist of round {wanted.number}")
    if hashlib.sha256(payload).hexdigest() != wanted.generalist_sha256:
        raise AdapterError(
            f"{path}, the generalist of round {wanted.number}, is damaged: it does not match "
            "its SHA-256; restore the state directory from a copy"
        )
    return payload


def _read(path: Path, what: str) -> bytes:
    """
    Raises:
        AdapterError: there is no such file.
        StorageError: it cannot be read now.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError(
            f"{path}, {what}, is missing; restore the state directory from a copy"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}, {what}: {error.strerror}") from error
