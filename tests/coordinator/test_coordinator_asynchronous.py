"""Asynchronous rounds: what counts, when, with which weight, and that a kill changes none of it."""

import hashlib
import math
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import (
    TIMEOUT,
    Fleet,
    Served,
    check_in_until,
    files_of,
    finish,
    free_port,
    header,
    ids,
    in_parallel,
    join_round,
    make_manifest,
    misused,
    train,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coordinator_listing import rows

from coordinator.administrator import Administrator
from coordinator.aggregation import Contribution, Recipe, aggregate
from coordinator.aggregation.optimizers import Adam
from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.compression import NAMES, compress, decompress
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb

TRAIN, WAIT, FINISH = pb.CheckInReply.TRAIN, pb.CheckInReply.WAIT, pb.CheckInReply.FINISH
MANIFEST = make_manifest(width=2, rank=1)
SIZE = next(role.size for role in MANIFEST.roles if role.shared)
SOAK = bool(os.environ.get("COMIGS_SOAK"))
KILLS = 60 if SOAK else 6

numbers = st.floats(-100, 100, width=32)
vectors = st.lists(numbers, min_size=SIZE, max_size=SIZE).map(lambda v: np.array(v, np.float32))
# Of each update: what it is, how far behind it started, and its tokens.
buffers = st.lists(st.tuples(vectors, st.integers(0, 3), st.integers(1, 1000)), min_size=1)


def reference(
    generalists: list[np.ndarray],
    updates: list[tuple[np.ndarray, int, int]],
    *,
    by_tokens: bool = False,
    clip_norm: float = math.inf,
) -> list[float]:
    """FedBuff with s(t) = (1 + t)^(-1/2), in Python's floats: the last of `generalists` plus the
    weighted mean of the steps, each from the generalist so many before the last."""
    steps, weights = [], []
    for vector, behind, tokens in updates:
        step = [float(y) - float(x) for y, x in zip(vector, generalists[-1 - behind], strict=True)]
        norm = math.sqrt(math.fsum(d * d for d in step))
        steps.append([d * min(1.0, clip_norm / norm) if norm else d for d in step])
        weights.append((1 + behind) ** -0.5 * (tokens if by_tokens else 1))
    total = math.fsum(weights)
    return [
        float(x) + math.fsum(w * step[i] for w, step in zip(weights, steps, strict=True)) / total
        for i, x in enumerate(generalists[-1])
    ]


def aggregated(
    recipe: Recipe,
    generalists: list[np.ndarray],
    updates: list[tuple[np.ndarray, int, int]],
    order: list[int] | None = None,
) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        began = [Path(folder, f"generalist-{index}") for index in range(len(generalists))]
        for path, generalist in zip(began, generalists, strict=True):
            path.write_bytes(wire.encode(MANIFEST, {"generalist": generalist}))
        contributions = []
        for index, (vector, behind, tokens) in enumerate(updates):
            path = Path(folder, str(index))
            path.write_bytes(wire.encode(MANIFEST, {"generalist": vector}))
            start = began[-1 - behind] if behind else None
            contributions.append(
                Contribution(f"{index:03}", path, tokens, began=start, staleness=behind)
            )
        outcome = aggregate(
            MANIFEST,
            recipe,
            incoming={"generalist": generalists[-1]},
            contributions=[contributions[i] for i in order or range(len(updates))],
        )
        return outcome.generalist["generalist"]


@settings(max_examples=50, deadline=None)
@given(st.lists(vectors, min_size=4, max_size=4), buffers, st.booleans(), st.randoms())
def test_the_mean_of_the_steps(
    generalists: list[np.ndarray],
    updates: list[tuple[np.ndarray, int, int]],
    by_tokens: bool,
    shuffle: random.Random,
) -> None:
    recipe = Recipe("token-mean" if by_tokens else "mean")
    got = aggregated(recipe, generalists, updates)
    expected = reference(generalists, updates, by_tokens=by_tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    order = list(range(len(updates)))
    shuffle.shuffle(order)
    assert aggregated(recipe, generalists, updates, order).tobytes() == got.tobytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(vectors, min_size=4, max_size=4), buffers)
def test_clipping_is_of_what_a_device_did_not_of_how_old_it_is(
    generalists: list[np.ndarray], updates: list[tuple[np.ndarray, int, int]]
) -> None:
    got = aggregated(Recipe("mean", clip_norm=2.5), generalists, updates)
    expected = reference(generalists, updates, clip_norm=2.5)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    assert np.linalg.norm(got.astype(np.float64) - generalists[-1]) < 2.5 + 1e-3


@settings(max_examples=30, deadline=None)
@given(st.lists(vectors, min_size=4, max_size=4), buffers)
def test_a_server_optimizer_takes_the_mean_of_the_steps_as_its_gradient(
    generalists: list[np.ndarray], updates: list[tuple[np.ndarray, int, int]]
) -> None:
    got = aggregated(Recipe("mean", optimizer=Adam(rate=0.5)), generalists, updates)
    start = generalists[-1].astype(np.float64)
    delta = np.array(reference(generalists, updates)) - start
    m, v = 0.1 * delta, 0.99 * 1e-6 + 0.01 * delta**2
    expected = start + 0.5 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


# Over gRPC


def vector(bundle: Bundle, payload: bytes) -> np.ndarray:
    return wire.decode(bundle.manifest, payload)["generalist"]


def expected_next(
    bundle: Bundle, generalists: list[bytes], updates: list[tuple[bytes, int]]
) -> np.ndarray:
    """By the reference; an update is its payload and how far behind it started."""
    decoded = [(vector(bundle, payload), behind, 1) for payload, behind in updates]
    return np.array(reference([vector(bundle, g) for g in generalists], decoded))


def begin(fleet: Fleet, *options: str, names: str) -> tuple[Bundle, Served, list[Client]]:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, *options)
    return bundle, served, fleet.enrolled(served, bundle, *names.split())


def test_a_slow_device_counts_for_a_later_generalist(fleet: Fleet) -> None:
    options = ("--rounds", "2", "--asynchronous", "2")
    bundle, served, (ada, ben, cy) = begin(fleet, *options, names="ada ben cy")
    assert ada.check_in(5).action == TRAIN, "nobody is waited for"
    check_in_until(ben, TRAIN)
    slow = check_in_until(cy, TRAIN)
    assert (slow.round, slow.seconds_left) == (1, 0)
    start = cy.download(1)
    first = [train(bundle, start, seed, 1) for seed in (0, 1)]
    assert ada.upload(header(1), first[0]).accepted
    assert ada.check_in(0.3).action == WAIT, "it has reported on this generalist"
    assert ben.upload(header(1), first[1]).accepted
    assert check_in_until(ada, TRAIN).round == 2
    second = ada.download(2)
    wanted = expected_next(bundle, [start], [(update, 0) for update in first])
    np.testing.assert_allclose(vector(bundle, second), wanted, rtol=1e-6, atol=1e-6)

    late = train(bundle, start, 2, 1)
    assert cy.upload(header(1), late).accepted, "what it downloaded was the first generalist"
    assert cy.check_in(0.3).action == WAIT, "once in a buffer"
    fresh = train(bundle, second, 0, 2)
    assert ada.upload(header(2), fresh).accepted
    final = check_in_until(cy, FINISH)
    wanted = expected_next(bundle, [start, second], [(late, 1), (fresh, 0)])
    got = vector(bundle, cy.download(final.round))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert ben.upload(header(1), first[1]).accepted, "sent again, since the reply was lost"
    listed = rows(fleet.state)
    assert [row["accepted"] for row in listed] == [2, 2]
    assert listed[1]["aggregation"] == "mean, asynchronous by 2, up to 10 behind"
    for client in (ada, ben, cy):
        finish(client, final.round)
    served.wait_for("finished")
    behind = [event["behind"] for event in served.events if event["event"] == "update_accepted"]
    assert behind == [0, 0, 1, 0]
    until(lambda: not files_of(fleet.state, "updates/*/*.safetensors"), "updates stay")


def test_a_compressed_step_is_from_the_generalist_that_it_started_from(fleet: Fleet) -> None:
    """Also when that is not the newest one any more, and the coordinator was killed meanwhile."""
    options = ("--rounds", "2", "--asynchronous", "1", "--compression", "top-k")
    options = (*options, "--enrolment-port", "0")
    bundle, kind, listen = fleet.bundle(), NAMES["top-k"], f"127.0.0.1:{free_port()}"
    served = fleet.serve(bundle, *options, listen=listen)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    first, late = (
        vector(bundle, train(bundle, start, i, 1)) - vector(bundle, start) for i in (0, 1)
    )
    assert ada.upload(header(1, compression=kind), compress(kind, first)).accepted
    served.wait_for("round_closed", round=1)
    served.kill()
    served = fleet.serve(bundle, *options, listen=listen)
    second = ada.download(2)
    sent = decompress(kind, compress(kind, first), first.size)
    np.testing.assert_allclose(vector(bundle, second), vector(bundle, start) + sent, rtol=1e-6)
    assert ben.upload(header(1, compression=kind), compress(kind, late)).accepted
    served.wait_for("round_closed", round=2)
    sent = vector(bundle, start) + decompress(kind, compress(kind, late), late.size)
    update = wire.encode(bundle.manifest, {"generalist": sent})
    wanted = expected_next(bundle, [start, second], [(update, 1)])
    got = vector(bundle, ben.download(3))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_too_stale_is_refused_and_counted(fleet: Fleet) -> None:
    options = ("--rounds", "9", "--asynchronous", "1", "--max-staleness", "1")
    bundle, served, (ada, ben) = begin(fleet, *options, names="ada ben")
    join_round(ada, ben)
    start = ada.download(1)
    for number in (1, 2):
        assert check_in_until(ada, TRAIN).round == number
        update = train(bundle, ada.download(number), 0, number)
        assert ada.upload(header(number), update).accepted
        served.wait_for("round_closed", round=number)
    refused = ben.upload(header(1), train(bundle, start, 1, 1))
    assert not refused.accepted
    assert "too long ago" in refused.reason
    assert served.wait_for("update_refused")["kind"] == "stale"
    assert rows(fleet.state)[0]["refused"] == 1
    assert check_in_until(ben, TRAIN).round == 3, "it goes on with the current one"


def test_what_was_accepted_counts_after_a_start_with_other_settings(fleet: Fleet) -> None:
    """A pause lets more come than one buffer holds."""
    port = f"127.0.0.1:{free_port()}"
    bundle = fleet.bundle()
    enrolment = ("--enrolment-port", "0", "--rounds", "4", "--asynchronous", "2")
    served = fleet.serve(bundle, *enrolment, listen=port)
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(*clients)
    start = clients[0].download(1)
    with Administrator(served.administrator()) as administrator:
        administrator.pause()
    updates = [train(bundle, start, seed, 1) for seed in range(3)]
    for client, update in zip(clients, updates, strict=True):
        assert client.upload(header(1), update).accepted
    served.stop()
    again = fleet.serve(bundle, *enrolment, "--max-staleness", "0", listen=port)
    with Administrator(again.administrator()) as administrator:
        administrator.resume()
    again.wait_for("round_closed", round=1)
    assert check_in_until(clients[0], TRAIN).round == 2
    assert clients[0].upload(header(2), train(bundle, clients[0].download(2), 0, 2)).accepted
    assert again.wait_for("round_closed", round=2)["updates"] == 2
    assert not again.has_said("update_damaged")


@pytest.mark.parametrize("closed", [False, True])
def test_in_other_rounds_nothing_counts_that_was_buffered(fleet: Fleet, closed: bool) -> None:
    """Else a device would count twice in one: with what it sends then, and with what it had sent.

    Args:
        closed: whether the first buffer is, so that only a later one holds anything.
    """
    port = f"127.0.0.1:{free_port()}"
    bundle = fleet.bundle()
    options = ("--enrolment-port", "0", "--rounds", "4")
    served = fleet.serve(bundle, *options, "--asynchronous", "2", listen=port)
    trio = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(*trio)
    start = trio[0].download(1)
    with Administrator(served.administrator()) as administrator:
        administrator.pause()
        for seed, client in enumerate(trio):
            assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
        if closed:
            administrator.resume()
            served.wait_for("round_closed", round=1)
    served.stop()
    again = fleet.serve(bundle, *options, "--min-devices", "3", listen=port)
    again.ready()
    if not closed:
        assert "asynchronous" in again.wait_for("round_abandoned", round=1)["reason"]
        with Administrator(again.administrator()) as administrator:
            administrator.resume()
    join_round(*trio)
    start = trio[0].download(2)
    for seed, client in enumerate(trio):
        assert client.upload(header(2), train(bundle, start, seed, 2)).accepted
    assert again.wait_for("round_closed", round=2)["updates"] == 3


def test_a_damaged_start_of_a_slow_device_is_noticed(fleet: Fleet) -> None:
    options = ("--rounds", "9", "--asynchronous", "2")
    bundle, served, (ada, ben, cy) = begin(fleet, *options, names="ada ben cy")
    join_round(ada, ben, cy)
    start = ada.download(1)
    for seed, client in enumerate((ada, ben)):
        assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
    served.wait_for("round_closed", round=1)
    (first,) = fleet.state.glob("generalists/1-*")
    content = bytearray(first.read_bytes())
    content[-1] ^= 8
    first.write_bytes(content)
    assert cy.upload(header(1), train(bundle, start, 2, 1)).accepted
    assert check_in_until(ada, TRAIN).round == 2
    assert ada.upload(header(2), train(bundle, ada.download(2), 0, 2)).accepted
    assert first.name in served.wait_for("update_damaged")["reason"]


def test_what_came_whole_and_is_refused_leaves_no_file(fleet: Fleet) -> None:
    bundle, served, (ada, ben) = begin(
        fleet, "--rounds", "1", "--asynchronous", "1", names="ada ben"
    )
    join_round(ada, ben)
    start = ada.download(1)
    update = train(bundle, start, 1, 1)
    announced = header(1, total_bytes=len(update), sha256=hashlib.sha256(update).digest())
    over = threading.Event()

    def parts() -> Iterator[pb.UploadPart]:
        yield pb.UploadPart(header=announced)
        yield pb.UploadPart(data=update[:100])
        over.wait(TIMEOUT)
        yield pb.UploadPart(data=update[100:])

    call = ben._stub.Upload.future(parts(), timeout=TIMEOUT)
    until(lambda: bool(files_of(fleet.state, "updates/*/*/*.partial")), "nothing has come")
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    served.wait_for("round_closed", round=1)
    over.set()
    reply = call.result()
    assert not reply.accepted
    assert "all rounds have the updates that they wanted" in reply.reason
    # That of the update that counted goes a moment after its round is closed.
    until(lambda: not files_of(fleet.state, "updates/*/*.safetensors"), "updates stay")


def test_every_buffer_has_exactly_its_size(fleet: Fleet) -> None:
    """Many report at once: what finds a buffer full counts in the next one, and nothing twice."""
    names = [f"device-{index}" for index in range(10)]
    options = ("--rounds", "3", "--asynchronous", "3")
    bundle, _, clients = begin(fleet, *options, names=" ".join(names))
    join_round(*clients)
    start = clients[0].download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(10)]
    replies = in_parallel(
        *(lambda c=c, u=u: c.upload(header(1), u) for c, u in zip(clients, updates, strict=True))
    )
    assert sum(reply.accepted for reply in replies) == 9, "there are three buffers of three"
    (refused,) = (reply for reply in replies if not reply.accepted)
    assert "all rounds have the updates that they wanted" in refused.reason
    number = check_in_until(clients[0], FINISH).round
    assert number == 4
    known = {device: name for name, device in ids(fleet.state).items()}
    generalists = [start]
    for counted in (1, 2, 3):
        with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
            found = connection.execute(
                "select device from updates where counted = ?", (counted,)
            ).fetchall()
        assert len(found) == 3
        given = [(updates[names.index(known[device])], counted - 1) for (device,) in found]
        got = clients[0].download(counted + 1)
        wanted = expected_next(bundle, generalists, given)
        np.testing.assert_allclose(vector(bundle, got), wanted, rtol=1e-6, atol=1e-6)
        generalists.append(got)


def test_a_roll_back_drops_what_came_of_newer_generalists(fleet: Fleet) -> None:
    # None may be stale, and an abandoned round makes none so.
    options = ("--rounds", "9", "--asynchronous", "2", "--max-staleness", "0")
    bundle, served, trio = begin(fleet, *options, names="ada ben cy")
    join_round(*trio)
    start = trio[0].download(1)
    for seed, client in enumerate(trio[:2]):
        assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
    served.wait_for("round_closed")
    join_round(*trio[:2])
    second = trio[0].download(2)
    assert trio[0].upload(header(2), train(bundle, second, 0, 2)).accepted
    with Administrator(served.administrator()) as administrator:
        assert administrator.roll_back(1) == 3
        assert trio[0].download(3) == start
        for client, base in ((trio[1], 2), (trio[2], 1)):
            refused = client.upload(header(base), train(bundle, start, 1, base))
            assert "roll-back" in refused.reason
        assert not files_of(fleet.state, "updates/*/*.safetensors")
        join_round(*trio)
        # Aborted, what is in the buffer is gone; the generalist is the same, so what is still
        # being trained on it counts.
        assert trio[0].upload(header(3), train(bundle, start, 0, 3)).accepted
        assert administrator.abort() == 3
        administrator.pause()
        updates = [train(bundle, start, seed, 3) for seed in (1, 2)]
        for client, update in zip(trio[1:], updates, strict=True):
            assert client.upload(header(3), update).accepted
        assert rows(fleet.state)[-1]["accepted"] == 2
        administrator.resume()
    assert trio[1].check_in(5).action == TRAIN
    served.wait_for("round_closed", round=4)
    wanted = expected_next(bundle, [start], [(update, 0) for update in updates])
    got = vector(bundle, trio[0].download(5))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_options_that_do_not_go_together_are_refused(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    for options, message in (
        (("--aggregation", "krum"), "differ by what they started from"),
        (("--aggregation", "median"), "differ by what they started from"),
        (("--devices-per-round", "7"), "selects who begins together"),
        (("--min-devices", "3"), "--min-devices means nothing with --asynchronous"),
        (("--deadline", "60"), "--deadline means nothing with --asynchronous"),
        (("--secure-aggregation",), "to share their secrets"),
        (
            ("--dp-noise", "1", "--clip-norm", "1", "--devices-per-round", "7"),
            "updates of equal weight",
        ),
    ):
        assert message in misused(bundle, *options, "--asynchronous", "5")


def test_real_devices(fleet: Fleet, tiny_bundle: Bundle, text_dir: Path) -> None:
    """`comigs device run` as it is: three processes, generalists of two updates each."""
    training = fleet.directory / "training.json"
    training.write_text('{"local_steps": 20, "batch_sequences": 2}')
    options = ("--rounds", "4", "--asynchronous", "2", "--training", str(training))
    served = fleet.serve(tiny_bundle, *options, "--exit-when-done")
    names = ["ada", "ben", "cy"]
    with Administrator(served.administrator()) as administrator:
        invitations = [administrator.invite(name, 600).invitation for name in names]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "edge_runtime", "device", "run"),
                *("--invitation", invitation, "--home", str(fleet.directory / name)),
                *("--data", str(text_dir), "--bundle", str(tiny_bundle.path), "--threads", "1"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, invitation in zip(names, invitations, strict=True)
    ]
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    served.process.wait(timeout=90)
    final = (next((fleet.state / "generalists").glob("5-*"))).read_bytes()
    for name in names:
        state, progress = Home(fleet.directory / name).load_state(tiny_bundle)
        assert progress.finished == 5
        assert state.expert_steps > 0
        np.testing.assert_array_equal(state.vectors["generalist"], vector(tiny_bundle, final))
    assert [row["accepted"] for row in rows(fleet.state)] == [2, 2, 2, 2]


# Kills

ROUNDS, SIZE_K, DEVICES = 120 if SOAK else 12, 3, 5


def live(bundle: Bundle, client: Client, seed: int) -> dict[int, bytes]:
    """A device's acknowledged updates by what they started from; devices differ in their pace."""
    pace = random.Random(seed)
    acknowledged: dict[int, bytes] = {}
    while True:
        reply = client.check_in(2)
        if reply.action == FINISH:
            finish(client, reply.round)
            return acknowledged
        if reply.action == TRAIN:
            assert reply.round not in acknowledged, "asked to train on a generalist again"
            update = train(bundle, client.download(reply.round), seed, reply.round)
            slow = 0.3 if seed == DEVICES - 1 else 0.0  # behind the others on any machine
            time.sleep(slow + pace.uniform(0, 0.05 * (1 + seed)))
            if client.upload(header(reply.round), update).accepted:
                acknowledged[reply.round] = update


def test_kills_at_random_moments(fleet: Fleet) -> None:
    """Each acknowledged update counts exactly once, with the weight of its staleness, and no other;
    the generalists are what the order of acceptance says."""
    bundle = fleet.bundle(width=100_000)
    listen = f"127.0.0.1:{free_port()}"
    options = ("--rounds", str(ROUNDS), "--asynchronous", str(SIZE_K), "--max-staleness", "3")
    # All that it makes are looked at below.
    options = (*options, "--enrolment-port", "0", "--keep-generalists", str(ROUNDS + 1))
    served = fleet.serve(bundle, *options, listen=listen)
    names = [f"device {index}" for index in range(DEVICES)]
    clients = fleet.enrolled(served, bundle, *names)
    moments = random.Random(11)
    done = threading.Event()

    def kill_again_and_again() -> int:
        current = served
        for kill in range(KILLS):
            current.wait_for(moments.choice(["update_accepted", "round_opened"]))
            time.sleep(moments.uniform(0, 0.06))
            if done.is_set():
                return kill
            current.kill()
            current = fleet.serve(bundle, *options, listen=listen)
        return KILLS

    def devices() -> list[dict[int, bytes]]:
        lives = in_parallel(*(lambda i=i: live(bundle, clients[i], i) for i in range(DEVICES)))
        done.set()
        return lives

    lives, kills = in_parallel(devices, kill_again_and_again)
    assert kills > 0
    known = {device: names.index(name) for name, device in ids(fleet.state).items()}
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        counted = connection.execute("select round, device, counted from updates").fetchall()
    acknowledged = {(base, i) for i, updates in enumerate(lives) for base in updates}
    assert {(base, known[device]) for base, device, _ in counted} == acknowledged
    assert len(counted) == ROUNDS * SIZE_K
    generalists = [wire.encode(bundle.manifest, adapters.load_fresh(bundle))]
    for number in range(1, ROUNDS + 1):
        given = [
            (lives[known[device]][base], number - base)
            for base, device, of in counted
            if of == number
        ]
        assert len(given) == SIZE_K
        assert max(behind for _, behind in given) <= 3
        got = next((fleet.state / "generalists").glob(f"{number + 1}-*")).read_bytes()
        decoded = [(vector(bundle, payload), behind) for payload, behind in given]
        weights = np.array([(1 + behind) ** -0.5 for _, behind in decoded])
        steps = np.stack(
            [
                new.astype(np.float64) - vector(bundle, generalists[-1 - behind])
                for new, behind in decoded
            ]
        )
        mean = (weights[:, None] * steps).sum(axis=0) / weights.sum()
        wanted = vector(bundle, generalists[-1]) + mean
        np.testing.assert_allclose(vector(bundle, got), wanted, rtol=1e-6, atol=1e-6)
        generalists.append(got)
    assert any(of > base for base, _, of in counted), "somebody was behind"
    # The last round's go after the devices have been told that it is over.
    until(lambda: not files_of(fleet.state, "updates/*/*.safetensors"), "updates stay")
