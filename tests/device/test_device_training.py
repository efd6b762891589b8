"""Local training: what it reads, what it leaves alone, and that it is the same every time."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from device_help import (
    comigs,
    refusal,
    run_alone,
    same,
    saved,
    steps,
    tokens,
    trainer,
    training_file,
)
from peft import PeftModel
from tiny import ExportTiny
from transformers import GPT2LMHeadModel

from edge_runtime import training_config
from edge_runtime.adapters import load_fresh, views, zeros
from edge_runtime.bundle import Bundle
from edge_runtime.device import rounds_done
from edge_runtime.engines import load_engine
from edge_runtime.errors import StorageError
from edge_runtime.predict import Predictor
from edge_runtime.store import Home
from edge_runtime.training import Evaluator
from export import mixture
from export.mixture import Mixture
from protos import manifest_pb2 as pb
from protos.coordinator_pb2 import CheckInReply

EXPERTS = ("generalist", "specialist.1")


@pytest.fixture(scope="module")
def alone(export_tiny: ExportTiny) -> Bundle:
    """A generalist and nobody beside it."""
    return export_tiny(Mixture(rank=4, specialists=0))


def test_experts_of_a_home_open_in_peft(
    tiny_bundle: Bundle, alone: Bundle, tiny_base_dir: Path, text_dir: Path, tmp_path: Path
) -> None:
    """Each means on its own what it means to our programs."""
    home, out = tmp_path / "home", tmp_path / "experts"
    run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 1)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # not even one expert fits

    # A disk that was full leaves nothing in the way of the same command.
    failed = comigs("device", "experts", "--home", home, "--out", out, preexec_fn=full)
    assert "free some space" in refusal(failed, StorageError.code)
    assert not out.exists()
    done = comigs("device", "experts", "--home", home, "--out", out, "--format", "json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)["experts"]
    assert list(written) == list(EXPERTS)
    vectors = Home(home).load_state(tiny_bundle)[0].vectors
    text = tokens(5, count=30)
    base = GPT2LMHeadModel.from_pretrained(tiny_base_dir)
    bare = base(torch.from_numpy(text)[None]).logits[0, -1].detach().numpy()
    for role, path in written.items():
        ours = zeros(alone.manifest)
        single = views(alone.manifest, ours)
        for name, value in views(tiny_bundle.manifest, {role: vectors[role]}).items():
            single[name.replace(role, "generalist")][...] = value
        model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base_dir), path)
        theirs = model(torch.from_numpy(text)[None]).logits[0, -1].detach().numpy()
        predictor = Predictor(alone, load_engine("onnxruntime", threads=1), ours)
        np.testing.assert_allclose(predictor.logits(text.tolist()), theirs, atol=1e-4)
        assert abs(theirs - bare).max() > 0.01
    again = comigs("device", "experts", "--home", home, "--out", out)
    assert "give another --out" in refusal(again, StorageError.code)


# --- the process -----------------------------------------------------------------------------


def test_a_device_alone_learns_its_text(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    got = run_alone(home, text_dir, "--bundle", tiny_bundle.path, "--rounds", 2)
    assert [event["round"] for event in got if event["event"] == "round"] == [1, 2]
    assert [event["step"] for event in got if event["event"] == "step"] == list(range(1, 21))
    summary = got[-1]
    assert summary["event"] == "summary"
    assert (summary["rounds"], summary["steps"]) == (2, 20)
    curve = summary["held_out_loss"]
    assert [step for step, _ in curve] == [0, 10, 20]
    assert curve[0][1] > curve[1][1] > curve[2][1]
    assert summary["peak_rss_mib"] <= summary["planned_memory_mib"]
    state, progress = Home(home).load_state(tiny_bundle)
    assert (state.expert_steps, progress.finished) == (20, progress.round)
    perplexities = [
        comigs("device", "evaluate", "--home", home, "--data", text_dir, *more).stdout
        for more in ((), ("--fresh",))
    ]
    trained, fresh = (float(line.split("perplexity ")[1].split()[0]) for line in perplexities)
    assert trained < fresh


def test_the_seed_decides(tiny_bundle: Bundle, text_dir: Path, tmp_path: Path) -> None:
    def train(name: str, seed: int) -> dict[str, object]:
        home = tmp_path / name
        options = ("--bundle", tiny_bundle.path, "--seed", seed, "--rounds", 1)
        run_alone(home, text_dir, *options, "--training", config)
        return saved(home, tiny_bundle)

    config = training_file(tmp_path / "training.json", local_steps=8, tau=4, weight_decay=0.01)
    one, again, other = train("one", 5), train("again", 5), train("other", 6)
    assert one == again
    for role in (*EXPERTS, "router"):
        assert one[f"{role}/vectors"] != other[f"{role}/vectors"], role


def test_text_files_of_any_name_are_split(tiny_bundle: Bundle, tmp_path: Path) -> None:
    data = tmp_path / "notes"
    data.mkdir()
    for name in ("a.txt", "b.md"):
        lines = [f"In {name}, paragraph {n}.\n\n" for n in range(400)]
        (data / name).write_text("".join(lines))
    got = run_alone(tmp_path / "home", data, "--bundle", tiny_bundle.path, "--rounds", 1)
    assert got[-1]["steps"] == 10


# --- a step ----------------------------------------------------------------------------------


def test_the_learning_rate_falls_from_where_its_schedule_began(tiny_bundle: Bundle) -> None:
    fresh = load_fresh(tiny_bundle)
    moved = []
    for schedule_start in (0, 10):
        trained = trainer(tiny_bundle, fresh, rounds=1, local_steps=10, weight_decay=0.0)
        trained.state.expert_steps = 10
        trained.step(schedule_start=schedule_start)
        moved.append(np.linalg.norm(trained.state.vectors["generalist"] - fresh["generalist"]))
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


@pytest.mark.parametrize("specialists", [0, 1, 2])
def test_activations_computed_twice_are_the_same(export_tiny: ExportTiny, specialists: int) -> None:
    """With three experts the balance loss has a gradient, through what the router said."""
    bundle = export_tiny(Mixture(rank=4, specialists=specialists))
    start = mixture.random(bundle.manifest, 1)
    one, other = (
        steps(trainer(bundle, start, micro_batch=1, program=name), 7)
        for name in ("train_step.b1", "train_step.b1.recompute")
    )
    for role, vector in one.items():
        np.testing.assert_allclose(other[role], vector, atol=2e-5)
        assert not np.array_equal(vector, start[role])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_routers_step_is_a_training_step_without_the_rest(
    tiny_bundle: Bundle, batch: int
) -> None:
    """To the last bit, also summed over micro-batches: bundles without it train the same."""
    start = mixture.random(tiny_bundle.manifest, 1)
    manifest = pb.Manifest()
    manifest.CopyFrom(tiny_bundle.manifest)
    for program in tiny_bundle.manifest.programs:
        if program.name.startswith("router_step"):
            manifest.programs.remove(program)
    assert len(manifest.programs) < len(tiny_bundle.manifest.programs)
    one, other = (
        steps(trainer(bundle, start, micro_batch=1, batch_sequences=batch, tau=2), 5)
        for bundle in (tiny_bundle, Bundle(tiny_bundle.path, manifest))
    )
    assert same(one, other)
    assert not same(one, start, "router")


@pytest.mark.parametrize("batch", [2, 4])
def test_micro_batches_add_up_to_the_batch(tiny_bundle: Bundle, batch: int) -> None:
    start = mixture.random(tiny_bundle.manifest, 0)
    whole, parts = (
        steps(trainer(tiny_bundle, start, micro_batch=size, batch_sequences=batch), 7)
        for size in (2, 1)
    )
    for role, vector in whole.items():
        change = np.linalg.norm(vector - start[role])
        assert change > 0
        assert np.linalg.norm(parts[role] - vector) < 1e-4 * change, role
        np.testing.assert_allclose(parts[role], vector, rtol=1e-5, atol=1e-5)


def test_a_burst_is_due_after_every_tau_steps(tiny_bundle: Bundle) -> None:
    start = mixture.random(tiny_bundle.manifest, 0)
    trained = trainer(tiny_bundle, start, tau=3, router_steps=2)
    # What a step costs is known before, so that a compute budget can be kept.
    assert [trained.gradients(step) for step in (1, 2, 3, 4, 6)] == [1, 1, 3, 1, 3]
    moved, before = [], start["router"]
    for _ in range(7):
        after = steps(trained, 1)["router"]
        moved.append(not np.array_equal(before, after))
        before = after
    assert moved == [False, False, True, False, False, True, False]
    assert trained.state.router_steps == 4


def test_the_held_out_text_reaches_the_experts_only_through_the_router(
    tiny_bundle: Bundle,
) -> None:
    start = mixture.random(tiny_bundle.manifest, 0)
    one, other = (trainer(tiny_bundle, start, valid=seed) for seed in (2, 9))
    assert same(steps(one, 2), steps(other, 2))
    after, elsewhere = steps(one, 1), steps(other, 1)  # with the burst at its end
    assert same(after, elsewhere, *EXPERTS)
    assert not same(after, elsewhere, "router")
    after, elsewhere = steps(one, 1), steps(other, 1)
    assert not same(after, elsewhere, "generalist")


def test_experts_never_learn_from_the_held_out_text(tiny_bundle: Bundle) -> None:
    """With the router held still, other held-out text changes nothing at all."""
    start = mixture.random(tiny_bundle.manifest, 0)
    one, other = (
        steps(trainer(tiny_bundle, start, valid=seed, router_learning_rate=0, weight_decay=0), 8)
        for seed in (2, 9)
    )
    assert same(one, other)
    assert not same(one, start, "generalist")
    assert not same(one, start, "specialist.1")


@pytest.mark.parametrize(
    ("content", "tau", "decay"),
    [
        ('{"local_steps": 20}', 30, 0.01),
        ('{"tau": 0, "weightDecay": 0}', 0, 0.0),
        ('{"tau": 5, "weight_decay": 0.5}', 5, 0.5),
    ],
)
def test_a_file_that_names_some_constants(
    tmp_path: Path, content: str, tau: int, decay: float
) -> None:
    """Whoever asks for other steps does not mean to do without the router."""
    path = tmp_path / "training.json"
    path.write_text(content)
    config = training_config.load(path)
    assert (config.tau, config.weight_decay) == (tau, pytest.approx(decay))
    assert (config.batch_sequences, config.router_steps) == (8, 10)


def test_the_router_never_learns_from_the_training_text(tiny_bundle: Bundle) -> None:
    """With the experts held still, other training text changes nothing at all."""
    start = mixture.random(tiny_bundle.manifest, 0)
    trained = [
        trainer(tiny_bundle, start, train=seed, learning_rate=0, weight_decay=0) for seed in (1, 9)
    ]
    one, other = (steps(t, 8) for t in trained)
    assert same(one, other)
    assert not same(one, start, "router")
    moments = [t.state.first_moment for t in trained]
    assert same(*moments, "router")
    assert not same(*moments, "generalist")


def test_training_without_specialists_has_no_router(
    alone: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    got = run_alone(home, text_dir, "--bundle", alone.path, "--rounds", 1)
    state, _ = Home(home).load_state(alone)
    assert list(state.vectors) == ["generalist"]
    assert (state.expert_steps, state.router_steps) == (10, 0)
    curve = got[-1]["held_out_loss"]
    assert curve[-1][1] < curve[0][1]


# --- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 16, 17, 18, 33, 34, 100])
def test_evaluation_predicts_every_token_once(
    tiny_bundle: Bundle, tiny_base_dir: Path, count: int
) -> None:
    """Against a loop over windows with transformers; lengths around windows and batches."""
    length = tiny_bundle.manifest.tier.train_length
    text = tokens(11, count)
    model = GPT2LMHeadModel.from_pretrained(tiny_base_dir)
    losses: list[float] = []
    for start in range(0, count - 1, length):
        window = torch.from_numpy(text[start : start + length + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert len(losses) == count - 1
    evaluator = Evaluator(
        tiny_bundle, load_engine("onnxruntime", threads=1), load_fresh(tiny_bundle)
    )
    assert evaluator.loss(text) == pytest.approx(np.mean(losses), rel=1e-5)
    some = count // 2
    assert evaluator.loss(text, most_tokens=some) == pytest.approx(np.mean(losses[:some]), rel=1e-5)


def test_the_rounds_behind_a_generalist_as_coordinators_tell_them() -> None:
    assert rounds_done(CheckInReply(round=5, rounds_done=2)) == 2
    assert rounds_done(CheckInReply(round=5, rounds_done=0)) == 0
    assert rounds_done(CheckInReply(round=5)) == 4, "one that is older does not say"
