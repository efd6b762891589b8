"""What compressing updates costs and saves: `python -m benchmarks.compression [--rounds 3]`.

The demo's users learn together, once with each compression, from the same start on the same
batches: each trains the round's generalist, sends its step compressed with error feedback, and the
next generalist is the mean of what arrived. Printed are the bytes of a device's update, and the
perplexity of each user's whole test split with the final generalist and the user's own specialist
and router. Everything but the network is what a session runs.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.users import UserText, default_users
from edge_runtime import training_config, wire
from edge_runtime.adapters import Vector, load_fresh
from edge_runtime.bundle import Bundle
from edge_runtime.compression import NAMES, compress, decompress
from edge_runtime.data import Batches, load_tokenizer, tokenize
from edge_runtime.engines import load_engine
from edge_runtime.training import Evaluator, Trainer, new_state, perplexity_of
from protos import coordinator_pb2 as pb

ENGINE = "onnxruntime"
GENERALIST = "generalist"


class User:
    """One user's device."""

    def __init__(
        self, bundle: Bundle, text: UserText, config: pb.TrainingConfig, seed: int
    ) -> None:
        tokenizer, length = load_tokenizer(bundle), bundle.manifest.tier.train_length
        fresh = load_fresh(bundle)
        self.bundle = bundle
        self.test = tokenize(tokenizer, text.test)
        self.state = new_state(bundle.manifest, fresh)
        self.residual = np.zeros_like(fresh[GENERALIST])
        self.engine = load_engine(ENGINE)
        self.trainer = Trainer(
            bundle=bundle,
            engine=self.engine,
            state=self.state,
            config=config,
            micro_batch=config.batch_sequences,
            train=Batches(tokenize(tokenizer, text.train), length, seed=10 * seed + 1),
            valid=Batches(tokenize(tokenizer, text.valid), length, seed=10 * seed + 2),
        )

    def round(self, incoming: Vector, steps: int, name: str) -> tuple[Vector, int]:
        """What arrives of a round from `incoming`, and its bytes."""
        vector = self.state.vectors[GENERALIST]
        vector[...] = incoming
        for _ in range(steps):
            self.trainer.step()
        if name == "none":
            payload = wire.encode(self.bundle.manifest, self.state.vectors)
            return vector.copy(), len(payload)
        due = vector - incoming + self.residual
        payload = compress(NAMES[name], due)
        sent = decompress(NAMES[name], payload, due.size)
        self.residual = due - sent
        return incoming + sent, len(payload)

    def perplexity(self, generalist: Vector) -> float:
        vectors = self.state.vectors | {GENERALIST: generalist}
        return perplexity_of(Evaluator(self.bundle, self.engine, vectors).loss(self.test))


def session(
    bundle: Bundle, texts: list[UserText], config: pb.TrainingConfig, name: str
) -> tuple[int, list[float]]:
    """Bytes of an update, and the users' perplexities in the end."""
    users = [User(bundle, text, config, seed) for seed, text in enumerate(texts)]
    generalist, size = load_fresh(bundle)[GENERALIST], 0
    for _ in range(config.rounds):
        total = np.zeros(generalist.size)
        for user in users:
            arrived, size = user.round(generalist, config.local_steps, name)
            total += arrived
        generalist = (total / len(users)).astype(np.float32)
    return size, [user.perplexity(generalist) for user in users]


def compiled(out: Path, batch: int) -> Bundle:
    from export.base import load_base
    from export.bundle import export_bundle
    from export.mixture import Mixture
    from export.tiers import tiers

    tier = replace(tiers()["laptop"], micro_batches=(batch,))
    programs = ("train_step", "eval_loss")
    base = load_base("gpt2-mini")
    return export_bundle(base, Mixture(), tier, engines=(ENGINE,), out=out, programs=programs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of each device in a round")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    arguments = parser.parse_args()
    config = training_config.load(None)
    config.rounds, config.local_steps = arguments.rounds, arguments.steps
    config.batch_sequences, config.tau, config.router_steps = arguments.batch, arguments.steps, 2
    texts = default_users()
    with tempfile.TemporaryDirectory() as folder:
        bundle = compiled(Path(folder) / "bundle", arguments.batch)
        print(f"| compression | bytes of an update | {' | '.join(text.name for text in texts)} |")
        print(f"|---|---|{'---|' * len(texts)}", flush=True)
        for name in ("none", *NAMES):
            size, found = session(bundle, texts, config, name)
            cells = " | ".join(f"{perplexity:.2f}" for perplexity in found)
            print(f"| {name} | {size:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
