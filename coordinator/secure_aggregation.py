"""The coordinator's part in secure aggregation: it passes messages on and learns the sum.

A round's updates are masked; `edge_runtime/secure_aggregation.py` has the devices' part and
`protos/coordinator.proto` the messages. Everything that devices say is durable before they are
answered, and who is summed up is durable before anyone is asked to sign it, so a coordinator that
is killed goes on where it was and never tells of other survivors.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography import x509

from coordinator.aggregation import AggregationError
from coordinator.aggregation.updates import Flat, is_lost
from coordinator.neighbours import enough_signers, graph_for, least_devices
from coordinator.restoring import Restored, Shared, restore
from coordinator.state import State
from coordinator.tables import (
    Device,
    MaskingGroup,
    MaskingMember,
    MaskingStage,
    MaskingStanding,
    MaskingStep,
    Update,
)
from edge_runtime import masking, shamir
from edge_runtime.errors import StorageError
from edge_runtime.neighbours import Graph
from edge_runtime.quantization import Grid, Integers, Residues, grid_for, signed
from edge_runtime.secure_aggregation import (
    COUNTERS,
    LEAST_DEVICES,
    LEAST_SIGMA,
    MOST_DEVICES,
    Signer,
    agreement,
    bitmap,
    members_of,
    noise_share,
    numbered,
    pair,
    payload_numbers,
    quorum,
    task_sha256,
    verify,
)
from protos import coordinator_pb2 as pb

# The bound of a coordinate where no norm is clipped. A generalist's numbers are smaller, and so is
# what AdamW makes of them in a round.
COORDINATE_BOUND = 1.0
STAGE_SECONDS = 60.0
STAYING = 0.75
# In a sparse group it takes a look at all to see whether enough is revealed: after every so many.
LOOK_EVERY = 16
FALSE_SHARES = "most shares of others' secrets that it revealed are false"
# Without its file, whose name has the device in it: the page and traces name none.
LOST_STEP = "a masked step was lost or damaged after it had been accepted"
FALSE_DEAL = "the shares of its own secrets that it dealt out are false"
_SEALED_BYTES = masking.NONCE_BYTES + 2 * shamir.SHARE_BYTES + 16
_COMMITMENT_BYTES = 32
_LAST_STAGES = (MaskingStage.AGREE, MaskingStage.UNMASK)


class RefusedStepError(Exception):
    """A device's step is not what was asked for; the message is one line that says why."""


class LostSecretError(AggregationError):
    """The sum is not to be had: what was revealed does not give every secret."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        """
        Args:
            faults: device -> what it did.
        """
        super().__init__(
            "shares of the masks are false or missing; shares_refused says whose, if that is known"
        )
        self.faults = faults


class AnotherTaskError(Exception):
    """A device has trained something else than the round is of by now; a check-in tells what."""


@dataclass(frozen=True)
class Masking:
    """How rounds are masked."""

    staying: float
    """Share of a group, more than a half, that has to stay until the sum is known."""
    stage_seconds: float
    """The longest that one of the stages after training takes."""
    min_devices: int
    clip_norm: float | None
    noise_multiplier: float
    """0: no differential privacy."""
    divisor: int | None = None
    """With differential privacy: what makes a mean of the sum, however many reported."""

    def __str__(self) -> str:
        return f"{self.staying:.0%} have to stay, {self.stage_seconds:g} s a stage"

    def least(self, devices: int) -> int:
        """Fewest of `devices` that are summed up."""
        return max(least_devices(devices, self.staying), self.min_devices, LEAST_DEVICES)

    def terms(self, devices: int) -> tuple[Graph, pb.MaskingGroup]:
        """For a group of so many; what all of them are told.

        Raises:
            ValueError: they are too many.
        """
        if devices > MOST_DEVICES:
            raise ValueError(f"a group has at most {MOST_DEVICES} devices; select fewer")
        graph = graph_for(devices, self.staying)
        least = self.least(devices)
        share = noise_share(self.noise_multiplier, least)
        grid = grid_for(self.clip_norm or COORDINATE_BOUND, devices, share * math.sqrt(devices))
        if 0 < share * grid.levels < LEAST_SIGMA:
            raise ValueError(
                f"each device's share of the noise is less than {LEAST_SIGMA:g} units of the "
                "grid; raise --dp-noise, or select fewer devices"
            )
        return graph, pb.MaskingGroup(
            threshold=graph.threshold,
            devices=devices,
            least_devices=least,
            quantization=pb.Quantization(
                bound=grid.bound,
                levels=grid.levels,
                clip_norm=self.clip_norm is not None,
                noise_multiplier=self.noise_multiplier,
            ),
        )


@dataclass(frozen=True)
class Sum:
    """What the coordinator learns in a round."""

    total: Flat
    """Of the steps, (D,)."""
    divisor: int
    """What makes a mean of it."""
    clipped: int
    """Steps whose norm was clipped; 0 with differential privacy, which does not count them."""
    clipped_coordinates: int
    """Likewise."""
    faults: Mapping[str, str]
    """Device -> what it did all the same to keep the sum from being known."""


class SecureAggregation:
    """Secure aggregation of one coordinator's rounds, of which one is open at a time."""

    def __init__(
        self,
        *,
        state: State,
        masking: Masking,
        training: pb.TrainingConfig,
        size: int,
        authority: x509.Certificate,
    ) -> None:
        """
        Args:
            training: as devices are told of it.
            size: D, coordinates of a step.
            authority: that certified the devices.
        """
        self._state = state
        self._masking = masking
        self._training = training
        self._size = size
        self._authority = authority
        self._history = state.history()
        # The stage, as round and name, and when it ends by the monotonic clock.
        self._clock: tuple[tuple[int, str], float] = ((0, ""), 0.0)
        # Of the open round; what does not change any more.
        self._keys: tuple[int, dict[int, bytes]] = (0, {})
        self._members: tuple[int, bytes] = (0, b"")
        self._settled: tuple[int, tuple[set[int], set[int]]] = (0, (set(), set()))
        self._inboxes: tuple[int, dict[int, pb.IncomingShares]] = (0, {})
        self._agreement: tuple[int, bytes] = (0, b"")
        # As many of its agreements as it takes to be believed; none before there are as many.
        self._agreed: tuple[int, list[pb.Agreement]] = (0, [])
        # A round, and how many had revealed shares when these did not give every secret.
        self._short = (0, 0)

    # The course of a round

    def advertised(self, number: int) -> set[str]:
        """Devices that have advertised keys for the round, and so have trained."""
        return set(self._state.masking_numbers(number))

    def settle(self, number: int, devices: set[str]) -> None:
        """Makes `devices`, which have advertised keys, the round's group.

        Raises:
            AggregationError: they are too many.
        """
        divisor = self._masking.divisor
        if divisor is not None and len(devices) > divisor:  # from before it was started otherwise
            raise AggregationError(
                f"{len(devices)} devices have trained, and steps are divided by {divisor}"
            )
        try:
            graph, terms = self._masking.terms(len(devices))
        except ValueError as error:
            raise AggregationError(str(error)) from error
        order = sorted(devices)
        random.SystemRandom().shuffle(order)
        self._state.settle(
            number,
            {device: index for index, device in enumerate(order, 1)},
            degree=graph.degree,
            terms=terms.SerializeToString(),
            divisor=divisor,
        )

    def fits(self, number: int, group: MaskingGroup | None) -> bool:
        """Whether the open round's steps are still to be made, bounded and noised as they were.

        Args:
            group: once it is settled, when all have been made.
        """
        said = (pb.KeyAdvertisement.FromString(m.keys) for m in self._state.masking_members(number))
        tasks = {keys.task_sha256 for keys in said}
        if group is None:
            return not tasks - {self._task(number)}
        if b"" in tasks:  # of version 4 of the protocol, with other masks
            return False
        terms = pb.MaskingGroup.FromString(group.terms)
        try:
            now = self._masking.terms(terms.devices)[1]
        except ValueError:
            return False
        return terms.quantization == now.quantization

    def seconds_left(self, group: MaskingGroup) -> float:
        """Until the end of the present stage, at least 0. Its time begins anew with a restart:
        nobody could report while the coordinator was down."""
        stage = (group.round, group.stage)
        if self._clock[0] != stage:
            self._clock = stage, time.monotonic() + self._masking.stage_seconds
        return max(0.0, self._clock[1] - time.monotonic())

    def start_clock(self) -> None:
        """Gives the present stage its time again."""
        self._clock = (0, ""), 0.0

    def advance(self, group: MaskingGroup, gone: set[str]) -> bool:
        """Ends the present stage if it is over, or the deadline has passed. Returns whether.

        Args:
            gone: devices that are not waited for.

        Raises:
            AggregationError: too few devices are left; nothing can be learnt of their steps.
        """
        due = not self.seconds_left(group)
        if not due and self._surely_waits(group, len(gone)):
            return False
        match group.stage:
            case MaskingStage.SHARE:
                return self._end_sharing(group, gone, due)
            case MaskingStage.MASK:
                return self._end_masking(group, gone, due)
            case MaskingStage.AGREE:
                return self._end_agreeing(group, gone, due)
        return False

    def _end_sharing(self, group: MaskingGroup, gone: set[str], due: bool) -> bool:
        number = group.round
        members = _numbered(self._state.masking_numbers(number))
        sharers = _numbered(self._state.masking_numbers(number, said="shares"))
        if not due and members.keys() - gone - sharers.keys():
            return False
        least = pb.MaskingGroup.FromString(group.terms).least_devices
        _require(len(sharers), least, "shared their secrets")
        self._state.set_masking_stage(number, MaskingStage.MASK)
        return True

    def _end_masking(self, group: MaskingGroup, gone: set[str], due: bool) -> bool:
        number = group.round
        sharers = _numbered(self._state.masking_numbers(number, said="shares"))
        summed = {update.device for update in self._state.updates(number)}
        if not due and sharers.keys() - gone - summed:
            return False
        least = pb.MaskingGroup.FromString(group.terms).least_devices
        _require(len(summed), least, "sent their masked steps")
        numbers = {sharers[device] for device in summed}
        if not _graph(group).can_unmask(numbers, set(sharers.values()) - numbers):
            raise AggregationError("too many neighbours of one device dropped out")
        self._state.set_masking_stage(number, MaskingStage.AGREE)
        return True

    def _end_agreeing(self, group: MaskingGroup, gone: set[str], due: bool) -> bool:
        """As soon as enough have agreed. Others can still do so while shares are revealed."""
        number, graph = group.round, _graph(group)
        agreed = _numbered(self._state.masking_numbers(number, said="agreed"))
        summed = {update.device for update in self._state.updates(number)}
        over = due or not summed - gone - agreed.keys()
        enough = len(agreed) >= _quorum(group)
        if not enough or not graph.binds(agreed.values()):
            if over:
                raise AggregationError(
                    f"{len(agreed)} of {len(summed)} devices stayed to confirm who is summed up, "
                    "which is too few"
                )
            return False
        # From here on the sum can be known, whatever becomes of the round.
        noise = pb.MaskingGroup.FromString(group.terms).quantization.noise_multiplier
        self._state.set_masking_stage(number, MaskingStage.UNMASK, noise=noise)
        return True

    def _surely_waits(self, group: MaskingGroup, gone: int) -> bool:
        """Whether more are missing in the present stage than are not waited for: a quick look."""
        number, shared = group.round, self._state.count_masking(group.round, said="shares")
        if group.stage == MaskingStage.SHARE:
            return shared + gone < self._state.count_masking(number)
        if group.stage == MaskingStage.MASK:
            return self._state.count_updates(number) + gone < shared
        agreed = self._state.count_masking(number, said="agreed")
        return agreed + gone < self._state.count_updates(number) and agreed < _quorum(group)

    def is_unmasked(self, group: MaskingGroup, gone: set[str]) -> bool:
        """Whether enough shares were revealed, in the last stage.

        Raises:
            AggregationError: they were not, and will not be.
        """
        if group.stage != MaskingStage.UNMASK:
            return False
        graph, due = _graph(group), not self.seconds_left(group)
        count = self._state.count_masking(group.round, said="revealed")
        if not due and count < graph.threshold:
            return False
        revealed = self._state.masking_numbers(group.round, said="revealed")
        over = self._is_over(group, gone, revealed)
        if not over and (
            self._short == (group.round, count) or (not graph.is_complete and count % LOOK_EVERY)
        ):
            return False
        if self._ends(group)[0] <= graph.covered(_numbered(revealed).values()):
            return True
        if over:
            raise AggregationError(
                f"{len(revealed)} of {self._state.count_updates(group.round)} devices stayed to "
                "reveal shares of the masks, which is too few"
            )
        return False

    def may_get_more(self, group: MaskingGroup, gone: set[str]) -> bool:
        """Whether more shares may be revealed than the last sum had, in the last stage, or were
        since."""
        revealed = self._state.masking_numbers(group.round, said="revealed")
        more = self._short != (group.round, len(revealed))
        return more or not self._is_over(group, gone, revealed)

    def _is_over(
        self, group: MaskingGroup, gone: set[str], revealed: Mapping[str, int | None]
    ) -> bool:
        summed = {update.device for update in self._state.updates(group.round)}
        return not (self.seconds_left(group) and summed - gone - revealed.keys())

    def total(self, number: int, updates: list[Update]) -> Sum:
        """The sum of the steps behind `updates`, all of the round's, without their masks.

        Only sums are ever unmasked: masks are taken from the total of all masked steps.

        Raises:
            LostSecretError: what was revealed is not what was shared.
            AggregationError: a step's file is not what was accepted. No sum without it can be
                unmasked.
        """
        group = self._state.masking_group(number)
        if group is None:
            raise AggregationError("it was ended while its steps were summed up")
        graph = _graph(group)
        terms = pb.MaskingGroup.FromString(group.terms)
        members = {
            m.number: m for m in self._state.masking_members(number) if m.number and m.shares
        }
        by_device = {member.device: index for index, member in members.items()}
        if any(update.device not in by_device for update in updates):
            raise AggregationError("it was ended while its steps were summed up")
        summed = {by_device[update.device] for update in updates}
        restored = self._restored(number, members, summed, graph)
        numbers = payload_numbers(self._size, terms.quantization)
        total = np.zeros(numbers, np.uint32)
        for update in updates:
            total += self._masked_step(update, numbers)
        for index, member in members.items():
            secret = restored.secrets[index]
            if index in summed:
                total -= masking.expand(secret, numbers)
                continue
            advertised = pb.KeyAdvertisement.FromString(member.keys)
            # What its neighbours added for it, it would have taken away.
            near = {
                other: pb.KeyAdvertisement.FromString(members[other].keys)
                for other in summed.intersection(graph.neighbours(index))
            }
            pairwise = {
                other: masking.agree(
                    secret, keys.mask_key, pair(number, {index: advertised, other: keys})
                )
                for other, keys in near.items()
            }
            masking.add_masks(total, pairwise=pairwise, index=index)
        faults = {members[index].device: FALSE_SHARES for index in restored.liars}
        divisor = group.divisor or len(updates)
        return self._sum(signed(total), divisor, terms.quantization, faults)

    def _restored(
        self, number: int, members: Mapping[int, MaskingMember], summed: set[int], graph: Graph
    ) -> Restored:
        """The seeds of those who are `summed`, and the keys of the other members.

        Raises:
            LostSecretError: one is not to be had.
        """
        told = {
            holder: pb.RevealedShares.FromString(member.revealed)
            for holder, member in members.items()
            if member.revealed is not None
        }
        restored = restore(_shared(members, summed, told, graph), graph.threshold)
        if restored.lost:
            self._short = number, len(told)
            dealers = {members[index].device: FALSE_DEAL for index in restored.dealers}
            liars = {members[index].device: FALSE_SHARES for index in restored.liars}
            raise LostSecretError(dealers | liars)
        return restored

    def _masked_step(self, update: Update, numbers: int) -> Residues:
        try:
            content = (self._state.directory / update.file).read_bytes()
        except OSError as error:
            if is_lost(error):
                raise AggregationError(LOST_STEP) from error
            raise StorageError(f"cannot read {update.file}: {error.strerror}") from error
        if len(content) != 4 * numbers or hashlib.sha256(content).digest() != update.sha256:
            raise AggregationError(LOST_STEP)
        return np.frombuffer(content, "<u4").astype(np.uint32, copy=False)

    def _sum(
        self,
        total: Integers,
        divisor: int,
        quantization: pb.Quantization,
        faults: Mapping[str, str],
    ) -> Sum:
        grid = Grid(quantization.bound, quantization.levels)
        coordinates, clipped = 0, 0
        if not quantization.noise_multiplier:
            coordinates, clipped = total[-COUNTERS:].tolist()
        return Sum(
            total=total[: self._size].astype(np.float64) * grid.unit,
            divisor=divisor,
            clipped=clipped,
            clipped_coordinates=coordinates,
            faults=faults,
        )

    # What devices say

    def check_upload(self, device: str, number: int, total_bytes: int) -> str | None:
        """Why a masked step of `device` cannot count now; None if it can."""
        group = self._state.masking_group(number)
        if group is None or group.stage == MaskingStage.SHARE:
            return "no masked steps are asked for yet"
        standing = self._state.masking_standing(number, device)
        if standing is None or not standing.shared:
            return "this device shared no secrets in this round"
        if group.stage != MaskingStage.MASK:
            return "the masked step came too late: the round goes on without it"
        terms = pb.MaskingGroup.FromString(group.terms)
        expected = 4 * payload_numbers(self._size, terms.quantization)
        if total_bytes != expected:
            return f"a masked step has {expected} bytes, not {total_bytes}"
        return None

    def step(self, device: Device, request: pb.AggregateRequest) -> MaskingStep | None:
        """What is to be noted of what a participant of the open round says; None of what was noted
        before or comes too late.

        Raises:
            RefusedStepError: it is not what was asked for.
            AnotherTaskError: it is the keys of a device that was asked for something else.
        """
        number = request.round
        group = self._state.masking_group(number)
        said = request.WhichOneof("step")
        standing = self._state.masking_standing(number, device.id)
        request.DiscardUnknownFields()  # what is noted is told to other devices
        noted, content = False, b""
        if said == "keys" and group is None:
            self._check_keys(device, number, request.keys)
            content = request.keys.SerializeToString()
        elif said == "shares" and group is not None and group.stage == MaskingStage.SHARE:
            noted = self._check_shares(standing, group, request.shares).shared
            content = request.shares.SerializeToString(deterministic=True)
        elif said == "agreed" and group is not None and group.stage in _LAST_STAGES:
            noted = self._check_agreed(device, standing, group, request.agreed).agreed
            content = request.agreed.signature
        elif said == "revealed" and group is not None and group.stage == MaskingStage.UNMASK:
            noted = self._check_revealed(device, standing, group, request.revealed).revealed
            content = request.revealed.SerializeToString(deterministic=True)
        else:
            return None
        if noted:
            return None
        return MaskingStep(number, device.id, said, content, first=standing is None)

    def answer(self, device: str, request: pb.AggregateRequest) -> pb.AggregateReply:
        """What a participant of the open round is to do next."""
        number = request.round
        group = self._state.masking_group(number)
        standing = self._state.masking_standing(number, device)
        if group is None:
            if standing is not None:
                return pb.AggregateReply(wait=pb.AggregateWait())
            return over("this device has advertised no keys")
        if standing is None:
            return over(f"round {number} goes on without this device: its keys came too late")
        index = standing.number
        assert index is not None, "the group is settled"
        if request.HasField("keys") and not self._has_keys(number, index, request.keys):
            return over(f"round {number} goes on with other keys of this device")
        return self._next(device, index, standing, group)

    def _next(
        self, device: str, index: int, standing: MaskingStanding, group: MaskingGroup
    ) -> pb.AggregateReply:
        """What a member of a settled group is to do in the present stage."""
        number = group.round
        wait = pb.AggregateReply(wait=pb.AggregateWait())
        lost = f"round {number} goes on without this device"
        if group.stage == MaskingStage.SHARE:
            return wait if standing.shared else pb.AggregateReply(share=self._seen_by(group, index))
        if not standing.shared:
            return over(f"{lost}: its shares came too late")
        masked = self._state.update(number, device) is not None
        if group.stage == MaskingStage.MASK:
            return wait if masked else pb.AggregateReply(mask=self._inbox(group, index))
        if not masked:
            return over(f"{lost}: its step came too late")
        if standing.revealed:
            return over()
        return self._last(standing, group)

    def _last(self, standing: MaskingStanding, group: MaskingGroup) -> pb.AggregateReply:
        """Likewise, once it is settled who is summed up: for one of these."""
        if not standing.agreed:
            return pb.AggregateReply(agree=self._survivors(group))
        if group.stage == MaskingStage.AGREE:
            return pb.AggregateReply(wait=pb.AggregateWait())
        return pb.AggregateReply(unmask=self._unmasking(group))

    # The inside

    def _check_keys(self, device: Device, number: int, keys: pb.KeyAdvertisement) -> None:
        if self._signer(number, keys).enrolment != device.enrolment:
            raise RefusedStepError("the keys are another device's")
        if keys.task_sha256 != self._task(number):
            raise AnotherTaskError(
                f"round {number} trains another generalist, or with other settings, by now"
            )

    def _task(self, number: int) -> bytes:
        """What the round's devices were given; empty if the round is gone."""
        row = self._state.round(number)
        return task_sha256(bytes.fromhex(row.generalist_sha256), self._training) if row else b""

    def _signer(self, number: int, keys: pb.KeyAdvertisement) -> Signer:
        try:
            return verify(keys, number, self._history, self._authority)
        except ValueError as error:
            raise RefusedStepError(str(error)) from error

    def _check_shares(
        self, standing: MaskingStanding | None, group: MaskingGroup, shares: pb.OutgoingShares
    ) -> MaskingStanding:
        if standing is None or standing.number is None:
            raise RefusedStepError("this device is not in the round's group")
        receivers = [share.index for share in shares.shares]
        if sorted(receivers) != _graph(group).neighbours(standing.number):
            raise RefusedStepError("the shares are not one for each neighbour")
        if any(len(share.sealed) != _SEALED_BYTES for share in shares.shares):
            raise RefusedStepError(f"a sealed share has {_SEALED_BYTES} bytes")
        if len(shares.commitment) != _COMMITMENT_BYTES:
            raise RefusedStepError(f"a commitment has {_COMMITMENT_BYTES} bytes")
        return standing

    def _check_agreed(
        self,
        device: Device,
        standing: MaskingStanding | None,
        group: MaskingGroup,
        agreed: pb.Agreement,
    ) -> MaskingStanding:
        reported = self._state.update(group.round, device.id) is not None
        if standing is None or standing.number is None or not reported:
            raise RefusedStepError("this device was not asked who is summed up")
        keys = pb.KeyAdvertisement.FromString(self._keys_of(group.round)[standing.number])
        signer = self._signer(group.round, keys)
        told = numbered(self._what_is_agreed(group), standing.number)
        signed = signer.has_signed(told, agreed.signature)
        if agreed.index != standing.number or not signed:
            raise RefusedStepError("the signature is not of what this device was told")
        return standing

    def _check_revealed(
        self,
        device: Device,
        standing: MaskingStanding | None,
        group: MaskingGroup,
        revealed: pb.RevealedShares,
    ) -> MaskingStanding:
        reported = self._state.update(group.round, device.id) is not None
        if standing is None or standing.number is None or not reported:
            raise RefusedStepError("this device was not asked to reveal anything")
        if not standing.agreed:
            raise RefusedStepError("this device has not confirmed who is summed up")
        sharers, summed = self._ends(group)
        near = sharers & {standing.number, *_graph(group).neighbours(standing.number)}
        for shares, numbers in ((revealed.seeds, near & summed), (revealed.keys, near - summed)):
            told = [share.index for share in shares]
            if len(set(told)) != len(told) or not set(told) <= numbers:
                raise RefusedStepError("shares were revealed that were not asked for")
            if any(len(share.share) != shamir.SHARE_BYTES for share in shares):
                raise RefusedStepError(f"a share has {shamir.SHARE_BYTES} bytes")
        return standing

    def _keys_of(self, number: int) -> dict[int, bytes]:
        """Number -> KeyAdvertisement of a settled group."""
        if self._keys[0] != number:
            members = self._state.masking_members(number)
            self._keys = number, {m.number: m.keys for m in members if m.number}
        return self._keys[1]

    def _members_of(self, number: int) -> bytes:
        """Of a settled group."""
        if self._members[0] != number:
            keys = sorted(self._keys_of(number).items())
            told = (pb.KeyAdvertisement.FromString(each) for _, each in keys)
            self._members = number, members_of(told)
        return self._members[1]

    def _has_keys(self, number: int, index: int, keys: pb.KeyAdvertisement) -> bool:
        known = pb.KeyAdvertisement.FromString(self._keys_of(number)[index])
        return (known.encryption_key, known.mask_key) == (keys.encryption_key, keys.mask_key)

    def _seen_by(self, group: MaskingGroup, index: int) -> pb.MaskingGroup:
        seen = pb.MaskingGroup.FromString(group.terms)
        seen.index = index
        keys = self._keys_of(group.round)
        if not _graph(group).is_complete:
            seen.members = self._members_of(group.round)
        for other in _graph(group).neighbours(index):
            neighbour = seen.neighbours.add(index=other)
            neighbour.keys.ParseFromString(keys[other])
        return seen

    def _inbox(self, group: MaskingGroup, index: int) -> pb.IncomingShares:
        """What was sent to a device, after the stage in which it was."""
        if self._inboxes[0] != group.round:
            inboxes: dict[int, pb.IncomingShares] = {}
            for member in self._state.masking_members(group.round):
                if member.number is None or member.shares is None:
                    continue
                for share in pb.OutgoingShares.FromString(member.shares).shares:
                    inbox = inboxes.setdefault(share.index, pb.IncomingShares())
                    inbox.shares.add(index=member.number, sealed=share.sealed)
            self._inboxes = group.round, inboxes
        return self._inboxes[1].get(index, pb.IncomingShares())

    def _survivors(self, group: MaskingGroup) -> pb.Survivors:
        """What all are told."""
        sharers, summed = self._ends(group)
        devices = _graph(group).devices
        return pb.Survivors(
            summed=bitmap(summed, devices), dropped=bitmap(sharers - summed, devices)
        )

    def _what_is_agreed(self, group: MaskingGroup) -> bytes:
        """What they sign."""
        if self._agreement[0] != group.round:
            terms = pb.MaskingGroup.FromString(group.terms)
            first = next(iter(self._keys_of(group.round).values()))
            task = pb.KeyAdvertisement.FromString(first).task_sha256  # all devices', once settled
            members, survivors = self._members_of(group.round), self._survivors(group)
            message = agreement(group.round, self._history, task, terms, members, survivors)
            self._agreement = group.round, message
        return self._agreement[1]

    def _unmasking(self, group: MaskingGroup) -> pb.Unmasking:
        """What a device has to see before it reveals anything; in the last stage."""
        if self._agreed[0] != group.round:
            signatures = self._state.agreements(group.round)
            agreed = [
                pb.Agreement(index=number, signature=signatures[number])
                for number in enough_signers(_graph(group), signatures, _quorum(group))
            ]
            if not _graph(group).is_complete:
                keys = self._keys_of(group.round)
                for each in agreed:
                    advertised = pb.KeyAdvertisement.FromString(keys[each.index])
                    each.certificate = advertised.certificate
            self._agreed = group.round, agreed
        return pb.Unmasking(agreed=self._agreed[1])

    def _ends(self, group: MaskingGroup) -> tuple[set[int], set[int]]:
        """Numbers of those who shared their secrets, and of those who are summed up; in the last
        stages, when neither changes any more."""
        if self._settled[0] != group.round:
            sharers = _numbered(self._state.masking_numbers(group.round, said="shares"))
            summed = {sharers[update.device] for update in self._state.updates(group.round)}
            self._settled = group.round, (set(sharers.values()), summed)
        return self._settled[1]


def over(reason: str = "") -> pb.AggregateReply:
    """There is nothing more for the device to do in the round."""
    return pb.AggregateReply(over=pb.AggregateOver(reason=reason))


def _graph(group: MaskingGroup) -> Graph:
    terms = pb.MaskingGroup.FromString(group.terms)
    return Graph(terms.devices, group.degree, terms.threshold)


def _quorum(group: MaskingGroup) -> int:
    terms = pb.MaskingGroup.FromString(group.terms)
    return quorum(terms, complete=_graph(group).is_complete)


def _numbered(numbers: Mapping[str, int | None]) -> dict[str, int]:
    return {device: number for device, number in numbers.items() if number is not None}


def _require(have: int, least: int, did: str) -> None:
    if have < least:
        raise AggregationError(f"{have} devices {did}, and {least} are needed")


def _shared(
    members: Mapping[int, MaskingMember],
    summed: set[int],
    told: Mapping[int, pb.RevealedShares],
    graph: Graph,
) -> dict[int, Shared]:
    """Whose seed or key -> what was revealed of it.

    Args:
        told: by holder.
    """
    seeds: dict[int, dict[int, bytes]] = {}
    keys: dict[int, dict[int, bytes]] = {}
    for holder, revealed in told.items():
        for share in revealed.seeds:
            seeds.setdefault(share.index, {})[holder] = share.share
        for share in revealed.keys:
            keys.setdefault(share.index, {})[holder] = share.share
    shared = {}
    for index, member in members.items():
        asked = told.keys() & {index, *graph.neighbours(index)}
        if index in summed:
            commitment = pb.OutgoingShares.FromString(member.shares or b"").commitment
            is_right = functools.partial(_is_committed_to, commitment)
            shared[index] = Shared(seeds.get(index, {}), asked, is_right)
        else:
            public = pb.KeyAdvertisement.FromString(member.keys).mask_key
            is_right = functools.partial(_is_private_of, public)
            shared[index] = Shared(keys.get(index, {}), asked, is_right)
    return shared


def _is_committed_to(commitment: bytes, seed: bytes) -> bool:
    return masking.commitment(seed) == commitment


def _is_private_of(public: bytes, key: bytes) -> bool:
    return masking.public_key(key) == public
