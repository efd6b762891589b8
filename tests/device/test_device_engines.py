"""One bundle, two engines that agree; and a device under the default one has no torch in it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_help import TIMEOUT, comigs, events, run_alone, saved, steps, tokens, trainer
from tiny import TIER, ExportTiny

from edge_runtime.bundle import Bundle
from edge_runtime.engines import ENGINES, load_engine
from edge_runtime.errors import DivergedError
from edge_runtime.predict import Predictor
from edge_runtime.training import Evaluator
from export import mixture
from export.mixture import Mixture

TEXT = "Line 17 of the train split says that 289 is a number. "  # longer than the context


@pytest.fixture(scope="module")
def both(export_tiny: ExportTiny) -> Bundle:
    """Every kind of program for both engines; one size of micro-batch, to compile less."""
    tier = replace(TIER, micro_batches=(2,))
    return export_tiny(Mixture(rank=4), engines=ENGINES, tier=tier)


# --- the engines agree -------------------------------------------------------------------------


def test_suggestions_and_routing_agree(both: Bundle) -> None:
    vectors = mixture.random(both.manifest, 1)
    one, other = (Predictor(both, load_engine(name), vectors) for name in ENGINES)
    for end in (1, 2, 7, 8, 9, 30, 31, 32, 33, len(TEXT)):
        ours, theirs = (p.suggest(TEXT[:end], top=256) for p in (one, other))
        # Suggestions of equal probability may come in either order.
        np.testing.assert_allclose(
            [s.probability for s in ours], [s.probability for s in theirs], atol=1e-4
        )
        assert ours[0].text == theirs[0].text
    for (token, shares), (same_token, same_shares) in zip(
        one.explain(TEXT), other.explain(TEXT), strict=True
    ):
        assert token == same_token
        assert shares == pytest.approx(same_shares, abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_beyond_float32_are_told_of_and_leave_nothing_behind(
    both: Bundle, engine: str
) -> None:
    """What they put into the cache is no number, whatever it is multiplied with."""
    good = mixture.random(both.manifest, 1)
    bad = {role: np.full_like(vector, 1e20) for role, vector in good.items()}
    predictor = Predictor(both, load_engine(engine, threads=1), good)
    before = predictor.logits([1, 2, 3])
    predictor.use(bad)
    with pytest.raises(DivergedError, match="no prediction is a finite number"):
        predictor.logits([1, 2, 3, 4, 5, 6])
    predictor.use(good)
    np.testing.assert_allclose(predictor.logits([1, 2, 3]), before, atol=1e-5)


def test_evaluation_and_training_agree(both: Bundle) -> None:
    start = mixture.random(both.manifest, 1)
    held_out = tokens(5, 200)
    trained, losses = [], []
    for name in ENGINES:
        vectors = steps(trainer(both, start, engine=name), 10)  # over three bursts
        trained.append(vectors)
        losses.append(Evaluator(both, load_engine(name), vectors).loss(held_out))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for role, vector in trained[0].items():
        assert not np.array_equal(vector, start[role])
        difference = np.linalg.norm(trained[1][role] - vector) / np.linalg.norm(vector)
        assert difference < 1e-3, role


def test_a_home_may_change_its_engine(both: Bundle, text_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = run_alone(
        home, text_dir, "--bundle", both.path, "--rounds", 1, "--engine", "executorch"
    )
    second = run_alone(home, text_dir, "--rounds", 2, "--engine", "onnxruntime")
    assert [first[-1]["engine"], second[-1]["engine"]] == ["executorch", "onnxruntime"]
    assert (first[-1]["steps"], second[-1]["steps"]) == (10, 20)
    assert second[-1]["held_out_loss"][2][1] < first[-1]["held_out_loss"][1][1]
    predict = ("predict", "--home", home, "Line 1", "--explain", "--format", "json")
    ended = [comigs(*predict, "--engine", engine, "--threads", 1) for engine in ENGINES]
    assert [done.stderr for done in ended] == ["", ""]  # nor does an engine chat
    results = [json.loads(done.stdout) for done in ended]
    probabilities = [[s["probability"] for s in result["suggestions"]] for result in results]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)
    assert [row["token"] for row in results[0]["routing"]] == list("Line 1")


def test_more_threads_are_the_same_device(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """The same bits, whatever number of threads: a state may move to another machine."""
    for threads in (1, 2):
        home = tmp_path / str(threads)
        options = ("--bundle", tiny_bundle.path, "--rounds", 1, "--threads", threads)
        run_alone(home, text_dir, *options)
    assert saved(tmp_path / "1", tiny_bundle) == saved(tmp_path / "2", tiny_bundle)


# --- no torch in a device ----------------------------------------------------------------------

WITHOUT = """
import json, sys

BANNED = ("torch", "transformers", "peft", "executorch", "onnx", "sqlalchemy")

class Alarm:
    # Importing one of them is an error.

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise ImportError("a device imports " + name)

class Hidden:
    # They are not installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in BANNED:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

if sys.argv[1] == "alarm":
    sys.meta_path.insert(0, Alarm())
else:
    sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
from edge_runtime.cli import main

for arguments in json.loads(sys.argv[2]):
    sys.argv = ["comigs", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(BANNED))
assert not loaded, loaded
assert "onnxruntime" in sys.modules
print("clean")
"""


def without(*commands: list[object], how: str) -> subprocess.CompletedProcess[str]:
    """Runs commands in one process without torch and the like.

    Args:
        how: "alarm" (it is there, importing it fails the test) or "hidden" (it is not there).
    """
    listed = json.dumps([[str(part) for part in arguments] for arguments in commands])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, how, listed],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize("how", ["alarm", "hidden"])
def test_a_device_needs_no_torch(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path, how: str
) -> None:
    home = tmp_path / "home"
    at: list[object] = ["--home", home]
    done = without(
        ["device", "run", *at, "--data", text_dir, "--bundle", tiny_bundle.path, "--alone"],
        ["device", "evaluate", *at, "--data", text_dir, "--format", "json"],
        ["predict", *at, "Line 1", "--explain"],
        ["plan", "--bundle", tiny_bundle.path],
        ["doctor", *at],
        how=how,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "clean"
    assert "perplexity" in done.stdout
    assert "generalist" in done.stdout
    assert saved(home, tiny_bundle)["expert_steps"] == 30


def test_executorch_brings_nothing_that_lowers_programs(
    both: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """Importing that would take seconds, and memory."""
    code = (
        "import sys; sys.modules['executorch.exir'] = None\n"
        "from edge_runtime.cli import main\nmain()"
    )
    arguments = ["--home", tmp_path / "home", "--data", text_dir, "--bundle", both.path, "--alone"]
    done = subprocess.run(
        [sys.executable, "-c", code, "device", "run", *arguments, "--engine", "executorch"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tiers_shapes_are_the_programs_shapes(both: Bundle) -> None:
    shapes = {
        (p.name, p.engine): tuple(next(i for i in p.inputs if i.name == "tokens").shape)
        for p in both.manifest.programs
    }
    for engine in ENGINES:
        assert shapes["train_step.b2", engine] == (2, TIER.train_length)
        assert shapes["eval_loss", engine] == (TIER.eval_batch, TIER.train_length)
        # ONNX Runtime's takes any number of tokens up to the context.
        in_place = engine == "onnxruntime"
        assert shapes["prefill", engine] == (TIER.context if in_place else TIER.prefill_chunk,)
        assert shapes["decode", engine] == (TIER.context if in_place else 1,)


def test_a_reader_of_events_gets_json_lines(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    options = ("--home", home, "--data", text_dir, "--bundle", tiny_bundle.path, "--alone")
    done = comigs("device", "run", *options, "--rounds", 1, "--format", "json")
    kinds = [event["event"] for event in events(done.stdout)]
    assert kinds[0] == "plan"
    assert kinds[-1] == "summary"
    assert kinds.count("step") == 10
    people = comigs("device", "run", *options, "--rounds", 2)
    assert people.stdout == ""
    assert "step" in people.stderr
