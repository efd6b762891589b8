"""The trainable part: which LoRA pairs there are, how they mix, and their fresh values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.adapters import ROUTER, ROUTER_FILE, Vectors, views, zeros
from export.architecture import Architecture
from protos import manifest_pb2 as pb

MIXINGS = ("per_linear", "per_block")
GENERALIST = "generalist"
# Beyond, float32 does not hold what comes of it.
LEAST_ALPHA, MOST_ALPHA = 1e-6, 1e6


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One generalist and `specialists` specialists.

    Attention LoRA belongs to the generalist and is not routed; every expert has a LoRA pair on
    each targeted linear map of the MLP (CoMiGS, arXiv 2409.13931, section 2 and appendix). Without
    `targets` every linear map of a block is one.
    """

    mixing: str = "per_linear"
    specialists: int = 1
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing is {self.mixing!r}; it must be one of {', '.join(MIXINGS)}")
        if self.specialists < 0 or self.rank < 1:
            raise ValueError("specialists must be 0 or more and rank 1 or more")
        if not LEAST_ALPHA <= self.alpha <= MOST_ALPHA:
            raise ValueError(
                f"alpha is {self.alpha:g}; it must be between {LEAST_ALPHA:g} and {MOST_ALPHA:g}"
            )

    def on(self, architecture: Architecture) -> Mixture:
        """The same with the targets of this architecture filled in.

        Raises:
            ValueError: a target is no linear map of its blocks, or specialists have none.
        """
        known = architecture.targets()
        if unknown := [target for target in self.targets if target not in known]:
            raise ValueError(f"{unknown[0]} is no target; choose from {', '.join(known)}")
        chosen = [m for m in architecture.maps if not self.targets or m.name in self.targets]
        if self.specialists and not any(each.routed for each in chosen):
            routed = " or ".join(each.name for each in architecture.maps if each.routed)
            raise ValueError(f"specialists need a target in the MLP ({routed})")
        return replace(self, targets=tuple(each.name for each in chosen))

    @property
    def experts(self) -> int:
        return 1 + self.specialists

    @property
    def top_k(self) -> int:
        return min(2, self.experts)

    @property
    def scale(self) -> float:
        """Rank-stabilised: alpha / sqrt(rank) (Kalajdzievski 2023)."""
        return self.alpha / math.sqrt(self.rank)

    def expert_roles(self) -> list[str]:
        return [GENERALIST, *(f"specialist.{i}" for i in range(1, self.experts))]

    def to_manifest(self) -> pb.Mixture:
        return pb.Mixture(
            mixing=self.mixing,
            specialists=self.specialists,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            top_k=self.top_k,
            balance_weight=self.balance_weight,
        )


def roles_and_tensors(
    mixture: Mixture, architecture: Architecture
) -> tuple[list[pb.Role], list[pb.Tensor]]:
    """The manifest's roles and tensors, in vector order, of a mixture `on` the architecture."""
    roles: list[pb.Role] = []
    tensors: list[pb.Tensor] = []

    def add_role(name: str, path: str, shapes: list[tuple[str, tuple[int, int]]]) -> None:
        offset = 0
        for key, shape in shapes:
            tensors.append(
                pb.Tensor(
                    name=f"{name}/{key}", role=name, shape=shape, dtype="float32", offset=offset
                )
            )
            offset += math.prod(shape)
        roles.append(pb.Role(name=name, shared=name == GENERALIST, size=offset, path=path))

    for role in mixture.expert_roles():
        own = [m for m in architecture.maps if role == GENERALIST or m.routed]
        shapes: list[tuple[str, tuple[int, int]]] = []
        for layer in range(architecture.layers):
            for target in (m for m in own if m.name in mixture.targets):
                key = f"{architecture.blocks}.{layer}.{target.name}"
                shapes.append((f"{key}.lora_A.weight", (mixture.rank, target.inputs)))
                shapes.append((f"{key}.lora_B.weight", (target.outputs, mixture.rank)))
        add_role(role, f"adapters/{role}", shapes)
    if mixture.specialists:
        add_role(
            ROUTER,
            f"adapters/{ROUTER_FILE}",
            [
                (
                    f"{architecture.blocks}.{layer}.mlp.router.weight",
                    (mixture.experts, architecture.width),
                )
                for layer in range(architecture.layers)
            ],
        )
    return roles, tensors


def fresh(manifest: pb.Manifest, seed: int) -> Vectors:
    """Untrained adapters: A Kaiming-uniform (bound 1/sqrt(inputs)), B zero, router N(0, 0.02)."""
    rng = np.random.default_rng(seed)
    vectors = zeros(manifest)
    for name, view in views(manifest, vectors).items():
        if name.startswith(f"{ROUTER}/"):
            view[...] = rng.normal(0.0, 0.02, view.shape)
        elif name.endswith(".lora_A.weight"):
            bound = 1.0 / math.sqrt(view.shape[1])
            view[...] = rng.uniform(-bound, bound, view.shape)
    return vectors


def random(manifest: pb.Manifest, seed: int) -> Vectors:
    """Adapters whose every tensor matters, for the parity gate: nothing is zero."""
    rng = np.random.default_rng(seed)
    vectors = fresh(manifest, seed)
    for name, view in views(manifest, vectors).items():
        if name.endswith(".lora_B.weight"):
            view[...] = rng.normal(0.0, 0.02, view.shape)
        elif name.startswith(f"{ROUTER}/"):
            # Wide enough that tokens differ in their experts.
            view[...] = rng.normal(0.0, 0.2, view.shape)
    return vectors
