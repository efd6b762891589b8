"""Whole sessions with real processes: who trains when, what is averaged, what ends a round."""

import json
import re
import sqlite3
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import (
    Fleet,
    Served,
    check_in_until,
    enrol_with,
    files_of,
    finish,
    free_port,
    header,
    ids,
    in_parallel,
    join_round,
    mean_of,
    seen,
    serve_command,
    train,
    until,
)

from coordinator.administrator import Administrator
from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.connection import Patience
from edge_runtime.errors import AdapterError, RefusedError, UnreachableError
from edge_runtime.identity import read_identity
from edge_runtime.invitation import decode
from protos import coordinator_pb2 as pb


def device(bundle: Bundle, client: Client, seed: int) -> tuple[list[bytes], bytes]:
    """A device's whole life: its update of each round, and the final generalist."""
    sent = []
    while True:
        reply = client.check_in(5)
        if reply.action == pb.CheckInReply.FINISH:
            return sent, finish(client, reply.round)
        if reply.action == pb.CheckInReply.TRAIN:
            sent.append(train(bundle, client.download(reply.round), seed, reply.round))
            assert client.upload(header(reply.round), sent[-1]).accepted


def by_device_id(state: Path, clients: list[Client], values: list[bytes]) -> list[bytes]:
    known = ids(state)
    order = sorted(range(len(clients)), key=lambda i: known[clients[i].who.name])
    return [values[index] for index in order]


def row(served_state: Path, query: str) -> tuple[object, ...]:
    with sqlite3.connect(served_state / "coordinator.sqlite3") as connection:
        return tuple(connection.execute(query).fetchone())


def test_three_devices_two_rounds_over_tls(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "2", "--min-devices", "3", "--exit-when-done")
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    lives = in_parallel(*(lambda i=i: device(bundle, clients[i], i) for i in range(3)))
    events = served.end()

    start = wire.encode(bundle.manifest, adapters.load_fresh(bundle))
    for number in range(2):
        sent = [life[0][number] for life in lives]
        for seed, update in enumerate(sent):
            assert update == train(bundle, start, seed, number + 1)
        mean = mean_of(bundle, by_device_id(fleet.state, clients, sent))
        start = wire.encode(bundle.manifest, {"generalist": mean})
    assert [life[1] for life in lives] == [start] * 3

    kinds = [event["event"] for event in events]
    one_round = ["round_opened", *["update_accepted"] * 3, "round_closed"]
    enrolments = ["device_enrolled"] * 3
    assert kinds == ["listening", *enrolments, *one_round, *one_round, "finished"]
    closed = [event for event in events if event["event"] == "round_closed"]
    assert [event["round"] for event in closed] == [1, 2]
    assert [event["updates"] for event in closed] == [3, 3]
    # Both sides count the same messages.
    assert events[-1]["bytes_received"] == sum(client.traffic.sent for client in clients)
    assert events[-1]["bytes_sent"] == sum(client.traffic.received for client in clients)


def test_what_a_person_reads(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    listen, other = f"127.0.0.1:{free_port()}", free_port()
    options = ("--listen", listen, "--enrolment-port", str(other), "--rounds", "1")
    options = (*options, "--min-devices", "1", "--exit-when-done", "--clip-norm", "0.1")
    command = serve_command(bundle.path, fleet.state, *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        admin = fleet.state / "admin.json"
        assert process.stdout.readline() == (
            f"listening on {listen}, enrolment on 127.0.0.1:{other}; "
            f"invite devices with: comigs invite NAME --admin {admin}\n"
        )
        with Administrator(read_identity(admin)) as administrator:
            invitation = administrator.invite("ada", 600).invitation
        client = fleet.client(enrol_with(decode(invitation), bundle))
        join_round(client)
        assert not client.upload(header(1), b"nonsense").accepted
        update = train(bundle, client.download(1), 0, 1)
        assert client.upload(header(1), update).accepted
        finish(client, check_in_until(client, pb.CheckInReply.FINISH).round)
        text = process.stdout.read()
    assert process.returncode == 0
    lines = [re.sub(r"\d+\.\d s|\d+ bytes", "N", line) for line in text.splitlines()]
    assert lines[2].startswith("default: round 1: refused an update of ada: not a safetensor")
    del lines[2]
    assert lines == [
        "default: ada has enrolled",
        "default: round 1: open",
        "default: round 1: ada reported (N)",
        "default: round 1: aggregated 1 updates, 1 of them clipped, after N",
        "all rounds are over; N received, N sent",
    ]


def test_average_weighted_by_tokens(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--aggregation", "token-mean")
    clients = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(*clients)
    start = clients[0].download(1)
    weights = [100, 300]
    updates = [train(bundle, start, seed, 1) for seed in range(2)]
    for client, update, tokens in zip(clients, updates, weights, strict=True):
        assert client.upload(header(1, tokens=tokens), update).accepted
    final = check_in_until(clients[0], pb.CheckInReply.FINISH)
    got = wire.decode(bundle.manifest, clients[0].download(final.round))["generalist"]
    np.testing.assert_allclose(got, mean_of(bundle, updates, weights), rtol=1e-6, atol=1e-7)


def test_krum_bears_an_attacker(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--aggregation", "krum", "--min-devices", "5")
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy", "dot", "eve")
    join_round(*clients)
    start = clients[0].download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(4)]
    huge = np.full_like(wire.decode(bundle.manifest, start)["generalist"], 3e38)
    attack = wire.encode(bundle.manifest, {"generalist": huge})
    for client, update in zip(clients, [*updates, attack], strict=True):
        assert client.upload(header(1), update).accepted
    final = check_in_until(clients[0], pb.CheckInReply.FINISH)
    assert clients[0].download(final.round) in updates


def test_clipping_bounds_an_attacker(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--clip-norm", "0.5")
    ada, eve = fleet.enrolled(served, bundle, "ada", "eve")
    join_round(ada, eve)
    start = wire.decode(bundle.manifest, ada.download(1))["generalist"]
    for client, value in ((ada, start), (eve, np.full_like(start, -3e38))):
        update = wire.encode(bundle.manifest, {"generalist": value})
        assert client.upload(header(1), update).accepted
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    got = wire.decode(bundle.manifest, ada.download(final.round))["generalist"]
    assert np.linalg.norm(got - start) == pytest.approx(0.25, rel=1e-5)
    assert served.wait_for("round_closed")["clipped"] == 1


def test_a_result_beyond_float32_abandons_the_round(fleet: Fleet) -> None:
    """An optimizer that overflows costs a round, neither the generalist nor the coordinator."""
    bundle = fleet.bundle()
    options = ("--rounds", "1", "--server-optimizer", "momentum", "--server-rate", "2")
    served = fleet.serve(bundle, *options)
    ada, eve = fleet.enrolled(served, bundle, "ada", "eve")
    join_round(ada, eve)
    start = ada.download(1)
    huge = np.full_like(wire.decode(bundle.manifest, start)["generalist"], 3e38)
    for client in (ada, eve):
        assert client.upload(header(1), wire.encode(bundle.manifest, {"generalist": huge})).accepted
    abandoned = served.wait_for("round_abandoned")
    assert abandoned["updates"] == 2
    assert "beyond float32" in abandoned["reason"]
    assert [reply.round for reply in join_round(ada, eve)] == [2, 2]
    assert ada.download(2) == start


def test_what_a_device_is_told(fleet: Fleet) -> None:
    """Waits for company, trains (also when asked again), waits once reported."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--deadline", "600")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    assert ada.check_in(0.2).action == pb.CheckInReply.WAIT
    with pytest.raises(RefusedError, match="no generalist of round 2"):
        ada.download(2)
    first, _ = join_round(ada, ben)
    assert (first.action, first.round) == (pb.CheckInReply.TRAIN, 1)
    assert 590 < first.seconds_left <= 600
    assert first.training.local_steps == 10
    assert first.training.rounds == 1
    assert first.training.weight_decay == pytest.approx(0.01)
    again = ada.check_in(0)
    assert (again.action, again.round) == (pb.CheckInReply.TRAIN, 1)
    assert ada.upload(header(1), train(bundle, ada.download(1), 0, 1)).accepted
    assert ada.check_in(0).action == pb.CheckInReply.WAIT


def test_check_in_is_held_open_until_something_changes(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    with ThreadPoolExecutor() as pool, Administrator(served.administrator()) as administrator:
        held = pool.submit(ada.check_in, 20)
        until(lambda: seen(administrator, "ada"), "the check-in does not arrive")
        ben.check_in(5)
        assert held.result().action == pb.CheckInReply.TRAIN


def test_a_device_that_hung_up_is_not_present(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")

    with ThreadPoolExecutor() as pool, Administrator(served.administrator()) as administrator:
        held = pool.submit(ada.check_in, 20)
        until(lambda: seen(administrator, "ada"), "the check-in does not arrive")
        ada.close()
        with pytest.raises(ValueError, match="closed channel"):
            held.result()
    assert ben.check_in(0.5).action == pb.CheckInReply.WAIT


def test_replay_is_acknowledged_and_counted_once(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(3)]
    assert ada.upload(header(1), updates[0]).accepted
    assert ada.upload(header(1), updates[0]).accepted
    other = ada.upload(header(1), updates[2])
    assert not other.accepted
    assert "already accepted" in other.reason
    assert ben.upload(header(1), updates[1]).accepted
    check_in_until(ben, pb.CheckInReply.FINISH)
    # The acknowledgement may also have been lost just before the round closed.
    assert ada.upload(header(1), updates[0]).accepted
    assert served.wait_for("round_closed")["updates"] == 2
    expected = mean_of(bundle, by_device_id(fleet.state, [ada, ben], updates[:2]))
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    assert wire.decode(bundle.manifest, ada.download(final.round))["generalist"].tobytes() == (
        expected.tobytes()
    )
    assert row(fleet.state, "select count(*) from updates") == (2,)
    assert row(fleet.state, "select count(*) from refusals") == (1,)


def test_outsiders_and_wrong_rounds_are_refused(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    ada, ben, cy = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    start = ada.download(1)
    update = train(bundle, start, 0, 1)
    assert "has not begun" in ada.upload(header(1), update).reason
    join_round(ada, ben)
    assert "takes no part in round 1" in cy.upload(header(1), update).reason
    assert "has not begun" in ada.upload(header(2), update).reason
    assert "round 0 is over" in ada.upload(header(0), update).reason


def test_deadline_with_enough_reports_closes_the_round(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "2", "--deadline", "2")
    ada, ben, cy = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(ada, ben, cy)
    start = ada.download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(3)]
    assert ada.upload(header(1), updates[0]).accepted
    assert ben.upload(header(1), updates[1]).accepted
    closed = served.wait_for("round_closed")
    assert closed["updates"] == 2
    assert 1.9 < closed["seconds"] < 4
    late = cy.upload(header(1), updates[2])
    assert (late.accepted, late.reason) == (False, "round 1 is over")
    final = check_in_until(cy, pb.CheckInReply.FINISH)
    expected = mean_of(bundle, by_device_id(fleet.state, [ada, ben], updates[:2]))
    assert cy.download(final.round) == wire.encode(bundle.manifest, {"generalist": expected})


def test_deadline_with_too_few_reports_abandons_the_round(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "2", "--deadline", "2")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    abandoned = served.wait_for("round_abandoned")
    assert (abandoned["updates"], abandoned["reason"]) == (1, "too few updates at its deadline")
    # Alone, a device is not sent to train for nothing.
    assert ada.check_in(0.3).action == pb.CheckInReply.WAIT
    replies = join_round(ada, ben)
    assert [reply.round for reply in replies] == [2, 2]
    assert ada.download(2) == start
    updates = [train(bundle, start, seed, 2) for seed in range(2)]
    assert ada.upload(header(2), updates[0]).accepted
    assert ben.upload(header(2), updates[1]).accepted
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    assert final.round == 3
    expected = mean_of(bundle, by_device_id(fleet.state, [ada, ben], updates))
    assert ada.download(3) == wire.encode(bundle.manifest, {"generalist": expected})
    assert row(fleet.state, "select group_concat(status) from rounds") == (
        "abandoned,aggregated,waiting",
    )


def test_devices_of_the_last_round_are_waited_for(fleet: Fleet) -> None:
    """Two of three come back at once: the next round must not close without the third."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "2", "--min-devices", "2")
    trio = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(*trio)
    start = trio[0].download(1)
    for seed, client in enumerate(trio):
        assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
    join_round(*trio[:2])
    start = trio[0].download(2)
    for seed, client in enumerate(trio[:2]):
        assert client.upload(header(2), train(bundle, start, seed, 2)).accepted
    assert trio[0].check_in(0.5).action == pb.CheckInReply.WAIT
    join_round(trio[2])
    assert trio[2].upload(header(2), train(bundle, start, 2, 2)).accepted
    assert served.wait_for("round_closed", round=2)["updates"] == 3


def test_a_restart_keeps_the_round_and_restarts_its_clock(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    options = ("--rounds", "1", "--deadline", "600")
    served = fleet.serve(bundle, *options)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(2)]
    assert ada.upload(header(1), updates[0]).accepted
    address = served.ready()
    served.stop()
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        connection.execute("update rounds set deadline = 1")
    again: Served = fleet.serve(bundle, *options, "--enrolment-port", "0", listen=address)
    resumed = again.wait_for("round_resumed")
    assert (resumed["round"], resumed["updates"]) == (1, 1)
    assert 590 < check_in_until(ben, pb.CheckInReply.TRAIN).seconds_left <= 600
    assert ben.upload(header(1), updates[1]).accepted
    expected = mean_of(bundle, by_device_id(fleet.state, [ada, ben], updates))
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    assert ada.download(final.round) == wire.encode(bundle.manifest, {"generalist": expected})
    # Updates are personal; they are gone once they are in the average.
    until(lambda: not files_of(fleet.state, "updates/*/*"), "updates stay")


def test_a_round_that_a_restart_has_no_use_for_is_ended(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "3", "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    assert ada.upload(header(1), train(bundle, ada.download(1), 0, 1)).accepted
    served.wait_for("round_opened", round=2)
    address = served.ready()
    served.stop()
    again = fleet.serve(
        bundle, "--rounds", "1", "--min-devices", "1", "--enrolment-port", "0", listen=address
    )
    assert again.wait_for("round_abandoned", round=2)["reason"] == "no more rounds are wanted"
    check_in_until(ada, pb.CheckInReply.FINISH)


def beyond(payload: bytes) -> bytes:
    """`payload`, with tensors at places that no file has."""
    end = 8 + int.from_bytes(payload[:8], "little")
    tensors = json.loads(payload[8:end])
    for tensor in tensors.values():
        tensor["data_offsets"] = [2**70, 2**70]
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content + payload[end:]


@pytest.mark.parametrize("damage", ["missing", "truncated", "nonsense", "beyond"])
def test_a_damaged_update_costs_that_update_only(fleet: Fleet, damage: str) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1")
    trio = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(*trio)
    start = trio[0].download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(3)]
    assert trio[0].upload(header(1), updates[0]).accepted
    (file,) = fleet.state.glob("updates/*/*.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        nonsense = b"x" * len(updates[0])
        written = {"truncated": updates[0][:-5], "nonsense": nonsense, "beyond": beyond(updates[0])}
        file.write_bytes(written[damage])
    for client, update in zip(trio[1:], updates[1:], strict=True):
        assert client.upload(header(1), update).accepted
    damaged = served.wait_for("update_damaged")
    assert damaged["device"] == "ada"
    assert "missing or damaged" in damaged["reason"]
    assert served.wait_for("round_closed")["updates"] == 2
    final = check_in_until(trio[1], pb.CheckInReply.FINISH)
    expected = mean_of(bundle, by_device_id(fleet.state, trio[1:], updates[1:]))
    assert trio[1].download(final.round) == wire.encode(bundle.manifest, {"generalist": expected})
    assert row(fleet.state, "select count(*) from updates") == (2,)
    assert row(fleet.state, "select count(*) from refusals") == (1,)


def test_a_round_short_of_a_damaged_update_waits_for_another(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "2")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(2)]
    assert ada.upload(header(1), updates[0]).accepted
    next(fleet.state.glob("updates/*/*.safetensors")).write_bytes(updates[0][:-5])
    assert ben.upload(header(1), updates[1]).accepted
    served.wait_for("update_damaged")
    assert ada.upload(header(1), updates[0]).accepted, "whoever still has it may send it again"
    assert served.wait_for("round_closed")["updates"] == 2


def test_a_missing_generalist_is_told_in_one_line(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    update = train(bundle, ada.download(1), 0, 1)
    next(fleet.state.glob("generalists/*")).unlink()
    assert ada.upload(header(1), update).accepted
    assert served.process.wait(timeout=30) == AdapterError.code
    assert "restore the state directory" in served.stderr()


def flip_a_bit(path: Path) -> None:
    """Of the last number's mantissa: it is as good a generalist as before."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("when", ["at the start", "at the end of a round"])
def test_a_flipped_bit_in_the_generalist_is_noticed(fleet: Fleet, when: str) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    update = train(bundle, ada.download(1), 0, 1)
    (generalist,) = fleet.state.glob("generalists/*")
    flip_a_bit(generalist)
    if when == "at the start":
        served.stop()
        served = fleet.serve(bundle, "--min-devices", "1")
    else:
        assert ada.upload(header(1), update).accepted
    assert served.process.wait(timeout=30) == AdapterError.code
    assert "does not match its SHA-256; restore" in served.stderr()
    assert served.has_said("listening") == (when != "at the start"), "nobody is let in before"


@pytest.mark.timeout(60)
def test_a_device_does_not_download_a_damaged_generalist_without_end(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=60_000)
    served = fleet.serve(bundle, "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    flip_a_bit(next(fleet.state.glob("generalists/*")))
    hasty = fleet.client(ada.who, Patience(1, lambda _: None))
    with pytest.raises(UnreachableError, match="arrived damaged"):
        hasty.download(1)


def test_other_settings_than_before_are_told(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    training = fleet.directory / "training.json"
    training.write_text('{"local_steps": 7, "tau": 0}')
    served = fleet.serve(bundle, "--rounds", "2")
    served.ready()
    served.stop()
    options = ("--rounds", "5", "--aggregation", "median", "--training", str(training))
    options = (*options, "--compression", "int8", "--compression", "float16")
    again = fleet.serve(bundle, *options)
    assert again.wait_for("settings_changed")["changes"] == {
        "compression": [None, "int8, float16"],
        "recipe": ["mean", "median"],
        "rounds": [2, 5],
        "training.local_steps": [10, 7],
        "training.tau": [30, 0],
    }
    again.ready()
    again.stop()
    third = fleet.serve(bundle, *options)
    third.ready()
    assert "settings_changed" not in [event["event"] for event in third.stop()]
    options = ("--secure-aggregation", "--min-devices", "3", "--devices-per-round", "9")
    options = (*options, "--clip-norm", "0.5", "--dp-noise", "4", "--dp-budget", "8")
    private = fleet.serve(bundle, *options).wait_for("settings_changed")["changes"]
    assert private["secure_aggregation"] == [None, "75% have to stay, 60 s a stage"]
    assert private["privacy"] == [None, "noise 4, delta 1e-05, epsilon up to 8"]
