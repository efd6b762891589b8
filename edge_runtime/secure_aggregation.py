"""A device's part in secure aggregation; the messages are in protos/coordinator.proto.

The coordinator is held to the protocol as far as a device can see it: keys of others must be signed
by certified devices that were given the same task, the mask of a pair is bound to both ends as each
was told of them, it must take more than half of the holders of shares to restore a secret, of each
neighbour one secret at most is revealed, and that only once a quorum of devices has signed the same
set of survivors (Bonawitz et al. 2017, round 3 against active adversaries). All secrets are in
memory only and made for one round: a device that is killed has dropped out, and can reveal nothing
after.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from edge_runtime import masking, shamir
from edge_runtime.adapters import Vector
from edge_runtime.errors import RefusedError
from edge_runtime.identity import Identity, sign
from edge_runtime.neighbours import Graph
from edge_runtime.noise import discrete_gaussian
from edge_runtime.quantization import (
    TAIL,
    Grid,
    Integers,
    quantize,
    quantize_clipped,
    residues,
)
from protos import coordinator_pb2 as pb

LEAST_DEVICES = 3
"""With two, each knows the other's step from the sum."""
MOST_DEVICES = 2**13
"""More would be too much to look through for a small device."""
LEAST_SIGMA = 8.0
"""The sum of discrete Gaussians of this standard deviation or more is the discrete Gaussian of
their variances' sum but for a factor that differs from 1 by less than 1e-100 (Kairouz, Liu, Steinke
2021, arXiv 2102.06387, on sums of discrete Gaussians)."""
COUNTERS = 2
"""Numbers behind a step's coordinates: coordinates clipped, and whether its norm was."""
# What `cryptography` says of bytes that are none, or of another authority.
_NO_CERTIFICATE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
)
# Clocks of devices differ.
CLOCK_SKEW = datetime.timedelta(days=1)


class DistrustedError(RefusedError):
    """The coordinator does not keep to the protocol."""


@dataclass(frozen=True)
class Signer:
    """Whom a certificate is for."""

    enrolment: str
    key: ec.EllipticCurvePublicKey

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        try:
            self.key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


def task_sha256(generalist: bytes, training: pb.TrainingConfig) -> bytes:
    """What a device makes its step from, for others to compare with what they were given: who had
    another generalist or another training gives steps that can be told from the sum, or none
    (Pasquini et al. 2022, arXiv 2111.07380).

    Args:
        generalist: SHA-256 of the payload that was downloaded.
        training: as it came in the CheckInReply.
    """
    return hashlib.sha256(generalist + training.SerializeToString(deterministic=True)).digest()


def advertisement(
    identity: Identity, number: int, history: str, task: bytes, encryption: bytes, mask: bytes
) -> pb.KeyAdvertisement:
    """The public keys of a device, bound to its certificate, to round `number` of `history` and to
    its task."""
    certificate = x509.load_pem_x509_certificate(identity.certificate.encode())
    keys = pb.KeyAdvertisement(
        encryption_key=encryption,
        mask_key=mask,
        certificate=certificate.public_bytes(Encoding.DER),
        task_sha256=task,
    )
    keys.signature = sign(identity.key, _signed(number, history, keys))
    return keys


def verify(
    keys: pb.KeyAdvertisement, number: int, history: str, authority: x509.Certificate
) -> Signer:
    """The device that advertises `keys` for round `number` of `history`.

    Raises:
        ValueError: they are not signed by a device that `authority` certified; one line says why.
    """
    if not (masking.is_usable(keys.encryption_key) and masking.is_usable(keys.mask_key)):
        raise ValueError("keys have 32 bytes each, and are not of low order")
    if len(keys.task_sha256) != hashlib.sha256().digest_size:
        raise ValueError("keys come with the SHA-256 of a task")
    signer = certified(keys.certificate, authority)
    if not signer.has_signed(_signed(number, history, keys), keys.signature):
        raise ValueError("the keys are not signed for this round by whom they are from")
    return signer


def certified(der: bytes, authority: x509.Certificate) -> Signer:
    """The device that a certificate is for.

    Raises:
        ValueError: it is no device's of `authority`.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(authority)
        key = certificate.public_key()
        subject = certificate.subject
        (role,) = subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        (enrolment,) = subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    except _NO_CERTIFICATE as error:
        raise ValueError("the keys come without a certificate of this coordinator") from error
    if role.value != "device" or not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the keys come with a certificate that is not a device's")
    if datetime.datetime.now(datetime.UTC) > certificate.not_valid_after_utc + CLOCK_SKEW:
        raise ValueError("the keys come with a certificate that has lapsed")
    return Signer(str(enrolment.value), key)


def _signed(number: int, history: str, keys: pb.KeyAdvertisement) -> bytes:
    told = keys.encryption_key + keys.mask_key + keys.task_sha256
    return b"comigs masking keys" + struct.pack(">I", number) + told + history.encode()


def pair(number: int, ends: Mapping[int, pb.KeyAdvertisement]) -> bytes:
    """What the mask of a pair is for (`masking.agree`): a round, and the two devices under their
    numbers. So a key that one device copied from another makes masks that cancel with nobody's, and
    neither do those of devices that were told of different numbers.

    Args:
        ends: number -> keys, of two.
    """
    told = b"".join(
        struct.pack(">I", index)
        + keys.encryption_key
        + keys.mask_key
        + hashlib.sha256(keys.certificate).digest()
        for index, keys in sorted(ends.items())
    )
    return b"comigs pairwise mask" + struct.pack(">I", number) + told


def agreement(
    number: int,
    history: str,
    task: bytes,
    terms: pb.MaskingGroup,
    members: bytes,
    survivors: pb.Survivors,
) -> bytes:
    """What devices sign, each with its number (`numbered`): a SHA-256, of what
    protos/coordinator.proto has byte by byte.

    Args:
        task: as of `task_sha256`.
        terms: a group, whose `index`, `neighbours` and `members` are not looked at.
        members: of all its devices (`members_of`).
    """
    quantization = terms.quantization
    numbers = struct.pack(
        ">IIIIIdd?",
        *(number, terms.devices, terms.threshold, terms.least_devices, quantization.levels),
        *(quantization.bound, quantization.noise_multiplier, quantization.clip_norm),
    )
    sets = survivors.summed + survivors.dropped
    told = b"comigs survivors" + numbers + task + members + sets + history.encode()
    return hashlib.sha256(told).digest()


def numbered(agreed: bytes, index: int) -> bytes:
    """An agreement, and which number of the group signs it."""
    return agreed + struct.pack(">I", index)


def members_of(keys: Iterable[pb.KeyAdvertisement]) -> bytes:
    """A group's devices, in the order of their numbers, as MaskingGroup has them: 64 bytes each."""
    return b"".join(each.encryption_key + each.mask_key for each in keys)


def quorum(terms: pb.MaskingGroup, *, complete: bool) -> int:
    """How many devices have to sign the same survivors: more than half of them, so that there are
    no two sets of which that is true. A fifth of a sparse group may sign two, and of a complete one
    fewer than twice the threshold less all."""
    if complete:
        return terms.threshold
    return min(terms.least_devices, 3 * terms.devices // 5 + 1)


def bitmap(numbers: Iterable[int], devices: int) -> bytes:
    """Numbers from 1 to `devices`, as Survivors has them."""
    bits = np.zeros(devices, np.uint8)
    bits[np.array(sorted(numbers), np.int64) - 1] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def numbers_of(content: bytes, devices: int) -> set[int]:
    """The numbers of a bitmap.

    Raises:
        ValueError: it is none for so many.
    """
    bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
    if len(content) != -(-devices // 8) or bits[devices:].any():
        raise ValueError(f"no bitmap of {devices} devices")
    return set((np.flatnonzero(bits) + 1).tolist())


@dataclass(frozen=True)
class _Secrets:
    """Of one device in one round; each has 32 bytes."""

    encryption: bytes
    mask: bytes
    """Pairwise masks come from it."""
    own: bytes
    """Seed of the mask of its own."""


class Session:
    """One device in one round. Methods are called in their order, each with what the coordinator
    sent; with the same once more they give the same again.

    Every method raises DistrustedError if the coordinator does not keep to the protocol. The device
    then takes no further part in the round.
    """

    def __init__(self, identity: Identity, number: int, history: str, task: bytes) -> None:
        """
        Args:
            history: of the CheckInReply.
            task: `task_sha256` of what the device was given.
        """
        self._identity = identity
        self._authority = x509.load_pem_x509_certificate(identity.ca.encode())
        self._number = number
        self._history = history
        self._task = task
        self._secrets = _Secrets(*(os.urandom(masking.KEY_BYTES) for _ in range(3)))
        secrets = self._secrets
        public = (masking.public_key(key) for key in (secrets.encryption, secrets.mask))
        self.advertisement = advertisement(identity, number, history, task, *public)
        """Its public keys, the first that it says."""
        self._group: pb.MaskingGroup | None = None
        self._members = b""
        self._outgoing = pb.OutgoingShares()
        self._incoming: dict[int, bytes] | None = None
        self._payload = b""
        self._signers: dict[int, Signer] = {}
        self._survivors: pb.Survivors | None = None
        self._agreement = b""

    def share(self, group: pb.MaskingGroup) -> pb.OutgoingShares:
        """Shares of the two secrets, for each neighbour; the device keeps one of its own."""
        if self._group is not None:
            _require(self._group == group, "it changed the group of a round")
            return self._outgoing
        _check(group)
        signers = {each.index: self._verified(each.keys) for each in group.neighbours}
        signers[group.index] = self._verified(self.advertisement)
        enrolments = {signer.enrolment for signer in signers.values()}
        _require(len(enrolments) == len(signers), "one device is there twice")
        tasks = {self._task, *(each.keys.task_sha256 for each in group.neighbours)}
        _require(len(tasks) == 1, "it gave devices different generalists or trainings")
        self._members = self._told_members(group)
        self._group, self._signers = group, signers
        holders = [neighbour.index for neighbour in group.neighbours] + [group.index]
        seeds = shamir.split(self._secrets.own, group.threshold, holders)
        keys = shamir.split(self._secrets.mask, group.threshold, holders)
        self._own_share = seeds[group.index]
        self._outgoing = pb.OutgoingShares(
            commitment=masking.commitment(self._secrets.own),
            shares=[
                pb.EncryptedShares(
                    index=receiver.index,
                    sealed=masking.seal(
                        self._channel(receiver),
                        seeds[receiver.index] + keys[receiver.index],
                        self._context(group.index, receiver.index),
                    ),
                )
                for receiver in group.neighbours
            ],
        )
        return self._outgoing

    def mask(self, incoming: pb.IncomingShares, step: Vector) -> bytes:
        """The payload to upload: `step`, (D,) float32, as masked integers.

        Args:
            incoming: with its senders, and no others, the device has pairwise masks.

        Raises:
            ValueError: the step holds no finite numbers, or its grid is too coarse.
        """
        group = self._known_group()
        received = {share.index: share.sealed for share in incoming.shares}
        if self._incoming is not None:
            _require(self._incoming == received, "it asked for a second masked step")
            return self._payload
        keys = {n.index: n.keys for n in group.neighbours}
        _require(len(received) == len(incoming.shares), "it passed on shares twice")
        _require(received.keys() <= keys.keys(), "it passed on shares of a stranger")
        _require(len(received) + 1 >= group.threshold, "it goes on with too few devices")
        masked = residues(prepared(step, group))
        masking.add_masks(
            masked,
            own=[self._secrets.own],
            pairwise={
                index: masking.agree(
                    self._secrets.mask,
                    keys[index].mask_key,
                    pair(self._number, {index: keys[index], group.index: self.advertisement}),
                )
                for index in received
            },
            index=group.index,
        )
        self._incoming = received
        self._payload = masked.astype("<u4").tobytes()
        return self._payload

    def agree(self, survivors: pb.Survivors) -> pb.Agreement:
        """The device's signature that these, and no others, are summed up."""
        group = self._known_group()
        incoming = self._incoming
        _require(incoming is not None, "it unmasks before anything was masked")
        assert incoming is not None
        if self._survivors is not None:
            _require(self._survivors == survivors, "it tells of survivors in two ways")
        summed, dropped = _sets(survivors, group)
        near = {*self._signers}
        _require((summed | dropped) & near == {*incoming, group.index}, "it unmasks others")
        _require(group.index in summed, "it left this device's step out")
        _require(len(summed) >= max(group.threshold, group.least_devices), "it sums up too few")
        _require(_graph(group).can_unmask(summed, dropped), "it would learn sums over fewer")
        self._survivors = survivors
        self._agreement = agreement(
            self._number, self._history, self._task, group, self._members, survivors
        )
        signature = sign(self._identity.key, numbered(self._agreement, group.index))
        return pb.Agreement(index=group.index, signature=signature)

    def unmask(self, request: pb.Unmasking) -> pb.RevealedShares:
        """Shares of one secret of each neighbour: the seed of its own mask if its step is summed
        up, else the key of its pairwise masks."""
        group, survivors, incoming = self._known_group(), self._survivors, self._incoming
        _require(survivors is not None, "it unmasks before devices agreed on who is summed up")
        assert survivors is not None
        assert incoming is not None, "`agree` saw to it"
        summed, _ = _sets(survivors, group)
        numbers = {agreed.index for agreed in request.agreed}
        _require(len(numbers) == len(request.agreed), "it counts a device twice")
        confirmed = {self._signers[group.index].enrolment}
        for agreed in request.agreed:
            signer = self._signers.get(agreed.index) or self._certified(agreed.certificate)
            _require(
                agreed.index in summed
                and signer.has_signed(numbered(self._agreement, agreed.index), agreed.signature),
                "it told another device of other survivors, or passes on what none signed",
            )
            confirmed.add(signer.enrolment)
        needed = quorum(group, complete=_graph(group).is_complete)
        _require(
            len(confirmed) >= needed,
            f"{len(confirmed)} devices confirm who is summed up, and {needed} are needed",
        )
        _require(
            _graph(group).binds(numbers | {group.index}),
            "too few of those that hold shares of a device's secrets confirm who is summed up",
        )
        revealed = pb.RevealedShares()
        revealed.seeds.add(index=group.index, share=self._own_share)
        for neighbour in group.neighbours:
            index = neighbour.index
            if index not in incoming:
                continue
            try:
                context = self._context(index, group.index)
                shares = masking.unseal(self._channel(neighbour), incoming[index], context)
            except ValueError:
                continue  # that device sent nonsense; others may hold shares of its secrets
            seed, key = shares[: shamir.SHARE_BYTES], shares[shamir.SHARE_BYTES :]
            if index in summed:
                revealed.seeds.add(index=index, share=seed)
            else:
                revealed.keys.add(index=index, share=key)
        return revealed

    def _told_members(self, group: pb.MaskingGroup) -> bytes:
        """All keys of the group; the device's own and its neighbours' are where they should be.

        So what one device signs is of no use beside what those of another group sign."""
        keys = {each.index: each.keys for each in group.neighbours}
        keys[group.index] = self.advertisement
        if _graph(group).is_complete:
            return members_of(keys[index] for index in sorted(keys))
        size = 2 * masking.KEY_BYTES
        _require(len(group.members) == size * group.devices, "it does not tell all keys")
        _require(
            all(
                group.members[size * (index - 1) : size * index] == members_of([each])
                for index, each in keys.items()
            ),
            "among all keys, a device's are others than it told it",
        )
        return group.members

    def _known_group(self) -> pb.MaskingGroup:
        _require(self._group is not None, "it skipped a stage")
        assert self._group is not None
        return self._group

    def _verified(self, keys: pb.KeyAdvertisement) -> Signer:
        try:
            return verify(keys, self._number, self._history, self._authority)
        except ValueError as error:
            raise DistrustedError(_refusal(str(error))) from error

    def _certified(self, certificate: bytes) -> Signer:
        try:
            return certified(certificate, self._authority)
        except ValueError as error:
            raise DistrustedError(_refusal("a stranger confirms survivors")) from error

    def _channel(self, neighbour: pb.Neighbour) -> bytes:
        """The key that encrypts what goes to and comes from a neighbour."""
        context = b"comigs shares %d" % self._number
        try:
            return masking.agree(self._secrets.encryption, neighbour.keys.encryption_key, context)
        except ValueError as error:
            raise DistrustedError(_refusal("a neighbour's key is none")) from error

    def _context(self, sender: int, receiver: int) -> bytes:
        return b"comigs shares %d from %d to %d" % (self._number, sender, receiver)


def prepared(step: Vector, group: pb.MaskingGroup) -> Integers:
    """What is masked: the step (D,) as integers, with noise or with COUNTERS more numbers.

    The numbers of clipped coordinates and steps are summed up like the rest, so that the
    coordinator learns of all devices together how many there were.

    Raises:
        ValueError: see `quantize` and `quantize_clipped`.
    """
    quantization = group.quantization
    grid = Grid(quantization.bound, quantization.levels)
    if quantization.clip_norm:
        integers, shortened = quantize_clipped(step, grid)
        beyond = 0
    else:
        integers, beyond = quantize(step, grid)
        shortened = False
    if quantization.noise_multiplier:
        # A count would tell without noise what the noise hides.
        share = noise_share(quantization.noise_multiplier, group.least_devices)
        integers += discrete_gaussian(share * grid.levels, integers.size)
        return integers
    return np.append(integers, [min(beyond, grid.levels), int(shortened)])


def noise_share(noise_multiplier: float, least_devices: int) -> float:
    """Standard deviation of one device's noise, as a multiple of the bound.

    All but one of `least_devices` make up `noise_multiplier` together: a device knows its own
    noise, and what is accounted for is to hold against it too.
    """
    return noise_multiplier / math.sqrt(max(least_devices - 1, 1))


def payload_numbers(size: int, quantization: pb.Quantization) -> int:
    """Integers in a masked payload for a step of `size` coordinates."""
    return size if quantization.noise_multiplier else size + COUNTERS


def _graph(group: pb.MaskingGroup) -> Graph:
    return Graph(group.devices, len(group.neighbours), group.threshold)


def _sets(survivors: pb.Survivors, group: pb.MaskingGroup) -> tuple[set[int], set[int]]:
    """Numbers of those that are summed up, and of those that dropped out."""
    try:
        summed = numbers_of(survivors.summed, group.devices)
        dropped = numbers_of(survivors.dropped, group.devices)
    except ValueError as error:
        raise DistrustedError(_refusal("its survivors are not of this group")) from error
    _require(
        not summed & dropped,
        "it asked for both secrets of a device, which would show that device's step",
    )
    return summed, dropped


def _check(group: pb.MaskingGroup) -> None:
    """Refuses a group in which the secrets would be safe with fewer than they should."""
    holders = {neighbour.index for neighbour in group.neighbours} | {group.index}
    quantization = group.quantization
    share = noise_share(quantization.noise_multiplier, group.least_devices)
    reach = share * math.sqrt(group.devices)
    for kept, complaint in (
        (len(holders) == len(group.neighbours) + 1, "a number in the group is there twice"),
        (0 not in holders and max(holders) <= group.devices, "a number is not in the group"),
        (
            LEAST_DEVICES <= group.least_devices <= group.devices,
            f"it sums up fewer than {LEAST_DEVICES} devices",
        ),
        (group.devices <= MOST_DEVICES, f"it has more than {MOST_DEVICES} devices"),
        (len(holders) >= LEAST_DEVICES, f"it names fewer than {LEAST_DEVICES} devices"),
        (group.threshold <= len(holders) < 2 * group.threshold, "its threshold is too low"),
        (
            0 < quantization.bound < math.inf and 0 <= reach < math.inf,
            "its quantization has no bound",
        ),
        (
            not quantization.noise_multiplier or share * quantization.levels >= LEAST_SIGMA,
            "its noise is too fine for the grid",
        ),
        (
            0 < quantization.levels * (group.devices + TAIL * reach) < 2**31,
            "sums on its grid could wrap",
        ),
        (
            quantization.clip_norm or not quantization.noise_multiplier,
            "it adds noise to steps of any length",
        ),
    ):
        _require(kept, complaint)
    _require(
        2 * quorum(group, complete=_graph(group).is_complete) > group.devices,
        "half of its devices could be told of others than the other half",
    )
    others = sorted(holders - {group.index})
    _require(
        others == _graph(group).neighbours(group.index), "its neighbours are not the next ones"
    )
    # Else two that sign the same could be told of graphs in which different ones are neighbours.
    _require(
        _graph(group).is_complete or len(holders) == 2 * group.threshold - 1,
        "its threshold is not for so many neighbours",
    )
    _require(_graph(group).hides(group.least_devices), "its devices have too few neighbours")


def _require(kept: bool, complaint: str) -> None:
    if not kept:
        raise DistrustedError(_refusal(complaint))


def _refusal(complaint: str) -> str:
    return (
        f"the coordinator does not keep to secure aggregation: {complaint}; nothing more was told "
        "to it in this round; ask who runs it"
    )
