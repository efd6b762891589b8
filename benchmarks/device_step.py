"""A device's training step on fixed inputs, for benchmarks: no torch in here.

`python -m benchmarks.device_step BUNDLE ENGINE THREADS BATCH` prints the largest resident set, in
MiB, of a process that does nothing else: three steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.adapters import Vectors, load_fresh, views, zeros
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.engines import allocate, load_engine
from edge_runtime.measure import peak_bytes
from edge_runtime.training import adamw, new_state
from edge_runtime.training_config import load as load_training

LEARNING_RATE = 1e-3
Array = np.ndarray[Any, Any]
Step = Callable[[], float]


def device_step(bundle: Bundle, engine_name: str, threads: int, batch: int) -> Step:
    """The step as a device does it: the compiled program, then AdamW on every role."""
    manifest = bundle.manifest
    name = f"train_step.b{batch}"
    vectors, parameters = fixed_adapters(bundle)
    gradients = zeros(manifest)
    state = new_state(manifest, vectors)
    entry = bundle.program(name, engine_name)
    tokens, targets = fixed_text(bundle, batch)
    inputs = parameters | {"tokens": tokens, "targets": targets}
    into = {f"grad:{n}": view for n, view in views(manifest, gradients).items()}
    outputs = into | allocate(entry.outputs, besides=into)
    call = load_engine(engine_name, threads=threads).load(bundle, name).bind(inputs, outputs)
    config = load_training(None)

    def step() -> float:
        call()
        state.expert_steps += 1
        for role, vector in vectors.items():
            adamw(
                vector,
                gradients[role],
                state.first_moment[role],
                state.second_moment[role],
                step=state.expert_steps,
                learning_rate=LEARNING_RATE,
                config=config,
            )
        return float(outputs["cross_entropy"])

    return step


def fixed_adapters(bundle: Bundle) -> tuple[Vectors, dict[str, Array]]:
    """Vectors and views of adapters of which nothing is zero."""
    vectors = load_fresh(bundle)
    named = views(bundle.manifest, vectors)
    rng = np.random.default_rng(1)
    for name, view in named.items():
        if name.endswith("lora_B.weight"):
            view[...] = rng.normal(0.0, 0.01, view.shape)
    return vectors, named


def fixed_text(bundle: Bundle, batch: int) -> tuple[Array, Array]:
    """Random tokens: the time does not depend on them."""
    rng = np.random.default_rng(2)
    shape = (2, batch, bundle.manifest.tier.train_length)
    tokens, targets = rng.integers(0, bundle.manifest.base.vocabulary, shape)
    return tokens, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("engine")
    parser.add_argument("threads", type=int)
    parser.add_argument("batch", type=int)
    given = parser.parse_args()
    step = device_step(open_bundle(given.bundle), given.engine, given.threads, given.batch)
    for _ in range(3):
        step()
    print(peak_bytes() / 2**20)


if __name__ == "__main__":
    main()
