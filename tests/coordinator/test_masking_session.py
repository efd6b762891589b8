"""What a device refuses in secure aggregation, and the graph of who is whose neighbour."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from masking_help import HISTORY, ROUND, SIZE, TASK, Round, World

from coordinator.accounting import epsilon
from coordinator.aggregation import AggregationError
from coordinator.neighbours import MAX_NEIGHBOURS, enough_signers, graph_for
from coordinator.secure_aggregation import AnotherTaskError, Masking, SecureAggregation
from coordinator.state import State
from coordinator.tables import MaskingGroup, Settings, Update
from coordinator.tls import administrator
from edge_runtime import masking, protocol
from edge_runtime.errors import RefusedError
from edge_runtime.identity import new_key, sign
from edge_runtime.neighbours import Graph
from edge_runtime.quantization import grid_for, quantize
from edge_runtime.secure_aggregation import (
    MOST_DEVICES,
    DistrustedError,
    Session,
    advertisement,
    agreement,
    bitmap,
    members_of,
    numbered,
    pair,
    prepared,
    quorum,
    task_sha256,
    verify,
)
from protos import coordinator_pb2 as pb


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def masked(world: World) -> Round:
    """Five devices that have masked their steps; a threshold of three."""
    made = Round(world, 5)
    made.mask()
    return made


def test_one_secret_of_each_device(masked: Round) -> None:
    told = masked.survivors([1, 2, 3, 4], [5])
    agreed = masked.agree(told, 1, 2, 3, 4)
    session = masked.sessions[1]
    revealed = session.unmask(pb.Unmasking(agreed=agreed[1:]))
    assert [share.index for share in revealed.seeds] == [1, 2, 3, 4]
    assert [share.index for share in revealed.keys] == [5]
    for summed, dropped in (([1, 2, 3], [4, 5]), ([1, 2, 3, 4, 5], [])):
        with pytest.raises(DistrustedError, match="in two ways"):
            session.agree(masked.survivors(summed, dropped))
    assert session.agree(told).index == 1, "a reply that was lost is repeated"
    assert session.unmask(pb.Unmasking(agreed=agreed[1:])) == revealed


@pytest.mark.parametrize(
    ("summed", "dropped", "complaint"),
    [
        ([1, 2, 3, 4], [4, 5], "both secrets"),
        ([1, 2, 3, 4], [], "unmasks others"),
        ([2, 3, 4], [1, 5], "left this device's step out"),
        ([1, 2], [3, 4, 5], "too few"),
    ],
)
def test_survivors_of_whom_no_honest_coordinator_tells(
    masked: Round, summed: list[int], dropped: list[int], complaint: str
) -> None:
    with pytest.raises(DistrustedError, match=complaint):
        masked.sessions[1].agree(masked.survivors(summed, dropped))


@pytest.mark.parametrize("content", [b"", b"\x0f\0", b"\x2f"])
def test_survivors_that_are_not_of_the_group(masked: Round, content: bytes) -> None:
    """Five devices are five bits of one byte."""
    with pytest.raises(DistrustedError, match="not of this group"):
        masked.sessions[1].agree(pb.Survivors(summed=content, dropped=b"\x10"))


def test_nothing_is_revealed_before_others_have_seen_the_same(masked: Round) -> None:
    session = masked.sessions[1]
    with pytest.raises(DistrustedError, match="before devices agreed"):
        session.unmask(pb.Unmasking())
    own, second = masked.agree(masked.survivors([1, 2, 3, 4], [5]), 1, 2)
    told_otherwise = masked.sessions[3].agree(masked.survivors([1, 2, 3, 5], [4]))
    stranger = pb.Agreement(index=5, signature=second.signature)
    renumbered = pb.Agreement(index=3, signature=second.signature)
    for agreed, complaint in (
        ([], "1 devices confirm who is summed up, and 3 are needed"),
        ([second], "2 devices confirm"),
        ([second, own], "2 devices confirm"),
        ([second, second, own], "counts a device twice"),
        ([second, told_otherwise], "told another device of other survivors"),
        ([second, renumbered], "none signed"),
        ([second, stranger], "none signed"),
        ([second, pb.Agreement(index=6)], "a stranger confirms"),
        ([second, pb.Agreement(index=6, certificate=b"x")], "a stranger confirms"),
        ([second, pb.Agreement(index=4)], "none signed"),
    ):
        with pytest.raises(DistrustedError, match=complaint):
            session.unmask(pb.Unmasking(agreed=agreed))


@pytest.mark.parametrize("other", ["round", "history", "task", "keys", "terms"])
def test_an_agreement_is_for_one_group_of_one_round(world: World, other: str) -> None:
    """Of the same devices under the same numbers, told of the same survivors."""
    made = Round(world, 3)
    made.mask()
    message = made.sessions[1]
    made.agree(made.survivors([1, 2, 3]), 1)
    group = made.group(1)
    keys = [made.sessions[index].advertisement for index in (1, 2, 3)]
    said = {"number": ROUND, "history": HISTORY, "task": TASK, "terms": group}
    said["members"] = members_of(keys)
    survivors = made.survivors([1, 2, 3])
    changes = {
        "round": {"number": ROUND + 1},
        "history": {"history": "the second"},
        "task": {"task": bytes(32)},
        "keys": {"members": members_of([*keys[:2], Round(world, 3).sessions[3].advertisement])},
        "terms": {"terms": Masking(0.6, 60, 3, 1.0, 0.0).terms(3)[1]},
    }
    assert agreement(**said, survivors=survivors) == message._agreement
    assert agreement(**said | changes[other], survivors=survivors) != message._agreement


def test_one_masked_step_only(world: World) -> None:
    """Two with different masks would differ by masks that then are known."""
    made = Round(world, 5)
    inbox = made.share()[1]
    session = made.sessions[1]
    payload = session.mask(inbox, np.zeros(SIZE, np.float32))
    assert session.mask(inbox, np.ones(SIZE, np.float32)) == payload
    with pytest.raises(RefusedError, match="second masked step"):
        session.mask(pb.IncomingShares(shares=inbox.shares[:3]), np.zeros(SIZE, np.float32))


def test_stages_come_in_their_order(world: World) -> None:
    session = Round(world, 5).sessions[1]
    with pytest.raises(RefusedError, match="skipped a stage"):
        session.mask(pb.IncomingShares(), np.zeros(SIZE, np.float32))
    with pytest.raises(RefusedError, match="skipped a stage"):
        session.agree(pb.Survivors())
    with pytest.raises(RefusedError, match="skipped a stage"):
        session.unmask(pb.Unmasking())
    made = Round(world, 5)
    inboxes = made.share()
    with pytest.raises(RefusedError, match="before anything was masked"):
        made.sessions[1].agree(made.survivors([1, 2, 3, 4, 5]))
    too_few = pb.IncomingShares(shares=inboxes[1].shares[:1])
    with pytest.raises(RefusedError, match="too few"):
        made.sessions[1].mask(too_few, np.zeros(SIZE, np.float32))
    other = made.group(1)
    other.neighbours.pop()
    with pytest.raises(RefusedError, match="changed"):
        made.sessions[1].share(other)


def low_threshold(group: pb.MaskingGroup) -> None:
    group.threshold = 2


def wrapping(group: pb.MaskingGroup) -> None:
    group.quantization.levels *= 2


def too_few_devices(group: pb.MaskingGroup) -> None:
    group.least_devices = 2


def alone(group: pb.MaskingGroup) -> None:
    """With a threshold of one, its own share would be the secret."""
    del group.neighbours[:]
    group.threshold, group.devices, group.least_devices = 1, 1000, 750


def twice(group: pb.MaskingGroup) -> None:
    group.neighbours[1].index = group.neighbours[0].index


def one_device_twice(group: pb.MaskingGroup) -> None:
    group.neighbours[1].keys.CopyFrom(group.neighbours[0].keys)


def beyond(group: pb.MaskingGroup) -> None:
    group.neighbours[1].index = 6


def unbounded(group: pb.MaskingGroup) -> None:
    group.quantization.bound = math.nan


def noise_on_anything(group: pb.MaskingGroup) -> None:
    group.quantization.levels //= 10
    group.quantization.noise_multiplier = 1.0


def forged_signature(group: pb.MaskingGroup) -> None:
    group.neighbours[0].keys.mask_key = group.neighbours[1].keys.mask_key


def no_majority(group: pb.MaskingGroup) -> None:
    """Sparse, and half of the devices would be enough."""
    group.devices, group.least_devices, group.quantization.levels = 1000, 500, 1


def renumbered(group: pb.MaskingGroup) -> None:
    """Sparse, with neighbours of the coordinator's choice: 1, 2, 4 and 5 of 1000 belong to 3."""
    group.devices, group.least_devices, group.quantization.levels = 1000, 750, 1
    group.index = 1


def few_neighbours(group: pb.MaskingGroup) -> None:
    """Sparse, with the neighbours that the numbers make, of which few need collude."""
    group.devices, group.least_devices, group.quantization.levels = 1000, 750, 1
    for neighbour, index in zip(group.neighbours, (2, 3, 999, 1000), strict=True):
        neighbour.index = index


def small_and_sparse(group: pb.MaskingGroup) -> None:
    """Whoever numbers nine devices can make rings of three."""
    del group.neighbours[2:]
    group.devices, group.least_devices, group.quantization.levels = 9, 9, 1
    group.threshold, group.neighbours[1].index = 2, 9


def noise_too_fine(group: pb.MaskingGroup) -> None:
    """Noise that would take for ever to draw."""
    group.quantization.clip_norm = True
    group.quantization.noise_multiplier = 1e-300


def no_devices(group: pb.MaskingGroup) -> None:
    group.devices = group.least_devices = 0


def more_than_any(group: pb.MaskingGroup) -> None:
    group.devices, group.quantization.levels = 2**32 - 1, 0


def no_certificate(group: pb.MaskingGroup) -> None:
    group.neighbours[0].keys.certificate = b"x"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (low_threshold, "threshold is too low"),
        (wrapping, "could wrap"),
        (too_few_devices, "fewer than 3"),
        (alone, "names fewer than 3 devices"),
        (twice, "there twice"),
        (one_device_twice, "one device is there twice"),
        (beyond, "not in the group"),
        (unbounded, "no bound"),
        (noise_on_anything, "any length"),
        (forged_signature, "not signed for this round"),
        (no_certificate, "without a certificate"),
        (renumbered, "not the next ones"),
        (no_majority, "told of others"),
        (few_neighbours, "too few neighbours"),
        (small_and_sparse, "too few neighbours"),
        (noise_too_fine, "too fine for the grid"),
        (no_devices, "not in the group"),
        (more_than_any, "more than 8192 devices"),
    ],
)
def test_groups_that_would_not_be_safe(
    world: World, spoil: Callable[[pb.MaskingGroup], None], complaint: str
) -> None:
    made = Round(world, 5)
    group = made.group(1)
    spoil(group)
    with pytest.raises(RefusedError, match=complaint):
        made.sessions[1].share(group)


def test_devices_that_were_given_something_else_are_no_company(world: World) -> None:
    """The others' steps would be known, and the sum be one device's."""
    made = Round(world, 5)
    group = made.group(1)
    elsewhere = Session(world.device("device 3"), ROUND, HISTORY, bytes(32))
    group.neighbours[1].keys.CopyFrom(elsewhere.advertisement)
    with pytest.raises(DistrustedError, match="different generalists or trainings"):
        made.sessions[1].share(group)


def test_a_copied_key_makes_no_mask_that_cancels(world: World) -> None:
    """Device 2 adds what it shares with 3 and takes away what it shares with 1."""
    made = Round(world, 3)
    copied = made.sessions[1].advertisement.mask_key
    own = made.sessions[3].advertisement.encryption_key
    copier = advertisement(world.device("device 3"), ROUND, HISTORY, TASK, own, copied)
    group = made.group(2)
    group.neighbours[1].keys.CopyFrom(copier)
    session = made.sessions[2]
    session.share(group)
    inbox = pb.IncomingShares(shares=[pb.EncryptedShares(index=index) for index in (1, 3)])
    masked = np.frombuffer(session.mask(inbox, np.zeros(SIZE, np.float32)), "<u4")
    rest = masked - masking.expand(session._secrets.own, masked.size)
    assert rest.any(), "nothing but the mask of its own, which is revealed"


def test_the_mask_of_a_pair_is_for_these_two_under_these_numbers(world: World) -> None:
    a, b, c = (each.advertisement for each in Round(world, 3).sessions.values())
    meant = pair(ROUND, {1: a, 2: b})
    assert pair(ROUND, {2: b, 1: a}) == meant
    renewed = pb.KeyAdvertisement()
    renewed.CopyFrom(b)
    renewed.certificate = c.certificate
    others = ({2: a, 1: b}, {1: a, 3: b}, {1: a, 2: c}, {1: a, 2: renewed})
    assert len({meant, pair(ROUND + 1, {1: a, 2: b}), *(pair(ROUND, ends) for ends in others)}) == 6


def test_keys_are_of_devices_that_this_authority_knows(world: World, tmp_path: Path) -> None:
    authority = x509.load_der_x509_certificate(world.authority.der)
    known = world.device("known")
    signer = verify(Session(known, ROUND, HISTORY, TASK).advertisement, ROUND, HISTORY, authority)
    assert signer.enrolment == "enrolment of known"
    stranger = World(tmp_path / "other").device("known")
    admin = administrator(world.authority, None, "nowhere:1")
    for who, number, history, complaint in (
        (stranger, ROUND, HISTORY, "without a certificate of this coordinator"),
        (admin, ROUND, HISTORY, "not a device's"),
        (known, ROUND + 1, HISTORY, "not signed for this round"),
        (known, ROUND, "of a backup", "not signed for this round"),
        (replace(known, key=new_key()), ROUND, HISTORY, "not signed for this round"),
    ):
        with pytest.raises(ValueError, match=complaint):
            verify(Session(who, number, history, TASK).advertisement, ROUND, HISTORY, authority)


@pytest.mark.parametrize("weak", [bytes(32), b"\1" + bytes(31), bytes(31)])
def test_a_key_that_nobody_can_agree_with_is_no_key(world: World, weak: bytes) -> None:
    """One of low order, advertised to all, would end the round of every neighbour."""
    authority = x509.load_der_x509_certificate(world.authority.der)
    eve, good = world.device("eve"), masking.public_key(bytes(32))
    for keys in ((weak, good), (good, weak)):
        with pytest.raises(ValueError, match="low order"):
            verify(advertisement(eve, ROUND, HISTORY, TASK, *keys), ROUND, HISTORY, authority)
    verify(advertisement(eve, ROUND, HISTORY, TASK, good, good), ROUND, HISTORY, authority)


def test_the_largest_messages_fit(world: World) -> None:
    """A device with the longest name, and as many neighbours as there may be."""
    session = Session(world.device("n" * 64), ROUND, HISTORY, TASK)
    group = pb.MaskingGroup(index=2**20, threshold=301, devices=2**20, least_devices=2**20)
    group.quantization.CopyFrom(pb.Quantization(bound=0.1, levels=2**31 - 1, noise_multiplier=0.1))
    for index in range(MAX_NEIGHBOURS):
        group.neighbours.add(index=2**20 + index, keys=session.advertisement)
    protocol.check(pb.AggregateReply(share=group))
    sealed, share = bytes(94), bytes(33)
    outgoing = pb.OutgoingShares(commitment=bytes(32))
    revealed = pb.RevealedShares()
    for index in range(MAX_NEIGHBOURS + 1):
        outgoing.shares.add(index=2**20 + index, sealed=sealed)
        revealed.seeds.add(index=2**20 + index, share=share)
    protocol.check(pb.AggregateRequest(round=2**31, shares=outgoing))
    protocol.check(pb.AggregateRequest(round=2**31, revealed=revealed))
    bits = bitmap(range(1, MOST_DEVICES + 1), MOST_DEVICES)
    protocol.check(pb.AggregateReply(agree=pb.Survivors(summed=bits, dropped=bits)))
    certificate = session.advertisement.certificate
    signed = pb.Agreement(index=MOST_DEVICES, signature=bytes(72), certificate=certificate)
    most = quorum(pb.MaskingGroup(devices=MOST_DEVICES, least_devices=MOST_DEVICES), complete=False)
    protocol.check(pb.AggregateReply(unmask=pb.Unmasking(agreed=[signed] * most)))


@pytest.mark.parametrize(("devices", "staying"), [(3, 1.0), (5, 0.6), (20, 0.75), (1000, 0.75)])
def test_what_is_charged_holds_against_a_device(devices: int, staying: float) -> None:
    """Of the fewest that are summed up, one knows its own noise: the others' is what is accounted
    for, and that of one fewer is not."""
    size, charged = 200_000, 2.0
    masking = Masking(
        staying=staying, stage_seconds=60, min_devices=3, clip_norm=0.5, noise_multiplier=charged
    )
    terms = masking.terms(devices)[1]
    noise = prepared(np.zeros(size, np.float32), terms)
    of_one = float(np.std(noise)) / terms.quantization.levels
    rounding = 5 / math.sqrt(2 * size)  # five standard deviations of an estimate
    cost = epsilon({charged: 10}, 1e-5)
    others = terms.least_devices - 1
    assert of_one * math.sqrt(others) == pytest.approx(charged, rel=rounding)
    least = of_one * math.sqrt(others) * (1 + rounding)
    assert epsilon({least: 10}, 1e-5) <= cost
    if others < 100:  # else the difference is within the estimate's
        fewer = of_one * math.sqrt(others - 1) * (1 + rounding)
        assert epsilon({fewer: 10}, 1e-5) > cost


def test_what_agreeing_costs_in_a_large_group(world: World) -> None:
    """docs/privacy.md has what this prints with -s."""
    masking = Masking(
        staying=0.75, stage_seconds=60, min_devices=3, clip_norm=None, noise_multiplier=0.0
    )
    graph, terms = masking.terms(1000)
    needed = quorum(terms, complete=graph.is_complete)
    signers = enough_signers(graph, range(1, 1001), needed)
    keys = Session(world.device("device 1000"), ROUND, HISTORY, TASK).advertisement
    one = pb.Agreement(index=1000, signature=keys.signature, certificate=keys.certificate)
    size = pb.AggregateReply(unmask=pb.Unmasking(agreed=[one] * len(signers))).ByteSize()
    members = len(members_of([keys])) * 1000
    print(f"\n{graph.degree} neighbours, {len(signers)} agreements, {size} bytes, keys {members}")
    assert (graph.degree, needed, len(signers)) == (118, 601, 601)
    assert size < 330_000
    assert members == 64_000


@pytest.fixture(scope="module")
def large(world: World) -> Round:
    """A hundred devices of which each knows some."""
    made = Round(world, 100, staying=0.95)
    assert not made.graph.is_complete
    return made


def with_another_key(members: bytes, number: int) -> bytes:
    start = 64 * (number - 1)
    return members[:start] + bytes(64) + members[start + 64 :]


def test_a_device_is_among_all_that_it_is_told_of(large: Round) -> None:
    group = large.group(1)
    near, far = group.neighbours[0].index, 50
    assert far not in large.graph.neighbours(1)
    for members, complaint in (
        (group.members[:-1], "does not tell all keys"),
        (b"", "does not tell all keys"),
        (with_another_key(group.members, 1), "are others than it told"),
        (with_another_key(group.members, near), "are others than it told"),
    ):
        session, told = large.sessions[1], pb.MaskingGroup()
        told.CopyFrom(group)
        told.members = members
        with pytest.raises(DistrustedError, match=complaint):
            session.share(told)
    # What it does not know of a stranger's keys, it signs.
    signed = [
        agreement(ROUND, HISTORY, TASK, large.terms, members, pb.Survivors())
        for members in (group.members, with_another_key(group.members, far))
    ]
    assert signed[0] != signed[1]


@pytest.mark.parametrize("fewer", [0, 2])
def test_all_that_sign_the_same_have_as_many_neighbours(large: Round, fewer: int) -> None:
    """With other ones, parts of a group share no masks although it seems so to those within."""
    masking = Masking(
        staying=0.75, stage_seconds=60, min_devices=3, clip_norm=None, noise_multiplier=0.0
    )
    graph, group = masking.terms(1000)
    told = Graph(1000, graph.degree - fewer, graph.threshold)
    assert told.hides(group.least_devices)
    group.index = 1
    for number in told.neighbours(1):
        group.neighbours.add(index=number)
    complaint = "is not for so many neighbours" if fewer else "keys have 32 bytes"
    with pytest.raises(DistrustedError, match=complaint):
        large.sessions[1].share(group)


def test_those_who_hold_shares_confirm_everywhere(large: Round) -> None:
    """Enough in number, but elsewhere: here others could have been told of other survivors."""
    everyone = large.survivors(range(1, 101))
    group, session = large.group(1), large.sessions[1]
    session.share(group)
    told = (pb.EncryptedShares(index=n.index, sealed=b"garbage") for n in group.neighbours)
    session.mask(pb.IncomingShares(shares=told), np.zeros(SIZE, np.float32))
    session.agree(everyone)
    message = agreement(ROUND, HISTORY, TASK, large.terms, group.members, everyone)

    def signed(number: int, *, as_number: int | None = None) -> pb.Agreement:
        index, identity = as_number or number, large.identities[number]
        return pb.Agreement(
            index=index,
            signature=sign(identity.key, numbered(message, number)),
            certificate=large.sessions[number].advertisement.certificate,
        )

    needed = quorum(large.terms, complete=False)
    together = range(1, needed + 1)
    assert len(large.graph.covered(together)) < 100
    with pytest.raises(DistrustedError, match="too few of those that hold shares"):
        session.unmask(pb.Unmasking(agreed=[signed(number) for number in together]))
    spread = enough_signers(large.graph, range(1, 101), needed)
    elsewhere = [signed(n, as_number=m) for n, m in zip(together, spread, strict=True) if n != m]
    with pytest.raises(DistrustedError, match="none signed"):
        session.unmask(pb.Unmasking(agreed=elsewhere))
    revealed = session.unmask(pb.Unmasking(agreed=[signed(number) for number in spread]))
    assert [share.index for share in revealed.seeds] == [1], "what the others sent was garbage"


def tail(devices: int, marked: int, degree: int, hits: range) -> Fraction:
    """The probability that as many as in `hits` of `degree` others are marked, exactly."""
    others = devices - 1
    count = sum(math.comb(marked, h) * math.comb(others - marked, degree - h) for h in hits)
    return Fraction(count, math.comb(others, degree))


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 3000), st.sampled_from([0.6, 2 / 3, 0.75, 0.9, 1.0]))
def test_graphs_hold_their_bounds(devices: int, staying: float) -> None:
    if staying < 0.7 and devices > MAX_NEIGHBOURS:
        with contextlib.suppress(ValueError):  # too many neighbours for a message
            graph_for(devices, staying)
        return
    graph = graph_for(devices, staying)
    assert graph.degree <= max(MAX_NEIGHBOURS, 64)
    assert graph.degree + 1 < 2 * graph.threshold <= 2 * (graph.degree + 1)
    staying_devices = math.ceil(round(devices * staying, 6))
    if graph.degree == devices - 1:
        assert graph.threshold >= staying_devices or graph.threshold == devices // 2 + 1
        return
    colluding, degree = devices // 5, graph.degree
    high = range(graph.threshold, degree + 1)
    assert devices * tail(devices, colluding, degree, high) <= Fraction(1, 2**39)
    low = range(graph.threshold)
    stay = min(staying_devices, devices - 1)
    assert devices * tail(devices, stay, degree, low) <= Fraction(1, 2**19)


def test_too_many_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="raise --secure-threshold"):
        graph_for(5000, 0.6)


@given(st.integers(3, 60), st.data())
def test_neighbours_are_mutual(devices: int, data: st.DataObject) -> None:
    even = data.draw(st.integers(1, (devices - 1) // 2)) * 2
    for graph in (Graph(devices, devices - 1, 2), Graph(devices, min(even, devices - 1), 2)):
        near = {number: graph.neighbours(number) for number in range(1, devices + 1)}
        for number, others in near.items():
            assert len(set(others)) == graph.degree
            assert number not in others
            assert all(number in near[other] for other in others)


def test_a_part_that_shares_no_masks_with_the_rest_is_not_unmasked() -> None:
    """Ten on a circle, each with four neighbours: without 5, 6, 10 and 9, no one joins the parts
    1 to 4 and 7 to 8."""
    graph = Graph(10, 4, 2)
    assert graph.can_unmask({1, 2, 3, 4, 5, 6, 7, 8}, {9, 10})
    assert not graph.can_unmask({1, 2, 3, 4, 7, 8}, {5, 6, 9, 10})
    assert not graph.can_unmask(set(), {1})
    assert not Graph(10, 4, 3).can_unmask({1, 2, 3, 4, 5}, {8}), "two shares of the key of 8"
    assert graph.can_unmask(set(range(1, 11)), set())


@settings(max_examples=300)
@given(st.integers(3, 14), st.data())
def test_what_binds_a_group_is_more_than_half_everywhere(devices: int, data: st.DataObject) -> None:
    """So two sets of which that is true have a device in common near each."""
    degree = data.draw(st.sampled_from([*range(2, devices - 1, 2), devices - 1]))
    graph = Graph(devices, degree, degree // 2 + 1)
    signers = data.draw(st.sets(st.integers(1, devices)))
    held = {n: signers & {n, *graph.neighbours(n)} for n in range(1, devices + 1)}
    enough = all(len(each) >= graph.threshold for each in held.values())
    reached, edge = set(), set(sorted(signers)[:1])
    while edge:
        reached |= edge
        edge = set().union(*(held[n] for n in edge)) - reached
    assert graph.binds(signers) == (enough and reached == signers)
    if graph.binds(signers):
        quorum = data.draw(st.integers(graph.threshold, len(signers)))
        kept = enough_signers(graph, signers, quorum)
        assert {*kept} <= signers
        assert len(kept) >= quorum
        assert graph.binds(kept)


@settings(max_examples=300)
@given(st.integers(3, 14), st.data())
def test_what_can_be_unmasked_is_one_part(devices: int, data: st.DataObject) -> None:
    """By the definition: shares are counted, and edges followed."""
    degree = data.draw(st.sampled_from([*range(2, devices - 1, 2), devices - 1]))
    graph = Graph(devices, degree, data.draw(st.integers(1, degree + 1)))
    numbers = st.sets(st.integers(1, devices))
    summed = data.draw(numbers)
    dropped = data.draw(numbers) - summed
    held = {n: summed & {n, *graph.neighbours(n)} for n in range(1, devices + 1)}
    assert graph.covered(summed) == {n for n in held if len(held[n]) >= graph.threshold}
    reached, edge = set(), set(sorted(summed)[:1])
    while edge:
        reached |= edge
        edge = set().union(*(held[n] for n in edge)) - reached
    enough = all(len(held[n]) >= graph.threshold for n in summed | dropped)
    assert graph.can_unmask(summed, dropped) == (enough and reached == summed)


def test_a_group_is_not_larger_than_what_its_sum_is_divided_by(
    world: World, tmp_path: Path
) -> None:
    """With differential privacy, after a restart with fewer --devices-per-round."""
    state = State(tmp_path / "state").of("base")
    options = {"recipe": "mean", "selection": None, "training": "{}", "contract_sha256": "c"}
    state.begin(Settings(rounds=9, min_devices=3, deadline_seconds=1, **options), b"generalist")
    secure = SecureAggregation(
        state=state,
        masking=Masking(0.75, 60, 3, 1.0, 1.0, divisor=4),
        training=pb.TrainingConfig(),
        size=SIZE,
        authority=x509.load_der_x509_certificate(world.authority.der),
    )
    with pytest.raises(AggregationError, match=r"5 devices have trained.* divided by 4"):
        secure.settle(1, {f"device {n}" for n in range(5)})


def test_a_sparse_group_sums_up_exactly(world: World, tmp_path: Path) -> None:
    """Seventy devices of which each knows some; two vanish before sharing, two before masking, two
    before revealing. Some are told late who is summed up, and reveal all the same."""
    state = State(tmp_path / "state").of("base")
    options = {"recipe": "mean", "selection": None, "training": "{}", "contract_sha256": "c"}
    state.begin(Settings(rounds=9, min_devices=3, deadline_seconds=1, **options), b"generalist")
    devices = {}
    for number in range(1, 71):
        device = state.named(f"device {number}", cohort="base", contract_sha256="c")
        device.enrolment = f"enrolment of device {number}"
        devices[number] = device
    state.open(1, deadline=0, recipe="mean", participants=[d.id for d in devices.values()])
    masking = Masking(
        staying=0.9, stage_seconds=60, min_devices=3, clip_norm=None, noise_multiplier=0.0
    )
    authority = x509.load_der_x509_certificate(world.authority.der)
    training = pb.TrainingConfig(rounds=9)
    secure = SecureAggregation(
        state=state, masking=masking, training=training, size=SIZE, authority=authority
    )
    task = task_sha256(hashlib.sha256(b"generalist").digest(), training)
    sessions = {n: Session(world.device(f"device {n}"), 1, state.history(), task) for n in devices}

    def say(number: int, **step: Any) -> None:
        said = secure.step(devices[number], pb.AggregateRequest(round=1, **step))
        assert said is not None
        state.commit([said])

    with pytest.raises(AnotherTaskError, match="with other settings, by now"):
        say(1, keys=Session(world.device("device 1"), 1, state.history(), TASK).advertisement)
    for number, session in sessions.items():
        say(number, keys=session.advertisement)
    # What is unknown is not passed on to the neighbours.
    whole = sessions[1].advertisement.SerializeToString()
    more = pb.KeyAdvertisement.FromString(whole + b"\x9a\x06\x04more")
    said = secure.step(devices[1], pb.AggregateRequest(round=1, keys=more))
    assert said is not None
    assert said.content == whole
    graph, terms = masking.terms(70)
    assert not graph.is_complete
    numbers = {device.id: number for number, device in devices.items()}
    state.settle(1, numbers, degree=graph.degree, terms=terms.SerializeToString())

    def asked(number: int) -> pb.AggregateReply:
        return secure.answer(devices[number].id, pb.AggregateRequest(round=1))

    def group() -> MaskingGroup:
        found = state.masking_group(1)
        assert found is not None
        return found

    absent = {2, 9}
    for number in devices.keys() - absent:
        say(number, shares=sessions[number].share(asked(number).share))
    assert secure.advance(group(), {devices[n].id for n in absent})
    absent |= {3, 10}
    steps = np.random.default_rng(1).normal(size=(71, SIZE)).astype(np.float32) * 0.1
    for number in devices.keys() - absent:
        payload = sessions[number].mask(asked(number).mask, steps[number])
        name = f"{number}.bin"
        (state.directory / name).write_bytes(payload)
        digest = hashlib.sha256(payload).digest()
        place = {"cohort": "base", "round": 1, "device": devices[number].id}
        known = {"contract_sha256": "c", "counted": True}
        state.commit([Update(**place, **known, file=name, sha256=digest, tokens=1)])
    assert secure.advance(group(), {devices[n].id for n in absent})
    summed = sorted(devices.keys() - absent)
    silent, needed = {1, 8}, quorum(terms, complete=False)
    prompt = sorted({*summed} - {8})[:needed]
    assert graph.binds(prompt)
    assert not graph.binds(prompt[:-1])

    def agree(number: int) -> None:
        say(number, agreed=sessions[number].agree(asked(number).agree))

    for number in prompt:
        assert not secure.advance(group(), set())
        agree(number)
        assert asked(number).HasField("wait")
    assert secure.advance(group(), set())
    for number in {*summed} - {*prompt, 8}:
        agree(number)
    told, stranger = asked(4).unmask.agreed, World(tmp_path / "other").device("device 35")
    forged = Session(stranger, 1, state.history(), task).advertisement.certificate
    assert 35 not in graph.neighbours(4)
    beyond = next(each for each in told if each.index == 35)
    others = [each for each in told if each.index != 4]
    for agreed, complaint in (
        (
            others[: needed - 2],
            f"{needed - 1} devices confirm who is summed up, and {needed} are needed",
        ),
        ([*told, *([beyond] * 5)], "counts a device twice"),
        ([pb.Agreement(index=35, certificate=forged)], "a stranger confirms"),
        ([pb.Agreement(index=35, certificate=beyond.certificate)], "none signed"),
    ):
        with pytest.raises(DistrustedError, match=complaint):
            sessions[4].unmask(pb.Unmasking(agreed=agreed))
    for number in {*summed} - silent:
        say(number, revealed=sessions[number].unmask(asked(number).unmask))
    assert secure.is_unmasked(group(), {devices[n].id for n in silent})
    got = secure.total(1, state.updates(1))
    grid = grid_for(1.0, 70)
    exact = sum(quantize(steps[number], grid)[0] for number in summed)
    assert len(summed) == 66
    np.testing.assert_array_equal(got.total, exact * grid.unit)
