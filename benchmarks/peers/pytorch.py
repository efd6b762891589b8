"""PyTorch eager with transformers and its cache: what the others are multiples of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.child import Commands
from benchmarks.peers.common import greedy, main

SETTINGS = "transformers, eager, float32, inference_mode, logits of the last token only"


def convert(model: Path, out: Path, weights: str) -> None:
    shutil.copytree(model, out, dirs_exist_ok=True)


def load(path: Path, weights: str, threads: int, context: int) -> Commands:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(threads)
    model: Any = GPT2LMHeadModel.from_pretrained(path)
    model.train(False)
    cache: Any = None

    @torch.inference_mode()
    def step(tokens: list[int]) -> int:
        nonlocal cache
        result = model(
            torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = result.past_key_values
        return int(result.logits[0, -1].argmax())

    def reset() -> None:
        nonlocal cache
        cache = None

    return greedy(step, reset, model.config.vocab_size)


if __name__ == "__main__":
    main("torch", SETTINGS, convert, load)
