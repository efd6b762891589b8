"""Members of a masking group that reveal, or deal out, shares that are none."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from coordinator_help import Fleet, Served, check_in_until, in_parallel
from hypothesis import given, settings
from hypothesis import strategies as st
from masking_help import Masked, expected, joined, step_of, vector

from coordinator.administrator import Administrator
from coordinator.restoring import Shared, restore
from edge_runtime import shamir
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from protos import coordinator_pb2 as pb

OPTIONS = ("--secure-aggregation", "--min-devices", "3", "--secure-threshold", "0.6")


def shared(secret: bytes, shares: dict[int, bytes]) -> Shared:
    return Shared(shares, shares.keys(), secret.__eq__)


def false(share: bytes, more: int = 1) -> bytes:
    value = (int.from_bytes(share, "big") + more) % shamir.PRIME
    return value.to_bytes(shamir.SHARE_BYTES, "big")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_enough_true_shares_give_every_secret_and_nobody_is_blamed_for_others(
    data: st.DataObject,
) -> None:
    """Ten members hold shares of one another's secrets, five of which restore one. Some make theirs
    up together, some deal out shares of nothing, and one a few that are false."""
    members = range(1, 11)
    liars = data.draw(st.sets(st.sampled_from(members), max_size=3))
    dealers = data.draw(st.sets(st.sampled_from(members), max_size=2))
    victims = data.draw(st.sets(st.sampled_from(members), max_size=2))
    together = data.draw(st.booleans())  # so that some false shares still give the secret
    everything, secrets = {}, {}
    for owner in members:
        secrets[owner] = os.urandom(32)
        shares = shamir.split(secrets[owner], 5, members)
        if owner in dealers:
            shares = {holder: os.urandom(shamir.SHARE_BYTES) for holder in members}
        elif owner == 1:
            shares |= {holder: false(shares[holder]) for holder in victims}
        more = [1 if together else random.getrandbits(200) + 1 for _ in range(11)]
        told = {h: false(share, more[h]) if h in liars else share for h, share in shares.items()}
        everything[owner] = shared(secrets[owner], told)
    restored = restore(everything, 5)
    assert restored.lost == dealers
    assert restored.secrets == {o: s for o, s in secrets.items() if o not in dealers}
    assert restored.liars <= liars
    assert restored.dealers <= dealers
    if len(liars) <= 2 and not together:  # (10 - 5) / 2
        assert restored.dealers == dealers
        if dealers or 1 in liars:  # else none of these shares was looked at
            assert restored.liars == liars


def test_a_liar_too_many_keeps_a_secret_back() -> None:
    secret = os.urandom(32)
    shares = shamir.split(secret, 3, range(1, 6))
    shares |= {holder: os.urandom(shamir.SHARE_BYTES) for holder in (1, 2)}
    assert restore({9: shared(secret, shares)}, 3).secrets == {9: secret}
    shares[3] = os.urandom(shamir.SHARE_BYTES)
    restored = restore({9: shared(secret, shares)}, 3)
    assert restored.lost == {9}
    assert not restored.secrets


def test_two_that_lie_together_do_not_have_another_one_blamed() -> None:
    """All but what they dealt out themselves is in doubt, by them; that says their victim lied."""
    members, bad, victim = range(1, 7), (1, 2), 5
    everything = {}
    for owner in members:
        secret = os.urandom(32)
        shares = shamir.split(secret, 4, members)
        lying = (victim,) if owner in bad else bad
        told = {h: os.urandom(33) if h in lying else share for h, share in shares.items()}
        everything[owner] = shared(secret, told)
    restored = restore(everything, 4)
    assert restored.secrets.keys() == {*members}
    assert not restored.liars


def test_one_that_keeps_another_ones_share_back_does_not_have_it_blamed() -> None:
    """With no share to spare, it cannot be told who of the two it was."""
    members = range(1, 11)
    everything = {}
    for owner in members:
        secret = os.urandom(32)
        told = {h: s for h, s in shamir.split(secret, 8, members).items() if h not in (9, 10)}
        if owner == 1:
            told[2] = os.urandom(33)
        everything[owner] = shared(secret, told)
    restored = restore(everything, 8)
    assert (restored.lost, restored.dealers, restored.liars) == ({1}, set(), set())


def test_many_holders_with_some_liars() -> None:
    """More sets of shares than anybody could try; as many liars as can be told, (89 - 61) / 2."""
    members = range(1, 90)
    liars = {1, 7, 30, 77, *range(50, 60)}
    everything, secrets = {}, {owner: os.urandom(32) for owner in range(1, 6)}
    for owner, secret in secrets.items():
        shares = shamir.split(secret, 61, members)
        told = {h: false(share) if h in liars else share for h, share in shares.items()}
        everything[owner] = shared(secret, told)
    # One of which all lie about another member, who deals honestly.
    secrets[70] = os.urandom(32)
    shares = shamir.split(secrets[70], 61, members)
    lied = {h: os.urandom(33) if h % 6 == 2 and h > 5 else share for h, share in shares.items()}
    everything[70] = shared(secrets[70], lied)
    assert len([h for h in members if lied[h] != shares[h]]) == 14
    restored = restore(everything, 61)
    assert restored.secrets == secrets
    assert restored.liars == liars
    assert not restored.dealers


def begin(fleet: Fleet, count: int, *options: str) -> tuple[Bundle, Served, list[Client]]:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *OPTIONS, *options)
    return bundle, served, fleet.enrolled(served, bundle, *(f"device {i}" for i in range(count)))


def revealing(masker: Masked) -> None:
    """Lets it reveal false shares of all others' secrets."""
    honest = masker.session.unmask

    def unmask(request: pb.Unmasking) -> pb.RevealedShares:
        revealed = honest(request)
        for share in (*revealed.seeds, *revealed.keys):
            share.share = false(share.share)
        return revealed

    masker.session.unmask = unmask  # type: ignore[method-assign]


def dealing(masker: Masked) -> None:
    """Lets it deal out what nobody can open."""
    honest = masker.session.share

    def share(group: pb.MaskingGroup) -> pb.OutgoingShares:
        dealt = pb.OutgoingShares()
        dealt.CopyFrom(honest(group))
        for each in dealt.shares:
            each.sealed = bytes(len(each.sealed))
        return dealt

    masker.session.share = share  # type: ignore[method-assign]


def take_part(
    bundle: Bundle, clients: list[Client], number: int, bad: dict[int, Callable[[Masked], None]]
) -> None:
    maskers = [Masked(client, number) for client in clients]
    for index, spoil in bad.items():
        spoil(maskers[index])
    in_parallel(
        *(lambda i=i, m=m: m.run(step_of(bundle, i, number)) for i, m in enumerate(maskers))
    )


def test_false_shares_of_one_device_do_not_keep_the_sum_back(fleet: Fleet) -> None:
    """Whichever number it has in the group, and though enough shares are there without it."""
    bundle, served, clients = begin(fleet, 6, "--rounds", "2")
    for _ in range(2):
        number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
        start = vector(bundle, clients[0].download(number))
        take_part(bundle, clients, number, {3: revealing})
        served.wait_for("round_closed", round=number)
        steps = [step_of(bundle, index, number) for index in range(6)]
        got = vector(bundle, clients[0].download(number + 1))
        np.testing.assert_array_equal(got, expected(start, steps, group=6))
    served.has_said("finished")
    for refused in (event for event in served.events if event["event"] == "shares_refused"):
        assert refused["device"] == "device 3"
        assert "that it revealed are false" in refused["reason"]


def test_who_deals_out_nothing_is_named_and_the_rounds_go_on_without_it(fleet: Fleet) -> None:
    bundle, served, clients = begin(fleet, 4, "--rounds", "2")
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    take_part(bundle, clients, number, {2: dealing})
    assert "false or missing" in served.wait_for("round_abandoned", round=number)["reason"]
    refused = served.wait_for("shares_refused", round=number)
    assert refused["device"] == "device 2"
    assert "that it dealt out are false" in refused["reason"]
    with Administrator(served.administrator()) as administrator:
        administrator.revoke("device 2")
    others = [client for index, client in enumerate(clients) if index != 2]
    replies = in_parallel(*(lambda c=c: check_in_until(c, pb.CheckInReply.TRAIN) for c in others))
    assert {reply.round for reply in replies} == {number + 1}
    take_part(bundle, others, number + 1, {})
    assert served.wait_for("round_closed", round=number + 1)["updates"] == 3


def test_false_shares_are_told_though_the_quality_gate_refuses_the_round(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    gate = ("--quality-gate", str(text_dir / "test.txt"), "--rounds", "2")
    served = fleet.serve(tiny_bundle, *OPTIONS, *gate)
    clients = fleet.enrolled(served, tiny_bundle, *(f"device {i}" for i in range(6)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    maskers = [Masked(client, number) for client in clients]
    revealing(maskers[3])
    worse = np.full_like(vector(tiny_bundle, clients[0].download(number)), 3.0)
    in_parallel(*(lambda m=m: m.run(worse) for m in maskers))
    abandoned = served.wait_for("round_abandoned", round=number)
    assert "perplexity" in abandoned["reason"]
    assert served.wait_for("shares_refused", round=number)["device"] == "device 3"
