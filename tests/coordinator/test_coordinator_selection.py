"""Some devices per round: who is chosen, when a round has enough, and what comes too late."""

import collections
import math
import sqlite3

import pytest
from coordinator_help import (
    Fleet,
    Served,
    check_in_until,
    header,
    in_parallel,
    join_round,
    mean_of,
    train,
)
from hypothesis import given
from hypothesis import strategies as st

from coordinator.selection import Selection, select
from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from protos import coordinator_pb2 as pb

NAMES = st.sets(st.text(min_size=1, max_size=8), max_size=12)


@given(NAMES, st.integers(1, 5), st.sampled_from([1.0, 1.1, 1.3, 2.0]), st.integers(), st.randoms())
def test_a_choice_is_a_subset_whatever_the_order(
    names: set[str], wanted: int, over: float, seed: int, shuffle: object
) -> None:
    selection = Selection(wanted, over, seed)
    listed = sorted(names)
    chosen = selection.choose(3, listed)
    shuffle.shuffle(listed)
    assert selection.choose(3, listed) == chosen
    assert set(chosen) <= names
    assert len(set(chosen)) == len(chosen) == min(len(names), selection.selected)
    # Who is chosen stays chosen when another is not there.
    without = [name for name in listed if name in chosen or len(names) == len(chosen)]
    assert selection.choose(3, without) == chosen


def test_how_many_are_selected() -> None:
    pairs = [(10, 1.3), (10, 1.1), (3, 1.3), (1, 1.0), (2, 1.5), (100, 1.3)]
    assert [Selection(*pair, 0).selected for pair in pairs] == [13, 11, 4, 1, 3, 130]


def test_every_device_has_its_turn() -> None:
    """5 of 20 in 2,000 rounds: 500 turns each on average, with a standard deviation of 19."""
    names = [f"device {index}" for index in range(20)]
    selection = Selection(5, 1.0, seed=1)
    turns = collections.Counter(
        name for number in range(2000) for name in selection.choose(number, names)
    )
    assert max(abs(turns[name] - 500) for name in names) < 80
    assert Selection(5, 1.0, seed=2).choose(1, names) != selection.choose(1, names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, 1.5, None), "--over-selection means nothing without --devices-per-round"),
        ((None, None, 7), "--seed means nothing without --devices-per-round"),
        ((2, None, None), "--devices-per-round 2 is less than the 3 updates"),
        ((3, 0.5, None), "--over-selection 0.5 is not a number of at least 1"),
        ((3, math.nan, None), "--over-selection nan"),
        ((3, math.inf, None), "--over-selection inf"),
    ],
)
def test_wrong_choices_are_told_in_one_line(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(*options, min_devices=3)


def test_a_seed_is_drawn_if_none_is_given() -> None:
    assert select(None, None, None, min_devices=1) is None
    one, other = (select(3, None, None, min_devices=1) for _ in range(2))
    assert one.seed != other.seed
    assert str(one) == str(other), "or every start would tell of other settings"
    assert one.selected == 4


# With real processes


def told_to_train(clients: dict[str, Client]) -> set[str]:
    replies = {name: client.check_in(0) for name, client in clients.items()}
    return {name for name, reply in replies.items() if reply.action == pb.CheckInReply.TRAIN}


def start(fleet: Fleet, bundle: Bundle, names: str, *options: str) -> tuple[Served, dict]:
    served = fleet.serve(bundle, "--seed", "7", *options)
    clients = dict(zip(names, fleet.enrolled(served, bundle, *names), strict=True))
    return served, clients


def test_a_round_selects_more_than_it_wants_and_closes_without_the_last(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served, clients = start(
        fleet, bundle, "abcdef", "--devices-per-round", "2", "--over-selection", "1.5"
    )
    for name in "abc":
        clients[name].check_in(0)
    served.wait_for("round_opened", round=1)
    assert told_to_train(clients) == set("abc"), "d, e and f came after the round had begun"
    begin = clients["a"].download(1)
    updates = {name: train(bundle, begin, seed, 1) for seed, name in enumerate("abcdef")}
    assert "takes no part in round 1" in clients["d"].upload(header(1), updates["d"]).reason
    for name in "ab":
        assert clients[name].upload(header(1), updates[name]).accepted
    closed = served.wait_for("round_closed", round=1)
    assert closed["updates"] == 2
    late = clients["c"].upload(header(1), updates["c"])
    assert (late.accepted, late.reason) == (False, "round 1 is over")

    # Those who waited and those who reported are candidates of the next round; c was away.
    served.wait_for("round_opened", round=2)
    expected = set(Selection(2, 1.5, seed=7).choose(2, "abdef"))
    assert told_to_train(clients) == expected
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        reasons = connection.execute("select reason from refusals order by id").fetchall()
    assert reasons == [("this device takes no part in round 1",), ("round 1 is over",)]


def test_exactly_the_wanted_updates_count_when_all_come_at_once(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served, clients = start(
        fleet, bundle, "abcdefgh", "--rounds", "1", *("--devices-per-round", "2"),
        *("--over-selection", "4"),
    )  # fmt: skip
    join_round(*clients.values())
    begin = clients["a"].download(1)
    updates = {name: train(bundle, begin, seed, 1) for seed, name in enumerate(clients)}
    replies = in_parallel(
        *(lambda n=name: (n, clients[n].upload(header(1), updates[n])) for name in clients)
    )
    accepted = [name for name, reply in replies if reply.accepted]
    assert len(accepted) == 2
    for _, reply in replies:
        assert reply.accepted or reply.reason in (
            "round 1 is over",
            "round 1 has all the updates that it wanted",
        )
    assert served.wait_for("round_closed")["updates"] == 2
    final = check_in_until(clients["h"], pb.CheckInReply.FINISH)
    # Of two numbers either order gives the same sum.
    expected = mean_of(bundle, [updates[name] for name in accepted])
    got = wire.decode(bundle.manifest, clients["h"].download(final.round))["generalist"]
    assert got.tobytes() == expected.tobytes()


def test_a_small_fleet_begins_with_what_is_there(fleet: Fleet) -> None:
    """Two of the three that would be selected, after a while; one reports before the deadline."""
    bundle = fleet.bundle()
    served, clients = start(
        fleet, bundle, "ab", "--devices-per-round", "2", *("--over-selection", "1.5"),
        *("--min-devices", "1"), *("--deadline", "1"),
    )  # fmt: skip
    assert told_to_train(clients) == set()
    join_round(*clients.values())
    update = train(bundle, clients["a"].download(1), 0, 1)
    assert clients["a"].upload(header(1), update).accepted
    assert served.wait_for("round_closed")["updates"] == 1


def test_a_kill_changes_nobody_s_part(fleet: Fleet) -> None:
    """Also with a new seed: who takes part was settled when the round opened."""
    bundle = fleet.bundle()
    options = ("--devices-per-round", "2", "--over-selection", "1")
    served, clients = start(fleet, bundle, "abcd", *options)
    for name in "ab":
        clients[name].check_in(0)
    served.wait_for("round_opened", round=1)
    assert told_to_train(clients) == set("ab")
    served.kill()
    again = fleet.serve(bundle, *options, "--seed", "8", listen=served.events[0]["address"])
    again.wait_for("round_resumed")
    assert told_to_train(clients) == set("ab")
    begin = clients["a"].download(1)
    for seed, name in enumerate("ab"):
        assert clients[name].upload(header(1), train(bundle, begin, seed, 1)).accepted
    again.wait_for("round_opened", round=2)
