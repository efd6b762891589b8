"""Secure aggregation between real devices' sessions and a coordinator process, over TLS."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import (
    Fleet,
    Served,
    check_in_until,
    files_of,
    free_port,
    in_parallel,
)
from masking_help import Masked, expected, joined, say, step_of, vector

from coordinator.administrator import Administrator
from coordinator.listing import rounds, table
from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.errors import RefusedError
from protos import coordinator_pb2 as pb

SOAK = bool(os.environ.get("COMIGS_SOAK"))
MASKED = ("--secure-aggregation", "--min-devices", "3")


def far(bundle: Bundle, device: int, number: int) -> np.ndarray:
    """A step of which one coordinate is beyond what masked numbers can say."""
    step = step_of(bundle, device, number)
    step[device] = 1.5
    return step


def play(bundle: Bundle, clients: list[Client], number: int, leaving: dict[int, str]) -> list[str]:
    """A round of steps that go `far`, in which the devices in `leaving` vanish at a stage."""
    return in_parallel(
        *(
            lambda index=index, client=client: Masked(client, number).run(
                far(bundle, index, number), until=leaving.get(index)
            )
            for index, client in enumerate(clients)
        )
    )


DEVICES = 8
CI_PLANS: list[dict[int, str]] = [{}, {1: "share", 2: "mask", 3: "agree"}]
"""Devices that vanish instead of answering in a stage; three of eight may."""


def soak_plans() -> list[dict[int, str]]:
    """Sixty-six, with every three stages among them."""
    draw = random.Random(5)
    stages = itertools.product(("share", "mask", "agree", "unmask"), repeat=3)
    plans = [dict(zip(draw.sample(range(DEVICES), 3), three, strict=True)) for three in stages]
    return [*CI_PLANS, *plans]


def test_the_sum_is_exact_whoever_drops_out_in_whatever_stage(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    plans = soak_plans() if SOAK else CI_PLANS
    # In so many rounds nobody may be late by chance, whatever else the machine does.
    seconds = "15" if SOAK else "2"
    options = ("--secure-threshold", "0.6", "--stage-seconds", seconds)
    options = (*options, "--rounds", str(len(plans)))
    served = fleet.serve(bundle, *MASKED, *options)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(DEVICES)))
    clipped = []
    for leaving in plans:
        number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
        start = vector(bundle, clients[0].download(number))
        play(bundle, clients, number, leaving)
        closed = served.wait_for("round_closed", round=number)
        summed = [i for i in range(DEVICES) if leaving.get(i) not in ("share", "mask")]
        assert closed["updates"] == len(summed)
        steps = [far(bundle, index, number) for index in summed]
        assert closed["clipped_coordinates"] == len(summed)
        clipped.append(f"coordinates clipped: {len(summed)}")
        got = vector(bundle, clients[0].download(number + 1))
        np.testing.assert_array_equal(got, expected(start, steps, group=DEVICES))
    told = [line.partition("; ")[2] for line in table(rounds(fleet.state))[1:]]
    assert told == clipped


def test_who_has_not_trained_at_the_deadline_is_left_out(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *MASKED, "--rounds", "1", "--deadline", "3")
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(5)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    play(bundle, clients, number, {2: "keys"})
    served.wait_for("round_closed", round=number)
    late = Masked(clients[2], number)
    assert late.run(step_of(bundle, 2, number)) == "", "the round is over"
    steps = [far(bundle, index, number) for index in (0, 1, 3, 4)]
    got = vector(bundle, clients[0].download(number + 1))
    np.testing.assert_array_equal(got, expected(start, steps, group=4))


@pytest.mark.parametrize(
    "stage", ["share", "mask", "agree", "unmask"] if SOAK else ["agree", "unmask"]
)
def test_below_the_threshold_nothing_is_learnt(fleet: Fleet, stage: str) -> None:
    """Four of eight vanish. Fewer shares than it takes are revealed, or none at all."""
    bundle = fleet.bundle()
    options = ("--secure-threshold", "0.6", "--stage-seconds", "2", "--rounds", "1")
    served = fleet.serve(bundle, *MASKED, *options)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(DEVICES)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    before = clients[0].download(number)
    maskers = [Masked(client, number) for client in clients]
    in_parallel(
        *(
            lambda i=i, m=m: m.run(step_of(bundle, i, number), until=stage if i < 4 else None)
            for i, m in enumerate(maskers)
        )
    )
    served.wait_for("round_abandoned", round=number)
    assert clients[0].download(number + 1) == before
    revealing = [masker for masker in maskers if masker.revealed]
    assert len(revealing) == (4 if stage == "unmask" else 0)
    assert all(masker.group.threshold == 5 for masker in maskers if masker.group.threshold)
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        for table in ("masking_members", "masking_groups", "updates"):
            (rows,) = connection.execute(f"select count(*) from {table}").fetchone()
            assert rows == 0 or table == "updates"
    assert not files_of(fleet.state, "updates/*/*.safetensors")


def test_a_coordinator_that_is_killed_in_any_stage_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    """When shares are being revealed; in a soak, in every stage and while one device is gone. With
    other settings of the training, which do not concern what is trained already."""
    bundle = fleet.bundle()
    training = tmp_path / "training.json"
    training.write_text('{"localSteps": 7}')
    listen = f"127.0.0.1:{free_port()}"
    rounds = "4" if SOAK else "1"
    # Long enough for devices to come back to a coordinator that was away.
    options = (*MASKED, "--secure-threshold", "0.6", "--stage-seconds", "12", "--rounds", rounds)
    options = (*options, "--enrolment-port", "0")
    leaving = {4: "mask"} if SOAK else {}
    served = fleet.serve(bundle, *options, listen=listen)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(5)))
    for stage in ("share", "mask", "agree", "unmask") if SOAK else ("unmask",):
        number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
        start = vector(bundle, clients[0].download(number))
        maskers = [Masked(client, number) for client in clients]
        reached = threading.Event()
        maskers[0].reached = stage, reached

        def killed(served: Served = served, reached: threading.Event = reached) -> Served:
            assert reached.wait(30)
            served.kill()
            return fleet.serve(bundle, *options, "--training", training, listen=listen)

        *_, served = in_parallel(
            *(
                lambda i=i, m=m, n=number: m.run(step_of(bundle, i, n), until=leaving.get(i))
                for i, m in enumerate(maskers)
            ),
            killed,
        )
        served.wait_for("round_closed", round=number)
        steps = [step_of(bundle, i, number) for i in range(5) if i not in leaving]
        got = vector(bundle, clients[0].download(number + 1))
        np.testing.assert_array_equal(got, expected(start, steps, group=5))


def test_a_round_does_not_go_on_with_another_training(fleet: Fleet, tmp_path: Path) -> None:
    """Its devices would no longer be told the same."""
    bundle = fleet.bundle()
    listen = f"127.0.0.1:{free_port()}"
    options = (*MASKED, "--rounds", "2", "--enrolment-port", "0")
    served = fleet.serve(bundle, *options, listen=listen)
    clients = fleet.enrolled(served, bundle, "ada", "ben", "eve")
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    keys = Masked(clients[0], number).session.advertisement
    assert say(clients[0], number, wait=0, keys=keys).HasField("wait")
    served.kill()
    training = tmp_path / "training.json"
    training.write_text('{"rounds": 2, "localSteps": 7}')
    again = fleet.serve(bundle, *options, "--training", training, listen=listen)
    assert "other training" in again.wait_for("round_abandoned", round=number)["reason"]
    train = pb.CheckInReply.TRAIN
    replies = in_parallel(*(lambda c=c: check_in_until(c, train) for c in clients))
    assert {(reply.round, reply.training.local_steps) for reply in replies} == {(number + 1, 7)}


def test_a_device_that_signs_something_else_is_refused_and_the_round_goes_on(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    options = ("--secure-threshold", "0.6", "--rounds", "1")
    served = fleet.serve(bundle, *MASKED, *options)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(4)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    maskers = [Masked(client, number) for client in clients]
    steps = [step_of(bundle, index, number) for index in range(4)]
    honest = maskers[3].session.agree

    def another(survivors: pb.Survivors) -> pb.Agreement:
        return pb.Agreement(index=honest(survivors).index, signature=b"of something else")

    maskers[3].session.agree = another  # type: ignore[method-assign]

    def refused() -> None:
        with pytest.raises(RefusedError, match="not of what this device was told"):
            maskers[3].run(steps[3])

    in_parallel(
        *(lambda m=m, s=s: m.run(s) for m, s in zip(maskers[:3], steps, strict=False)), refused
    )
    assert served.wait_for("update_refused")["device"] == "device 3"
    served.wait_for("round_closed", round=number)
    got = vector(bundle, clients[0].download(number + 1))
    # Its step had come, so it is in the sum.
    np.testing.assert_array_equal(got, expected(start, steps, group=4))


@pytest.mark.parametrize("devices", [4, 8])
def test_what_a_round_costs_a_device(fleet: Fleet, devices: int) -> None:
    """Six calls, and a step as large as the update that it stands for; docs/privacy.md has what
    this prints with -s."""
    bundle = fleet.bundle(width=5000)
    served = fleet.serve(bundle, *MASKED, "--rounds", "1")
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(devices)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    maskers = [Masked(client, number) for client in clients]
    before = [(client.traffic.sent, client.traffic.received) for client in clients]
    in_parallel(
        *(lambda i=i, m=m: m.run(step_of(bundle, i, number)) for i, m in enumerate(maskers))
    )
    served.wait_for("round_closed", round=number)
    plain = len(wire.encode(bundle.manifest, {"generalist": step_of(bundle, 0, number)}))
    for masker, client, (sent, received) in zip(maskers, clients, before, strict=True):
        more = client.traffic.sent - sent - plain
        got = client.traffic.received - received
        assert masker.calls == 6
        # A certificate's length varies a little, and so do a signature's and a name's.
        assert more < 1200 + 160 * (devices - 1)
        assert got < 400 + 850 * (devices - 1)
    print(f"\n{devices} devices: {more} bytes more sent, {got} received in {masker.calls} calls")


def test_a_device_goes_on_when_rounds_are_without_it_from_now_on(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    reply = ada.aggregate(pb.AggregateRequest(round=1))
    assert reply.over.reason == "rounds are without secure aggregation"


def test_a_round_that_began_with_keys_is_not_gone_on_with_without_them(fleet: Fleet) -> None:
    """Its device would not train in it again, and would be waited for until the deadline."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *MASKED)
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    reply = say(clients[0], number, keys=Masked(clients[0], number).session.advertisement)
    assert reply.WhichOneof("next") == "wait"
    address = served.ready()
    served.stop()
    served = fleet.serve(bundle, "--min-devices", "3", listen=address)
    assert "it began with other training or privacy" in served.wait_for("round_abandoned")["reason"]


def test_a_masked_step_that_cannot_be_read_for_now_is_not_given_up(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *MASKED, "--rounds", "1")
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    maskers = [Masked(client, number) for client in clients]
    asked, one_at_a_time = threading.Event(), threading.Lock()
    aside = fleet.directory / "aside"
    hidden: list[Path] = []

    def hide() -> None:  # when all have sent theirs, and before anybody reveals what sums them up
        with one_at_a_time:
            if asked.is_set() and not hidden:
                hidden.append(files_of(fleet.state, "updates/*/*.safetensors")[0])
                hidden[0].rename(aside)
                hidden[0].symlink_to(hidden[0])  # "too many levels of symbolic links"

    def mend() -> None:
        assert "cannot read updates/" in served.wait_for("storage_failed")["reason"]
        aside.replace(hidden[0])

    for masker in maskers:
        masker.reached = ("unmask", asked)
    steps = [step_of(bundle, index, number) for index in range(3)]
    pairs = zip(maskers, steps, strict=True)
    in_parallel(*(lambda m=m, step=step: m.run(step, pause=hide) for m, step in pairs), mend)
    assert served.wait_for("round_closed", round=number)["updates"] == 3
    got = vector(bundle, clients[0].download(number + 1))
    np.testing.assert_array_equal(got, expected(start, steps, group=3))


def test_a_masked_step_that_is_lost_ends_the_round_and_names_nobody(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *MASKED, "--rounds", "1")
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    maskers = [Masked(client, number) for client in clients]
    asked, one_at_a_time = threading.Event(), threading.Lock()
    damaged: list[Path] = []

    def damage() -> None:
        with one_at_a_time:
            if asked.is_set() and not damaged:
                damaged.append(files_of(fleet.state, "updates/*/*.safetensors")[0])
                damaged[0].write_bytes(b"")

    for masker in maskers:
        masker.reached = ("unmask", asked)
    steps = [step_of(bundle, index, number) for index in range(3)]
    pairs = zip(maskers, steps, strict=True)
    in_parallel(*(lambda m=m, step=step: m.run(step, pause=damage) for m, step in pairs))
    assert damaged
    reason = served.wait_for("round_abandoned", round=number)["reason"]
    assert reason == "a masked step was lost or damaged after it had been accepted"


def test_two_cohorts_at_once(fleet: Fleet) -> None:
    """Each sums up its own devices, in a round of the same number, though one of each vanishes."""
    bundles = [fleet.bundle(), fleet.bundle(width=24)]
    options = (*MASKED, "--secure-threshold", "0.6", "--stage-seconds", "3", "--rounds", "1")
    served = fleet.serve(bundles[0], "--bundle", str(bundles[1].path), *options)
    members = [
        (bundle, fleet.enrolled(served, bundle, *(f"{place} {i}" for i in range(4))))
        for place, bundle in enumerate(bundles)
    ]
    everybody = [client for _, clients in members for client in clients]
    assert set(in_parallel(*(lambda c=c: joined([c]) for c in everybody))) == {1}
    starts = [vector(bundle, clients[0].download(1)) for bundle, clients in members]
    leaving = {0: {3: "mask"}, 1: {2: "agree"}}
    in_parallel(
        *(
            lambda b=bundle, c=clients, p=place: play(b, c, 1, leaving[p])
            for place, (bundle, clients) in enumerate(members)
        )
    )
    closed = [served.wait_for("round_closed") for _ in members]
    assert len({event["cohort"] for event in closed}) == 2
    for place, (bundle, clients) in enumerate(members):
        summed = [i for i in range(4) if leaving[place].get(i) != "mask"]
        steps = [far(bundle, index, 1) for index in summed]
        got = vector(bundle, clients[0].download(2))
        np.testing.assert_array_equal(got, expected(starts[place], steps, group=4))
    assert members[0][0].manifest != members[1][0].manifest


def test_another_takes_the_place_of_a_device_that_is_revoked_before_the_group_is_made(
    fleet: Fleet,
) -> None:
    bundle = fleet.bundle()
    selection = ("--devices-per-round", "3", "--over-selection", "2")
    served = fleet.serve(bundle, *MASKED, *selection)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(6)))
    (number,) = set(in_parallel(*(lambda c=c: joined([c]) for c in clients)))
    maskers = [Masked(client, number) for client in clients[:4]]
    advertised = [(m.client, m.session.advertisement) for m in maskers]
    for client, keys in advertised[:2]:
        say(client, number, 0, keys=keys)
    with Administrator(served.administrator()) as administrator:
        administrator.revoke("device 0")
    for client, keys in advertised[2:]:
        assert say(client, number, 0, keys=keys).WhichOneof("next") != "over"
    assert served.wait_for("masking_began", round=number)["devices"] == 3
