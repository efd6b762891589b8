"""What the administrator commands: pause, resume, abort, roll back."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from coordinator_help import (
    Fleet,
    check_in_until,
    comigs,
    enrol_with,
    files_of,
    finish,
    free_port,
    header,
    in_parallel,
    invited,
    join_round,
    train,
    until,
)
from test_coordinator_listing import rows
from typer.testing import CliRunner

from coordinator import listing
from coordinator.administrator import Administrator
from edge_runtime import cli
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.connection import Patience
from edge_runtime.errors import RefusedError, TrustError
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb

# How often a coordinator is killed while it is commanded.
KILLS = 60 if os.environ.get("COMIGS_SOAK") else 6

TRAIN, WAIT, FINISH = pb.CheckInReply.TRAIN, pb.CheckInReply.WAIT, pb.CheckInReply.FINISH


def command(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`comigs WORDS` with the administrator's file of `state`."""
    line = [sys.executable, "-m", "coordinator", *words, "--admin", str(state / "admin.json")]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def commanded(state: Path, *words: str) -> dict[str, object]:
    done = command(state, *words, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def report(bundle: Bundle, clients: list[Client], number: int) -> None:
    """All join round `number` and report."""
    assert [reply.round for reply in join_round(*clients)] == [number] * len(clients)
    start = clients[0].download(number)
    for seed, client in enumerate(clients):
        assert client.upload(header(number), train(bundle, start, seed, number)).accepted


def test_pause_and_resume(fleet: Fleet) -> None:
    """Nobody is sent to train, no round begins or ends; what was trained still counts."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "2", "--deadline", "4")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    with Administrator(served.administrator()) as administrator:
        administrator.pause()
    served.wait_for("paused")
    assert commanded(fleet.state, "pause") == {"paused": True}, "once more is no mistake"
    assert ben.check_in(4).action == WAIT, "past the deadline, too"
    assert ben.upload(header(1), train(bundle, start, 1, 1)).accepted
    (paused,) = rows(fleet.state)
    assert (paused["status"], paused["accepted"], paused["paused"]) == ("open", 2, True)

    served.kill()
    again = fleet.serve(bundle, "--rounds", "2", "--deadline", "600", listen=served.ready())
    again.ready()
    assert ada.check_in(0.5).action == WAIT, "a restart ends no pause"
    assert "go on" in command(fleet.state, "resume").stdout
    again.wait_for("resumed")
    assert again.wait_for("round_closed", round=1)["updates"] == 2
    join_round(ada, ben)
    assert [row["paused"] for row in rows(fleet.state)] == [False, False]


def test_a_pause_holds_devices_that_wait(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    with Administrator(served.administrator()) as administrator:
        administrator.pause()
        replies = in_parallel(*(lambda c=c: c.check_in(1) for c in (ada, ben)))
        assert [reply.action for reply in replies] == [WAIT] * 2
        assert rows(fleet.state)[0]["status"] == "waiting"

        def heard() -> list[float]:
            return [entry.last_seen for entry in administrator.devices()]

        before = max(heard())

        def later() -> None:
            until(lambda: min(heard()) > before, "the check-ins do not arrive")
            administrator.resume()

        begin = time.monotonic()
        replies = in_parallel(*(lambda c=c: c.check_in(20) for c in (ada, ben)), later)
        assert [reply.action for reply in replies[:2]] == [TRAIN] * 2
        assert time.monotonic() - begin < 20, "they were woken"


def test_abort(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    nothing = command(fleet.state, "abort")
    assert (nothing.returncode, nothing.stdout) == (RefusedError.code, "")
    assert "no round is open" in nothing.stderr

    join_round(ada, ben)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    assert commanded(fleet.state, "abort", "--reason", "a test") == {"aborted": 1}
    abandoned = served.wait_for("round_abandoned")
    assert abandoned["reason"] == "aborted by the administrator: a test"
    assert abandoned["updates"] == 1
    assert not files_of(fleet.state, "updates/*/*"), "its updates are dropped"
    late = ben.upload(header(1), train(bundle, start, 1, 1))
    assert (late.accepted, late.reason) == (False, "round 1 is over")

    report(bundle, [ada, ben], 2)
    check_in_until(ada, FINISH)
    first, second = rows(fleet.state)
    assert (first["status"], first["reason"]) == ("abandoned", abandoned["reason"])
    assert (second["status"], second["accepted"]) == ("aggregated", 2)
    assert command(fleet.state, "abort").returncode == RefusedError.code, "all rounds are over"
    with Administrator(served.administrator()) as administrator:
        for reason in ("two\nlines", "a" * 201):
            with pytest.raises(RefusedError, match="printable text"):
                administrator.abort(reason)


def test_roll_back(fleet: Fleet) -> None:
    """The generalist and the count of rounds go back; later ones start from there, also after
    the last one; what was trained on the newer generalist counts no more."""
    bundle = fleet.bundle()
    options = ("--rounds", "3", "--server-optimizer", "momentum")
    served = fleet.serve(bundle, *options)
    pair = fleet.enrolled(served, bundle, "ada", "ben")
    for number in (1, 2):
        report(bundle, pair, number)
    served.wait_for("round_closed", round=2)
    starts = {number: pair[0].download(number) for number in (1, 2, 3)}
    join_round(*pair)
    newer = train(bundle, starts[3], 0, 3)
    assert pair[0].upload(header(3), newer).accepted
    assert commanded(fleet.state, "rollback", "2") == {"rolled_back_to": 2, "round": 4}
    assert served.wait_for("rolled_back", round=4)["to"] == 2
    late = pair[1].upload(header(3), newer)
    assert (late.accepted, late.reason) == (False, "round 3 is over")
    assert pair[0].download(4) == starts[2]
    assert not files_of(fleet.state, "updates/*/*")
    assert not list(fleet.state.glob("memories/*")), "the optimizer begins anew"

    served.kill()
    again = fleet.serve(bundle, *options, listen=served.ready())
    again.ready()
    assert pair[0].download(4) == starts[2]
    report(bundle, pair, 4)
    report(bundle, pair, 5)
    assert finish(pair[0], check_in_until(pair[0], FINISH).round) == pair[0].download(6)
    finish(pair[1], 6)
    again.wait_for("finished")
    listed = rows(fleet.state)
    assert [(row["round"], row["status"], row["rolled_back_to"]) for row in listed] == [
        (1, "aggregated", None),
        (2, "aggregated", None),
        (3, "abandoned", None),
        (4, "aggregated", 2),
        (5, "aggregated", None),
    ]
    assert listed[2]["reason"] == "rolled back to the start of round 2 by the administrator"

    # Three aggregated rounds led here. Undone after the end, the last of them is to be run again.
    assert commanded(fleet.state, "rollback", "5") == {"rolled_back_to": 5, "round": 7}
    report(bundle, pair, 7)
    assert check_in_until(pair[0], FINISH).round == 8
    # Forward again: what round 6 would have started from is the end of three rounds, too.
    assert commanded(fleet.state, "rollback", "6") == {"rolled_back_to": 6, "round": 9}
    assert check_in_until(pair[0], FINISH).round == 9
    assert pair[0].download(9) == pair[0].download(6)
    text = command(fleet.state, "rollback", "1").stdout
    assert text == "round 10 starts from what round 1 started from\n"


def test_after_a_roll_back_a_device_learns_as_fast_as_in_those_rounds(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """Its learning rate falls with the rounds that came to something."""
    training = tmp_path / "training.json"
    training.write_text('{"local_steps": 3, "batch_sequences": 2}')
    options = ("--rounds", "2", "--min-devices", "1", "--training", str(training))
    served = fleet.serve(tiny_bundle, *options)
    (invitation,) = invited(served, "ada")
    home = Home(tmp_path / "home")
    home.save_identity(enrol_with(invitation, tiny_bundle))
    at = ("--home", home.path, "--data", text_dir, "--bundle", tiny_bundle.path, "--threads", 1)

    def device() -> list[tuple[int, int]]:
        done = comigs("device", "run", *at, "--format", "json")
        assert done.returncode == 0, done.stderr
        events = map(json.loads, done.stdout.splitlines())
        return [(e["round"], e["rounds"]) for e in events if e["event"] == "round"]

    assert device() == [(1, 2), (2, 2)]
    assert commanded(fleet.state, "rollback", "1") == {"rolled_back_to": 1, "round": 4}
    assert device() == [(4, 5), (5, 5)]
    _, progress = home.load_state(tiny_bundle)
    # Of its twelve steps the last six are the whole schedule again.
    assert (progress.round_start, progress.schedule_start) == (9, 6)


def test_of_the_generalists_the_latest_are_kept(fleet: Fleet) -> None:
    """And no other: not the one of a round that was rolled back to once it is too long ago."""
    bundle = fleet.bundle()
    options = ("--rounds", "9", "--min-devices", "1", "--keep-generalists", "2")
    served = fleet.serve(bundle, *options)
    (ada,) = fleet.enrolled(served, bundle, "ada")

    def kept() -> set[int]:
        return {int(path.name.split("-")[0]) for path in fleet.state.glob("generalists/*")}

    for number in (1, 2, 3):
        report(bundle, [ada], number)
        served.wait_for("round_opened", round=number + 1)
    until(lambda: kept() == {3, 4}, "they are not deleted")
    assert command(fleet.state, "rollback", "1").returncode == 21
    assert commanded(fleet.state, "rollback", "3") == {"rolled_back_to": 3, "round": 5}
    for number in (5, 6):
        report(bundle, [ada], number)
        served.wait_for("round_opened", round=number + 1)
    until(lambda: kept() == {6, 7}, "they are not deleted")


def test_what_cannot_be_rolled_back_is_refused(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "2", "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    report(bundle, [ada], 1)
    check_in_until(ada, TRAIN)
    next(fleet.state.glob("generalists/1-*")).write_bytes(b"x")
    with Administrator(served.administrator()) as administrator:
        for number, message in (
            (3, "no round 3"),
            (2, "current one"),
            (1, "missing or damaged"),
            (0, "no round 0"),
            (2**32 - 1, "no round 4294967295"),
        ):
            with pytest.raises(RefusedError, match=message):
                administrator.roll_back(number)
    done = command(fleet.state, "rollback", "3")
    assert done.returncode == RefusedError.code
    assert done.stderr.count("\n") == 1
    assert "no round 3 to roll back; choose one before 2" in done.stderr
    assert command(fleet.state, "rollback", "0").returncode == 2
    assert [row["status"] for row in rows(fleet.state)] == ["aggregated", "open"]
    assert ada.upload(header(2), train(bundle, ada.download(2), 0, 2)).accepted, "nothing happened"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollback", str(2**32)), "Invalid value for 'ROUND'"),
        (("rollback", "1", "--cohort", "\udcff"), "'--cohort': '\\udcff' is not printable"),
        (("abort", "--reason", "\udcff"), "'--reason': '\\udcff' is not printable"),
        (("pause", "--cohort", "\udcff"), "'--cohort': '\\udcff' is not printable"),
        (("invite", "ada", "ben", "ada"), "'ada' is there more than once"),
        (("invite", "ada", "--cohort", "a\n"), "'--cohort': 'a\\n' is not printable"),
    ],
)
def test_what_cannot_be_asked_is_wrong_usage(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(cli.build(), [*words, "--admin", "nowhere"])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_commands_are_for_the_administrator(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    with Administrator(ada.who) as impostor:
        for attempt in (
            impostor.pause,
            impostor.resume,
            impostor.abort,
            lambda: impostor.roll_back(1),
        ):
            with pytest.raises(TrustError, match="role"):
                attempt()
    assert rows(fleet.state)[0]["status"] == "waiting"


def test_kills_around_commands(fleet: Fleet) -> None:
    """Every command is carried out once and lasts, whatever the moment of a kill -9."""
    bundle = fleet.bundle()
    listen = f"127.0.0.1:{free_port()}"
    options = ("--rounds", "1000", "--min-devices", "1", "--enrolment-port", "0")
    served = fleet.serve(bundle, *options, listen=listen)
    (enrolled,) = fleet.enrolled(served, bundle, "ada")
    # On a busy machine it may take some kills until a call gets through between two of them.
    patience = Patience(300, on_wait=lambda _: None)
    ada = fleet.client(enrolled.who, patience)
    moments = random.Random(3)
    killed, over = threading.Event(), threading.Event()
    uploads: dict[int, bytes] = {}

    def device() -> None:
        while not over.is_set():
            reply = ada.check_in(0.2)
            if reply.action == TRAIN:
                update = train(bundle, ada.download(reply.round), 0, reply.round)
                if ada.upload(header(reply.round), update).accepted:
                    uploads[reply.round] = update

    def kills() -> None:
        try:
            current = served
            for _ in range(KILLS):
                current.ready()
                time.sleep(moments.uniform(0, 0.5))
                current.kill()
                current = fleet.serve(bundle, *options, listen=listen)
            current.ready()
        finally:
            killed.set()

    def commands() -> list[tuple[str, int, int]]:
        made: list[tuple[str, int, int]] = []
        with (
            contextlib.ExitStack() as stack,
            Administrator(served.administrator(), patience) as administrator,
        ):
            stack.callback(over.set)
            # Between two kills there may be no time for any.
            while not killed.is_set() or len({what for what, _, _ in made}) < 2:
                time.sleep(moments.uniform(0, 0.1))
                administrator.pause()
                (before,) = (row for row in listing.rounds(fleet.state) if row.paused)
                if before.status == "open" and len(made) % 2 == 0:
                    assert administrator.abort() == before.round
                    made.append(("abort", before.round, before.round + 1))
                elif before.round > 1:
                    to = moments.randrange(1, before.round)
                    made.append(("rollback", to, administrator.roll_back(to)))
                after = listing.rounds(fleet.state)[-1]
                assert after.paused, "a pause lasts"
                assert after.round == made[-1][2] if made else 1
                administrator.resume()
        return made

    made, *_ = in_parallel(commands, device, kills)
    listed = {row["round"]: row for row in rows(fleet.state)}
    for what, of, successor in made:
        ended = listed[successor - 1]
        assert ended["status"] == "abandoned"
        if what == "abort":
            assert ended["reason"] == "aborted by the administrator"
            assert listed[successor]["rolled_back_to"] is None
        else:
            assert listed[successor]["rolled_back_to"] == of
            assert ada.download(successor) == ada.download(of)
    abandoned = [n for n, row in listed.items() if row["status"] == "abandoned"]
    assert sorted(n - 1 for _, _, n in made) == abandoned, "each command once"
    for number, row in listed.items():
        if row["status"] == "aggregated":
            assert (
                ada.download(number + 1) == uploads[number] or listed[number + 1]["rolled_back_to"]
            ), "a mean of one"
