"""A device's home directory: it survives a kill at any moment.

    HOME/device.json          who this device is: name, seed, bundle, engine
    HOME/state.safetensors    adapters, optimizer moments and counters, in one file
    HOME/identity.json        key and certificate for its coordinator (readable by the owner only)
    HOME/enrolment.json       the key of an enrolment that has not ended yet (likewise)
    HOME/download.partial     what has come of a generalist, while it is downloaded
    HOME/lock                 held by the process that trains

Every other file is replaced as a whole, so a reader sees the old one or the new one. The state
carries a SHA-256 of its content: a bit that flipped on a worn disk is found, not trained on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_runtime.adapters import load_fresh
from edge_runtime.bundle import Bundle, contract_sha256
from edge_runtime.compression import Feedback
from edge_runtime.errors import AdapterError, StorageError, VersionError
from edge_runtime.files import check_readable, remove_leftovers, storage_errors, write_atomic
from edge_runtime.training import TrainingState, new_state

if TYPE_CHECKING:
    from edge_runtime.identity import Identity

STATE_VERSION = 2

T = TypeVar("T")


@dataclass
class DeviceConfig:
    """Fixed when the home is made."""

    name: str
    seed: int
    bundle: str
    engine: str

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if type(value) is not (int if key == "seed" else str):
                raise TypeError(f"{key} is {value!r}")


@dataclass(frozen=True)
class Enrolment:
    """An enrolment that has begun: what must be the same when it is tried again."""

    invitation: str
    """SHA-256 (hex) of the invitation's token."""
    key: str = field(repr=False)
    """Private key, PEM: a secret."""


@dataclass
class Progress:
    """Where the device is in its round, beside what `TrainingState` holds."""

    round: int = 0  # round being trained, 0 before the first
    round_start: int = 0  # expert step at which it began
    schedule_start: int = 0  # expert step at which the first round began, had it taken part in all
    round_seconds: float = 0.0  # training time spent in it
    stopped: int = 0  # expert step at which the compute budget ended it, 0 while it has not
    task: str = ""  # `task_sha256` (hex) of what it began with
    uploaded: bool = False  # the coordinator has answered to its update
    finished: int = 0  # round whose generalist is in place as the final one, 0 before
    rounds_of: str = ""  # whose rounds these are: see `Device.take_part`
    compression: str = ""  # of the round's update, as `compression.NAMES` says; empty: none
    sending: int = 0  # tokens of the round's finished update, while that is compressed, else 0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (expert step, held-out loss)


class Home:
    """Reads and writes one home directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the home for one training process.

        Raises:
            StorageError: another process trains in this home.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("w")
        with file:
            with storage_errors(self.path / "lock"):  # of some networks' disks: there are no locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StorageError(
                        f"another process trains in {self.path}; stop it, or use another --home"
                    ) from None
            remove_leftovers(self.path)
            yield

    def config(self) -> DeviceConfig | None:
        return self._json("device.json", DeviceConfig)

    def save_config(self, config: DeviceConfig) -> None:
        self._save_json("device.json", asdict(config))

    def identity(self) -> Identity | None:
        """What proves this device to its coordinator; None before it enrolled.

        Raises:
            TrustError: the file is damaged.
            StorageError: it cannot be read.
        """
        from edge_runtime.identity import read_identity  # with cryptography, which takes a while

        return read_identity(self.path / "identity.json")

    def save_identity(self, identity: Identity) -> None:
        from edge_runtime.identity import write_identity

        write_identity(self.path / "identity.json", identity)
        (self.path / "enrolment.json").unlink(missing_ok=True)

    def enrolment(self) -> Enrolment | None:
        """The enrolment that was begun and has not ended."""
        return self._json("enrolment.json", Enrolment)

    def save_enrolment(self, enrolment: Enrolment) -> None:
        self._save_json("enrolment.json", asdict(enrolment))

    def state_modified(self) -> int:
        """Changes whenever a state is saved: modification time in ns, 0 before the first."""
        path = self.path / "state.safetensors"
        return path.stat().st_mtime_ns if path.exists() else 0

    def save_state(self, bundle: Bundle, state: TrainingState, progress: Progress) -> None:
        """Replaces the saved state.

        Raises:
            StorageError: the disk is full or not writable; the old state is intact.
        """
        arrays = {}
        for role, vector in state.vectors.items():
            arrays[f"{role}/value"] = vector
            arrays[f"{role}/first_moment"] = state.first_moment[role]
            arrays[f"{role}/second_moment"] = state.second_moment[role]
        if state.feedback is not None:
            arrays["incoming"] = state.feedback.incoming
            arrays["residual"] = state.feedback.residual
        metadata = {
            "version": STATE_VERSION,
            "contract": contract_sha256(bundle.manifest),
            "expert_steps": state.expert_steps,
            "router_steps": state.router_steps,
            "progress": asdict(progress),
        }
        text = json.dumps(metadata)
        content = save(arrays, metadata={"comigs": text, "sha256": _digest(text, arrays)})
        write_atomic(self.path / "state.safetensors", content)

    def load_state(self, bundle: Bundle) -> tuple[TrainingState, Progress]:
        """The saved state, or the bundle's fresh one if nothing was saved yet.

        Raises:
            AdapterError: the state is damaged or belongs to another bundle.
            StorageError: it cannot be read.
            VersionError: it was written by another version of comigs.
        """
        path = self.path / "state.safetensors"
        check_readable(path)
        if not path.exists():
            return new_state(bundle.manifest, load_fresh(bundle)), Progress()
        try:
            with safe_open(path, "np") as file:
                header = file.metadata()
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if header["sha256"] != _digest(header["comigs"], arrays):
                raise ValueError("its content does not match its SHA-256")
            metadata = json.loads(header["comigs"])
            return _state_of(bundle, path, metadata, arrays)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise AdapterError(
                f"{path} is damaged: {error}; restore it from a copy, or move it away to start "
                "from fresh adapters"
            ) from error

    def _json(self, name: str, kind: Callable[..., T]) -> T | None:
        path = self.path / name
        check_readable(path)
        if not path.exists():
            return None
        try:
            return kind(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, RecursionError, TypeError, ValueError) as error:
            raise AdapterError(f"{path} is damaged: {error}; restore it from a copy") from error

    def _save_json(self, name: str, value: dict[str, Any]) -> None:
        content = json.dumps(value, indent=2) + "\n"
        write_atomic(self.path / name, content.encode())


def _digest(metadata: str, arrays: dict[str, NDArray[Any]]) -> str:
    """SHA-256 (hex) of all that a state file says."""
    digest = hashlib.sha256(metadata.encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _state_of(
    bundle: Bundle, path: Path, metadata: dict[str, Any], arrays: dict[str, NDArray[Any]]
) -> tuple[TrainingState, Progress]:
    """What `Home.save_state` wrote to `path`.

    Raises:
        AdapterError: it belongs to another bundle.
        VersionError: it was written by another version of comigs.
    """
    if metadata["version"] != STATE_VERSION:
        raise VersionError(
            f"{path} is of version {metadata['version']}, and {STATE_VERSION} is understood here; "
            "use the version of comigs that wrote it, or another --home"
        )
    sizes = {role.name: role.size for role in bundle.manifest.roles}
    stored = {
        key.removesuffix("/value"): len(value)
        for key, value in arrays.items()
        if key.endswith("/value")
    }
    same_base = metadata["contract"] == contract_sha256(bundle.manifest)
    if stored != sizes or not same_base:
        raise AdapterError(
            f"{path} was made with another bundle than {bundle.path} (another base, rank, "
            "mixing or number of experts); use that bundle, or another --home"
        )
    # One by one: each is there twice meanwhile.
    writable = {key: np.array(arrays.pop(key), np.float32) for key in list(arrays)}
    state = TrainingState(
        vectors={role: writable[f"{role}/value"] for role in sizes},
        first_moment={role: writable[f"{role}/first_moment"] for role in sizes},
        second_moment={role: writable[f"{role}/second_moment"] for role in sizes},
        expert_steps=metadata["expert_steps"],
        router_steps=metadata["router_steps"],
    )
    if "residual" in writable:
        shared = sum(role.size for role in bundle.manifest.roles if role.shared)
        if not writable["residual"].shape == writable["incoming"].shape == (shared,):
            raise ValueError("its residual is of another size")
        state.feedback = Feedback(writable["incoming"], writable["residual"])
    progress = Progress(**metadata["progress"])
    progress.curve = [(int(step), float(loss)) for step, loss in progress.curve]
    return state, progress
