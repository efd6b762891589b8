"""The frozen base: from a Hugging Face name, a directory or the repository to plain tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from edge_runtime.errors import BaseModelError

BUILT_IN = {"gpt2-mini": Path(__file__).parent / "gpt2_mini"}
SUPPORTED = ("gpt2",)
# Published sizes, so that `--weights random` needs no network: width, layers, heads.
GPT2_SIZES = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}


@dataclass(frozen=True)
class Base:
    """A GPT-2: its sizes, its tokenizer, and its weights as float32.

    `tensors` is keyed as in `GPT2LMHeadModel.state_dict()` without "transformer."; linear maps are
    Conv1D's, so (inputs, outputs).
    """

    name: str
    config: GPT2Config
    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            digest.update(key.encode())
            digest.update(self.tensors[key].contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def load_base(name: str, *, random_weights: bool = False, seed: int = 0) -> Base:
    """Loads `gpt2-mini`, a local directory, or a Hugging Face name.

    Raises:
        BaseModelError: not available (offline and not cached), or not a supported architecture.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = str(BUILT_IN.get(name, name))
    if random_weights and name in GPT2_SIZES:
        width, layers, heads = GPT2_SIZES[name]
        config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
        tokenizer = _bytes_tokenizer()
    else:
        config = _load_config(name, source)
        tokenizer = _load_tokenizer(name, source, config.vocab_size)
    if random_weights:
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    else:
        try:
            model = GPT2LMHeadModel.from_pretrained(source, config=config, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _unavailable(name, error) from error
    state = {
        key.removeprefix("transformer."): value.detach().float().contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight" or not config.tie_word_embeddings
    }
    return Base(name=name, config=config, tensors=state, tokenizer=tokenizer)


def _load_config(name: str, source: str) -> GPT2Config:
    try:
        config: GPT2Config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise _unavailable(name, error) from error
    if config.model_type not in SUPPORTED:
        raise BaseModelError(
            f"{name} is a {config.model_type} model; supported architectures: "
            f"{', '.join(SUPPORTED)}"
        )
    odd = [
        text
        for wrong, text in (
            (config.activation_function != "gelu_new", f"activation {config.activation_function}"),
            (not config.scale_attn_weights, "unscaled attention"),
            (config.scale_attn_by_inverse_layer_idx, "attention scaled by layer"),
            (config.add_cross_attention, "cross attention"),
            (config.n_inner not in (None, 4 * config.n_embd), f"an MLP of {config.n_inner}"),
        )
        if wrong
    ]
    if odd:
        raise BaseModelError(f"{name} has {' and '.join(odd)}, which is not supported")
    return config


def _load_tokenizer(name: str, source: str, vocabulary: int) -> Tokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unavailable(f"the tokenizer of {name}", error) from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"{name} has no fast tokenizer (tokenizer.json); convert it first")
    backend: Tokenizer = tokenizer.backend_tokenizer
    # Where there is none, transformers makes an empty one.
    if not backend.encode("a").ids:
        raise BaseModelError(f"{name} has no tokenizer; save the model's beside it")
    if backend.get_vocab_size() > vocabulary:
        raise BaseModelError(
            f"the tokenizer of {name} knows {backend.get_vocab_size()} tokens, the model "
            f"{vocabulary}; give the model its own tokenizer"
        )
    return backend


def _bytes_tokenizer() -> Tokenizer:
    """One token per byte: a stand-in where weights are random and no tokenizer is at hand."""
    tokenizer = Tokenizer(
        BPE(vocab={char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _unavailable(name: str, error: Exception) -> BaseModelError:
    if Path(name).exists():
        why = " ".join(str(error).split())
        return BaseModelError(f"{name} is not a model directory as transformers saves it: {why}")
    return BaseModelError(
        f"{name} is neither a directory, nor {' or '.join(BUILT_IN)}, nor in the local Hugging "
        "Face cache, and it could not be downloaded; check the name, or go online once, or "
        "give a directory"
    )
