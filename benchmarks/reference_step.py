"""The training step as one would write it in PyTorch today, as a contestant.

    python -m benchmarks.reference_step BASE WEIGHTS BUNDLE BATCH THREADS

`transformers`' model, every targeted linear map wrapped in a module that adds the mixed LoRA
deltas, autograd, AdamW. Base, adapters, tokens and update are those of `device_process.train`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.child import Commands, serve
from benchmarks.device_process import LEARNING_RATE, fixed_adapters, fixed_text
from edge_runtime.adapters import ROUTER
from edge_runtime.bundle import Bundle, open_bundle
from export.base import Base, load_base
from export.mixture import GENERALIST


class MixedLinear(nn.Module):
    """A frozen map and the LoRA pairs of its experts: y = W x + sum_j p_j s B_j A_j x."""

    def __init__(self, frozen: nn.Module, pairs: list[tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale
        self.a = nn.ParameterList(nn.Parameter(a.clone()) for a, _ in pairs)
        self.b = nn.ParameterList(nn.Parameter(b.clone()) for _, b in pairs)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x)
        for j, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            delta = F.linear(F.linear(x, a), b) * self.scale
            y = y + (delta if self.weights is None else self.weights[..., j : j + 1] * delta)
        return y


class RoutedMlp(nn.Module):
    """An MLP that routes its input before its maps see it; `balance` is its share of the loss."""

    def __init__(
        self, mlp: nn.Module, maps: Sequence[MixedLinear], router: Tensor, top_k: int
    ) -> None:
        super().__init__()
        self.mlp, self.router, self.top_k = mlp, nn.Parameter(router.clone()), top_k
        self.maps = list(maps)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        full = torch.softmax(F.linear(x, self.router), -1)
        n = full.shape[-1]
        chosen = F.one_hot(full.topk(self.top_k).indices, n).sum(-2).to(full.dtype)
        kept = full * chosen
        for each in self.maps:
            each.weights = kept / kept.sum(-1, keepdim=True)
        factors = torch.tensor([1.0] + [n - 1.0] * (n - 1)) / ((n - 1) ** 2 + 1)
        shares = chosen.flatten(0, -2).mean(0) * full.flatten(0, -2).mean(0)
        self.balance = (factors * shares).sum()
        y: Tensor = self.mlp(x)
        return y


def adapted_model(base: Base, bundle: Bundle) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model with the bundle's fixed adapters, and those by their names in the manifest."""
    mixture = bundle.manifest.mixture
    adapters = {
        name: torch.from_numpy(view.copy()) for name, view in fixed_adapters(bundle)[1].items()
    }
    model: Any = AutoModelForCausalLM.from_config(base.config)  # type: ignore[no-untyped-call]
    # Assigned, not copied: the process holds the base once.
    prefix = model.base_model_prefix + "."
    state = {k if k == "lm_head.weight" else prefix + k: v for k, v in base.tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    model.train(False)
    scale = mixture.alpha / mixture.rank**0.5
    experts = [role.name for role in bundle.manifest.roles if role.name != ROUTER]
    trainable: dict[str, nn.Parameter] = {}
    architecture = base.architecture
    for layer in range(architecture.layers):
        block_name = f"{architecture.blocks}.{layer}"
        block = model.get_submodule(block_name)
        routed = []
        for each in architecture.maps:
            roles = experts if each.routed else [GENERALIST]
            names = [f"{role}/{block_name}.{each.name}" for role in roles]
            pairs = [
                (adapters[f"{n}.lora_A.weight"], adapters[f"{n}.lora_B.weight"]) for n in names
            ]
            mixed = MixedLinear(block.get_submodule(each.name), pairs, scale)
            block.set_submodule(each.name, mixed)
            for name, a, b in zip(names, mixed.a, mixed.b, strict=True):
                trainable[f"{name}.lora_A.weight"] = a
                trainable[f"{name}.lora_B.weight"] = b
            if each.routed:
                routed.append(mixed)
        router = f"{ROUTER}/{block_name}.mlp.router.weight"
        block.mlp = RoutedMlp(block.mlp, routed, adapters[router], mixture.top_k)
        trainable[router] = block.mlp.router
    return model, trainable


def load(base: Base, bundle: Bundle, batch: int, threads: int) -> Commands:
    """`step` and `gradients`, as `device_process.train` has them."""
    torch.set_num_threads(threads)
    model, trainable = adapted_model(base, bundle)
    # The peak counts from here: how this process comes by its model is no part of the reference.
    Path("/proc/self/clear_refs").write_text("5")
    manifest = bundle.manifest
    routed = [each for each in model.modules() if isinstance(each, RoutedMlp)]
    shape = (batch, manifest.tier.train_length)
    tokens, targets = map(torch.from_numpy, fixed_text(manifest.base.vocabulary, shape))
    optimizer = torch.optim.AdamW(
        trainable.values(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
        balance = torch.stack([each.balance for each in routed]).mean()
        (loss + manifest.mixture.balance_weight * balance).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return time.perf_counter() - started, loss.item()

    def write_gradients(path: str) -> None:
        save_file({n: p.grad for n, p in trainable.items() if p.grad is not None}, path)

    return {"step": step, "gradients": write_gradients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("weights", choices=("random", "pretrained"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("batch", type=int)
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    serve(
        lambda: load(
            load_base(given.base, random_weights=given.weights == "random"),
            open_bundle(given.bundle),
            given.batch,
            given.threads,
        )
    )


if __name__ == "__main__":
    main()
