"""The quality gate, with a compiled bundle and the engine."""

import asyncio
import errno
import json
import math
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from coordinator_help import Fleet, header, join_round, serve_command, until
from test_coordinator_listing import listed, rows

from coordinator.administrator import Administrator
from coordinator.quality import Quality, QualityGate
from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.connection import Patience
from edge_runtime.data import load_tokenizer, tokenize
from edge_runtime.engines import load_engine
from edge_runtime.errors import (
    AddressError,
    BundleError,
    ComigsError,
    DataError,
    MissingPartError,
    TrustError,
)
from edge_runtime.training import Evaluator
from protos import coordinator_pb2 as pb


def moved(bundle: Bundle, payload: bytes, step: float, seed: int = 0) -> bytes:
    vectors = wire.decode(bundle.manifest, payload)
    noise = np.random.default_rng(seed).normal(size=vectors["generalist"].size)
    moved = vectors["generalist"] + np.float32(step) * noise.astype(np.float32)
    return wire.encode(bundle.manifest, {"generalist": moved})


class Perplexity:
    """Of generalists, as a device that has just joined would have them."""

    def __init__(self, bundle: Bundle, text: str) -> None:
        self.manifest = bundle.manifest
        self.tokens = tokenize(load_tokenizer(bundle), text)
        self.vectors = adapters.load_fresh(bundle)
        self.evaluator = Evaluator(bundle, load_engine("onnxruntime", threads=1), self.vectors)

    def __call__(self, payload: bytes) -> float:
        self.vectors["generalist"][...] = wire.decode(self.manifest, payload)["generalist"]
        return math.exp(self.evaluator.loss(self.tokens))


def test_a_worse_generalist_is_refused_and_a_better_one_is_not(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    text = fleet.directory / "held-out"
    text.mkdir()
    words = (text_dir / "test.txt").read_text()
    (text / "a.txt").write_text(words)
    options = ("--rounds", "2", "--min-devices", "1", "--quality-gate", str(text))
    served = fleet.serve(tiny_bundle, *options, "--quality-tolerance", "0")
    (ada,) = fleet.enrolled(served, tiny_bundle, "ada")
    start = ada.download(1)
    perplexity = Perplexity(tiny_bundle, words)
    measured = next(event for event in served.events if event["event"] == "quality_measured")
    before = perplexity(start)
    assert measured["perplexity"] == pytest.approx(before, rel=1e-5)

    better, *_, worse = sorted(
        (moved(tiny_bundle, start, 0.02, seed) for seed in range(20)), key=perplexity
    )
    assert perplexity(better) < before < perplexity(worse)
    join_round(ada)
    assert ada.upload(header(1), worse).accepted
    refused = served.wait_for("round_abandoned")
    bad = perplexity(worse)
    assert refused["perplexity"] == {
        "incoming": pytest.approx(before, rel=1e-5),
        "candidate": pytest.approx(bad, rel=1e-5),
    }
    assert "the quality gate refused" in refused["reason"]
    assert f"{bad:.2f}" in refused["reason"]

    join_round(ada)
    assert ada.download(2) == start, "the incoming generalist stays"
    assert ada.upload(header(2), better).accepted
    closed = served.wait_for("round_closed")
    assert closed["perplexity"]["candidate"] < closed["perplexity"]["incoming"]
    assert ada.download(3) == better
    first, second = rows(fleet.state)[:2]
    assert (first["status"], second["status"]) == ("abandoned", "aggregated")
    assert first["candidate_perplexity"] == refused["perplexity"]["candidate"]
    assert second["incoming_perplexity"] == closed["perplexity"]["incoming"]
    lines = listed(fleet.state).stdout.splitlines()
    assert lines[1].endswith(refused["reason"])
    good = perplexity(better)
    assert lines[2].endswith(f"perplexity {before:.2f} to {good:.2f}")


def test_who_comes_while_a_round_is_being_closed_waits_as_long_as_that_takes(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    """It was selected beside the one whose update sufficed."""
    selection = ("--devices-per-round", "1", "--over-selection", "2", "--min-devices", "1")
    gate = ("--quality-gate", str(text_dir / "test.txt"), "--quality-tolerance", "1000")
    served = fleet.serve(tiny_bundle, "--rounds", "9", *selection, *gate)
    ada, ben = fleet.enrolled(served, tiny_bundle, "ada", "ben")
    join_round(ada, ben)
    update = moved(tiny_bundle, ada.download(1), 0.02)
    hasty = fleet.client(ben.who, Patience(1.0, on_wait=lambda _: None))
    coordinator = psutil.Process(served.process.pid)
    assert ada.upload(header(1), update).accepted
    until(coordinator.children, "nobody measures")
    (measuring,) = coordinator.children()
    measuring.suspend()
    with ThreadPoolExecutor() as pool:
        late = pool.submit(hasty.upload, header(1), update)
        time.sleep(3)
        measuring.resume()
        reply = late.result()
    assert (reply.accepted, reply.reason) == (False, "round 1 is over")
    assert served.wait_for("round_closed")["updates"] == 1


def test_commands_while_a_round_is_being_closed(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    """Measuring takes a while: paused meanwhile, the round is closed after the pause, as it would
    have been; aborted meanwhile, nothing comes of it."""
    options = ("--rounds", "9", "--min-devices", "1", "--quality-gate", str(text_dir / "test.txt"))
    served = fleet.serve(tiny_bundle, *options, "--quality-tolerance", "1000")
    (ada,) = fleet.enrolled(served, tiny_bundle, "ada")
    start = ada.download(1)
    update = moved(tiny_bundle, start, 0.02)
    with Administrator(served.administrator()) as administrator:
        join_round(ada)
        assert ada.upload(header(1), update).accepted
        administrator.pause()
        served.wait_for("paused")
        assert ada.check_in(3).action == pb.CheckInReply.WAIT, "longer than measuring takes"
        (paused,) = rows(fleet.state)
        assert (paused["status"], paused["accepted"]) == ("open", 1)
        assert "round_closed" not in [event["event"] for event in served.events]
        administrator.resume()
        served.wait_for("round_closed", round=1)
        assert ada.download(2) == update

        join_round(ada)
        assert ada.upload(header(2), moved(tiny_bundle, update, 0.02)).accepted
        assert administrator.abort() == 2
        join_round(ada)
        assert ada.download(3) == update
        assert ada.upload(header(3), moved(tiny_bundle, update, 0.01)).accepted
        served.wait_for("round_closed", round=3)
    assert [row["status"] for row in rows(fleet.state)][:3] == [
        "aggregated",
        "abandoned",
        "aggregated",
    ]


def test_an_update_that_comes_while_its_round_is_closed_waits_for_what_becomes_of_that(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    """Paused meanwhile, the round is not over after all, and both count."""
    options = ("--rounds", "9", "--min-devices", "1", "--quality-gate", str(text_dir / "test.txt"))
    served = fleet.serve(tiny_bundle, *options, "--quality-tolerance", "1000", "--deadline", "3")
    ada, ben = fleet.enrolled(served, tiny_bundle, "ada", "ben")
    join_round(ada, ben)
    update = moved(tiny_bundle, ada.download(1), 0.02)
    assert ada.upload(header(1), update).accepted
    # Until the deadline: ben is missing.
    until(lambda: bool(psutil.Process(served.process.pid).children()), "nothing is measured")
    with ThreadPoolExecutor() as pool, Administrator(served.administrator()) as administrator:
        late = pool.submit(ben.upload, header(1), update)
        assert "being closed" in served.wait_for("upload_broken", device="ben")["reason"]
        administrator.pause()
        assert late.result().accepted
        administrator.resume()
    assert served.wait_for("round_closed", round=1)["updates"] == 2


def test_what_gets_worse_by_no_more_than_the_tolerance_passes() -> None:
    gate = QualityGate(bundle=Path("b"), text=Path("t"), tolerance=0.1)
    assert gate.objection(Quality(incoming=100, candidate=110)) is None
    for candidate in (110.01, math.inf, math.nan):
        assert gate.objection(Quality(incoming=100, candidate=candidate)) is not None


def test_a_gate_that_fails_lets_nothing_through(
    fleet: Fleet, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The text is here at the start, and gone when the round closes.\n" * 20)
    options = ("--rounds", "1", "--min-devices", "1", "--quality-gate", str(text))
    served = fleet.serve(tiny_bundle, *options)
    (ada,) = fleet.enrolled(served, tiny_bundle, "ada")
    join_round(ada)
    text.unlink()
    start = ada.download(1)
    assert ada.upload(header(1), moved(tiny_bundle, start, 0.01)).accepted
    assert "could not be measured" in served.wait_for("round_abandoned")["reason"]
    join_round(ada)
    assert ada.download(2) == start


def refusal(bundle: Path, state: Path, *options: str, without: str = "") -> tuple[int, str]:
    """Exit code and message of a start that is refused."""
    command = serve_command(bundle, state, "--listen", "127.0.0.1:0", *options)
    if without:  # the child that measures must not find it either
        (state / f"{without}.py").write_text(f"raise ModuleNotFoundError(name='{without}')\n")
        command = ["env", f"PYTHONPATH={state}:{Path(__file__).parents[2]}", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_a_measurement_that_cannot_be_started_is_an_error_like_others(
    tiny_bundle: Bundle, text_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = QualityGate(tiny_bundle.path, text_dir / "test.txt", 0.0)

    async def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_process)
    with pytest.raises(ComigsError, match="cannot be started: Resource temporarily unavailable"):
        asyncio.run(gate.compare(Path("generalist"), b""))


def test_a_measurement_that_is_killed_costs_no_round(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    """As the system kills what takes memory that others need: it is tried once more."""
    options = ("--rounds", "1", "--min-devices", "1", "--quality-gate", str(text_dir / "test.txt"))
    served = fleet.serve(tiny_bundle, *options, "--quality-tolerance", "1000")
    (ada,) = fleet.enrolled(served, tiny_bundle, "ada")
    join_round(ada)
    assert ada.upload(header(1), moved(tiny_bundle, ada.download(1), 0.02)).accepted
    process = psutil.Process(served.process.pid)
    until(lambda: bool(process.children()), "nothing is measured")
    process.children()[0].kill()
    assert served.wait_for("round_closed")["updates"] == 1


def test_what_the_gate_lacks_is_told_at_the_start(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    text = str(text_dir / "test.txt")
    state = tmp_path / "state"
    state.mkdir()
    code, message = refusal(tiny_bundle.path, state, "--quality-gate", "nowhere")
    assert (code, message.count("\n")) == (DataError.code, 1)
    assert "--quality-gate: nowhere cannot be read" in message
    code, message = refusal(fleet.bundle().path, tmp_path / "other", "--quality-gate", text)
    assert code == BundleError.code
    code, message = refusal(tiny_bundle.path, state, "--quality-tolerance", "0.1")
    assert code == 2
    assert "means nothing without --quality-gate" in message
    code, message = refusal(tiny_bundle.path, state, "--quality-gate", text, without="tokenizers")
    assert code == MissingPartError.code, message
    assert "pip install 'comigs[device]'" in message


def test_a_start_that_fails_has_changed_no_settings(fleet: Fleet, tiny_bundle: Bundle) -> None:
    def refused(*options: str) -> int:
        return refusal(tiny_bundle.path, fleet.state, "--rounds", "9", *options)[0]

    assert refused("--quality-gate", "nowhere") == DataError.code
    fleet.serve(tiny_bundle, "--rounds", "2").ready()
    fleet.close()
    assert refused("--quality-gate", "nowhere") == DataError.code
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        assert refused("--enrolment-port", str(taken)) == AddressError.code
        assert refused("--monitor", f"127.0.0.1:{taken}") == AddressError.code
    administrator = fleet.state / "admin.json"
    kept = administrator.read_bytes()
    administrator.write_bytes(b"{}")
    assert refused() == TrustError.code
    administrator.write_bytes(kept)
    again = fleet.serve(tiny_bundle, "--rounds", "2")
    again.ready()
    assert "settings_changed" not in [event["event"] for event in again.stop()]


def test_it_can_be_stopped_while_it_measures(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path
) -> None:
    served = fleet.serve(tiny_bundle, "--quality-gate", str(text_dir / "test.txt"))
    process = psutil.Process(served.process.pid)
    until(lambda: bool(process.children()), "nothing is measured")
    (measuring,) = process.children()
    assert served.stop() == []
    assert not measuring.is_running()


def test_perplexity_of_any_generalist(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    start = wire.encode(tiny_bundle.manifest, adapters.load_fresh(tiny_bundle))
    other = tmp_path / "other.safetensors"
    other.write_bytes(moved(tiny_bundle, start, 1.0))
    text = text_dir / "test.txt"
    command = [sys.executable, "-m", "edge_runtime", "perplexity", "--bundle", tiny_bundle.path]
    done = subprocess.run(
        [*command, "--text", text, "--format", "json", "-", other],
        input=start,
        capture_output=True,
        check=True,
        timeout=60,
    )
    perplexity = Perplexity(tiny_bundle, text.read_text())
    wanted = [perplexity(payload) for payload in (start, other.read_bytes())]
    result = json.loads(done.stdout)
    assert [entry["perplexity"] for entry in result["generalists"]] == pytest.approx(wanted)
    assert result["tokens"] == len(text.read_text())  # a byte is a token here
    # Beyond what numbers can say, and JSON all the same.
    other.write_bytes(moved(tiny_bundle, start, 1e18))
    done = subprocess.run(
        [*command, "--text", text, "--format", "json", other], capture_output=True, check=True
    )
    (entry,) = json.loads(done.stdout, parse_constant=pytest.fail)["generalists"]
    assert entry["perplexity"] is None
    done = subprocess.run([*command, "--text", text], capture_output=True, text=True, check=True)
    assert done.stdout == f"{wanted[0]:12.2f}  the bundle's own\n"
