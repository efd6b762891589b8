"""`comigs demo` from compiling to the report, on the tiny base and two small users."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from benchmarks.demo import (
    Child,
    ChildError,
    Demo,
    _compile,
    _curve,
    _places,
    _sentence,
    _shower,
    finish_all,
)
from benchmarks.users import UserText
from edge_runtime import training_config
from edge_runtime.bundle import Bundle
from edge_runtime.cli import emit
from edge_runtime.errors import DataError, StorageError
from edge_runtime.training import perplexity_of
from export.mixture import Mixture


@pytest.fixture(scope="module")
def users_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`numbers` brings its own splits, `letters` one file that has to be split."""
    path = tmp_path_factory.mktemp("users")
    for name in ("numbers", "letters"):
        (path / name).mkdir()
    for split in ("train", "valid", "test"):
        lines = [f"{n} plus {n} makes {2 * n} in {split}.\n" for n in range(200)]
        (path / "numbers" / f"{split}.txt").write_text("".join(lines))
    lines = [f"After {chr(97 + n % 26) * 3} comes {chr(97 + (n + 1) % 26) * 3}, {n} says.\n\n"
             for n in range(500)]  # fmt: skip
    (path / "letters" / "notes.txt").write_text("".join(lines))
    return path


def start_demo(users: Path, base: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "edge_runtime", "demo", "--users", users, "--base", base),
            *("--rounds", "2", "--local-steps", "5", "--out", out, "--format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def run_demo(users: Path, base: Path, out: Path) -> dict[str, object]:
    done = start_demo(users, base, out)
    assert done.returncode == 0, done.stderr
    assert "method: letters: 10 of 10" in done.stderr, "it shows progress without a terminal"
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_nobody_waits_for_a_process_that_failed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = ("--listen", "127.0.0.1:0", "--insecure", "--state", str(tmp_path / "state"))
    waiting = Child(["serve", "--bundle", str(tiny_bundle.path), *options], lambda _: None)
    try:
        waiting.wait_for("listening", 60)
        failing = Child(["plan", "--bundle", str(tmp_path / "nothing")], lambda _: None)
        with pytest.raises(ChildError, match=r"comigs plan .*ended with 10: .*no bundle at"):
            finish_all([waiting, failing])
    finally:
        waiting.process.kill()
        waiting.process.wait()


def test_demo_tells_the_whole_story(users_dir: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run_demo(users_dir, tiny_base_dir, out)
    assert [user["name"] for user in result["users"]] == ["letters", "numbers"]
    for user in result["users"]:
        perplexity = user["test_perplexity"]
        assert set(perplexity) == {"base", "local", "fedavg", "method"}
        assert all(1.0 < value < math.inf for value in perplexity.values())
        # Ten steps on such regular text help every arm; a base of random weights knows nothing.
        assert all(perplexity[arm] < perplexity["base"] for arm in ("local", "fedavg", "method"))
        assert user["bytes_sent"] > 0
        assert user["bytes_received"] > user["bytes_sent"]
        assert user["peak_rss_mib"] > 10
        assert user["step_seconds"] > 0
        assert [step for step, _ in user["curves"]["method"]] == [0, 5, 10]
        for weights in user["routing"]["weights"]:
            assert sum(weights) == pytest.approx(1.0, abs=1e-4)
    page = (out / "report.html").read_text()
    for user in result["users"]:
        assert user["name"] in page
    # What was compiled once is used again, and the seed fixes the figures.
    bundles = {path: path.stat().st_mtime_ns for path in (out / "bundles").iterdir()}
    again = run_demo(users_dir, tiny_base_dir, out)
    assert bundles == {path: path.stat().st_mtime_ns for path in (out / "bundles").iterdir()}
    assert [user["test_perplexity"] for user in again["users"]] == [
        user["test_perplexity"] for user in result["users"]
    ]


@pytest.mark.parametrize("folder", ["homes", "users"])
def test_what_no_demo_made_is_not_deleted(
    users_dir: Path, tiny_base_dir: Path, tmp_path: Path, folder: str
) -> None:
    """README keeps the homes of devices in `homes`; somebody may say `--out .` there."""
    key = tmp_path / folder / "anna" / "identity.json"
    key.parent.mkdir(parents=True)
    key.write_text("{}")
    done = start_demo(users_dir, tiny_base_dir, tmp_path)
    assert done.returncode == StorageError.code
    assert "choose another --out" in done.stderr
    assert key.exists()


def test_a_test_split_of_one_token_is_refused_before_anything_is_compiled(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    demo = Demo(
        users=[UserText("ann", "", *["Some text."] * 3), UserText("bob", "", *["Text."] * 2, "x")],
        base=str(tiny_base_dir),
        engine="onnxruntime",
        precision="float32",
        training=training_config.load(None),
        out=tmp_path / "demo",
    )
    with pytest.raises(DataError, match=r"user bob: .*; put more text into bob/test\.txt"):
        _compile(demo, "method", Mixture(), ("eval_loss",), queue.Queue())
    assert not demo.out.exists()


class Ended:
    """A device that said what its losses were."""

    def last(self, kind: str) -> dict[str, object]:
        return {"event": kind, "held_out_loss": [[0, 0.0], [5, 1.0], [5, 800.0]]}


def test_a_loss_beyond_what_a_float_holds_is_an_infinite_perplexity(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert perplexity_of(1.0) == math.e
    assert perplexity_of(709.0) > 1e304
    assert perplexity_of(800.0) == math.inf
    curve = _curve(Ended())
    assert curve == [(0, 1.0), (5, math.inf)]
    progress = Progress()
    task = progress.add_task("method: ann", note="")
    _shower(progress, task)({"event": "held_out", "loss": 800.0})
    assert progress.tasks[0].fields["note"] == "held-out perplexity inf"
    # JSON has no infinity.
    emit({"curves": curve})
    assert json.loads(capsys.readouterr().out) == {"curves": [[0, 1.0], [5, None]]}


def test_suggestions_are_asked_for_at_word_boundaries() -> None:
    text = "One two three four five. " * 40
    for context, truth in _places(text, 3):
        assert context + truth in text
        assert truth.startswith(" ")
        assert truth[1:].isalpha()
        assert text[len(context) :] != context


def test_the_sentence_is_a_passage_of_the_text() -> None:
    text = "\n".join(f"Line {n} holds some words of its own." for n in range(100))
    sentence = _sentence(text)
    assert sentence in text
    assert 40 < len(sentence) <= 240
