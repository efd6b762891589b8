"""`comigs demo`: one coordinator and four devices on this machine, from compiling to predicting.

Three arms on the same text, with the same number of expert steps and sequences. The MLP's LoRA has
as many trainable numbers in each; the baselines have twice the method's in attention and no router:

* `local`: every device alone, one LoRA of twice the rank;
* `fedavg`: the same LoRA, averaged over the devices after every round;
* `method`: CoMiGS, a generalist that is averaged, a specialist and a router that are not.

Every device is a process of its own that enrols with an invitation and talks to the coordinator
over mutual TLS. The test perplexities are taken from the device homes at the end, over each user's
whole test split.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from tokenizers import Tokenizer

from benchmarks.report import DemoResult, UserResult
from benchmarks.users import UserText, write_users
from coordinator.administrator import Administrator
from edge_runtime.adapters import Vectors, load_fresh
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.cli import LARGEST_SEED, messages
from edge_runtime.data import load_tokenizer, tokenize
from edge_runtime.engines import load_engine
from edge_runtime.errors import ComigsError, DataError, StorageError
from edge_runtime.files import write_atomic
from edge_runtime.identity import read_identity
from edge_runtime.predict import Predictor
from edge_runtime.store import Home
from edge_runtime.training import Evaluator, perplexity_of
from export.mixture import Mixture
from protos import coordinator_pb2 as pb

ARMS = ("local", "fedavg", "method")
RANK, ALPHA = 8, 16.0
NO_DEADLINE = 10**6  # seconds: however long a round takes here, nobody is late
HOUR = 3600.0  # how long the invitations work, in seconds
LARGE = 50e6  # parameters of a base
MARK = ".made-by-comigs-demo"  # file in the folders that a demo empties when it begins
SUGGESTIONS = 3  # places per user at which suggestions before and after are shown


class ChildError(ComigsError):
    """A process of the demo failed."""

    code = 1


@dataclass
class Child:
    """A `comigs` process whose JSON lines are followed as they come."""

    arguments: Sequence[str]
    on_event: Callable[[dict[str, Any]], None]
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `finish`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime", *self.arguments, "--format", "json"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.events.append(event)
            self.on_event(event)

    def last(self, kind: str) -> dict[str, Any]:
        return next(e for e in reversed(self.events) if e["event"] == kind)

    def wait_for(self, kind: str, seconds: float) -> dict[str, Any]:
        """The first event of a kind, once it is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for event in list(self.events):
                if event["event"] == kind:
                    return event
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        self.finish()
        raise ChildError(f"comigs {self.arguments[0]} said no {kind!r}")

    def finish(self) -> None:
        """Waits for the end.

        Raises:
            ChildError: it failed; ends with what it printed last.
        """
        code = self.process.wait()
        self._reader.join()
        self._errors.seek(0)
        tail = self._errors.read().strip().splitlines()[-3:]
        self._errors.close()
        if code:
            raise ChildError(
                f"comigs {' '.join(self.arguments[:2])} ended with {code}: {' '.join(tail)}"
            )


def finish_all(children: Sequence[Child]) -> None:
    """Waits for the end of all: without one of them, the others might wait for ever.

    Raises:
        ChildError: one failed, or a round went on without one.
    """
    running = list(children)
    while running:
        for child in [each for each in running if each.process.poll() is not None]:
            child.finish()
            running.remove(child)
        time.sleep(0.1)
    for child in children:
        for event in child.events:
            if event["event"] == "refused":
                raise ChildError(f"an update did not count: {event['reason']}")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What to run. `out` holds users, bundles, homes and the report."""

    users: list[UserText]
    base: str
    engine: str
    precision: str
    training: pb.TrainingConfig
    out: Path
    seed: int = 0

    def run(self) -> DemoResult:
        """
        Raises:
            StorageError: `out` cannot be written, or has homes or users that no demo made.
            DataError: a user's test split has fewer than two tokens; nothing was compiled.
        """
        started = time.monotonic()
        steps = self.training.rounds * self.training.local_steps
        progress = _bars() if messages.is_terminal else _Lines(disable=True)
        _empty(self.out / "homes", self.out / "users")
        write_users(self.users, self.out / "users")
        with progress:
            bundles = self._export(progress)
            children = {arm: self._train(arm, bundles[arm], steps, progress) for arm in ARMS}
            results = self._evaluate(bundles, children, progress)
        return {
            "users": results,
            "seconds": round(time.monotonic() - started, 1),
            "engine": self.engine,
            "rounds": self.training.rounds,
            "base": self.base,
            "versions": {
                name: version(name) for name in ("comigs", "torch", self.engine, "numpy", "grpcio")
            },
            "setup": self._setup(bundles["method"]),
            "notes": self._notes(),
        }

    # --- compiling -------------------------------------------------------------------------

    def _export(self, progress: Progress) -> dict[str, Bundle]:
        """The method's bundle and the one that both baselines use, each in a process of its own:
        lowering is Python on one core."""
        plans: dict[str, tuple[Mixture, Sequence[str] | None]] = {
            "method": (Mixture(specialists=1, rank=RANK, alpha=ALPHA), None),
            # As in the paper, the baselines have two LoRA pairs in the MLP as well and take their
            # mean, which is one pair of twice the rank at half the scale. One rank holds for the
            # whole bundle, so their attention has it too: in their favour.
            "baseline": (
                Mixture(specialists=0, rank=2 * RANK, alpha=ALPHA / math.sqrt(2)),
                ("train_step", "eval_loss"),
            ),
        }
        context = multiprocessing.get_context("spawn")
        tasks = {name: progress.add_task(f"compile: {name}", total=1, note="") for name in plans}
        with context.Manager() as manager, ProcessPoolExecutor(len(plans), context) as pool:
            notes = manager.Queue()
            futures = {
                name: pool.submit(_compile, self, name, mixture, programs, notes)
                for name, (mixture, programs) in plans.items()
            }
            while not all(future.done() for future in futures.values()):
                with contextlib.suppress(queue.Empty):
                    name, line = notes.get(timeout=0.2)
                    progress.update(tasks[name], note=line)
            bundles = {name: open_bundle(future.result()) for name, future in futures.items()}
        for task in tasks.values():
            progress.update(task, completed=1, note="")
        baseline = bundles["baseline"]
        return {"method": bundles["method"], "local": baseline, "fedavg": baseline}

    # --- training --------------------------------------------------------------------------

    def _home(self, arm: str, user: UserText) -> Path:
        return self.out / "homes" / arm / user.name

    def _train(self, arm: str, bundle: Bundle, steps: int, progress: Progress) -> dict[str, Child]:
        """Runs one arm: four device processes, and a coordinator unless they train alone."""
        training = self.out / "homes" / arm / "training.json"
        training.parent.mkdir(parents=True)
        training.write_text(json_format.MessageToJson(self.training))
        where = {user.name: ["--alone", "--training", str(training)] for user in self.users}
        coordinator = None
        if arm != "local":
            coordinator = Child(
                [
                    "serve",
                    *("--bundle", str(bundle.path)),
                    *("--listen", "127.0.0.1:0"),
                    *("--state", str(self.out / "homes" / arm / "coordinator")),
                    *("--rounds", str(self.training.rounds)),
                    *("--min-devices", str(len(self.users))),
                    *("--deadline", str(NO_DEADLINE)),
                    *("--training", str(training)),
                    "--exit-when-done",
                ],
                lambda _: None,
            )
        children: dict[str, Child] = {}
        helper = [coordinator] if coordinator else []
        try:
            if coordinator is not None:
                where = self._invite(coordinator)
            for index, user in enumerate(self.users):
                task = progress.add_task(f"{arm}: {user.name}", total=steps, note="")
                children[user.name] = Child(
                    [
                        "device",
                        "run",
                        *where[user.name],
                        *("--home", str(self._home(arm, user))),
                        *("--data", str(self.out / "users" / user.name)),
                        *("--bundle", str(bundle.path)),
                        *("--engine", self.engine),
                        *("--seed", str((self.seed + index) % (LARGEST_SEED + 1))),
                        *("--threads", "1"),
                    ],
                    _shower(progress, task),
                )
            finish_all([*children.values(), *helper])
        finally:
            for child in [*children.values(), *helper]:
                child.process.kill()
        return children

    def _invite(self, coordinator: Child) -> dict[str, list[str]]:
        """What lets each user's device in, as options of `comigs device run`."""
        admin = read_identity(Path(coordinator.wait_for("listening", 60)["admin"]))
        assert admin is not None, "the coordinator says so once it is written"
        with Administrator(admin) as administrator:
            return {
                user.name: ["--invitation", administrator.invite(user.name, HOUR).invitation]
                for user in self.users
            }

    # --- figures ---------------------------------------------------------------------------

    def _evaluate(
        self,
        bundles: dict[str, Bundle],
        children: dict[str, dict[str, Child]],
        progress: Progress,
    ) -> list[UserResult]:
        task = progress.add_task("evaluate", total=len(self.users) * 4, note="whole test splits")
        engine = load_engine(self.engine)
        perplexities: dict[str, dict[str, float]] = {user.name: {} for user in self.users}
        # All bundles are of one base, so of one tokenizer.
        tokenizer = load_tokenizer(bundles["method"])
        tests = {user.name: tokenize(tokenizer, user.test) for user in self.users}
        for arm in ("base", *ARMS):
            bundle = bundles["method" if arm == "base" else arm]
            vectors = load_fresh(bundle)
            evaluator = Evaluator(bundle, engine, vectors)
            for user in self.users:
                if arm != "base":
                    self._load(vectors, bundle, arm, user)
                perplexities[user.name][arm] = perplexity_of(evaluator.loss(tests[user.name]))
                progress.advance(task)
        bundle = bundles["method"]
        predictor = Predictor(bundle, engine, load_fresh(bundle))
        return [
            self._user_result(user, perplexities[user.name], children, bundle, predictor)
            for user in self.users
        ]

    def _user_result(
        self,
        user: UserText,
        perplexity: dict[str, float],
        children: dict[str, dict[str, Child]],
        bundle: Bundle,
        predictor: Predictor,
    ) -> UserResult:
        method = children["method"][user.name]
        network, summary = method.last("network"), method.last("summary")
        trained = load_fresh(bundle)
        fresh = {role: vector.copy() for role, vector in trained.items()}
        self._load(trained, bundle, "method", user)
        places = _places(user.test, SUGGESTIONS)
        predictor.use(fresh)
        before = [predictor.suggest(context) for context, _ in places]
        predictor.use(trained)
        after = [predictor.suggest(context) for context, _ in places]
        routing = predictor.explain(_sentence(user.test))
        return {
            "name": user.name,
            "description": user.description,
            "test_perplexity": {
                "base": perplexity["base"],
                "local": perplexity["local"],
                "fedavg": perplexity["fedavg"],
                "method": perplexity["method"],
            },
            "bytes_sent": network["bytes_sent"],
            "bytes_received": network["bytes_received"],
            "peak_rss_mib": summary["peak_rss_mib"],
            "step_seconds": summary["step_seconds"],
            "curves": {
                "local": _curve(children["local"][user.name]),
                "fedavg": _curve(children["fedavg"][user.name]),
                "method": _curve(method),
            },
            "suggestions": [
                {
                    "context": context[-80:],
                    "truth": truth,
                    "before": [(s.text, s.probability) for s in old],
                    "after": [(s.text, s.probability) for s in new],
                }
                for (context, truth), old, new in zip(places, before, after, strict=True)
            ],
            "routing": {
                "tokens": [token for token, _ in routing],
                "experts": bundle.experts(),
                "weights": [list(shares.values()) for _, shares in routing],
            },
        }

    def _load(self, into: Vectors, bundle: Bundle, arm: str, user: UserText) -> None:
        state, _ = Home(self._home(arm, user)).load_state(bundle)
        for role, vector in state.vectors.items():
            into[role][...] = vector

    def _setup(self, bundle: Bundle) -> dict[str, str]:
        training, tier = self.training, bundle.manifest.tier
        shared = sum(4 * role.size for role in bundle.manifest.roles if role.shared)
        return {
            "base": f"{self.base}, {bundle.manifest.base.parameters / 1e6:.1f} M parameters, "
            f"{self.precision}",
            "experts": f"1 generalist and 1 specialist, rank {RANK}, per_linear; baselines: one "
            f"LoRA of rank {2 * RANK} (in attention twice the method's)",
            "training": f"{training.rounds} rounds of {training.local_steps} steps of "
            f"{training.batch_sequences} x {tier.train_length} tokens; router: "
            f"{training.router_steps} steps every {training.tau}",
            "learning rate": f"{training.learning_rate:g} (cosine), router "
            f"{training.router_learning_rate:g}",
            "generalist": f"{shared / 2**20:.2f} MiB each way and round",
        }

    def _notes(self) -> list[str]:
        return [
            "Perplexities are per token over each user's whole test split, each token predicted "
            "once, with the averaged generalist of the last round.",
            "Peak memory is the largest resident set of the method's device process; step time is "
            "the median of its expert steps while all devices train at once on this machine.",
            "Bytes are the serialized gRPC messages of the method's device, without TLS and "
            "HTTP/2 framing.",
        ]


def _empty(*folders: Path) -> None:
    """Makes each anew, if it is a demo's: devices that somebody needs may have such homes, too."""
    for folder in folders:
        if folder.exists() and not (folder / MARK).exists():
            raise StorageError(
                f"{folder} was made by no demo, and would be deleted; choose another --out, or "
                "move it away"
            )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(folder / MARK, b"")


def _compile(
    demo: Demo,
    name: str,
    mixture: Mixture,
    programs: Sequence[str] | None,
    notes: queue.Queue[tuple[str, str]],
) -> Path:
    """Compiles a bundle unless it is there already; runs in a process of its own."""
    import torch

    from benchmarks.compiled import sources_digest
    from export.base import load_base
    from export.bundle import export_bundle
    from export.tiers import tiers

    torch.set_num_threads(1)  # as many processes as cores: threads of one wait for the other's
    notes.put((name, "loading the base"))
    base = load_base(demo.base)
    _check_tests(demo.users, base.tokenizer)
    batch = demo.training.batch_sequences
    # Four devices share this machine's memory: a large base takes its batches in parts.
    micro_batch = 2 if base.parameters > LARGE and batch % 2 == 0 else batch
    tier = replace(tiers()["laptop"], micro_batches=(micro_batch,))
    key = hashlib.sha256(
        f"{base.fingerprint} {demo.precision} {mixture} {tier} {demo.engine} {programs} "
        f"{demo.seed} {sources_digest()}".encode()
    ).hexdigest()[:16]
    out = demo.out / "bundles" / f"{name}-{key}"
    if not out.exists():
        export_bundle(
            base,
            mixture,
            tier,
            engines=[demo.engine],
            out=out,
            precision=demo.precision,
            seed=demo.seed,
            programs=programs,
            progress=lambda line: notes.put((name, line)),
        )
    return out


def _check_tests(users: Sequence[UserText], tokenizer: Tokenizer) -> None:
    """
    Raises:
        DataError: a user's test split has no token to predict; its loss is wanted in the end.
    """
    for user in users:
        if (count := len(tokenize(tokenizer, user.test))) < 2:
            raise DataError(
                f"user {user.name}: the test split has too few tokens to predict one ({count}, 2 "
                f"are needed); put more text into {user.name}/test.txt"
            )


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=messages,
    )


class _Lines(Progress):
    """Without a terminal: a line when a task begins to move, and for each quarter of it."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._telling = threading.Lock()  # devices are read in threads of their own

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        with self._telling:
            task = self.tasks[task_id]  # none is ever removed
            quarters = int(task.percentage // 25)
            if quarters > task.fields.get("told", -1):
                task.fields["told"] = quarters
                done = f"{task.completed:.0f} of {task.total:.0f}"
                line = f"{task.description}: {done}  {task.fields['note']}".rstrip()
                messages.print(line, markup=False, highlight=False, soft_wrap=True)


def _shower(progress: Progress, task: TaskID) -> Callable[[dict[str, Any]], None]:
    """Shows a device's events on its progress bar."""

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            progress.update(
                task,
                completed=event["step"],
                note=f"round {event['round']}  loss {event['loss']:.2f}",
            )
        elif event["event"] == "held_out":
            progress.update(task, note=f"held-out perplexity {perplexity_of(event['loss']):.1f}")
        elif event["event"] == "waiting":
            progress.update(task, note=event["message"])

    return show


def _curve(child: Child) -> list[tuple[int, float]]:
    """Held-out perplexity by expert step; the last measurement at a step counts."""
    losses = child.last("summary")["held_out_loss"]
    points = {int(step): perplexity_of(loss) for step, loss in losses}
    return sorted(points.items())


def _places(text: str, count: int) -> list[tuple[str, str]]:
    """(context, the word that follows) at evenly spread places of `text`."""
    places = []
    for index in range(count):
        at = int(len(text) * (index + 0.5) / count)
        while at < len(text) - 1 and not (text[at] == " " and text[at + 1].isalpha()):
            at += 1
        follow = text[at : at + 40]
        word = next((follow[:n] for n in range(2, len(follow)) if not follow[n].isalpha()), follow)
        places.append((text[max(0, at - 400) : at], word))
    return places


def _sentence(text: str) -> str:
    """A passage of about two lines out of the middle of `text`."""
    start = text.find("\n", len(text) // 3) + 1
    end = text.find("\n", start + 120)
    return text[start : end if end > 0 else None][:240]
