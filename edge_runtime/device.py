"""The device: takes part in rounds, or trains alone, and survives a kill at any moment.

Training state is saved every `save_every` steps, more often if they are slow, and at the end of a
round, with the counters that fix the next batch. A device that starts again repeats the few steps
since then bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime import planner, training_config, wire
from edge_runtime.adapters import Vector, Vectors
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.compression import NAMES, Feedback, compress, decompress
from edge_runtime.connection import GoneError
from edge_runtime.data import (
    Batches,
    Tokens,
    encoding_bytes,
    load_tokenizer,
    read_splits,
    stored_bytes,
    tokenize,
)
from edge_runtime.engines import Engine
from edge_runtime.errors import (
    AdapterError,
    BudgetError,
    DivergedError,
    RefusedError,
    UnreachableError,
)
from edge_runtime.identity import Identity
from edge_runtime.memory import peak_bytes, return_freed_memory
from edge_runtime.planner import Plan
from edge_runtime.secure_aggregation import DistrustedError, Session, task_sha256
from edge_runtime.store import DeviceConfig, Home, Progress
from edge_runtime.training import Evaluator, Trainer, TrainingState, diverged
from protos import coordinator_pb2 as pb

# Held-out text looked at after each round for the learning curve, in tokens.
CURVE_TOKENS = 2048
CHECK_IN_SECONDS = 10.0
# Latest steps whose time the summary is about.
TIMED = 1000
# Before it checks in again when the coordinator has not what it has just spoken of.
GONE_SECONDS = 1.0
# Training time after which the state is saved, and its share of a budget: time since then is
# forgotten with a kill, and a device that is killed often must not train for ever.
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.1
# How long a call of secure aggregation is held open at most.
MASKING_WAIT_SECONDS = 20.0

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _Start:
    """The generalist that a round started from, as it was received."""

    round: int
    sha256: bytes
    vectors: Vectors


@dataclass
class Device:
    """One device in one process.

    Args:
        batch_sequences: to plan for; planned again if the coordinator asks for another batch.
        memory_bytes: the budget that plans must fit (None: no limit).
        compute_seconds: training time per round (None: no limit). Training stops before the step
            that would exceed it, and the round goes on with the steps that were made. The first
            step is always made, however long it takes: only then is known how long one takes.
            Of what was spent before a kill, at most a tenth of the budget and two steps are
            forgotten.
        alone: without a coordinator.
        only_masked: send no update but by secure aggregation.
        compression: of updates, if the coordinator offers it: a name, "none", or None for what it
            prefers.
        report: told what happens, as dictionaries with an "event".
    """

    home: Home
    config: DeviceConfig
    bundle: Bundle
    engine: Engine
    data: Path
    batch_sequences: int
    memory_bytes: int | None
    compute_seconds: float | None
    report: Report
    save_every: int = 10
    alone: bool = False
    compression: str | None = None
    only_masked: bool = False
    state: TrainingState = field(init=False)
    progress: Progress = field(init=False)
    tokens: dict[str, Tokens] = field(init=False)
    plan: Plan = field(init=False)
    # Of the text and its tokens, which are there at once while it is read.
    _text_bytes: int = field(init=False)
    # If this process has received it.
    _start: _Start | None = field(init=False, default=None)
    _trainer: Trainer | None = field(init=False, default=None)
    _evaluator: Evaluator | None = field(init=False, default=None)
    _step_seconds: deque[float] = field(init=False, default_factory=partial(deque, maxlen=TIMED))
    _gradient_seconds: deque[float] = field(init=False, default_factory=partial(deque, maxlen=5))

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer(self.bundle)
        if self.memory_bytes is not None and (size := stored_bytes(self.data)) > self.memory_bytes:
            raise BudgetError(
                f"{self.data} holds {size / 2**20:.0f} MiB of text, which does not even fit into "
                f"--memory {self.memory_bytes / 2**20:.0f}MiB; give less text, or more memory"
            )
        splits = read_splits(self.data)
        self._text_bytes = sum(map(sys.getsizeof, splits.values())) + max(
            encoding_bytes(tokenizer, text) for text in splits.values()
        )
        # The test split is not a device's business while it trains.
        self.tokens = {name: tokenize(tokenizer, splits.pop(name)) for name in ("train", "valid")}
        self._text_bytes += sum(tokens.nbytes for tokens in self.tokens.values())
        del splits
        return_freed_memory()
        self.plan = self._choose_plan(self.batch_sequences)
        self.state, self.progress = self.home.load_state(self.bundle)

    def take_part(self, client: Client) -> None:
        """Takes part until the coordinator says that all rounds are over.

        Raises:
            UnreachableError, TrustError, RefusedError: see `Client`.
            StorageError: the home cannot be written; what was saved is intact.
        """
        who = client.who
        proof = who.ca.encode() if isinstance(who, Identity) else who.coordinator.encode()
        while True:
            self._renew(client)
            reply = client.check_in(CHECK_IN_SECONDS)
            self._take_rounds_of(hashlib.sha256(proof + reply.history.encode()).hexdigest())
            if self.progress.sending:  # killed before it knew whether its last update counts
                if self.only_masked:
                    self._answered(False, "this device sends only masked updates now")
                else:
                    self._report_compressed(client, reply.history)
            answered = self.progress.uploaded and reply.round == self.progress.round
            if reply.action == pb.CheckInReply.TRAIN and not answered:
                try:
                    self._round(client, reply)
                except GoneError:  # it was restored from a backup, or has other settings by now
                    time.sleep(GONE_SECONDS)
            elif reply.action == pb.CheckInReply.FINISH:
                self._finish(client, reply.round)
                return
            else:
                # In this order a NaN is the least.
                time.sleep(min(max(0.2, reply.retry_seconds), CHECK_IN_SECONDS))

    def train_alone(self, config: pb.TrainingConfig) -> None:
        """The same rounds without a coordinator: nothing is exchanged."""
        self._take_rounds_of("alone")
        if max(self.progress.finished, self.progress.round - 1) >= config.rounds:
            done = max(self.progress.finished, config.rounds)
            message = (
                f"all rounds up to {done} are trained already; for more, give --rounds {done + 1} "
                "or higher, or as many in the file of --training"
            )
            self.report({"event": "nothing_to_do", "message": message})
            return
        for number in range(max(1, self.progress.round), config.rounds + 1):
            if number != self.progress.round:
                self._start_round(number, config, done=number - 1)
            self._train(config)
        self.progress.finished = config.rounds
        self._save()

    # --- a round ---------------------------------------------------------------------------

    def _take_rounds_of(self, group: str) -> None:
        """Forgets how far it was in other rounds with the same numbers: alone, of another
        coordinator, or of this one before it was restored from a backup."""
        progress = self.progress
        if progress.rounds_of != group:
            progress.rounds_of = group
            progress.round = progress.finished = progress.sending = 0
            progress.uploaded = False
            self.state.feedback = None

    def _renew(self, client: Client) -> None:
        """Replaces a certificate of which little time is left."""
        if isinstance(client.who, Identity) and client.who.needs_renewal():
            renewed = client.renew(client.who)
            self.home.save_identity(renewed)
            client.use(renewed)
            self.report({"event": "renewed", "valid_until": renewed.valid_until.isoformat()})

    def _round(self, client: Client, reply: pb.CheckInReply) -> None:
        if self.only_masked and not reply.secure_aggregation:
            raise RefusedError(
                f"in round {reply.round} the coordinator wants updates as they are, and this "
                "device has --require-secure-aggregation; nothing was sent; ask who runs it"
            )
        try:
            training_config.check(reply.training)
        except ValueError as error:
            raise RefusedError(
                f"the coordinator wants a training that cannot be: {error}"
            ) from error
        config = training_config.with_defaults(reply.training)
        resumed = reply.round == self.progress.round
        if resumed and reply.secure_aggregation:
            # Else it would say of a step that it was made from something else than it was.
            resumed = self._task(client, reply) == self.progress.task
        if not resumed:
            self._receive(client, reply.round)
            self.progress.task = self._task(client, reply)
            self._choose_compression(client, reply)
            self._start_round(
                reply.round, config, done=rounds_done(reply), seconds_left=reply.seconds_left
            )
        self._train(config)
        steps = self.state.expert_steps - self.progress.round_start
        header = pb.UploadHeader(
            round=reply.round,
            history=reply.history,
            tokens=steps * config.batch_sequences * self._length,
        )
        if self.progress.compression and not reply.secure_aggregation:
            self.progress.sending = header.tokens
            self._save()
            self._report_compressed(client, reply.history)
            return
        if reply.secure_aggregation:
            try:
                accepted, reason = self._report_masked(client, header)
            except DistrustedError as error:
                fields = {"round": reply.round, "reason": str(error)}
                self.report({"event": "distrusted", **fields})
                raise
        else:
            answer = client.upload(
                header, wire.encode(self.bundle.manifest, self.state.vectors), resume=resumed
            )
            accepted, reason = answer.accepted, answer.reason
        self._answered(accepted, reason)

    def _answered(self, accepted: bool, reason: str) -> None:
        """Remembers that the coordinator has answered to the round's update."""
        self.progress.uploaded = True
        self.progress.sending = 0
        self._save()
        event = "uploaded" if accepted else "refused"
        self.report({"event": event, "round": self.progress.round, "reason": reason})

    def _choose_compression(self, client: Client, reply: pb.CheckInReply) -> None:
        """How the update of the round that begins will be sent; only before it is trained."""
        offered = [name for name, kind in NAMES.items() if kind in reply.compressions]
        offered.sort(key=lambda name: list(reply.compressions).index(NAMES[name]))
        chosen = ""
        if client.protocol > 1 and not reply.secure_aggregation:
            wanted = self.compression
            chosen = wanted if wanted in offered else ""
            if wanted is None and offered:
                chosen = offered[0]
        self.progress.compression = chosen
        if chosen:
            incoming = self._shared()
            feedback = self.state.feedback or Feedback(incoming, np.zeros_like(incoming))
            self.state.feedback = Feedback(incoming, feedback.residual)

    def _report_compressed(self, client: Client, history: str) -> None:
        """Sends the round's step and what earlier ones left out, as bytes that depend on nothing
        but the saved state: however often it is killed, the coordinator counts them once, and what
        they leave out is remembered in the same write as that they count."""
        feedback, kind = self.state.feedback, NAMES[self.progress.compression]
        assert feedback is not None, "`_choose_compression` made it"
        step = self._shared() - feedback.incoming + feedback.residual
        payload = compress(kind, step)
        header = pb.UploadHeader(
            round=self.progress.round,
            history=history,
            tokens=self.progress.sending,
            compression=kind,
        )
        answer = client.upload(header, payload, resume=True)
        if answer.accepted:
            feedback.residual = step - decompress(kind, payload, step.size)
        del step, payload  # before the state is saved
        self._answered(answer.accepted, answer.reason)

    def _shared(self) -> Vector:
        """The shared roles as one vector, (D,), a copy."""
        roles = wire.shared_roles(self.bundle.manifest)
        return np.concatenate([self.state.vectors[role] for role in roles])

    def _task(self, client: Client, reply: pb.CheckInReply) -> str:
        """`task_sha256` (hex) of what the device is given for a round now."""
        return task_sha256(self._started_from(client, reply.round).sha256, reply.training).hex()

    def _started_from(self, client: Client, number: int) -> _Start:
        """The generalist that the round starts from, if need be received again."""
        if self._start is None or self._start.round != number:
            self._start = self._download(client, number)
        return self._start

    def _report_masked(self, client: Client, header: pb.UploadHeader) -> tuple[bool, str]:
        """Reports the round's step by secure aggregation.

        Returns:
            Whether it was accepted and, if not, why.

        Raises:
            RefusedError: the coordinator does not keep to the protocol.
        """
        if not isinstance(client.who, Identity):
            raise RefusedError(
                "the coordinator wants secure aggregation, for which devices must be known to each "
                "other; enrol with an invitation instead of --insecure"
            )
        number = header.round
        start = self._started_from(client, number)
        roles = wire.shared_roles(self.bundle.manifest)
        step = np.concatenate([self.state.vectors[role] - start.vectors[role] for role in roles])
        task = bytes.fromhex(self.progress.task)
        session = Session(client.who, number, header.history, task)
        request = pb.AggregateRequest(round=number, keys=session.advertisement)
        accepted = False
        while True:
            request.wait_seconds = MASKING_WAIT_SECONDS
            reply = client.aggregate(request)
            request = pb.AggregateRequest(round=number)
            match reply.WhichOneof("next"):
                case "share":
                    request.shares.CopyFrom(session.share(reply.share))
                case "mask":
                    try:
                        payload = session.mask(reply.mask, step)
                    except ValueError as error:
                        return False, str(error)
                    # Killed from here on it has dropped out: two masked steps of one round, in
                    # groups that differ, could be told from each other.
                    self.progress.uploaded = True
                    self._save()
                    answer = client.upload(header, payload)
                    if not answer.accepted:
                        return False, answer.reason
                    accepted = True
                    self.report({"event": "masked", "round": number})
                case "agree":
                    request.agreed.CopyFrom(session.agree(reply.agree))
                case "unmask":
                    request.revealed.CopyFrom(session.unmask(reply.unmask))
                case "wait":
                    time.sleep(0.2)  # a coordinator that is stopping answers at once
                case _:
                    reason = "" if accepted else "the round ended before this device was to send"
                    return accepted, reply.over.reason or reason

    def _receive(self, client: Client, number: int) -> None:
        """Takes over the generalist that round `number` starts from."""
        start = self._download(client, number)
        for role, vector in start.vectors.items():
            # In place: the programs are bound to this memory.
            self.state.vectors[role][...] = vector
        self._start = start

    def _download(self, client: Client, number: int) -> _Start:
        payload = client.download(
            number,
            self.home.path / "download.partial",
            most_bytes=wire.max_bytes(self.bundle.manifest),
        )
        try:
            received = wire.decode(self.bundle.manifest, payload)
        except AdapterError as error:
            raise RefusedError(f"the coordinator sent an unusable generalist: {error}") from error
        self.report({"event": "downloaded", "round": number, "bytes": len(payload)})
        return _Start(number, hashlib.sha256(payload).digest(), received)

    def _start_round(
        self, number: int, config: pb.TrainingConfig, *, done: int, seconds_left: float = 0
    ) -> None:
        """
        Args:
            done: how many rounds came to something before.
            seconds_left: until the round's deadline; 0 if it has none.
        """
        if not self.progress.curve:
            self._measure_curve()
        # Whatever it trained before, missed or had no time for: it is where the other devices are.
        self.progress.schedule_start = self.state.expert_steps - done * config.local_steps
        self.progress.round = number
        self.progress.round_start = self.state.expert_steps
        self.progress.round_seconds = 0.0
        self._gradient_seconds.clear()  # what held a step up then does not now
        self.progress.stopped = 0
        self.progress.uploaded = False
        self._save()
        known = seconds_left > 0 and math.isfinite(seconds_left)
        fields = {"seconds_left": round(seconds_left, 1)} if known else {}
        last = number + config.rounds - done - 1
        self.report({"event": "round", "round": number, "rounds": last, **fields})

    def _train(self, config: pb.TrainingConfig) -> None:
        """The rest of the current round's steps, and how good the experts are then."""
        self._take_steps(config)
        if not self.progress.curve or self.progress.curve[-1][0] != self.state.expert_steps:
            self._measure_curve()
        self._save()

    def _take_steps(self, config: pb.TrainingConfig) -> None:
        """The rest of the current round's steps, within the compute budget."""
        trainer = self._get_trainer(config)
        often = SAVE_SHARE * self.compute_seconds if self.compute_seconds else SAVE_SECONDS
        saved_seconds, due_to_save = self.progress.round_seconds, False
        while True:
            made = self.state.expert_steps - self.progress.round_start
            due = trainer.gradients(self.state.expert_steps + 1)
            if made >= config.local_steps or self._out_of_time(made, due):
                break
            started = time.monotonic()
            # What a step made is saved once the next one's loss shows that it is of use.
            loss = trainer.step(
                self._save if due_to_save else None, schedule_start=self.progress.schedule_start
            )
            seconds = time.monotonic() - started
            self._step_seconds.append(seconds)
            self._gradient_seconds.append(seconds / trainer.gradients(self.state.expert_steps))
            self.progress.round_seconds += seconds
            self.report(
                {
                    "event": "step",
                    "round": self.progress.round,
                    "step": self.state.expert_steps,
                    "loss": round(loss, 4),
                }
            )
            long_ago = self.progress.round_seconds - saved_seconds >= often
            due_to_save = (made + 1) % self.save_every == 0 or long_ago
            if due_to_save:
                saved_seconds = self.progress.round_seconds

    def _out_of_time(self, made: int, due: int) -> bool:
        """Whether a next step of `due` gradients would exceed the budget, by the slowest recent.

        Never before the first step of a round."""
        if self.compute_seconds is None or made == 0:
            return False
        if self.progress.stopped == self.state.expert_steps:
            return True  # after a restart, too: what was sent of the update must be its beginning
        recent = self._gradient_seconds
        expected = due * (max(recent) if recent else self.progress.round_seconds / made)
        stop = self.progress.round_seconds + expected > self.compute_seconds
        if stop:
            self.progress.stopped = self.state.expert_steps
            self.report(
                {
                    "event": "compute_budget",
                    "round": self.progress.round,
                    "steps": made,
                    "seconds": round(self.progress.round_seconds, 2),
                }
            )
        return stop

    def _finish(self, client: Client, number: int) -> None:
        if self.progress.finished != number:
            self.progress.task = ""  # what is there then was not made from what that says
            self._receive(client, number)
            try:
                self._measure_curve()
            except DivergedError as error:
                raise RefusedError(
                    f"the coordinator's last generalist is of no use here: {error}"
                ) from error
            self.progress.finished = number
            self._save()
        # Only now may the coordinator go. If it has, it waited for nobody, and all is well.
        with contextlib.suppress(UnreachableError):
            client.check_in(0, stored_round=number)
        self.report({"event": "finished", "round": number})

    # --- helpers ---------------------------------------------------------------------------

    @property
    def _length(self) -> int:
        return self.bundle.manifest.tier.train_length

    def report_plan(self) -> None:
        self.report(
            {
                "event": "plan",
                "micro_batch": self.plan.micro_batch,
                "recompute": self.plan.recompute,
                "packed": self.plan.packed,
                "together": self.plan.together,
                "memory_mib": round(self.plan.total_bytes / 2**20, 1),
            }
        )

    def require_text(self, batch_sequences: int) -> None:
        """
        Raises:
            DataError: the training or the held-out split is too small for one batch.
        """
        list(self._batches(batch_sequences))

    def _batches(self, batch_sequences: int) -> Iterator[Batches]:
        """The training and the held-out split's."""
        for name, salt in (("train", 1), ("valid", 2)):
            split = Batches(self.tokens[name], self._length, self.config.seed * 10 + salt)
            split.require(batch_sequences, "training" if salt == 1 else "held-out")
            yield split

    def _get_trainer(self, config: pb.TrainingConfig) -> Trainer:
        if self._trainer is None or self._trainer.config != config:
            train, valid = self._batches(config.batch_sequences)
            plan = self._choose_plan(config.batch_sequences)
            if plan != self.plan or not plan.together:
                self._unload()
            if plan != self.plan:  # a coordinator's batch is another than what was planned for
                self.plan = plan
                self.report_plan()
            self._trainer = None
            self._trainer = Trainer(
                bundle=self.bundle,
                engine=self.engine,
                state=self.state,
                config=config,
                micro_batch=self.plan.micro_batch,
                program=self.plan.program,
                packed=self.plan.packed,
                train=train,
                valid=valid,
            )
        return self._trainer

    def _choose_plan(self, batch_sequences: int) -> Plan:
        compressed = self.compression != "none" and not self.only_masked
        return planner.choose(
            self.bundle,
            self.engine.name,
            batch_sequences,
            self.memory_bytes,
            text_bytes=self._text_bytes,
            shared_bytes=0 if self.alone else planner.for_rounds(compressed=compressed),
        )

    def _unload(self) -> None:
        self._trainer = self._evaluator = None
        return_freed_memory()

    def _measure_curve(self) -> None:
        if self._evaluator is None:
            if not self.plan.together:
                self._unload()
            self._evaluator = Evaluator(
                self.bundle, self.engine, self.state.vectors, packed=self.plan.packed
            )
        loss = self._evaluator.loss(self.tokens["valid"], most_tokens=CURVE_TOKENS)
        if not math.isfinite(loss):
            raise diverged("the held-out loss is", self.state.expert_steps)
        self.progress.curve.append((self.state.expert_steps, loss))
        self.report(
            {
                "event": "held_out",
                "round": self.progress.round,
                "step": self.state.expert_steps,
                "loss": round(loss, 4),
            }
        )

    def _save(self) -> None:
        return_freed_memory()  # else it stays beside the copies that a file is made of
        self.home.save_state(self.bundle, self.state, self.progress)

    def summary(self) -> dict[str, Any]:
        """What the device did: planned against measured."""
        times = sorted(self._step_seconds)
        return {
            "name": self.config.name,
            "engine": self.engine.name,
            "rounds": self.progress.round,
            "steps": self.state.expert_steps,
            "micro_batch": self.plan.micro_batch,
            "recompute": self.plan.recompute,
            "packed": self.plan.packed,
            "together": self.plan.together,
            "step_seconds": times[len(times) // 2] if times else None,
            "planned_memory_mib": round(self.plan.total_bytes / 2**20, 1),
            "peak_rss_mib": round(peak_bytes() / 2**20, 1),
            "held_out_loss": self.progress.curve,
        }


def rounds_done(reply: pb.CheckInReply) -> int:
    """Rounds that made the generalist which the round of `reply` starts from. A coordinator that
    does not know of them has ended as many as it counts."""
    return reply.rounds_done if reply.HasField("rounds_done") else reply.round - 1
