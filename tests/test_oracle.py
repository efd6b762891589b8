"""The whole method, compiled, against the plain PyTorch oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from tiny import TIER, ExportTiny
from transformers import AutoModelForCausalLM

from coordinator.aggregation import Contribution, Recipe, aggregate
from edge_runtime import wire
from edge_runtime.adapters import load_fresh, views
from edge_runtime.bundle import Bundle
from edge_runtime.data import Batches
from edge_runtime.engines import load_engine
from edge_runtime.training import Trainer, new_state
from export.mixture import Mixture
from protos import coordinator_pb2 as pb

ROUNDS = 3
CONFIG = pb.TrainingConfig(
    rounds=ROUNDS,
    local_steps=4,
    batch_sequences=4,
    learning_rate=2e-3,
    final_rate_share=0.1,
    router_learning_rate=2e-3,
    weight_decay=0.01,
    beta1=0.9,
    beta2=0.95,
    tau=5,  # bursts fall into the second and third round
    router_steps=3,
)
MICRO_BATCH = 2
ONE_PROGRAM = replace(TIER, micro_batches=(MICRO_BATCH,))
Arrays = dict[str, np.ndarray]


def device_batches(bundle: Bundle, device: int) -> tuple[Batches, Batches]:
    """Random but learnable tokens: each device has its own favourites."""
    length = bundle.manifest.tier.train_length

    def split(salt: int) -> Batches:
        rng = np.random.default_rng((device, salt))
        return Batches(rng.integers(40 * device, 40 * device + 60, 1500), length, seed=salt)

    return split(1), split(2)


def train_compiled(bundle: Bundle, engine_name: str, tmp_path: Path) -> list[Arrays]:
    """Two devices with compiled programs, their generalists through the wire format."""
    manifest = bundle.manifest
    trainers = []
    for device in range(2):
        train, valid = device_batches(bundle, device)
        trainers.append(
            Trainer(
                bundle=bundle,
                engine=load_engine(engine_name),
                state=new_state(manifest, load_fresh(bundle)),
                config=CONFIG,
                micro_batch=MICRO_BATCH,
                train=train,
                valid=valid,
            )
        )
    for _ in range(ROUNDS):
        files = []
        for device, trainer in enumerate(trainers):
            for _ in range(CONFIG.local_steps):
                trainer.step()
            files.append(tmp_path / f"{device}.safetensors")
            files[-1].write_bytes(wire.encode(manifest, trainer.state.vectors))
        outcome = aggregate(
            manifest,
            Recipe(),
            incoming=load_fresh(bundle),
            contributions=[Contribution(path.stem, path, 1) for path in files],
        )
        for trainer in trainers:
            trainer.state.vectors["generalist"][...] = outcome.generalist["generalist"]
    return [{k: v.copy() for k, v in views(manifest, t.state.vectors).items()} for t in trainers]


def train_oracle(bundle: Bundle, base: Path, *, leak: bool = False) -> list[Arrays]:
    mixture = bundle.manifest.mixture
    fresh = views(bundle.manifest, load_fresh(bundle))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    family = oracle.LlamaOracle if model.config.model_type == "llama" else oracle.OracleModel
    devices = []
    for device in range(2):

        def micro_batches(split: Batches, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            parts = CONFIG.batch_sequences // MICRO_BATCH
            pairs = [
                split.at((step * parts + part) * MICRO_BATCH, MICRO_BATCH) for part in range(parts)
            ]
            return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]

        train, valid = device_batches(bundle, device)
        devices.append(
            oracle.OracleDevice(
                family(
                    model,
                    mixing=mixture.mixing,
                    experts=1 + mixture.specialists,
                    rank=mixture.rank,
                    alpha=mixture.alpha,
                    targets=tuple(mixture.targets),
                    balance_weight=mixture.balance_weight,
                    values=fresh,
                ),
                lambda step, split=train: micro_batches(split, step),
                lambda step, split=valid: micro_batches(split, step),
                oracle.Constants(
                    rounds=CONFIG.rounds,
                    local_steps=CONFIG.local_steps,
                    tau=CONFIG.tau,
                    router_steps=CONFIG.router_steps,
                ),
                leak=leak,
            )
        )
    return oracle.run_oracle(devices, ROUNDS)


def worst_difference(got: list[Arrays], want: list[Arrays]) -> tuple[float, str]:
    """Largest relative difference of any tensor of any device."""
    differences = []
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = np.linalg.norm(value)
            differences.append((float(np.linalg.norm(mine[name] - value) / scale), name))
    return max(differences)


@pytest.mark.parametrize("engine", ["onnxruntime", "executorch"])
@pytest.mark.parametrize("mixing", ["per_linear", "per_block"])
@pytest.mark.parametrize("specialists", [1, 3])
def test_compiled_training_agrees_with_the_oracle(
    export_tiny: ExportTiny,
    tiny_base_dir: Path,
    tmp_path: Path,
    engine: str,
    mixing: str,
    specialists: int,
) -> None:
    bundle = export_tiny(
        Mixture(rank=4, mixing=mixing, specialists=specialists),
        engines=(engine,),
        programs=("train_step",),
        tier=ONE_PROGRAM,
    )
    got = train_compiled(bundle, engine, tmp_path)
    difference, where = worst_difference(got, train_oracle(bundle, tiny_base_dir))
    assert difference < 1e-3, where


@pytest.mark.parametrize("engine", ["onnxruntime", "executorch"])
@pytest.mark.parametrize(("mixing", "specialists"), [("per_linear", 2), ("per_block", 1)])
def test_the_llama_family_agrees_with_its_oracle(
    export_tiny: ExportTiny,
    tiny_llama_dir: Path,
    tmp_path: Path,
    engine: str,
    mixing: str,
    specialists: int,
) -> None:
    bundle = export_tiny(
        Mixture(rank=4, mixing=mixing, specialists=specialists),
        base=tiny_llama_dir,
        engines=(engine,),
        programs=("train_step",),
        tier=ONE_PROGRAM,
    )
    got = train_compiled(bundle, engine, tmp_path)
    difference, where = worst_difference(got, train_oracle(bundle, tiny_llama_dir))
    assert difference < 1e-3, where


def test_every_tensor_moves_and_devices_differ_only_where_they_should(
    export_tiny: ExportTiny, tmp_path: Path
) -> None:
    bundle = export_tiny(
        Mixture(rank=4, mixing="per_linear", specialists=1),
        programs=("train_step",),
        tier=ONE_PROGRAM,
    )
    one, other = train_compiled(bundle, "onnxruntime", tmp_path)
    fresh = views(bundle.manifest, load_fresh(bundle))
    for name, value in one.items():
        assert not np.array_equal(value, fresh[name]), f"{name} was not trained"
        same = np.array_equal(value, other[name])
        assert same == name.startswith("generalist/"), name


def test_a_gradient_leak_would_be_caught(
    export_tiny: ExportTiny, tiny_base_dir: Path, tmp_path: Path
) -> None:
    """The public reference implementation lets each level's gradients reach the other."""
    bundle = export_tiny(
        Mixture(rank=4, mixing="per_linear", specialists=1),
        programs=("train_step",),
        tier=ONE_PROGRAM,
    )
    got = train_compiled(bundle, "onnxruntime", tmp_path)
    difference, _ = worst_difference(got, train_oracle(bundle, tiny_base_dir, leak=True))
    assert difference > 1e-2
