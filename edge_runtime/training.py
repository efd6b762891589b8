"""Local training, exactly as in CoMiGS (arXiv 2409.13931, algorithm 1, eqs. 7 and 8).

Experts take AdamW steps on the training split; after every `tau` of them the router takes
`router_steps` AdamW steps on the held-out split. Each level uses its own gradients and throws the
other's away where they are computed, so no gradient of one level can reach the other.

Everything a step depends on is in `TrainingState`: two runs from the same state are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.adapters import ROUTER, Vector, Vectors, views, zeros
from edge_runtime.bundle import Bundle
from edge_runtime.compression import Feedback
from edge_runtime.data import Batches
from edge_runtime.engines import Array, Engine, allocate
from edge_runtime.errors import DivergedError
from protos import coordinator_pb2 as pb
from protos import manifest_pb2

EPSILON = 1e-8
# A perplexity of more is beyond what a float holds.
LARGEST_LOSS = 709.0


@dataclass
class TrainingState:
    """Parameters, optimizer moments and counters of a device.

    `expert_steps` and `router_steps` count over all rounds; times the batch, they are the position
    in the data.
    """

    vectors: Vectors
    first_moment: Vectors
    second_moment: Vectors
    expert_steps: int = 0
    router_steps: int = 0
    feedback: Feedback | None = None
    """None unless updates are compressed."""


def new_state(manifest: manifest_pb2.Manifest, vectors: Vectors) -> TrainingState:
    return TrainingState(vectors, zeros(manifest), zeros(manifest))


def adamw(
    parameter: Vector,
    gradient: Vector,
    first: Vector,
    second: Vector,
    *,
    step: int,
    learning_rate: float,
    config: pb.TrainingConfig,
) -> None:
    """One AdamW step in place (Loshchilov and Hutter 2019, algorithm 2); `step` counts from 1."""
    parameter *= 1.0 - learning_rate * config.weight_decay
    first *= config.beta1
    first += (1.0 - config.beta1) * gradient
    second *= config.beta2
    second += (1.0 - config.beta2) * np.square(gradient)
    denominator = np.sqrt(second) / math.sqrt(1.0 - config.beta2**step) + EPSILON
    parameter -= learning_rate / (1.0 - config.beta1**step) * first / denominator


def expert_learning_rate(config: pb.TrainingConfig, step: int) -> float:
    """Cosine from the peak to `final_rate_share` of it; `step` counts from 0 over the rounds of
    `config`."""
    total = max(1, config.rounds * config.local_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total))
    floor = config.final_rate_share
    return config.learning_rate * (floor + (1.0 - floor) * share)


@dataclass
class Trainer:
    """Steps a `TrainingState` with a bundle's compiled `train_step`.

    The router's bursts take the `router_step` of the same kind where the bundle has one.

    Args:
        micro_batch: sequences per call of the program; must divide `config.batch_sequences`.
        program: which one; `train_step` of that size if empty.
        packed: see `Engine.load`.
    """

    bundle: Bundle
    engine: Engine
    state: TrainingState
    config: pb.TrainingConfig
    micro_batch: int
    train: Batches
    valid: Batches
    program: str = ""
    packed: bool = True
    _gradients: Vectors = field(init=False)
    _program_gradients: Vectors = field(init=False)
    _inputs: dict[str, Array] = field(init=False)
    _outputs: dict[str, Array] = field(init=False)
    _call: Callable[[], None] = field(init=False)
    _call_for_router: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        if self.config.batch_sequences % self.micro_batch:
            raise ValueError("the micro-batch must divide the batch")
        manifest = self.bundle.manifest
        name = self.program or f"train_step.b{self.micro_batch}"
        entry = self.bundle.program(name, self.engine.name)
        self._gradients = zeros(manifest)
        # With a single micro-batch the program writes straight into the sum.
        single = self.config.batch_sequences == self.micro_batch
        self._program_gradients = self._gradients if single else zeros(manifest)
        parameters = views(manifest, self.state.vectors)
        self._inputs = parameters | allocate(entry.inputs, besides=parameters)
        into = views(manifest, self._program_gradients)
        gradients = {f"grad:{name}": view for name, view in into.items()}
        self._outputs = gradients | allocate(entry.outputs, besides=gradients)
        program = self.engine.load(self.bundle, name, packed=self.packed)
        self._call = self._call_for_router = program.bind(self._inputs, self._outputs)
        of_router = name.replace("train_step", "router_step")
        if self.bundle.has_program(of_router, self.engine.name):
            program = self.engine.load(self.bundle, of_router, packed=self.packed)
            self._call_for_router = program.bind(self._inputs, self._outputs)

    def step(
        self, before_update: Callable[[], None] | None = None, *, schedule_start: int = 0
    ) -> float:
        """One expert step on the training split, and the router's burst if one is due.

        Args:
            schedule_start: expert step at which the learning rate's schedule began.
            before_update: called when the loss of what the last step made is known to be finite,
                and nothing has changed yet.

        Returns:
            The cross-entropy of the training batch before the step, in nats per token.

        Raises:
            DivergedError: a number is not finite any more; the state is of no use then.
        """
        loss = self._expert_step(before_update, schedule_start)
        for _ in range(self.gradients(self.state.expert_steps) - 1):
            self._router_step()
        return loss

    def gradients(self, step: int) -> int:
        """How many gradients expert step `step`, from 1, takes: its own, and its burst's."""
        tau = self.config.tau
        burst = tau and ROUTER in self.state.vectors and step % tau == 0
        return 1 + self.config.router_steps if burst else 1

    def _expert_step(self, before_update: Callable[[], None] | None, schedule_start: int) -> float:
        state, config = self.state, self.config
        experts = [role for role in state.vectors if role != ROUTER]
        loss = self._accumulate(self.train, state.expert_steps, experts, self._call)
        if before_update is not None:
            before_update()
        rate = expert_learning_rate(config, state.expert_steps - schedule_start)
        state.expert_steps += 1
        for role in experts:
            self._update(role, state.expert_steps, rate)
        return loss

    def _router_step(self) -> None:
        state = self.state
        self._accumulate(self.valid, state.router_steps, [ROUTER], self._call_for_router)
        state.router_steps += 1
        self._update(ROUTER, state.router_steps, self.config.router_learning_rate)

    def _update(self, role: str, step: int, learning_rate: float) -> None:
        state = self.state
        with np.errstate(over="ignore", invalid="ignore"):
            adamw(
                state.vectors[role],
                self._gradients[role],
                state.first_moment[role],
                state.second_moment[role],
                step=step,
                learning_rate=learning_rate,
                config=self.config,
            )
            # What is not finite in a gradient stays in the second moment, in which squares
            # overflow first. Weights whose squares overflow leave nothing finite behind them.
            values = state.vectors[role]
            if not np.isfinite(values @ values) or not np.isfinite(state.second_moment[role].sum()):
                raise diverged(f"{role} is", step)

    def _accumulate(
        self, split: Batches, step: int, roles: Sequence[str], call: Callable[[], None]
    ) -> float:
        """Fills `_gradients` of `roles` with the mean over the micro-batches of optimizer step
        `step`, each of which `call` computes."""
        parts = self.config.batch_sequences // self.micro_batch
        summed = self._gradients is not self._program_gradients
        if summed:
            for role in roles:
                self._gradients[role][...] = 0.0
        loss = 0.0
        for part in range(parts):
            taken = (step * parts + part) * self.micro_batch
            self._inputs["tokens"][...], self._inputs["targets"][...] = split.at(
                taken, self.micro_batch
            )
            call()
            loss += float(self._outputs["cross_entropy"]) / parts
            if summed:
                for role in roles:
                    self._gradients[role] += self._program_gradients[role] / np.float32(parts)
        if not math.isfinite(loss):
            raise diverged("the loss is", step + 1)
        return loss


def diverged(what: str, step: int) -> DivergedError:
    return DivergedError(
        f"{what} not finite after training step {step}; lower the learning rate where --training "
        "is given: what was saved before is intact"
    )


def perplexity_of(loss: float) -> float:
    """Of a mean loss; infinity where a float holds none."""
    return math.inf if loss > LARGEST_LOSS else math.exp(loss)


class Evaluator:
    """Mean loss over text, each token predicted once, in windows without overlap."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        vectors: Mapping[str, Vector],
        *,
        packed: bool = True,
    ) -> None:
        manifest = bundle.manifest
        self.batch, self.length = manifest.tier.eval_batch, manifest.tier.train_length
        entry = bundle.program("eval_loss", engine.name)
        parameters = views(manifest, vectors)
        self._inputs = parameters | allocate(entry.inputs, besides=parameters)
        self._outputs = allocate(entry.outputs)
        program = engine.load(bundle, "eval_loss", packed=packed)
        self._call = program.bind(self._inputs, self._outputs)

    def loss(self, tokens: Array, *, most_tokens: int | None = None) -> float:
        """Nats per token over all of `tokens`, or over its first `most_tokens`.

        The last window is padded; what is predicted from padding does not count.
        """
        predicted = len(tokens) - 1
        if most_tokens is not None:
            predicted = min(predicted, most_tokens)
        if predicted < 1:
            raise ValueError("there is no token to predict")
        rows = -(-predicted // self.length)
        flat = np.zeros((2, -(-rows // self.batch) * self.batch * self.length), np.int64)
        flat[0, :predicted] = tokens[:predicted]
        flat[1, :predicted] = tokens[1 : predicted + 1]
        losses = []
        for batch in flat.reshape(2, -1, self.batch, self.length).swapaxes(0, 1):
            self._inputs["tokens"][...], self._inputs["targets"][...] = batch
            self._call()
            losses.append(self._outputs["losses"].reshape(-1).astype(np.float64))
        return float(np.concatenate(losses)[:predicted].mean())
