"""CTranslate2: a converted model and its generator, which decodes greedily by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.child import Commands, prompt
from benchmarks.peers.common import main

SETTINGS = "Generator.generate_batch, greedy, compute_type as the weights, inter_threads=1"


def convert(model: Path, out: Path, weights: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(model)).convert(str(out), quantization=weights, force=True)


def load(path: Path, weights: str, threads: int, context: int) -> Commands:
    import ctranslate2

    words = json.loads((path / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(
        str(path), device="cpu", compute_type=weights, intra_threads=threads, inter_threads=1
    )
    text: list[str] = []

    def generate(tokens: int) -> tuple[float, list[int]]:
        started = time.perf_counter()
        (result,) = generator.generate_batch(
            [text],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - started, list(result.sequences_ids[0])

    def prefill(tokens: int) -> tuple[float, int]:
        text[:] = [words[token] for token in prompt(tokens, len(words))]
        seconds, chosen = generate(1)
        return seconds, chosen[0]

    def decode(tokens: int) -> tuple[list[float], list[int]]:
        """The prompt again, then `tokens` more: what is beyond the prompt, evenly over tokens."""
        first, _ = generate(1)
        seconds, chosen = generate(1 + tokens)
        return [(seconds - first) / tokens] * tokens, chosen[1:]

    return {"prefill": prefill, "decode": decode}


if __name__ == "__main__":
    main("ctranslate2", SETTINGS, convert, load)
