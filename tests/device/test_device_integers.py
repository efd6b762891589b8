"""ExecuTorch on integer weights: what it suggests and learns is near the float32 base's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_help import comigs, run_alone, steps, tokens, trainer
from executorch.exir._serialize._program import deserialize_pte_binary
from tiny import TIER, ExportTiny
from torch import Tensor

from edge_runtime.bundle import Bundle
from edge_runtime.engines import ENGINES, load_engine
from edge_runtime.errors import ParityError
from edge_runtime.predict import Predictor
from edge_runtime.training import Evaluator
from export import mixture, xnnpack_integers
from export.base import load_base
from export.bundle import export_bundle
from export.mixture import Mixture

TEXT = "Line 17 of the train split says"


TIER_HERE = replace(TIER, micro_batches=(2,))


@pytest.fixture(scope="module")
def exact(export_tiny: ExportTiny) -> Bundle:
    return export_tiny(Mixture(rank=4), engines=ENGINES, tier=TIER_HERE)


@pytest.fixture(scope="module")
def eight_bits(export_tiny: ExportTiny) -> Bundle:
    return export_tiny(Mixture(rank=4), engines=("executorch",), tier=TIER_HERE, precision="int8")


@pytest.fixture(scope="module")
def four_bits(export_tiny: ExportTiny) -> Bundle:
    """What trains is as with eight."""
    return export_tiny(
        Mixture(rank=4),
        engines=("executorch",),
        tier=TIER_HERE,
        precision="int4",
        programs=("prefill", "decode"),
    )


@pytest.mark.parametrize(("precision", "allowed"), [("eight_bits", 0.05), ("four_bits", 0.3)])
def test_it_suggests_nearly_what_float32_does(
    exact: Bundle, request: pytest.FixtureRequest, precision: str, allowed: float
) -> None:
    rounded = request.getfixturevalue(precision)
    vectors = mixture.random(exact.manifest, 1)
    one, other = (Predictor(b, load_engine("executorch"), vectors) for b in (exact, rounded))
    text = list(TEXT.encode())
    for end in (1, 7, 8, 9, 30):
        want, got = (each.logits(text[:end]) for each in (one, other))
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-4 < error < allowed  # and it is another program


def test_it_learns_as_float32_does(exact: Bundle, eight_bits: Bundle) -> None:
    start = mixture.random(exact.manifest, 1)
    losses = []
    for bundle in (exact, eight_bits):
        trained = steps(trainer(bundle, start, engine="executorch"), 10)
        losses.append(Evaluator(bundle, load_engine("executorch"), trained).loss(tokens(5, 200)))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_device_trains_and_suggests(eight_bits: Bundle, text_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ended = run_alone(
        home, text_dir, "--bundle", eight_bits.path, "--rounds", 1, "--engine", "executorch"
    )
    before, after = (loss for _, loss in ended[-1]["held_out_loss"])
    assert after < before
    at = ("predict", "--home", home, "Line 1", "--engine", "executorch", "--format", "json")
    assert len(json.loads(comigs(*at).stdout)["suggestions"]) == 5


def test_a_program_is_one_delegate(eight_bits: Bundle) -> None:
    file = eight_bits.path / eight_bits.program("decode", "executorch").file
    plans = deserialize_pte_binary(file.read_bytes()).program.execution_plan
    delegates = {plan.name: len(plan.delegates) for plan in plans}
    # What is read of a chunk is one row of it, looked up outside.
    assert delegates == {"train_step_b2": 1, "eval_loss": 1, "prefill": 2, "decode": 1}


def export_decode(base: Path, out: Path) -> Bundle:
    """The one program, in int8."""
    return export_bundle(
        load_base(str(base)),
        Mixture(rank=4),
        TIER,
        engines=["executorch"],
        precision="int8",
        out=out,
        programs=("decode",),
    )


def test_rows_of_an_embedding_are_looked_up_in_eight_bits(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One delegate as before, and of the embedding, 256 x 32, one byte a number instead of four."""
    sizes = []
    for smallest in (2**14, 2**13):
        monkeypatch.setattr(xnnpack_integers, "SMALLEST_EMBEDDING", smallest)
        bundle = export_decode(tiny_base_dir, tmp_path / str(smallest))
        file = bundle.path / bundle.program("decode", "executorch").file
        (plan,) = deserialize_pte_binary(file.read_bytes()).program.execution_plan
        assert len(plan.delegates) == 1
        sizes.append(file.stat().st_size)
    saved = 256 * 32 * 3 - 256 * 4  # there are scales
    assert abs(sizes[0] - sizes[1] - saved) < 4096


def test_biases_that_are_parts_of_one_tensor(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's of queries, keys and values, which XNNPACK adds where it takes the product."""
    monkeypatch.setattr(xnnpack_integers, "SMALLEST_QUANTISED", 32 * 32)
    bundle = export_decode(tiny_base_dir, tmp_path / "bundle")
    assert bundle.program("decode", "executorch").parity.worst_relative_error < 0.05


def test_wrong_weights_are_not_written(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = xnnpack_integers.eight_bits

    def negated(value: Tensor) -> tuple[Tensor, Tensor]:
        integers, scales = right(value)
        return -integers, scales

    monkeypatch.setattr(xnnpack_integers, "eight_bits", negated)
    with pytest.raises(ParityError, match="nothing was written"):
        export_decode(tiny_base_dir, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
