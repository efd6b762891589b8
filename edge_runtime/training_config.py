"""The method's constants, with their defaults filled in."""

from __future__ import annotations

import json
import math
from pathlib import Path

from google.protobuf import json_format

from protos import coordinator_pb2 as pb

# What zero stands for, as protos/coordinator.proto says.
DEFAULTS = {
    "local_steps": 10,
    "batch_sequences": 8,
    "learning_rate": 2e-3,
    "final_rate_share": 0.1,
    "router_learning_rate": 2e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "router_steps": 10,
}
# In these two zero is a choice of its own, so their defaults hold only where nobody chose them.
UNCHOSEN = pb.TrainingConfig(weight_decay=0.01, tau=30)


def with_defaults(config: pb.TrainingConfig) -> pb.TrainingConfig:
    """A copy of `config` in which zeros that mean a default are that default."""
    full = pb.TrainingConfig()
    full.CopyFrom(config)
    for name, value in DEFAULTS.items():
        if not getattr(full, name):
            setattr(full, name, value)
    return full


def load(path: Path | None) -> pb.TrainingConfig:
    """Reads a TrainingConfig in proto3 JSON, or gives the default one for None.

    What a file does not name has its default; weight_decay and tau can be 0 there.

    Raises:
        ValueError: with one line, if the file cannot be read or is not a sensible configuration.
    """
    if path is None:
        return with_defaults(UNCHOSEN)
    config = pb.TrainingConfig()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        json_format.ParseDict(values, config)
        for field, value in UNCHOSEN.ListFields():
            if values.get(field.name, values.get(field.json_name)) is None:
                setattr(config, field.name, value)
    except (OSError, ValueError, json_format.ParseError) as error:
        raise ValueError(f"{path} is not a TrainingConfig in JSON: {error}") from error
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return with_defaults(config)


def check(config: pb.TrainingConfig) -> None:
    """
    Raises:
        ValueError: with one line, if no training can be like that.
    """
    for field, value in config.ListFields():
        limit = {"beta1": 1.0, "beta2": 1.0}.get(field.name, math.inf)
        if not 0 <= value < limit:
            raise ValueError(f"{field.name} is {value}; it must be in [0, {limit})")
    if config.final_rate_share > 1:
        raise ValueError(f"final_rate_share is {config.final_rate_share}, more than 1")
