"""Compressed updates in rounds: what is offered is taken, and a kill loses or doubles nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import (
    Fleet,
    check_in_until,
    header,
    ids,
    join_round,
    mean_of,
    serve_command,
    train,
)
from safetensors.numpy import save

from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.compression import BLOCK, NAMES, compress, decompress
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb

SOAK = bool(os.environ.get("COMIGS_SOAK"))


def flat(bundle: Bundle, payload: bytes) -> np.ndarray:
    return wire.decode(bundle.manifest, payload)["generalist"]


def test_a_round_of_updates_each_compressed_in_its_own_way(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=50_000)
    offered = [option for name in NAMES for option in ("--compression", name)]
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "4", *offered)
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cyd", "dan")
    replies = join_round(*clients)
    assert list(replies[0].compressions) == list(NAMES.values())
    start = clients[0].download(1)
    updates, sent = [], []
    for seed, (client, kind) in enumerate(zip(clients, [0, *NAMES.values()], strict=True)):
        payload = train(bundle, start, seed, 1)
        if kind:
            step = flat(bundle, payload) - flat(bundle, start)
            compressed = compress(kind, step)
            got = flat(bundle, start) + decompress(kind, compressed, step.size)
            payload = wire.encode(bundle.manifest, {"generalist": got})
        sent.append((client, header(1, compression=kind), compressed if kind else payload))
        updates.append(payload)
    for client, full, payload in sent:
        assert client.upload(full, payload).accepted
    for client, full, payload in sent:  # replays: counted once
        assert client.upload(full, payload).accepted
    assert served.wait_for("round_closed")["updates"] == 4
    final = check_in_until(clients[0], pb.CheckInReply.FINISH)
    got = flat(bundle, clients[0].download(final.round))
    known = ids(fleet.state)
    order = sorted(range(4), key=lambda i: known[("ada", "ben", "cyd", "dan")[i]])
    assert got.tobytes() == mean_of(bundle, [updates[i] for i in order]).tobytes()


def test_what_was_not_offered_or_is_no_step_is_refused(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=50_000)
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "1", "--compression", "int8")
    ada, eve = fleet.enrolled(served, bundle, "ada", "eve")
    join_round(ada, eve)
    start = flat(bundle, ada.download(1))
    huge = np.full(-(-start.size // BLOCK), 3e38, np.float32)
    attacks = {
        "not offered": ("top-k", compress(NAMES["top-k"], start), "was not offered"),
        "of another size": ("int8", compress(NAMES["int8"], start[:-1]), "instead of I8"),
        "another kind": ("int8", compress(NAMES["float16"], start), "scale is not a tensor"),
        "beyond float32": (
            "int8",
            save({"step": np.full(start.size, 127, np.int8), "scale": huge}),
            "NaN or an infinity",
        ),
    }
    for name, payload, reason in attacks.values():
        reply = eve.upload(header(1, compression=NAMES[name]), payload)
        assert not reply.accepted
        assert reason in reply.reason
        assert served.wait_for("update_refused")["reason"] == reply.reason
    step = np.ones_like(start)
    assert ada.upload(header(1, compression=NAMES["int8"]), compress(NAMES["int8"], step)).accepted
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    np.testing.assert_allclose(flat(bundle, ada.download(final.round)), start + 1, rtol=1e-6)


def packed(bundle: Bundle, start: bytes, seed: int, name: str) -> tuple[bytes, bytes]:
    """What a device sends of its step, and the update that it amounts to."""
    before = flat(bundle, start)
    step = flat(bundle, train(bundle, start, seed, 1)) - before
    payload = compress(NAMES[name], step)
    got = before + decompress(NAMES[name], payload, step.size)
    return payload, wire.encode(bundle.manifest, {"generalist": got})


def test_compressed_updates_of_several_ranks(fleet: Fleet) -> None:
    """They come to what the same updates come to that were not compressed, at each rank."""
    wide, narrow = fleet.bundle(width=5000, rank=4), fleet.bundle(width=5000, rank=2)
    ranks = [("ada", wide, "int8"), ("ben", narrow, "top-k"), ("cyd", narrow, "float16")]
    offered = [option for name in NAMES for option in ("--compression", name)]
    finals = []
    for options in (offered, []):
        both = ("--bundle", str(narrow.path), "--mixed-ranks", "hetlora")
        state = fleet.directory / f"state-{len(finals)}"
        served = fleet.serve(
            wide, *both, "--rounds", "1", "--min-devices", "3", *options, state=state
        )
        clients = [fleet.enrolled(served, bundle, name)[0] for name, bundle, _ in ranks]
        join_round(*clients)
        for seed, (client, (_, bundle, name)) in enumerate(zip(clients, ranks, strict=True)):
            small, whole = packed(bundle, client.download(1), seed, name)
            if options:
                answer = client.upload(header(1, compression=NAMES[name]), small)
            else:
                answer = client.upload(header(1), whole)
            assert answer.accepted, answer.reason
        last = check_in_until(clients[0], pb.CheckInReply.FINISH).round
        finals.append([flat(r[1], c.download(last)) for c, r in zip(clients, ranks, strict=True)])
    for compressed, plain in zip(*finals, strict=True):
        np.testing.assert_allclose(compressed, plain, rtol=1e-5, atol=1e-6)


def test_a_device_goes_on_when_its_compression_is_offered_no_more(fleet: Fleet) -> None:
    """As after a restart of the coordinator with other options: it asks first what has come."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    start = flat(bundle, ada.download(1))
    kind = NAMES["int8"]
    reply = ada.upload(header(1, compression=kind), compress(kind, start), resume=True)
    assert not reply.accepted
    assert "was not offered" in reply.reason


def test_what_compression_does_not_go_with(fleet: Fleet) -> None:
    """Masks; and ranks that are mixed so that what was left out has no place in the next step."""
    command = serve_command(
        fleet.bundle().path, fleet.state, "--listen", "127.0.0.1:0", "--compression", "int8"
    )
    for options, said in (
        (["--secure-aggregation", "--min-devices", "3", "--clip-norm", "1"], "does not go with"),
        (["--compression", "zip"], "not one of"),
        (["--mixed-ranks", "flexlora"], "numbers mean something else after every round"),
    ):
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert said in " ".join(done.stderr.replace("│", " ").split())


ROUNDS = 16 if SOAK else 6


def device(home: Path, bundle: Bundle, text: Path, address: str) -> subprocess.Popen[str]:
    options = ("--home", home, "--data", text, "--bundle", bundle.path, "--threads", 1)
    connection = ("--coordinator", address, "--insecure", "--format", "json")
    return subprocess.Popen(
        [sys.executable, "-m", "edge_runtime", "device", "run", *map(str, options), *connection],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["top-k", "int8"] if SOAK else ["top-k"])
def test_a_kill_neither_loses_nor_doubles_what_was_left_out(
    fleet: Fleet, name: str, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """Most of all between the coordinator's count and the device's knowledge of it."""
    training = tmp_path / "training.json"
    training.write_text('{"local_steps": 3, "batch_sequences": 2}')
    options = ("--rounds", str(ROUNDS), "--min-devices", "1", "--training", str(training))
    options = (*options, "--insecure", "--exit-when-done", "--compression", name)

    def run(label: str, kills: int) -> tuple[dict[str, object], bytes]:
        served = fleet.serve(tiny_bundle, *options, state=tmp_path / f"{label}-state")
        home, moments = tmp_path / label, random.Random(5)
        process = device(home, tiny_bundle, text_dir, served.ready())
        for kill in range(kills):
            moment = "update_accepted" if kill % 2 == 0 else "round_opened"
            served.wait_for(moment)
            if kill % 3 == 2:
                time.sleep(moments.uniform(0, 0.05))
            process.kill()
            process.communicate()
            process = device(home, tiny_bundle, text_dir, served.ready())
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        events = served.end()
        assert not [event for event in events if event["event"] == "update_refused"]
        state, progress = Home(home).load_state(tiny_bundle)
        assert state.feedback is not None
        assert np.abs(state.feedback.residual).max() > 0
        values = asdict(progress) | {"residual": state.feedback.residual.tobytes()}
        del values["round_seconds"], values["rounds_of"]
        final = max(
            (tmp_path / f"{label}-state" / "generalists").rglob("*.safetensors"),
            key=lambda path: path.stat().st_mtime,
        )
        return values | {r: v.tobytes() for r, v in state.vectors.items()}, final.read_bytes()

    undisturbed, killed = run("undisturbed", 0), run("killed", 12 if SOAK else 3)
    assert undisturbed[0]["finished"] == ROUNDS + 1
    assert killed == undisturbed
