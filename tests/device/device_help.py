"""`comigs` as a process, and small things that several test files need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.adapters import Vectors
from edge_runtime.bundle import Bundle
from edge_runtime.data import Batches
from edge_runtime.engines import load_engine
from edge_runtime.store import Home
from edge_runtime.training import Trainer, new_state
from protos import coordinator_pb2 as pb

TIMEOUT = 120.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edge_runtime", *map(str, arguments)]


def comigs(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `comigs` to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=TIMEOUT, check=False, **options
    )


def device_run(home: Path, data: Path, *arguments: object) -> list[str]:
    """`comigs device run --alone` with one thread and events on stdout."""
    options = ("--home", home, "--data", data, "--alone", "--threads", 1, "--format", "json")
    return command("device", "run", *options, *arguments)


def events(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


def run_alone(home: Path, data: Path, *arguments: object) -> list[dict[str, Any]]:
    """The events of a device that trains alone and succeeds."""
    done = subprocess.run(
        device_run(home, data, *arguments),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return events(done.stdout)


def refusal(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The message of a command that refused with `code` and said so in a single line."""
    assert done.returncode == code, f"exit code {done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines, "it said nothing"
    assert lines[-1].startswith("error: "), done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1].removeprefix("error: ")


def training_file(path: Path, **values: float) -> Path:
    path.write_text(json.dumps(values))
    return path


def saved(home: Path, bundle: Bundle) -> dict[str, Any]:
    """What must be equal where two devices went the same way: everything but the clock."""
    state, progress = Home(home).load_state(bundle)
    values = vars(progress) | {"expert_steps": state.expert_steps, "router": state.router_steps}
    del values["round_seconds"]
    for kind in ("vectors", "first_moment", "second_moment"):
        for role, vector in getattr(state, kind).items():
            values[f"{role}/{kind}"] = vector.tobytes()
    return values


def tokens(seed: int, count: int = 600) -> np.ndarray:
    return np.random.default_rng(seed).integers(32, 120, count)


def trainer(
    bundle: Bundle,
    vectors: Vectors,
    *,
    engine: str = "onnxruntime",
    train: int = 1,
    valid: int = 2,
    micro_batch: int = 2,
    program: str = "",
    **config: float,
) -> Trainer:
    """A trainer from a copy of `vectors`; `train` and `valid` are seeds of the text."""
    values = {
        "rounds": 1,
        "local_steps": 10,
        "batch_sequences": 2,
        "learning_rate": 2e-3,
        "final_rate_share": 0.1,
        "router_learning_rate": 2e-3,
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.95,
        "tau": 3,
        "router_steps": 2,
    } | config
    length = bundle.manifest.tier.train_length
    copy = {role: vector.copy() for role, vector in vectors.items()}
    return Trainer(
        bundle=bundle,
        engine=load_engine(engine, threads=1 if engine == "onnxruntime" else None),
        state=new_state(bundle.manifest, copy),
        config=pb.TrainingConfig(**values),
        micro_batch=micro_batch,
        program=program,
        train=Batches(tokens(train), length, seed=3),
        valid=Batches(tokens(valid), length, seed=4),
    )


def steps(trained: Trainer, count: int) -> Vectors:
    """A copy of the vectors after `count` more steps."""
    for _ in range(count):
        trained.step()
    return {role: vector.copy() for role, vector in trained.state.vectors.items()}


def same(one: Vectors, other: Vectors, *roles: str) -> bool:
    return all(np.array_equal(one[role], other[role]) for role in roles or one)
