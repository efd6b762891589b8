"""What can be wrong, and what it gets: a line that says what to do, an exit code, nothing lost."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from device_help import (
    TIMEOUT,
    comigs,
    device_run,
    events,
    refusal,
    run_alone,
    saved,
    training_file,
)
from device_help import (
    command as command_of,
)
from safetensors import safe_open
from safetensors.numpy import save
from tiny import TIER, ExportTiny
from typer.testing import CliRunner

from edge_runtime import adapters, cli
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.errors import (
    AdapterError,
    BundleError,
    DivergedError,
    RefusedError,
    VersionError,
)
from edge_runtime.invitation import encode
from edge_runtime.store import Home, _digest
from export import mixture
from export.mixture import Mixture
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

INVITATION = encode(pb.Invitation(name="ada", host="127.0.0.1", port=1, enrolment_port=2))
BUNDLE, ADAPTER, DATA, BUDGET, UNREACHABLE, TRUST, STORAGE = 10, 11, 12, 13, 14, 15, 17


def start(
    home: Path, data: Path, *arguments: object, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A device that trains alone for a round, to its end."""
    return subprocess.run(
        device_run(home, data, "--rounds", 1, *arguments),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def other_bundle(export_tiny: ExportTiny) -> Bundle:
    """The same base with adapters of another rank."""
    tier = replace(TIER, micro_batches=(2,))
    return export_tiny(Mixture(rank=2), programs=("train_step", "eval_loss"), tier=tier)


# --- bundles -----------------------------------------------------------------------------------


def remove_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def cut_manifest(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])


def empty_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{}")


def binary_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b"\x00\xff\xfe")


def newer_manifest(bundle: Path) -> None:
    brought = {"minimum_reader_version": 99, "what_99_brought": {"unknown": True}}
    change_manifest(bundle, lambda manifest: manifest.update(brought))


def older_manifest(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest.update({"format_version": 3}))


def leading_out(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest["roles"][0].update(path="../elsewhere"))


def cut_weights(bundle: Path) -> None:
    weights = bundle / "onnx" / "weights.bin"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 100)


def alter_program(bundle: Path) -> None:
    for program in (bundle / "onnx").glob("*.onnx"):
        content = bytearray(program.read_bytes())
        content[len(content) // 2] ^= 1
        program.write_bytes(bytes(content))


def no_engines(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest.pop("engines"))


def no_micro_batch(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest["tier"].update(micro_batches=[0]))


def one_place_for_all(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for tensor in manifest["tensors"]:
            tensor["offset"] = "0"

    change_manifest(bundle, change)


def no_rank(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest["mixture"].pop("rank"))


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def remove_programs(bundle: Path) -> None:
    for program in (bundle / "onnx").glob("*.onnx"):
        program.unlink()


def remove_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_manifest, "comigs export"),
        (cut_manifest, "not a valid manifest.*copy the bundle again"),
        (empty_manifest, "incomplete.*export it again"),
        (binary_manifest, "copy the bundle again"),
        (newer_manifest, "99.*update comigs"),
        (older_manifest, "of format 3.*export it again"),
        (no_engines, "does not say what engine onnxruntime costs; copy the bundle again"),
        (no_micro_batch, "a micro-batch of 0; copy the bundle again"),
        (leading_out, "leads out of the bundle"),
        (one_place_for_all, "is not where its role has room for it; copy the bundle again"),
        (no_rank, "rank is missing; copy the bundle again"),
        (cut_weights, r"weights\.bin has \d+ bytes instead of \d+; copy the bundle again"),
        (alter_program, "SHA-256.*copy the bundle again"),
        (remove_programs, "missing; copy the bundle again"),
        (remove_tokenizer, "tokenizer.json is missing"),
        (shutil.rmtree, "no bundle at.*comigs export"),
    ],
)
def test_a_bad_bundle(
    own_bundle: Path,
    text_dir: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    says: str,
) -> None:
    damage(own_bundle)
    message = refusal(start(tmp_path / "home", text_dir, "--bundle", own_bundle), BUNDLE)
    assert re.search(says, message)
    assert str(own_bundle) in message


def test_a_bundle_that_goes_bad_later_costs_nothing(
    own_bundle: Path, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run_alone(home, text_dir, "--bundle", own_bundle, "--rounds", 1)
    before = (home / "state.safetensors").read_bytes()
    copy = shutil.copytree(own_bundle, tmp_path / "copy")
    alter_program(own_bundle)
    refusal(start(home, text_dir, "--rounds", 2), BUNDLE)
    refusal(comigs("predict", "--home", home, "text"), BUNDLE)
    refusal(comigs("device", "evaluate", "--home", home, "--data", text_dir), BUNDLE)
    assert (home / "state.safetensors").read_bytes() == before
    shutil.rmtree(own_bundle)
    # As the message says: copy it again. It may lie elsewhere, too.
    assert run_alone(home, text_dir, "--bundle", copy, "--rounds", 2)[-1]["steps"] == 20


def test_an_engine_that_the_bundle_is_not_for(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    at = ("--bundle", tiny_bundle.path)
    message = refusal(start(home, text_dir, *at, "--engine", "executorch"), BUNDLE)
    assert "engines in it: onnxruntime" in message
    assert "export it again with --engine executorch" in message
    message = refusal(comigs("plan", *at, "--engine", "executorch"), BUNDLE)
    assert "--engine executorch" in message
    # The mistake does not stay in the home.
    run_alone(home, text_dir, *at, "--rounds", 1)
    message = refusal(comigs("predict", "--home", home, "a", "--engine", "executorch"), BUNDLE)
    assert "--engine executorch" in message
    unknown = start(home, text_dir, *at, "--engine", "tensorflow")
    assert unknown.returncode == 2
    assert "onnxruntime or executorch" in unknown.stderr


# --- adapters and state ------------------------------------------------------------------------


def test_an_adapter_of_another_rank(
    own_bundle: Path, other_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    expert = own_bundle / "adapters" / "generalist"
    shutil.rmtree(expert)
    shutil.copytree(other_bundle.path / "adapters" / "generalist", expert)
    # Nothing in a bundle may be replaced, ...
    message = refusal(start(tmp_path / "home", text_dir, "--bundle", own_bundle), BUNDLE)
    assert "adapters/generalist" in message
    # ... and elsewhere a directory of adapters must have the bundle's rank.
    with pytest.raises(AdapterError, match=r"shape \[2, 32\].*wants \[4, 32\] \(rank 4\)") as error:
        adapters.load_directory(open_bundle(own_bundle).manifest, own_bundle)
    assert "\n" not in str(error.value)


def test_directories_of_adapters_that_do_not_fit(tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = tiny_bundle.manifest
    vectors = mixture.random(manifest, 1)
    adapters.save_directory(manifest, vectors, tmp_path)
    again = adapters.load_directory(manifest, tmp_path)
    assert all((again[role] == vector).all() for role, vector in vectors.items())
    file = tmp_path / "adapters" / "specialist.1" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(AdapterError, match="damaged"):
        adapters.load_directory(manifest, tmp_path)
    file.write_bytes((tmp_path / "adapters" / "generalist" / file.name).read_bytes())
    with pytest.raises(AdapterError, match="attn"):  # the specialist has none
        adapters.load_directory(manifest, tmp_path)
    file.unlink()
    with pytest.raises(AdapterError, match="cannot read"):
        adapters.load_directory(manifest, tmp_path)


def test_a_home_made_with_another_bundle(
    tiny_bundle: Bundle, other_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    # Its tensors are the same, but they do not mean the same.
    mixing = tmp_path / "mixing"
    shutil.copytree(tiny_bundle.path, mixing)
    manifest = (mixing / "manifest.json").read_text()
    (mixing / "manifest.json").write_text(manifest.replace("per_linear", "per_block"))
    for other in (other_bundle.path, mixing):
        message = refusal(start(home, text_dir, "--bundle", other), ADAPTER)
        assert "another bundle" in message
        assert "another --home" in message
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    # It goes on with its own, without being told which that is.
    assert run_alone(home, text_dir, "--rounds", 2)[-1]["steps"] == 20


def test_a_flipped_bit_in_the_state_is_found(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """Anywhere in the file: a header, a counter, a weight, a moment."""
    home = tmp_path / "home"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    path = home / "state.safetensors"
    whole = path.read_bytes()
    before, progress = Home(home).load_state(tiny_bundle)
    generator = random.Random(3)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [generator.randrange(len(whole)) for _ in range(100)]
    unread = 0
    for place in [*range(header), *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            state, got = Home(home).load_state(tiny_bundle)
        except AdapterError:
            continue
        unread += 1  # a blank between the header's words
        assert got == progress
        assert all((state.vectors[role] == v).all() for role, v in before.vectors.items())
    assert unread < 10
    path.write_bytes(damaged)
    assert "SHA-256" in refusal(start(home, text_dir), ADAPTER)


@pytest.mark.parametrize("file", ["state.safetensors", "device.json"])
def test_a_damaged_home(tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, file: str) -> None:
    home = tmp_path / "home"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    before = saved(home, tiny_bundle)
    whole = (home / file).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[1, 2]", b"\xff" * len(whole)):
        (home / file).write_bytes(damaged)
        message = refusal(comigs("predict", "--home", home, "text"), ADAPTER)
        assert f"{file} is damaged" in message
        assert "restore it" in message
        refusal(start(home, text_dir), ADAPTER)
        assert (home / file).read_bytes() == damaged  # not replaced behind one's back
    (home / file).write_bytes(whole)
    assert saved(home, tiny_bundle) == before
    run_alone(home, text_dir, "--rounds", 2)


def test_no_home_yet(text_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "--bundle DIR" in refusal(start(home, text_dir), ADAPTER)
    assert "comigs device run" in refusal(comigs("predict", "--home", home, "text"), ADAPTER)


def test_a_home_that_another_process_trains_in(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    training = training_file(tmp_path / "training.json", local_steps=100_000)
    options = ("--bundle", tiny_bundle.path, "--training", training)
    first = subprocess.Popen(
        device_run(home, text_dir, *options), stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline()  # it holds the home
        message = refusal(start(home, text_dir, *options), STORAGE)
        assert "another process trains" in message
        assert "another --home" in message
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    run_alone(home, text_dir, "--rounds", 1)  # the lock went with its holder


# --- text --------------------------------------------------------------------------------------

SENTENCES = "This is a sentence like any other.\n" * 100


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "is not a directory"),
        ({}, "holds no text; put"),
        ({"notes.txt": "", "more.txt": " \n\n"}, "holds no text"),
        ({"notes.txt": "A single line."}, "too few"),
        ({"notes.txt": b"caf\xe9 au lait\n" * 500}, "not UTF-8.*byte 3"),
        ({"train.txt": SENTENCES}, r"no valid\.txt"),
        ({"valid.txt": SENTENCES}, r"no train\.txt"),
        ({"train.txt": "", "valid.txt": SENTENCES}, r"train.*is empty"),
        ({"train.txt": SENTENCES, "valid.txt": b"\xff\xfe" * 99}, r"valid\.txt is not UTF-8"),
        ({"train.txt": "A single line.", "valid.txt": SENTENCES}, "training split has 14 tokens"),
        ({"train.txt": SENTENCES, "valid.txt": "A single line."}, "held-out split has 14 tokens"),
    ],
)
def test_bad_text(
    tiny_bundle: Bundle, tmp_path: Path, files: dict[str, str | bytes] | None, says: str
) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    if files is not None:
        data.mkdir()
        for name, content in files.items():
            (data / name).write_bytes(content.encode() if isinstance(content, str) else content)
    message = refusal(start(home, data, "--bundle", tiny_bundle.path), DATA)
    assert re.search(says, message), message
    assert not (home / "state.safetensors").exists()


def test_the_least_text_that_is_enough(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The message's figure is true to the token (which is a byte here)."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text(SENTENCES)
    (data / "valid.txt").write_text("too little")
    at = ("--bundle", tiny_bundle.path)
    message = refusal(start(tmp_path / "home", data, *at), DATA)
    found = re.search(r"needs at least ([\d,]+)", message)
    assert found
    enough = int(found[1].replace(",", ""))
    (data / "valid.txt").write_text(SENTENCES[: enough - 1])
    refusal(start(tmp_path / "home", data, *at), DATA)
    (data / "valid.txt").write_text(SENTENCES[:enough])
    assert start(tmp_path / "home", data, *at).returncode == 0


def test_evaluating_a_split_that_is_not_there(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home, data = tmp_path / "home", tmp_path / "data"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    shutil.copytree(text_dir, data)
    (data / "test.txt").unlink()
    options = ("device", "evaluate", "--home", home, "--data", data)
    assert "test.txt" in refusal(comigs(*options), DATA)
    (data / "test.txt").write_text("")
    refusal(comigs(*options), DATA)
    (data / "test.txt").write_text(SENTENCES)
    for other in ("train", "valid"):  # which are not asked for
        (data / f"{other}.txt").unlink()
    assert comigs(*options).returncode == 0
    assert comigs(*options, "--split", "other").returncode == 2


def test_a_state_of_another_version(tiny_bundle: Bundle, text_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    path = home / "state.safetensors"
    with safe_open(path, "np") as file:
        text = file.metadata()["comigs"]
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    newer = json.dumps(json.loads(text) | {"version": 99})
    path.write_bytes(save(arrays, metadata={"comigs": newer, "sha256": _digest(newer, arrays)}))
    message = refusal(start(home, text_dir), VersionError.code)
    assert "is of version 99" in message


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--memory", "9" * 400), 2),
        (("--compute", "9" * 400 + "h"), 2),
        (("--threads", "-1"), 2),
        (("--data", "d" * 300), 17),
        (("--home", "h" * 300), 17),
    ],
)
def test_numbers_and_paths_that_nothing_holds(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, options: tuple[str, str], code: int
) -> None:
    at = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)
    done = comigs("device", "run", "--alone", *at, *options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--alone", "--compression", "int8"), "no option of one"),
        (("--alone", "--retry", 5), "no option of one"),
        (("--invitation", INVITATION, "--rounds", 2), "are the coordinator's"),
        (("--invitation", INVITATION, "--training", "t.json"), "are the coordinator's"),
    ],
)
def test_options_that_would_mean_nothing(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    at = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)
    done = comigs("device", "run", *at, *options, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_rounds_of_the_command_line_go_before_those_of_the_file(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    training = training_file(tmp_path / "t.json", rounds=1, local_steps=2)
    at = (tmp_path / "home", text_dir, "--bundle", tiny_bundle.path, "--training", training)
    assert run_alone(*at)[-1]["steps"] == 2
    assert run_alone(*at, "--rounds", 3)[-1]["steps"] == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
@pytest.mark.parametrize("command", ["plan", "device run --home home --alone --format json"])
def test_a_full_disk_behind_standard_output(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, command: str
) -> None:
    of_device = ("--data", text_dir) if "run" in command else ()
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command_of(*command.split(), "--bundle", tiny_bundle.path, *of_device),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
            cwd=tmp_path,
        )
    assert "standard output: No space left" in refusal(done, STORAGE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
@pytest.mark.parametrize("streams", ["2>/dev/full", "<&- >&- 2>&-", "0>&- 1<&-"])
def test_the_code_tells_what_the_messages_cannot(streams: str, tmp_path: Path) -> None:
    words = shlex.join(map(str, command_of("predict", "--home", tmp_path / "none")))
    done = subprocess.run(["sh", "-c", f"{words} {streams}"], timeout=TIMEOUT, check=False)
    assert done.returncode == AdapterError.code


def test_a_program_at_a_terminal_gets_json(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    run_alone(tmp_path / "home", text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    here, there = os.openpty()
    command = command_of("predict", "--home", tmp_path / "home", "--format", "json", "--top", 1)
    with subprocess.Popen(command, stdin=there, stdout=subprocess.PIPE, text=True) as asking:
        os.close(there)
        os.write(here, b"hello\n\x04")
        told, _ = asking.communicate(timeout=TIMEOUT)
    os.close(here)
    assert (json.loads(told)["text"], asking.returncode) == ("hello", 0)


def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("device.json", "identity.json"):
        (home / name).write_text("{}")
        (home / name).chmod(0)
    script = """if True:
        import os, sys
        from pathlib import Path
        import edge_runtime.identity
        from edge_runtime.store import Home
        if os.geteuid() == 0:
            os.seteuid(65534)
        getattr(Home(Path(sys.argv[1])), sys.argv[2])()
    """
    for what in ("config", "identity"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(home), what],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert "StorageError" in done.stderr
        assert "let this user read it" in done.stderr


def test_a_configuration_of_other_kinds(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)
    config = json.loads((home / "device.json").read_text())
    (home / "device.json").write_text(json.dumps(config | {"bundle": 5}))
    assert "bundle is 5" in refusal(start(home, text_dir), ADAPTER)


# --- budgets -----------------------------------------------------------------------------------


def test_a_memory_budget_that_is_too_small(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    at = ("--bundle", tiny_bundle.path)
    message = refusal(start(home, text_dir, *at, "--memory", "10MiB"), BUDGET)
    assert "the budget is 10MiB" in message
    found = re.search(r"--memory (\d+)MiB", message)
    assert found
    smallest = int(found[1])
    refusal(start(home, text_dir, *at, "--memory", f"{smallest - 1}MiB"), BUDGET)
    of_plan = ("plan", *at, "--alone", "--memory")
    refusal(comigs(*of_plan, f"{smallest - 1}MiB"), BUDGET)
    done = start(home, text_dir, *at, "--memory", f"{smallest}MiB")
    assert done.returncode == 0, done.stderr
    summary = events(done.stdout)[-1]
    assert summary["peak_rss_mib"] <= summary["planned_memory_mib"] <= smallest
    plan = json.loads(comigs(*of_plan, f"{smallest}MiB", "--format", "json").stdout)
    assert plan["chosen_micro_batch"] == summary["micro_batch"]
    assert 0 < plan["suggesting_bytes"] < smallest * 2**20
    assert plan["plans"][0]["together"]
    assert not plan["plans"][-1]["together"]
    # With programs that make room for each other it learns what it learns with all of them loaded.
    done = start(tmp_path / "roomy", text_dir, *at, "--seed", 0)
    roomy = events(done.stdout)[-1]
    assert (roomy["together"], summary["together"]) == (True, False)
    np.testing.assert_allclose(summary["held_out_loss"], roomy["held_out_loss"], rtol=1e-4)


def test_much_text_counts_towards_the_memory_budget(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """Its tokens, and itself while it is read: with one emoji in it, four bytes a character."""
    data = tmp_path / "data"
    shutil.copytree(text_dir, data)
    lines = "".join(f"word{n % 977} and line {n}.\n" for n in range(50_000))
    (data / "train.txt").write_text(lines + "\N{GRINNING FACE}\n")
    at = ("--bundle", tiny_bundle.path)
    little = json.loads(comigs("plan", *at, "--format", "json").stdout)["plans"][-1]["total_bytes"]
    assert "is not a size" in start(tmp_path / "a", data, *at, "--memory", little).stderr
    little = f"{little} B"
    message = refusal(start(tmp_path / "a", data, *at, "--memory", little), BUDGET)
    found = re.search(r"--memory (\d+)MiB .*, (\d+)MiB of it for the text", message)
    assert found
    assert int(found[2]) * 2**20 > 8 * len(lines)
    summary = events(start(tmp_path / "b", data, *at, "--memory", f"{found[1]}MiB").stdout)[-1]
    assert summary["peak_rss_mib"] <= summary["planned_memory_mib"] <= int(found[1])


def test_a_compute_budget_ends_a_round_early_and_says_so(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    training = training_file(tmp_path / "training.json", rounds=2, local_steps=100)
    options = ("--bundle", tiny_bundle.path, "--training", training)
    got = run_alone(tmp_path / "little", text_dir, *options, "--compute", "0.001s")
    stops = [event for event in got if event["event"] == "compute_budget"]
    assert [(stop["round"], stop["steps"]) for stop in stops] == [(1, 1), (2, 1)]
    assert got[-1]["steps"] == 2
    _, progress = Home(tmp_path / "little").load_state(tiny_bundle)
    # Its second round is at the learning rate of everybody's second round.
    assert progress.round_start - progress.schedule_start == 100
    for _ in range(3):  # it would go on where it was, and makes no other step
        again = run_alone(tmp_path / "little", text_dir, *options, "--compute", "0.001s")
        assert not [event for event in again if event["event"] in ("step", "compute_budget")]
    said = comigs("plan", "--bundle", tiny_bundle.path, "--compute", "0.001s").stdout
    assert said.endswith("would exceed 0.001 s in a round, after at least one\n")
    got = run_alone(tmp_path / "plenty", text_dir, *options, "--compute", "5m")
    assert [event for event in got if event["event"] == "compute_budget"] == []
    assert got[-1]["steps"] == 200


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--memory", "lots", "512MiB"),
        ("--memory", "-5MiB", "512MiB"),
        ("--memory", "5 apples", "512MiB"),
        ("--compute", "soon", "60s"),
        ("--compute", "0s", "60s"),
        ("--compute", "-1", "60s"),
    ],
)
def test_nonsense_budgets(option: str, value: str, says: str) -> None:
    done = CliRunner().invoke(cli.build(), ["plan", "--bundle", "nowhere", f"{option}={value}"])
    assert done.exit_code == 2
    message = " ".join(done.stderr.replace("│", " ").split())
    assert f"Invalid value for '{option}': {value!r} is not a " in message
    assert f"write for example {says}" in message


@pytest.mark.parametrize(
    ("command", "option", "most"),
    [
        ("device run --alone --home {out} --data {text} --bundle {bundle}", "--seed", 2**32 - 1),
        ("device run --alone --home {out} --data {text} --bundle {bundle}", "--rounds", 10**6),
        ("export --out {out}", "--seed", 2**32 - 1),
        ("demo --out {out}", "--seed", 2**32 - 1),
        ("demo --out {out}", "--rounds", 10**6),
        ("demo --out {out}", "--local-steps", 10**6),
    ],
)
def test_numbers_that_cannot_be_leave_no_trace(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, command: str, option: str, most: int
) -> None:
    out = tmp_path / "out"
    words = command.format(out=out, text=text_dir, bundle=tiny_bundle.path).split()
    for value in (-1, most + 1, 5_000_000_000):
        done = CliRunner().invoke(cli.build(), [*words, f"{option}={value}"])
        assert done.exit_code == 2, done.output
        message = " ".join(done.stderr.replace("│", " ").split())
        assert f"Invalid value for '{option}'" in message
        assert not out.exists()


def test_a_program_that_the_bundle_lacks(tiny_bundle: Bundle) -> None:
    """What is missing is what is to be mended."""
    with pytest.raises(BundleError, match=r"only .*train_step\.b2; export .* --tier that has it"):
        tiny_bundle.program("train_step.b7", "onnxruntime")
    with pytest.raises(BundleError, match=r"engines in it: onnxruntime\); .* --engine executorch"):
        tiny_bundle.program("train_step.b2", "executorch")


@pytest.mark.parametrize(
    "values",
    [{"batch_sequences": 3}, {"batchSequences": 5}],
)
def test_a_batch_that_no_program_divides_is_fitted(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, values: dict[str, int]
) -> None:
    """Odd batches are left to the program that takes one sequence."""
    training = training_file(tmp_path / "training.json", rounds=1, local_steps=2, **values)
    options = ("--bundle", tiny_bundle.path, "--training", training)
    summary = run_alone(tmp_path / "home", text_dir, *options)[-1]
    assert (summary["micro_batch"], summary["steps"]) == (1, 2)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"unknown": 1}', '{"beta1": 1.5}', '{"learning_rate": "fast"}', "\xff"]
)
def test_nonsense_training_configurations(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, content: str
) -> None:
    training = tmp_path / "training.json"
    training.write_text(content, encoding="latin-1")
    options = ("--bundle", tiny_bundle.path, "--training", training)
    done = start(tmp_path / "home", text_dir, *options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--training" in done.stderr


@pytest.mark.parametrize(
    ("rate", "steps"), [(1e38, 2), (1e30, 2), (1e30, 1), (1e17, 1), (1e17, 20)]
)
def test_training_that_diverges_leaves_the_home_as_it_was(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, rate: float, steps: int
) -> None:
    """At the higher rates a step makes weights of which nothing finite comes; at the lowest one it
    is the loss after the round's last step, or the next one's. So little compute saves each."""
    home = tmp_path / "home"
    start(home, text_dir, "--bundle", tiny_bundle.path)
    before = learnt(home, tiny_bundle)
    training = training_file(tmp_path / "wild.json", learning_rate=rate, local_steps=steps)
    options = ("--rounds", 2, "--training", training, "--compute", "0.1s")
    done = start(home, text_dir, *options)
    assert "lower the learning rate" in refusal(done, DivergedError.code)
    assert learnt(home, tiny_bundle) == before
    assert start(home, text_dir, "--rounds", 2).returncode == 0


def learnt(home: Path, bundle: Bundle) -> dict[str, Any]:
    """Vectors and moments that are saved."""
    return {name: value for name, value in saved(home, bundle).items() if "/" in name}


@pytest.mark.parametrize("options", [("--name", "other"), ("--seed", 8)])
def test_what_a_home_was_made_with_cannot_change(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, options: tuple[str, object]
) -> None:
    home = tmp_path / "home"
    made = ("--name", "ada", "--seed", 7)
    assert start(home, text_dir, "--bundle", tiny_bundle.path, *made).returncode == 0
    assert start(home, text_dir, *made).returncode == 0
    done = start(home, text_dir, *options)
    assert done.returncode == 2
    assert "too late" in done.stderr


# --- disk and network --------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_training(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """The device ends with what to do; with space again it ends as if nothing had been."""
    training = training_file(
        tmp_path / "training.json", rounds=3, local_steps=400, tau=30, router_steps=3
    )
    options = ("--bundle", tiny_bundle.path, "--training", training)
    home = tmp_path / "home"
    process = subprocess.Popen(
        device_run(home, text_dir, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == 25:
            break
    # From now on no file of this process may become larger than this.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    output, errors = process.communicate(timeout=TIMEOUT)
    message = refusal(
        subprocess.CompletedProcess(process.args, process.returncode, output, errors), STORAGE
    )
    assert "state.safetensors" in message
    assert "free some space" in message
    assert {path.name for path in home.iterdir()} == {"device.json", "lock", "state.safetensors"}
    state, _ = Home(home).load_state(tiny_bundle)
    assert 20 <= state.expert_steps < 1200
    run_alone(home, text_dir, *options)
    run_alone(tmp_path / "untouched", text_dir, *options)
    assert saved(home, tiny_bundle) == saved(tmp_path / "untouched", tiny_bundle)


def test_a_disk_that_is_full_from_the_start(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    # Its output goes into pipes, which have no size.
    options = ("--bundle", tiny_bundle.path)
    message = refusal(start(home, text_dir, *options, preexec_fn=full), STORAGE)
    assert "free some space" in message
    run_alone(home, text_dir, *options, "--rounds", 1)


def test_a_home_that_cannot_be_a_directory(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    message = refusal(
        start(tmp_path / "file" / "home", text_dir, "--bundle", tiny_bundle.path), STORAGE
    )
    assert "choose another" in message


def test_a_coordinator_that_cannot_be_reached(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    home = tmp_path / "home"
    options = ("--home", home, "--data", text_dir, "--bundle", tiny_bundle.path)
    started = time.monotonic()
    done = comigs(
        *("device", "run", *options, "--coordinator", address, "--insecure", "--retry", 2)
    )
    assert time.monotonic() - started >= 2
    message = refusal(done, UNREACHABLE)
    assert address in message
    assert "check that it runs" in message
    waits = [line for line in done.stderr.splitlines() if "trying again in" in line]
    assert len(waits) >= 2
    assert all(address in line for line in waits)
    # It is still a device, which may go on alone.
    run_alone(home, text_dir, "--rounds", 1)


class Senseless(coordinator_pb2_grpc.CoordinatorServicer):
    """A coordinator that wants a training that cannot be."""

    def __init__(self, training: pb.TrainingConfig) -> None:
        self.training = training

    def CheckIn(self, request: pb.CheckInRequest, context: object) -> pb.CheckInReply:  # noqa: N802
        return pb.CheckInReply(
            action=pb.CheckInReply.TRAIN, round=1, protocol=4, training=self.training
        )


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (pb.TrainingConfig(rounds=1, learning_rate=float("nan")), "learning_rate is nan"),
        (pb.TrainingConfig(rounds=1, beta2=1.0), "beta2 is 1.0"),
        (pb.TrainingConfig(rounds=1, weight_decay=-1.0), "weight_decay is -1.0"),
    ],
)
def test_a_training_that_cannot_be(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, training: pb.TrainingConfig, message: str
) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(Senseless(training), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    options = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)
    done = comigs("device", "run", *options, "--coordinator", address, "--insecure")
    assert message in refusal(done, RefusedError.code)
    server.stop(None)


def test_an_invitation_that_is_cut_off(tiny_bundle: Bundle, text_dir: Path, tmp_path: Path) -> None:
    options = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)
    for text, message in ((INVITATION[:-9], "copy all of"), ("nonsense", "this is no invitation")):
        assert message in refusal(comigs("device", "run", *options, "--invitation", text), TRUST)
    assert not (tmp_path / "home").exists()


def test_interrupting_is_no_error(tiny_bundle: Bundle, text_dir: Path, tmp_path: Path) -> None:
    training = training_file(tmp_path / "training.json", local_steps=100_000)
    home = tmp_path / "home"
    # A background job ignores interrupts, and its children would, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        device_run(home, text_dir, "--bundle", tiny_bundle.path, "--training", training),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == 30:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert Home(home).load_state(tiny_bundle)[0].expert_steps >= 20


@pytest.mark.parametrize(
    "arguments",
    [
        ("--alone", "--coordinator", "127.0.0.1:1"),
        (),
        ("--coordinator", "127.0.0.1:1"),  # neither enrolled nor --insecure
        ("--insecure",),  # where?
        ("--coordinator", "127.0.0.1:1", "--insecure", "--invitation", INVITATION),
        ("--alone", "--invitation", INVITATION),
        ("--name", "ben", "--invitation", INVITATION),
    ],
)
def test_options_that_do_not_go_together(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    options = ("--home", tmp_path / "home", "--data", text_dir, "--bundle", tiny_bundle.path)
    done = comigs("device", "run", *options, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()
