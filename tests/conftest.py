"""Fixtures: a tiny base as transformers saves it, and bundles compiled from it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import hypothesis
import pytest
import torch
from tiny import TIER, ExportTiny
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from edge_runtime.bundle import Bundle, open_bundle
from export.base import _bytes_tokenizer, load_base
from export.bundle import export_bundle
from export.mixture import Mixture
from export.tiers import Tier

# For child processes; here it has already been read, when it was imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Where a message of wrong usage breaks must not depend on the length of a temporary path.
os.environ["TERMINAL_WIDTH"] = "250"
huggingface_hub.constants.HF_HUB_OFFLINE = True
# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# The tensors are tiny: more threads only get in each other's way.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With COMIGS_SOAK=1 each has more to do, and others beside it have, too."""
    if os.environ.get("COMIGS_SOAK"):
        for item in items:
            item.add_marker(pytest.mark.timeout(3600), append=False)


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Makes a file or directory of that name, once for all processes that share the tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return once


@pytest.fixture(scope="session")
def tiny_base_dir(make_once: MakeOnce) -> Path:
    """A random GPT-2 (2 layers, 32 wide, 256 byte tokens) saved by transformers."""
    return make_once("tiny-gpt2", _save_tiny_gpt2)


def _save_tiny_gpt2(path: Path) -> None:
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    _random(GPT2LMHeadModel(config)).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=_bytes_tokenizer()).save_pretrained(path)


def _random(model: PreTrainedModel) -> PreTrainedModel:
    """With biases and norms that are random, too: of zeros and ones a mistake would not show."""
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value), alpha=0.5)
    return model


@pytest.fixture(scope="session")
def tiny_llama_dir(make_once: MakeOnce) -> Path:
    """A random Llama (2 layers, 32 wide, 4 heads of 16 in groups of two) saved by transformers."""
    return make_once("tiny-llama", _save_tiny_llama)


def _save_tiny_llama(path: Path) -> None:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=256,
        max_position_embeddings=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    _random(LlamaForCausalLM(config)).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=_bytes_tokenizer()).save_pretrained(path)


@pytest.fixture(scope="session")
def export_tiny(tiny_base_dir: Path, make_once: MakeOnce) -> ExportTiny:
    """Compiles the tiny base; the same arguments give the same bundle, compiled once."""

    def export(
        mixture: Mixture | None = None,
        *,
        base: Path = tiny_base_dir,
        engines: tuple[str, ...] = ("onnxruntime",),
        programs: tuple[str, ...] | None = None,
        tier: Tier = TIER,
        precision: str = "float32",
    ) -> Bundle:
        mixture = mixture or Mixture(rank=4)
        key = repr((mixture, base.name, engines, programs, tier, precision))
        name = f"bundle-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

        def compile_to(path: Path) -> None:
            export_bundle(
                load_base(str(base)),
                mixture,
                tier,
                engines=engines,
                out=path,
                precision=precision,
                programs=programs,
            )

        return open_bundle(make_once(name, compile_to))

    return export


@pytest.fixture(scope="session")
def tiny_bundle(export_tiny: ExportTiny) -> Bundle:
    """One generalist, one specialist, rank 4, for ONNX Runtime."""
    return export_tiny()


@pytest.fixture
def own_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.txt, valid.txt and test.txt of plain sentences, a few thousand bytes each."""
    path = tmp_path_factory.mktemp("text")
    for index, name in enumerate(("train", "valid", "test")):
        lines = [
            f"Line {n} of the {name} split says that {n * n + index} is a number.\n"
            for n in range(120)
        ]
        (path / f"{name}.txt").write_text("".join(lines))
    return path
