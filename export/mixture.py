"""The trainable part: which LoRA pairs there are, how they mix, and their fresh values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edge_runtime.adapters import ROUTER, ROUTER_FILE, Vectors, views, zeros
from protos import manifest_pb2 as pb

MIXINGS = ("per_linear", "per_block")
ATTENTION_TARGETS = ("attn.c_attn", "attn.c_proj")
MLP_TARGETS = ("mlp.c_fc", "mlp.c_proj")
TARGETS = ATTENTION_TARGETS + MLP_TARGETS
GENERALIST = "generalist"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One generalist and `specialists` specialists.

    Attention LoRA belongs to the generalist and is not routed; every expert has a LoRA pair on
    each targeted linear map of the MLP (CoMiGS, arXiv 2409.13931, section 2 and appendix).
    """

    mixing: str = "per_linear"
    specialists: int = 1
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing is {self.mixing!r}; it must be one of {', '.join(MIXINGS)}")
        if self.specialists < 0 or self.rank < 1:
            raise ValueError("specialists must be 0 or more and rank 1 or more")
        unknown = set(self.targets) - set(TARGETS)
        if unknown or not self.targets:
            raise ValueError(
                f"targets are {', '.join(self.targets) or 'none'}; choose from {', '.join(TARGETS)}"
            )
        if self.specialists and not set(self.targets) & set(MLP_TARGETS):
            raise ValueError("specialists need a target in the MLP (mlp.c_fc or mlp.c_proj)")

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
    mixture: Mixture, *, layers: int, width: int
) -> tuple[list[pb.Role], list[pb.Tensor]]:
    """The manifest's roles and tensors for a GPT-2 of this size, in vector order."""
    sizes = {  # target -> (inputs, outputs)
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
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
        own = TARGETS if role == GENERALIST else MLP_TARGETS
        shapes: list[tuple[str, tuple[int, int]]] = []
        for layer in range(layers):
            for target in (t for t in own if t in mixture.targets):
                inputs, outputs = sizes[target]
                key = f"transformer.h.{layer}.{target}"
                shapes.append((f"{key}.lora_A.weight", (mixture.rank, inputs)))
                shapes.append((f"{key}.lora_B.weight", (outputs, mixture.rank)))
        add_role(role, f"adapters/{role}", shapes)
    if mixture.specialists:
        add_role(
            ROUTER,
            f"adapters/{ROUTER_FILE}",
            [
                (f"transformer.h.{layer}.mlp.router.weight", (mixture.experts, width))
                for layer in range(layers)
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
