"""kill -9 at any moment: the device goes on where it was, and nobody ever reads half a state."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from device_help import comigs, device_run, events, run_alone, saved, training_file

import edge_runtime.device
from edge_runtime import training_config
from edge_runtime.bundle import Bundle
from edge_runtime.device import Device
from edge_runtime.engines import load_engine
from edge_runtime.errors import StorageError
from edge_runtime.files import write_atomic
from edge_runtime.store import DeviceConfig, Home

KILLS = 18
ROUNDS = 4
LOCAL_STEPS = 200


class Reader:
    """Loads the state again and again, as `comigs predict` does, while others write it."""

    def __init__(self, home: Path, bundle: Bundle) -> None:
        self.home, self.bundle = Home(home), bundle
        self.errors: list[Exception] = []
        self.seen: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.004):
            try:
                self.seen.append(self.home.load_state(self.bundle)[0].expert_steps)
            except Exception as error:
                self.errors.append(error)


def kill_once(start: list[str], rng: random.Random, *, early: bool) -> list[dict[str, object]]:
    """Starts a device and kills it at a random moment; what it had reported until then.

    Early: at any time since it was started. Otherwise after some number of reports, so that it was
    surely at work.
    """
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    if early:
        time.sleep(rng.uniform(0.0, 0.8))
    else:
        lines = [process.stdout.readline() for _ in range(rng.randint(2, 60))]
        time.sleep(rng.uniform(0.0, 0.02))
    process.kill()
    # Not communicate(), which leaves out what readline() has buffered.
    rest, errors = process.stdout.read(), process.stderr.read()
    process.wait()
    assert process.returncode == -signal.SIGKILL, errors
    assert errors == ""
    whole = [line for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]
    return events("".join(whole))


def test_killed_again_and_again_it_ends_as_if_never_killed(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    config = training_file(
        tmp_path / "training.json", rounds=ROUNDS, local_steps=LOCAL_STEPS, tau=30, router_steps=3
    )
    options = ("--bundle", tiny_bundle.path, "--training", config, "--seed", 3)
    run_alone(tmp_path / "untouched", text_dir, *options)

    home = tmp_path / "killed"
    rng = random.Random(20)
    reported: list[int] = []
    with Reader(home, tiny_bundle) as reader:
        for kill in range(KILLS):
            seen = kill_once(device_run(home, text_dir, *options), rng, early=kill % 6 == 5)
            made = [int(str(event["step"])) for event in seen if event["event"] == "step"]
            if made and reported:
                # It takes up near where it was; only steps since the last save are made again.
                assert max(reported) - 20 <= made[0] <= max(reported) + 1
            reported += made
        last = run_alone(home, text_dir, *options)
    assert reader.errors == []
    assert reader.seen == sorted(reader.seen)
    assert len(set(reader.seen)) > KILLS / 2  # it did look while things were moving
    assert last[-1]["steps"] == ROUNDS * LOCAL_STEPS
    assert 0 < max(reported) < ROUNDS * LOCAL_STEPS
    got, want = saved(home, tiny_bundle), saved(tmp_path / "untouched", tiny_bundle)
    assert got.keys() == want.keys()
    assert [key for key in want if got[key] != want[key]] == []
    assert list(home.glob(".*")) == []


@pytest.mark.parametrize("budget", [60.0, None])
def test_time_spent_before_a_kill_counts(
    tiny_bundle: Bundle,
    text_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: float | None,
) -> None:
    """No step is as slow here as real ones: so saving is due at once. What step 1 made is saved
    when step 2 has shown that it is of use."""
    monkeypatch.setattr(edge_runtime.device, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(edge_runtime.device, "SAVE_SHARE", 0.0)
    config = training_config.load(training_file(tmp_path / "t.json", rounds=1, local_steps=5))
    home = Home(tmp_path / "home")
    seen: list[str] = []

    def report(event: dict[str, Any]) -> None:
        seen.append(f"step {event['step']}" if event["event"] == "step" else event["event"])
        if seen[-1] == "step 2" and "step 2" not in seen[:-1]:
            raise KeyboardInterrupt

    def start() -> None:
        Device(
            home=home,
            config=DeviceConfig("ada", 0, str(tiny_bundle.path), "onnxruntime"),
            bundle=tiny_bundle,
            engine=load_engine("onnxruntime", threads=1),
            data=text_dir,
            batch_sequences=config.batch_sequences,
            memory_bytes=None,
            compute_seconds=budget,
            report=report,
        ).train_alone(config)

    with pytest.raises(KeyboardInterrupt):
        start()
    state, progress = home.load_state(tiny_bundle)
    assert state.expert_steps == 1
    assert progress.round_seconds > 0.0
    start()
    assert (seen.count("step 1"), seen.count("step 2")) == (1, 2)


def test_leftovers_of_a_killed_write_go_at_the_next_start(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in (".state.safetensors.abc12.comigs-tmp", ".device.json.x.comigs-tmp", ".my.tmp"):
        (home / name).write_bytes(b"half of it")
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    names = {path.name for path in home.iterdir()}
    assert names == {"device.json", "state.safetensors", "lock", ".my.tmp"}


def test_a_finished_device_stays_as_it_is(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    options = ("--bundle", tiny_bundle.path, "--rounds", 1)
    run_alone(home, text_dir, *options)
    before = saved(home, tiny_bundle)
    again = run_alone(home, text_dir, "--rounds", 1)
    assert [event for event in again if event["event"] == "step"] == []
    (nothing,) = (event for event in again if event["event"] == "nothing_to_do")
    assert "up to 1 are trained already; for more, give --rounds 2" in nothing["message"]
    assert saved(home, tiny_bundle) == before
    more = run_alone(home, text_dir, "--rounds", 2)  # as it was told to
    assert sum(event["event"] == "step" for event in more) == 10
    assert "nothing_to_do" not in {event["event"] for event in more}
    told = comigs("device", "run", "--alone", "--home", home, "--data", text_dir, "--rounds", 2)
    summary = told.stderr.splitlines()[-1]
    assert "recompute no" in summary
    assert re.search(r"held out loss \d\.\d+ → \d\.\d+ → \d\.\d+$", summary), summary


def test_a_new_folder_is_as_durable_as_what_is_written_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut right after could take the folder, and the file with it."""
    synced: list[Path] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        fsync(handle)
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "fsync", watched)
    write_atomic(tmp_path / "a" / "b" / "file", b"content")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} < set(synced)


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    path.unlink()
    path.mkdir()  # cannot be replaced by a file
    (path / "inside").write_bytes(b"kept")
    with pytest.raises(StorageError, match="file"):
        write_atomic(path, b"never")
    assert (path / "inside").read_bytes() == b"kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
