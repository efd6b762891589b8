"""Cohorts: devices that share a generalist, and its rounds.

Bundles of one contract share a generalist, whatever their tiers. So do, with mixed ranks, bundles
of one family; their generalist has the largest rank, and each device gets it at its own. Other
bundles are cohorts of their own, with rounds of their own. An operator may also name further
cohorts of the same bundles.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from coordinator.aggregation.ranks import fit_generalist
from coordinator.aggregation.updates import Layout
from coordinator.policy import Counting
from coordinator.rounds import Rounds
from coordinator.state import FITTED, State
from coordinator.tables import Device, Round
from edge_runtime import wire
from edge_runtime.bundle import Bundle, contract_sha256, family_sha256
from edge_runtime.errors import BundleError
from edge_runtime.files import write_atomic
from protos import manifest_pb2 as pb

UNNAMED = "default"


class CohortsError(Exception):
    """Cohorts that cannot be; the message is one line that says why."""


@dataclass(frozen=True)
class Group:
    """A cohort before it runs."""

    name: str
    bundles: tuple[Bundle, ...]
    """The first has the generalist's rank, which is the largest."""

    @property
    def contract_sha256(self) -> str:
        return contract_sha256(self.bundles[0].manifest)


def name_of(manifest: pb.Manifest) -> str:
    """Of the cohort of a bundle: its base's, in letters that a file's name may have."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", PurePath(manifest.base.name).name)
    return name.strip(".-")[:64] or UNNAMED


def group(
    bundles: Sequence[Bundle],
    *,
    mixed: bool,
    known: Mapping[str, str],
    names: Sequence[str],
) -> list[Group]:
    """The cohorts of `bundles`, the first of each kind being where its devices are by default.

    Args:
        mixed: whether bundles of different ranks may share a generalist.
        known: cohorts that have begun -> the contracts of their generalists.
        names: of further cohorts, if all bundles share one generalist.

    Raises:
        BundleError: a bundle cannot share its generalist between ranks, or a cohort that has begun
            is not among these.
        CohortsError: there are further cohorts, and the bundles share no generalist.
    """
    kinds: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        key = family_sha256(bundle.manifest) if mixed else contract_sha256(bundle.manifest)
        kinds.setdefault(key, []).append(bundle)
    if names and len(kinds) > 1:
        raise CohortsError(
            "--cohort divides the devices of one generalist, and these bundles have "
            f"{len(kinds)}; leave it out, or serve bundles that share one"
        )
    groups: dict[str, Group] = {}
    for same in kinds.values():
        ordered = tuple(sorted(same, key=lambda bundle: _precedence(bundle, known)))
        contract = contract_sha256(ordered[0].manifest)
        own = [name for name, theirs in known.items() if theirs == contract]
        default = _free_name(name_of(ordered[0].manifest), contract, known, groups)
        for name in dict.fromkeys([default, *own, *names]):
            if known.get(name, contract) == contract:
                groups[name] = Group(name, ordered)
    if missing := sorted(known.keys() - groups.keys()):
        raise BundleError(
            f"cohort {missing[0]} of the state began with a bundle of another base, shared tensors "
            "or largest rank; serve such a bundle, too, or choose another --state"
        )
    return list(groups.values())


def _precedence(bundle: Bundle, known: Mapping[str, str]) -> tuple[int, bool]:
    """Sorts first what the generalist is made by: of the largest rank the one that it began with,
    since those of one rank may differ in alpha and be given in another order."""
    begun = contract_sha256(bundle.manifest) in known.values()
    return -bundle.manifest.mixture.rank, not begun


def _free_name(wanted: str, contract: str, known: Mapping[str, str], taken: Iterable[str]) -> str:
    """`wanted`, or with a number if that is another bundle's."""
    name, number = wanted, 2
    while known.get(name, contract) != contract or name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name


class Cohort:
    """A cohort that runs."""

    def __init__(self, group: Group, *, state: State, counting: Counting) -> None:
        """
        Args:
            counting: its Rounds, or what stands for them at a coordinator that follows.
        """
        self.name = group.name
        self.state = state
        self.counting = counting
        self.manifest = group.bundles[0].manifest
        """That of the generalist."""
        self.manifests = manifests_of(group)
        self.most_bytes = {
            contract: wire.max_bytes(manifest) for contract, manifest in self.manifests.items()
        }
        """Contract -> size of the largest update that an honest device sends."""
        self._digests: dict[Path, bytes] = {}
        self._fitting = threading.Lock()

    @property
    def rounds(self) -> Rounds:
        """Only the coordinator that leads has them."""
        assert isinstance(self.counting, Rounds)
        return self.counting

    def manifest_of(self, device: Device) -> pb.Manifest:
        """Of the device's bundle."""
        return self.manifests[device.contract_sha256]

    async def generalist(self, device: Device, wanted: Round) -> tuple[Path, bytes]:
        """File with what `device` gets as the generalist of a round, and its SHA-256.

        Raises:
            StorageError: it cannot be written.
        """
        return await asyncio.to_thread(self.fitted, device, wanted)

    def fitted(self, device: Device, wanted: Round) -> tuple[Path, bytes]:
        """Likewise, for a thread."""
        manifest = self.manifest_of(device)
        path = self.state.directory / wanted.generalist_file
        if manifest is self.manifest:
            return path, bytes.fromhex(wanted.generalist_sha256)
        start = self.fitted_as(device.contract_sha256)
        fitted = self.state.directory / FITTED / f"{start}{wanted.generalist_sha256}.safetensors"
        with self._fitting:  # once, however many ask for it
            if fitted not in self._digests or not fitted.exists():
                self._digests[fitted] = self._fit(path, manifest, fitted)
            return fitted, self._digests[fitted]

    def fitted_as(self, contract: str) -> str:
        """How the names of the files begin that have the generalist as a bundle wants it."""
        return f"{self.name}-{contract[:16]}-"

    def _fit(self, path: Path, manifest: pb.Manifest, fitted: Path) -> bytes:
        """Writes the generalist at another rank. Those of earlier rounds go, until asked for."""
        vectors = wire.decode(self.manifest, path.read_bytes())
        content = wire.encode(
            manifest, fit_generalist(vectors, Layout(self.manifest), Layout(manifest))
        )
        write_atomic(fitted, content)
        current = self.state.current().generalist_sha256
        for other in fitted.parent.glob(f"{fitted.name.rsplit('-', 1)[0]}-*"):
            if other != fitted and current not in other.name:
                other.unlink(missing_ok=True)
                self._digests.pop(other, None)
        return hashlib.sha256(content).digest()


def manifests_of(group: Group) -> dict[str, pb.Manifest]:
    """Contract -> manifest of the bundles of a cohort."""
    # In this order, so that of bundles with one contract the first stands for all.
    return {contract_sha256(b.manifest): b.manifest for b in reversed(group.bundles)}


class Cohorts:
    """All cohorts of one coordinator."""

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        self.all = tuple(cohorts)
        self._by_name = {cohort.name: cohort for cohort in cohorts}

    def clean(self) -> None:
        """Deletes generalists that were fitted to bundles that are not served any more."""
        starts = tuple(
            cohort.fitted_as(contract) for cohort in self.all for contract in cohort.manifests
        )
        for path in (self.all[0].state.directory / FITTED).glob("*.safetensors"):
            if not path.name.startswith(starts):
                path.unlink(missing_ok=True)

    def __getitem__(self, name: str) -> Cohort:
        """
        Raises:
            KeyError: there is none.
        """
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def of(self, device: Device) -> Cohort | None:
        """The cohort that a device is in, if it is still served, with the device's bundle."""
        cohort = self._by_name.get(device.cohort)
        if cohort is None or device.contract_sha256 not in cohort.manifests:
            return None
        return cohort

    def place(self, contract: str, name: str | None) -> Cohort | None:
        """Where a device with a bundle of `contract` belongs, in the cohort `name` if given.

        None: no such cohort is served with such a bundle.
        """
        for cohort in self.all:
            if contract in cohort.manifests and name in (None, cohort.name):
                return cohort
        return None

    def leave(self, device: str) -> None:
        """`device` was revoked or replaced."""
        for cohort in self.all:
            cohort.rounds.leave(device)
