"""An int8 base: what it saves, that it trains as the float32 one, and that the gate watches it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import TIER
from transformers import LlamaConfig, LlamaForCausalLM

from edge_runtime import engines, training_config
from edge_runtime.adapters import load_fresh
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import Batches, load_tokenizer
from edge_runtime.engines import allocate, allocate_outputs, load_engine
from edge_runtime.errors import BaseModelError, BundleError, ParityError
from edge_runtime.predict import Predictor
from edge_runtime.processor import cuts_sums, features
from edge_runtime.training import Evaluator, Trainer, new_state
from export import base as bases
from export import bundle as bundles
from export import inference, onnx_graph, parity
from export.base import load_base
from export.bundle import export_bundle
from export.mixture import Mixture
from export.tiers import Tier

STEPS = 12
Export = Callable[..., Bundle]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """gpt2-mini, whose weights are real: what rounding does to random ones says little."""
    base = load_base("gpt2-mini")
    tier = Tier(
        name="test",
        train_length=64,
        micro_batches=(4,),
        eval_batch=4,
        context=64,
        prefill_chunk=8,
        memory_mib=4096,
    )
    made: dict[str, Bundle] = {}

    def export(precision: str) -> Bundle:
        if precision not in made:
            made[precision] = export_bundle(
                base,
                Mixture(),
                tier,
                engines=["onnxruntime"],
                precision=precision,
                out=tmp_path_factory.mktemp("int8") / precision,
            )
        return made[precision]

    return export


def test_the_manifest_says_it_and_the_gate_has_seen_it(export: Export) -> None:
    small, full = export("int8").manifest, export("float32").manifest
    assert (small.base.precision, full.base.precision) == ("int8", "float32")
    # Of one base, so that their devices may share a generalist.
    assert small.base.sha256 == full.base.sha256
    for program in small.programs:
        assert program.parity.tolerance in (0.03, 0.4, 0.8)
        assert 1e-4 < program.parity.worst_relative_error <= program.parity.tolerance
    # The same integers for all programs: a byte a number, and their scales.
    weights = (export("int8").path / "onnx" / "weights.bin").stat().st_size
    assert weights <= 1.15 * small.base.parameters
    assert small.engines[0].disk_bytes < 0.32 * full.engines[0].disk_bytes
    memory = [{p.name: p.memory_bytes for p in m.programs} for m in (small, full)]
    assert memory[0]["decode"] < memory[1]["decode"]
    assert memory[0]["train_step.b4"] < memory[1]["train_step.b4"]
    programs = {program.name: program for program in small.programs}
    # What continues a text rounds activations in blocks, and is the nearer to float32 for it.
    assert programs["decode"].parity.worst_relative_error < 0.05


def test_four_bits_continue_a_text_nearly_as_the_float32_base_does(export: Export) -> None:
    text = Path(torch.__file__).with_name("functional.py").read_text()
    likelihood = {}
    for precision in ("float32", "int8", "int4"):
        bundle = export(precision)
        tokens = load_tokenizer(bundle).encode(text).ids[:64]
        ours = Predictor(bundle, load_engine("onnxruntime", threads=2), load_fresh(bundle))
        losses = []
        for end in range(1, 64):
            logits = ours.logits(tokens[:end]).astype(np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[tokens[end]])
        likelihood[precision] = np.mean(losses)
    assert likelihood["int8"] == pytest.approx(likelihood["float32"], abs=0.02)
    assert likelihood["int4"] == pytest.approx(likelihood["float32"], abs=0.2)


def test_four_bits_where_attention_is_not_over_a_cache_in_place(tmp_path: Path) -> None:
    """Heads of 20 are not whole vectors; and numbers of inputs that no engine has four bits for."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 16}
    # With an embedding large enough to be held in eight bits, too.
    config = LlamaConfig(vocab_size=3400, hidden_size=320, max_position_embeddings=64, **sizes)

    def exported(config: LlamaConfig, engine: str) -> Bundle:
        tensors = LlamaForCausalLM(config).model.state_dict()
        base = replace(load_base("gpt2-mini"), config=config, tensors=tensors)
        base = replace(base, tokenizer=bases._bytes_tokenizer())
        out = tmp_path / str(config.hidden_size)
        return export_bundle(base, Mixture(), TIER, engines=[engine], precision="int4", out=out)

    config.tie_word_embeddings = True
    graph = onnx.load(exported(config, "onnxruntime").path / "onnx" / "decode.onnx").graph
    bits = [a.i for node in graph.node for a in node.attribute if a.name == "bits"]
    assert bits.count(4) == 7, "all maps of a block"
    config.hidden_size, config.intermediate_size = 336, 656  # multiples of 16, but not of 32
    config.head_dim = 21
    with pytest.raises(BaseModelError, match=r"executorch has .* for a multiple of 32 inputs"):
        exported(config, "executorch")


def test_it_learns_as_the_float32_base_does(export: Export) -> None:
    """The same steps on the same text end within 1 % of the same perplexity."""
    text = Path(torch.__file__).with_name("functional.py").read_text()
    perplexity = {}
    for precision in ("float32", "int8"):
        bundle = export(precision)
        tokens = np.array(load_tokenizer(bundle).encode(text).ids)
        train, test = tokens[:12_000], tokens[12_000:16_000]
        engine = load_engine("onnxruntime", threads=2)
        state = new_state(bundle.manifest, load_fresh(bundle))
        config = training_config.load(None)
        config.rounds, config.batch_sequences, config.tau = 1, 4, 6
        length = bundle.manifest.tier.train_length
        batches = Batches(train, length, seed=0)
        trainer = Trainer(bundle, engine, state, config, 4, batches, batches)
        fresh = math.exp(Evaluator(bundle, engine, state.vectors).loss(test))
        for _ in range(STEPS):
            trainer.step()
        perplexity[precision] = math.exp(Evaluator(bundle, engine, state.vectors).loss(test))
        assert perplexity[precision] < 0.5 * fresh
    assert perplexity["int8"] == pytest.approx(perplexity["float32"], rel=0.01)


@pytest.mark.parametrize(
    ("machine", "found", "cut"),
    [
        ("x86_64", "ssse3 avx2", True),
        ("AMD64", "", True),  # not Linux, which tells
        ("x86_64", "avx2 avx512f", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx512f avx512_vnni", False),
        ("aarch64", "", False),
    ],
)
def test_processors_that_cut_sums(machine: str, found: str, cut: bool) -> None:
    assert cuts_sums(found.split(), machine) == cut


def test_processors_that_cut_sums_get_unsigned_weights(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown by bundles in which each form in turn is damaged."""
    for cut, own, other in ((False, "file", "unsigned_file"), (True, "unsigned_file", "file")):
        monkeypatch.setattr(engines, "cuts_sums", lambda _, cut=cut: cut)
        bundle = open_bundle(shutil.copytree(export("int8").path, tmp_path / own))
        entry = bundle.program("eval_loss", "onnxruntime")
        (bundle.path / getattr(entry, other)).write_bytes(b"")
        load_engine("onnxruntime").load(bundle, "eval_loss")
        (bundle.path / getattr(entry, own)).write_bytes(b"")
        with pytest.raises(BundleError):
            load_engine("onnxruntime").load(bundle, "eval_loss")


@pytest.mark.skipif(
    cuts_sums(features()), reason="products with signed weights are wrong on this processor"
)
def test_unsigned_weights_say_the_same(export: Export) -> None:
    bundle = export("int8")
    rng = np.random.default_rng(0)
    for name in ("train_step.b4", "prefill"):
        entry = bundle.program(name, "onnxruntime")
        values = allocate(entry.inputs)
        for port in entry.inputs:
            if port.name in ("tokens", "targets"):
                values[port.name][...] = rng.integers(0, 99, values[port.name].shape)
            elif port.dtype == "float32":
                values[port.name][...] = 0.05 * rng.standard_normal(values[port.name].shape)
        results = []
        for unsigned in (False, True):
            inputs = {name: value.copy() for name, value in values.items()}
            outputs = allocate_outputs(entry, inputs)
            program = load_engine("onnxruntime").load(bundle, name, unsigned=unsigned)
            program.bind(inputs, outputs)()
            results.append(outputs)
        for port in entry.outputs:
            one, other = (outputs[port.name] for outputs in results)
            assert np.abs(one).max() > 0
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize(
    ("form", "cut", "written"),
    [(True, False, False), (False, False, False), (False, True, False), (True, True, True)],
)
def test_a_wrong_zero_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: bool, cut: bool, written: bool
) -> None:
    """The gate looks at programs with unsigned weights, and where the processor is exact with them
    at those with signed ones."""
    right = onnx_graph._Translation.zeros

    def wrong(self: Any, shape: tuple[int, ...]) -> str:
        name = right(self, shape)
        if self.signed is form:
            values = numpy_helper.to_array(self.initializers[name])
            self.initializers[name].CopyFrom(numpy_helper.from_array(values + 9, name))
        return name

    monkeypatch.setattr(onnx_graph._Translation, "zeros", wrong)
    monkeypatch.setattr(parity, "cuts_sums", lambda _: cut)
    if written:
        export_one("train_step", tmp_path / "bundle")
        return
    with pytest.raises(ParityError, match="nothing was written"):
        export_one("train_step", tmp_path / "bundle")


def export_one(
    program: str, out: Path, mixture: Mixture | None = None, tier: Tier = TIER
) -> Bundle:
    """gpt2-mini's program in int8, and no other."""
    return export_bundle(
        load_base("gpt2-mini"),
        mixture or Mixture(),
        tier,
        engines=["onnxruntime"],
        precision="int8",
        out=out,
        programs=(program,),
    )


def test_wrong_scales_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_graph._Translation.integers

    def too_large(self: Any, attribute: str, transposed: bool) -> Any:
        integers, scale = right(self, attribute, transposed)
        return integers, 1.5 * scale

    monkeypatch.setattr(onnx_graph._Translation, "integers", too_large)
    with pytest.raises(ParityError, match="nothing was written"):
        export_one("train_step", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_experts_that_tokens_choose_among_are_written(tmp_path: Path) -> None:
    """A token on the edge between two takes the other one with weights that are rounded."""
    tier = replace(TIER, train_length=128, micro_batches=(2,), context=128)
    bundle = export_one("train_step", tmp_path / "bundle", Mixture(specialists=3), tier)
    assert bundle.program("train_step.b2", "onnxruntime").parity.worst_relative_error < 0.8


def test_wrong_adapters_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generalist and specialist exchanged: the outputs as a whole hardly show it."""
    right, compiled = inference._mlp, bundles.flat_graph

    def exchanged(decoder: Any, stacks: Any, *rest: Any) -> Any:
        of_mlp = {name for name in stacks if ".mlp." in name and name.endswith("lora_B.weight")}
        swapped = {n: torch.cat([v[len(v) // 2 :], v[: len(v) // 2]]) for n, v in stacks.items()}
        return right(decoder, {**stacks, **{name: swapped[name] for name in of_mlp}}, *rest)

    def wrongly_compiled(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(inference, "_mlp", exchanged)
            return compiled(*arguments)

    monkeypatch.setattr(bundles, "flat_graph", wrongly_compiled)
    with pytest.raises(ParityError, match="what adapters change in logits is off by"):
        export_one("decode", tmp_path / "bundle")
