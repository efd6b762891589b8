"""Full disks and clocks that jump: nothing is lost, and it goes on by itself."""

import json
import os
import resource
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

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
    in_parallel,
    join_round,
    mean_of,
    serve_command,
    train,
    until,
)

from coordinator.closing import read_start
from coordinator.state import State
from coordinator.tables import Refusal, Round, Settings
from coordinator.update_rows import round_errors
from edge_runtime import wire
from edge_runtime.connection import GoneError, Unproven
from edge_runtime.errors import AdapterError, StorageError
from protos import coordinator_pb2 as pb

Full = Callable[[Served | None], AbstractContextManager[None]]


@contextmanager
def file_size_limited(served: Served | None) -> Iterator[None]:
    """No file of `served` may grow beyond 100 kB, which fails as a full disk does."""
    assert served is not None
    limits = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(fleet: Fleet) -> Iterator[Full]:
    """`fleet`'s state is on a file system of its own, and can fill it."""
    fleet.state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "comigs-test", str(fleet.state)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    @contextmanager
    def full(_served: Served | None) -> Iterator[None]:
        filler = fleet.state / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        yield
        filler.unlink()

    yield full
    fleet.close()
    subprocess.run(["umount", str(fleet.state)], check=True)


@pytest.fixture(params=["file system", "limit"])
def full(request: pytest.FixtureRequest) -> Full:
    """What makes the disk of a coordinator full for a while."""
    if request.param == "limit":
        return file_size_limited
    small: Full = request.getfixturevalue("small_disk")
    return small


def test_a_full_disk_loses_nothing(fleet: Fleet, full: Full) -> None:
    """While an update arrives, and while a round closes: both wait until there is room."""
    bundle = fleet.bundle(width=60_000)
    served = fleet.serve(bundle, "--rounds", "2", "--deadline", "3")
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    ada, ben, cy = clients
    join_round(*clients)
    start = ada.download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(2)]
    assert ada.upload(header(1), updates[0]).accepted

    with ExitStack() as stack:
        stack.enter_context(full(served))

        def free_space() -> None:
            assert "free some space" in served.wait_for("storage_failed")["reason"]
            stack.close()

        reply, _ = in_parallel(lambda: ben.upload(header(1), updates[1]), free_space)
        assert reply.accepted
    # cy does not report: the round closes at its deadline, and cannot at first.
    with full(served):
        served.wait_for("storage_failed")
    assert served.wait_for("round_closed", round=1)["updates"] == 2
    served.wait_for("storage_recovered")

    mean = wire.encode(bundle.manifest, {"generalist": mean_of(bundle, updates)})
    join_round(*clients)
    assert [client.download(2) for client in clients] == [mean] * 3
    for seed, client in enumerate(clients):
        assert client.upload(header(2), train(bundle, mean, seed, 2)).accepted
    check_in_until(cy, pb.CheckInReply.FINISH)


def test_a_generalist_that_cannot_be_read_for_now_is_asked_for_again(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    (file,) = (fleet.state / "generalists").glob("1-*")
    aside = file.rename(file.with_suffix(".aside"))
    file.symlink_to(file)  # "too many levels of symbolic links"

    def mend() -> None:
        assert file.name in served.wait_for("storage_failed")["reason"]
        aside.replace(file)

    got, _ = in_parallel(lambda: ada.download(1), mend)
    assert got == file.read_bytes()


def test_who_asks_for_a_generalist_that_is_not_kept_is_told_that_it_is_gone(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "1", "--keep-generalists", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    assert ada.upload(header(1), train(bundle, ada.download(1), 0, 1)).accepted
    served.wait_for("round_closed", round=1)
    until(lambda: not files_of(fleet.state, "generalists/1-*"), "the first is deleted")
    with pytest.raises(GoneError, match="another round"):
        ada.download(1)
    assert ada.download(2)


def test_a_device_that_is_refused_without_end_does_not_fill_the_disk(tmp_path: Path) -> None:
    with closing(State(tmp_path)) as whole:
        state = whole.of("a cohort")
        eve, ada = (state.named(n, cohort="", contract_sha256="").id for n in ("eve", "ada"))
        times = [1e9 + 20 * each for each in range(360)]  # two hours
        state.commit([Refusal(round=1, device=eve, reason="bad", time=t) for t in times])
        state.commit([Refusal(round=1, device=ada, reason="bad", time=1e9)])
    with sqlite3.connect(tmp_path / "coordinator.sqlite3") as connection:
        kept = connection.execute("select count(*) from refusals group by device order by 1")
        assert kept.fetchall() == [(1,), (120,)]


def test_a_state_that_cannot_be_taken_may_be_taken_later(tmp_path: Path) -> None:
    """By this process, too: a coordinator that stands by tries again and again."""
    options = {"recipe": "mean", "selection": None, "training": "{}", "contract_sha256": "c"}
    with closing(State(tmp_path)) as whole:
        settings = Settings(rounds=9, min_devices=1, deadline_seconds=1, **options)
        whole.of("base").begin(settings, b"generalist")
    in_the_way = tmp_path / "updates" / "1-base" / "not-a-file.safetensors"
    in_the_way.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            State(tmp_path)
    in_the_way.rmdir()
    State(tmp_path).close()


@pytest.mark.parametrize("ended", [0, 2])
def test_what_another_database_names_is_not_deleted(fleet: Fleet, ended: int) -> None:
    """As when --database was forgotten, or is of an empty one."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "2")
    pair = fleet.enrolled(served, bundle, "ada", "ben")
    for number in range(1, 2 + ended):
        join_round(*pair)
        start = pair[0].download(number)
        for client in pair if number <= ended else pair[:1]:
            assert client.upload(header(number), train(bundle, start, 0, number)).accepted
    served.stop()
    content = {path: path.read_bytes() for path in fleet.state.glob("*/**/*.safetensors")}
    assert len(content) >= 2
    database = fleet.state / "coordinator.sqlite3"
    database.rename(fleet.directory / "away")
    wrong = fleet.serve(bundle, "--min-devices", "2")
    assert wrong.process.wait(30) == StorageError.code
    assert "give the --database that belongs to it" in " ".join(wrong.stderr().split())
    assert content == {path: path.read_bytes() for path in fleet.state.glob("*/**/*.safetensors")}
    assert not database.exists()
    (fleet.directory / "away").rename(database)
    again = fleet.serve(bundle, "--min-devices", "2")
    assert again.wait_for("round_resumed", round=1 + ended)["updates"] == 1


def test_a_generalist_that_is_there_but_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    start = Round(number=3, generalist_file="generalist", generalist_sha256="")
    with pytest.raises(AdapterError, match="is missing; restore"):
        read_start(tmp_path, start)
    (tmp_path / "generalist").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        read_start(tmp_path, start)


def test_cohorts_that_end_rounds_at_the_same_time_keep_their_generalists(tmp_path: Path) -> None:
    """Each deletes what failed attempts left, and must not take the other's for that."""
    rounds, together = 40, threading.Barrier(2)
    with closing(State(tmp_path)) as whole:

        def live(cohort: str) -> None:
            state = whole.of(cohort)
            settings = Settings(rounds=rounds, min_devices=1, deadline_seconds=1, recipe="mean")
            settings.contract_sha256, settings.training = "", "{}"
            state.begin(settings, b"start")
            for number in range(1, rounds + 1):
                state.open(number, deadline=None, recipe="mean", participants=[])
                together.wait(TIMEOUT)
                state.aggregate(number, f"{number} {cohort}".encode() * 50_000, b"memory")
                together.wait(TIMEOUT)
                current = state.current()
                assert (tmp_path / current.generalist_file).exists()
                assert current.memory_file is not None
                assert (tmp_path / current.memory_file).exists()

        in_parallel(lambda: live("one"), lambda: live("other"))


def test_a_roll_back_beside_a_cleaning_keeps_what_it_goes_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is outdated is found, then deleted; a roll-back in between must not name it."""
    found, deleted_soon = threading.Event(), threading.Event()
    outdated = State._outdated

    def slowly(*arguments: Any) -> set[str]:
        files = outdated(*arguments)
        found.set()
        deleted_soon.wait(0.5)
        return files

    def roll_back(state: State) -> None:
        found.wait(TIMEOUT)
        with state.keeping_starts():
            if (tmp_path / state.round(2).generalist_file).exists():
                state.roll_back(2, "by the administrator", command="1")
        deleted_soon.set()

    with closing(State(tmp_path)) as whole:
        state = whole.of("one")
        state.keep_generalists = 1  # besides what an update may have started from
        settings = Settings(rounds=9, min_devices=1, deadline_seconds=1, recipe="mean")
        settings.contract_sha256, settings.training = "", "{}"
        state.begin(settings, b"start")
        for number in (1, 2, 3):
            state.open(number, deadline=None, recipe="mean", participants=[])
            state.aggregate(number, f"after {number}".encode(), None)
        monkeypatch.setattr(State, "_outdated", slowly)
        in_parallel(state.clean, lambda: roll_back(state))
        assert (tmp_path / state.current().generalist_file).exists()


def test_what_a_failed_attempt_to_close_a_round_left_is_deleted(fleet: Fleet) -> None:
    """With differential privacy, generalists of several noises would tell what one must not."""
    bundle = fleet.bundle()
    options = ("--min-devices", "1", "--server-optimizer", "momentum")
    served = fleet.serve(bundle, *options)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    start = ada.download(1)
    left = [
        fleet.state / folder / f"2-{'0' * 64}.safetensors" for folder in ("generalists", "memories")
    ]

    def fail() -> None:
        for path in left:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(start)

    fail()
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    join_round(ada)
    assert not any(path.exists() for path in left)
    assert ada.download(1) == start
    result = ada.download(2)
    served.stop()
    fail()
    again = fleet.serve(bundle, *options)
    again.ready()
    assert not any(path.exists() for path in left)
    assert {path.read_bytes() for path in left[0].parent.iterdir()} == {start, result}


def test_a_full_disk_may_be_the_one_with_the_log(fleet: Fleet, small_disk: Full) -> None:
    """What it prints comes when there is room again, and meanwhile it serves."""
    bundle = fleet.bundle()
    state, listen = fleet.directory / "other", free_address()
    options = ("--listen", listen, "--rounds", "1", "--exit-when-done")
    with (fleet.state / "log").open("w") as log:
        command = [*serve_command(bundle.path, state, *options), "--insecure", "--format", "json"]
        process = subprocess.Popen(command, stdout=log)
    try:
        clients = [fleet.client(Unproven(listen, name)) for name in ("ada", "ben")]
        clients[0].check_in(0)
        with small_disk(None):
            join_round(*clients)
            start = clients[0].download(1)
            assert clients[0].upload(header(1), train(bundle, start, 0, 1)).accepted
        assert clients[1].upload(header(1), train(bundle, start, 1, 1)).accepted
        number = check_in_until(clients[0], pb.CheckInReply.FINISH).round
        for client in clients:
            finish(client, number)
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
    lines = (fleet.state / "log").read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in lines]
    one_round = ["round_opened", *["update_accepted"] * 2, "round_closed"]
    assert kinds == ["listening", *one_round, "finished"]


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how far ahead of the truth `time.time` is in processes that start from now on."""
    offset = tmp_path / "offset"
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(
        "import pathlib, time\n"
        f"real, offset = time.time, pathlib.Path({str(offset)!r})\n"
        "time.time = lambda: real() + float(offset.read_text())\n"
    )
    path = [str(tmp_path / "clock"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))

    def set_offset(seconds: float) -> None:
        other = tmp_path / "offset.new"
        other.write_text(str(seconds))
        other.rename(offset)

    set_offset(0)
    return set_offset


def test_a_clock_that_jumps_ahead_ends_no_round(
    fleet: Fleet, jump: Callable[[float], None]
) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--deadline", "600")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    jump(20 * 86400)
    reply = ben.check_in(0)
    assert reply.action == pb.CheckInReply.TRAIN
    assert 500 < reply.seconds_left <= 600
    assert ben.upload(header(1), train(bundle, start, 1, 1)).accepted
    assert served.wait_for("round_closed")["updates"] == 2


def test_a_clock_that_jumps_back_does_not_prolong_a_round(
    fleet: Fleet, jump: Callable[[float], None]
) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--deadline", "2")
    clients = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(*clients)
    jump(-3600)
    start = clients[0].download(1)
    for seed, client in enumerate(clients[:2]):
        assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
    closed = served.wait_for("round_closed")
    assert closed["updates"] == 2
    assert closed["seconds"] >= 0


def test_who_has_the_final_generalist_survives_a_kill(fleet: Fleet) -> None:
    """A coordinator that starts again waits for nobody who has it, and for those who have not."""
    bundle = fleet.bundle()
    options = ("--rounds", "1", "--exit-when-done", "--enrolment-port", "0")
    listen = free_address()
    served = fleet.serve(bundle, *options, listen=listen)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    for seed, client in enumerate((ada, ben)):
        assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
    number = check_in_until(ada, pb.CheckInReply.FINISH).round
    finish(ada, number)
    served.kill()
    again = fleet.serve(bundle, *options, listen=listen)
    again.ready()
    finish(ben, number)
    assert again.end()[-1]["event"] == "finished"
    # Killed at the very end, it has nothing left to do.
    assert fleet.serve(bundle, *options, listen=listen).end()[-1]["event"] == "finished"


def test_a_file_that_went_with_its_round_is_no_failing_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), round_errors(tmp_path):
        (tmp_path / "gone").read_bytes()
    with pytest.raises(StorageError, match="cannot write"), round_errors(tmp_path):
        tmp_path.read_bytes()
