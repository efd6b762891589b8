"""A device as a contestant: its training step, or its suggestions. No torch in here.

python -m benchmarks.device_process train BUNDLE ENGINE THREADS PROGRAM [--unpacked]
python -m benchmarks.device_process predict BUNDLE ENGINE THREADS
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Commands, prompt, serve
from edge_runtime.adapters import Vectors, load_fresh, views, zeros
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.engines import allocate, load_engine
from edge_runtime.predict import Predictor

LEARNING_RATE = 1e-3
Array = np.ndarray[Any, Any]


def train(
    bundle: Bundle, engine_name: str, threads: int, program: str, *, packed: bool
) -> Commands:
    """A step as a device takes it: the compiled program, then AdamW on every role that it is for.

    `step` answers with its seconds and its loss, `gradients` writes the last step's to a file.
    """
    # A process that suggests does not import what trains.
    from safetensors.numpy import save_file

    from edge_runtime.training import adamw, new_state
    from edge_runtime.training_config import load as load_training

    manifest = bundle.manifest
    vectors, parameters = fixed_adapters(bundle)
    gradients = zeros(manifest)
    state = new_state(manifest, vectors)
    entry = bundle.program(program, engine_name)
    shape = next(tuple(port.shape) for port in entry.inputs if port.name == "tokens")
    tokens, targets = fixed_text(manifest.base.vocabulary, shape)
    inputs = parameters | {"tokens": tokens, "targets": targets}
    learning = {port.name.removeprefix("grad:") for port in entry.outputs}
    named = {n: view for n, view in views(manifest, gradients).items() if n in learning}
    roles = {tensor.role for tensor in manifest.tensors if tensor.name in learning}
    into = {f"grad:{name}": view for name, view in named.items()}
    outputs = into | allocate(entry.outputs, besides=into)
    loaded = load_engine(engine_name, threads=threads).load(bundle, program, packed=packed)
    call = loaded.bind(inputs, outputs)
    config = load_training(None)

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        call()
        state.expert_steps += 1
        for role in roles:
            adamw(
                vectors[role],
                gradients[role],
                state.first_moment[role],
                state.second_moment[role],
                step=state.expert_steps,
                learning_rate=LEARNING_RATE,
                config=config,
            )
        return time.perf_counter() - started, float(outputs["cross_entropy"])

    def write_gradients(path: str) -> None:
        save_file({name: np.ascontiguousarray(view) for name, view in named.items()}, path)

    return {"step": step, "gradients": write_gradients}


def predict(bundle: Bundle, engine_name: str, threads: int) -> Commands:
    """Suggestions as a device makes them.

    `prefill` of a text of n tokens into an empty cache, then `decode` of m more, the most probable
    each: both answer with seconds, one for `prefill`, one for each token for `decode`, and the
    tokens. `swap` answers with the seconds that a change to another person's adapters takes, which
    the shared ones are not among, and that a change of all.
    """
    own = load_fresh(bundle)
    personal = {role.name: own[role.name] for role in bundle.manifest.roles if not role.shared}
    predictor = Predictor(bundle, load_engine(engine_name, threads=threads), own)
    text: list[int] = []

    def next_token() -> float:
        started = time.perf_counter()
        text.append(int(predictor.logits(text).argmax()))
        return time.perf_counter() - started

    def prefill(tokens: int) -> tuple[float, int]:
        predictor.use(own)  # empties the cache, too
        text[:] = prompt(tokens, bundle.manifest.base.vocabulary)
        return next_token(), text[-1]

    def decode(tokens: int) -> tuple[list[float], list[int]]:
        return [next_token() for _ in range(tokens)], text[-tokens:]

    def swap() -> tuple[float, float]:
        started = time.perf_counter()
        predictor.use(personal)
        between = time.perf_counter()
        predictor.use(own)
        return between - started, time.perf_counter() - between

    return {"prefill": prefill, "decode": decode, "swap": swap}


def fixed_adapters(bundle: Bundle) -> tuple[Vectors, dict[str, Array]]:
    """Vectors and views of adapters of which nothing is zero."""
    vectors = load_fresh(bundle)
    named = views(bundle.manifest, vectors)
    rng = np.random.default_rng(1)
    for name, view in named.items():
        if name.endswith("lora_B.weight"):
            rng.standard_normal(dtype=np.float32, out=view)
            np.multiply(view, np.float32(0.01), out=view)
    return vectors, named


def fixed_text(vocabulary: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Random tokens and targets: the time does not depend on them."""
    tokens, targets = np.random.default_rng(2).integers(0, vocabulary, (2, *shape))
    return tokens, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "predict"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("engine")
    parser.add_argument("threads", type=int)
    parser.add_argument("program", nargs="?", default="")
    parser.add_argument("--unpacked", action="store_true")
    given = parser.parse_args()

    def load() -> Commands:
        bundle = open_bundle(given.bundle)
        if given.what == "train":
            packed = not given.unpacked
            return train(bundle, given.engine, given.threads, given.program, packed=packed)
        return predict(bundle, given.engine, given.threads)

    serve(load)


if __name__ == "__main__":
    main()
