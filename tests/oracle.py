"""The method (CoMiGS, arXiv 2409.13931) in plain PyTorch, to check the real implementation against.

Written from the equations and meant to be read beside them: autograd, `torch.optim.AdamW`, and an
average in a Python loop. Nothing here is shared with the code under test, and nothing is fast.

    model = OracleModel(GPT2LMHeadModel(config), mixing="per_linear", experts=2)
    constants = Constants(rounds=2, local_steps=3, tau=2)
    device = OracleDevice(model, train_batch, valid_batch, constants)
    final = run_oracle([device, ...], rounds=2)

Give the base in float64 to get the oracle in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

Batch = tuple[Tensor, Tensor]  # tokens (B, T), targets (B, T): the targets are already shifted
Batches = Callable[[int], Sequence[Batch]]  # step (from 0) -> micro-batches of that step
Arrays = dict[str, NDArray[np.float32]]

GENERALIST = "generalist/"
ROUTER = "router/"


def chosen(logits: Tensor, k: int) -> Tensor:
    """Whether a token uses an expert: its k largest logits, the lower index of a tie. (.., n)"""
    order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)


def mixing_weights(logits: Tensor, k: int) -> Tensor:
    """p = softmax over the k chosen logits, zero elsewhere. (.., n)"""
    return logits.masked_fill(~chosen(logits, k), -math.inf).softmax(dim=-1)


def balance_loss(logits: Tensor, k: int) -> Tensor:
    """[f_0 P_0 + (n-1) sum_{j>0} f_j P_j] / ((n-1)^2 + 1) of one layer's router logits (.., n).

    f_j is the share of tokens that chose expert j (a constant), P_j the mean over tokens of the
    full softmax.
    """
    n = logits.shape[-1]
    f = chosen(logits, k).to(logits.dtype).reshape(-1, n).mean(dim=0).detach()
    P = logits.softmax(dim=-1).reshape(-1, n).mean(dim=0)  # noqa: N806
    others = torch.stack([f[j] * P[j] for j in range(1, n)]).sum()
    return (f[0] * P[0] + (n - 1) * others) / ((n - 1) ** 2 + 1)


class OracleModel(torch.nn.Module):
    """A frozen GPT-2 with a mixture of LoRA experts in its MLPs; expert 0 is the generalist.

    `LlamaOracle` is the same for the other family.

    Args:
        base: only read, never changed.
        mixing: "per_linear" (LoRA deltas mixed in each map) or "per_block" (whole MLPs mixed).
        experts: the generalist and its specialists; with one expert there is no router.
        targets: the maps that carry LoRA; all if not given.
        top_k: experts that a token uses.
        balance_weight: weight of the balance loss in `loss`.
        values: adapters to start with; fresh ones (B zero, so no effect yet) if not given.
    """

    family: type[PreTrainedModel] = GPT2LMHeadModel
    blocks = "transformer.h"
    embedding, norms = "transformer.wte.weight", ("ln_1", "ln_2", "transformer.ln_f")
    attention: tuple[str, ...] = ("attn.c_attn", "attn.c_proj")
    mlp: tuple[str, ...] = ("mlp.c_fc", "mlp.c_proj")

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        mixing: str = "per_linear",
        experts: int = 2,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] | None = None,
        top_k: int = 2,
        balance_weight: float = 0.01,
        values: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        super().__init__()
        assert mixing in ("per_linear", "per_block"), mixing
        assert isinstance(base, self.family), type(base)
        assert set(targets or ()) <= {*self.attention, *self.mlp}, targets
        self.config = base.config
        self.weights = {name: value.detach() for name, value in base.state_dict().items()}
        self.mixing = mixing
        self.n = experts
        self.k = min(top_k, experts)
        self.rank = rank
        self.scale = alpha / math.sqrt(rank)
        self.targets = self.attention + self.mlp if targets is None else tuple(targets)
        self.balance_weight = balance_weight
        self.adapters = {
            name: torch.nn.Parameter(value) for name, value in self._fresh_adapters().items()
        }
        for name, parameter in self.adapters.items():
            self.register_parameter(name.replace(".", "_"), parameter)
        if values is not None:
            self.load(values)

    def load(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Sets every adapter tensor; names and shapes must be exactly the oracle's."""
        assert values.keys() == self.adapters.keys(), values.keys() ^ self.adapters.keys()
        with torch.no_grad():
            for name, parameter in self.adapters.items():
                assert values[name].shape == tuple(parameter.shape), name
                parameter.copy_(torch.from_numpy(np.array(values[name])))

    def arrays(self) -> Arrays:
        """A float32 copy of every adapter tensor."""
        return {
            name: parameter.detach().to(torch.float32).numpy().copy()
            for name, parameter in self.adapters.items()
        }

    def level(self, *, router: bool) -> list[torch.nn.Parameter]:
        """The parameters that one of the two optimizers moves."""
        return [p for name, p in self.adapters.items() if name.startswith(ROUTER) == router]

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, T) -> logits (B, T, V), and each layer's router logits (B, T, n), if any."""
        x = self._embed(tokens)  # (B, T, D)
        routed = []
        for layer in range(self.config.num_hidden_layers):
            block = f"{self.blocks}.{layer}"
            x = x + self._attention(block, self._norm(f"{block}.{self.norms[0]}", x))
            h = self._norm(f"{block}.{self.norms[1]}", x)
            if self.n == 1:
                p = torch.ones_like(h[..., :1])
            else:
                routed.append(h @ self.adapters[f"{ROUTER}{block}.mlp.router.weight"].T)
                p = mixing_weights(routed[-1], self.k)
            x = x + self._mlp(block, h, p)
        return self._norm(self.norms[2], x) @ self.weights["lm_head.weight"].T, routed

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy + balance_weight * the balance loss averaged over layers."""
        logits, routed = self(tokens)
        loss = -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
        if routed:
            balance = torch.stack([balance_loss(r, self.k) for r in routed]).mean()
            loss = loss + self.balance_weight * balance
        return loss

    def _embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return (
            self.weights[self.embedding][tokens] + self.weights["transformer.wpe.weight"][positions]
        )

    def _attention(self, block: str, x: Tensor) -> Tensor:
        """Causal attention; its LoRA is the generalist's, and is not routed."""
        batch, length, width = x.shape
        heads = self.config.n_head
        q, k, v = (
            part.reshape(batch, length, heads, width // heads).transpose(1, 2)  # (B, H, T, D/H)
            for part in self._one_expert(f"{block}.attn.c_attn", x, 0).split(width, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)  # (B, H, T, T)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return self._one_expert(f"{block}.attn.c_proj", mixed, 0)

    def _mlp(self, block: str, x: Tensor, p: Tensor) -> Tensor:
        if self.mixing == "per_linear":
            return self._whole_mlp(block, x, lambda map_, x: self._all_experts(map_, x, p))
        y = torch.zeros_like(x)
        for j in range(self.n):
            expert = self._whole_mlp(block, x, lambda map_, x, j=j: self._one_expert(map_, x, j))
            y = y + p[..., j : j + 1] * expert
        return y

    def _whole_mlp(self, block: str, x: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
        return linear(f"{block}.mlp.c_proj", _gelu_new(linear(f"{block}.mlp.c_fc", x)))

    def _one_expert(self, module: str, x: Tensor, j: int) -> Tensor:
        """W x + b + s B_j A_j x"""
        return self._base(module, x) + self._delta(module, x, j)

    def _all_experts(self, module: str, x: Tensor, p: Tensor) -> Tensor:
        """W x + b + sum_j p_j s B_j A_j x"""
        y = self._base(module, x)
        for j in range(self.n):
            y = y + p[..., j : j + 1] * self._delta(module, x, j)
        return y

    def _base(self, module: str, x: Tensor) -> Tensor:
        """GPT-2 stores W as [in, out]."""
        return x @ self.weights[f"{module}.weight"] + self.weights[f"{module}.bias"]

    def _delta(self, module: str, x: Tensor, j: int) -> Tensor:
        """s B_j A_j x, or zeros that broadcast where the map carries no LoRA."""
        if module.split(".", 3)[3] not in self.targets:
            return x.new_zeros(())
        a = self.adapters[f"{_expert(j)}{module}.lora_A.weight"]  # (rank, in)
        b = self.adapters[f"{_expert(j)}{module}.lora_B.weight"]  # (out, rank)
        return self.scale * (x @ a.T @ b.T)

    def _norm(self, module: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{module}.weight"], self.weights[f"{module}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_epsilon)

    def _fresh_adapters(self) -> dict[str, Tensor]:
        """A Kaiming-uniform (a = sqrt 5), B zero, router N(0, 0.02), from torch's generator."""
        wte = self.weights[self.embedding]
        fresh = {}
        for j in range(self.n):
            for layer in range(self.config.num_hidden_layers):
                for target in (*self.attention, *self.mlp) if j == 0 else self.mlp:
                    if target not in self.targets:
                        continue
                    module = f"{self.blocks}.{layer}.{target}"
                    inputs, outputs = self._sizes(module)
                    a = wte.new_empty(self.rank, inputs)
                    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                    fresh[f"{_expert(j)}{module}.lora_A.weight"] = a
                    fresh[f"{_expert(j)}{module}.lora_B.weight"] = wte.new_zeros(outputs, self.rank)
        for layer in range(self.config.num_hidden_layers if self.n > 1 else 0):
            name = f"{ROUTER}{self.blocks}.{layer}.mlp.router.weight"
            fresh[name] = 0.02 * torch.randn(self.n, self.config.hidden_size).to(wte.dtype)
        return fresh

    def _sizes(self, module: str) -> tuple[int, int]:
        inputs, outputs = self.weights[f"{module}.weight"].shape
        return inputs, outputs


class LlamaOracle(OracleModel):
    """The same method in a frozen Llama: RMS norm, rotary positions, grouped queries, gated MLP."""

    family = LlamaForCausalLM
    blocks = "model.layers"
    embedding = "model.embed_tokens.weight"
    norms = ("input_layernorm", "post_attention_layernorm", "model.norm")
    attention = tuple(f"self_attn.{part}_proj" for part in "qkvo")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.weights[self.embedding][tokens]

    def _attention(self, block: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = (
            self._one_expert(f"{block}.self_attn.{part}_proj", x, 0)
            .reshape(batch, length, -1, self.config.head_dim)
            .transpose(1, 2)  # (B, heads, T, D)
            for part in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        k, v = (y.repeat_interleave(heads // key_heads, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.config.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        return self._one_expert(f"{block}.self_attn.o_proj", mixed, 0)

    def _rotate(self, y: Tensor) -> Tensor:
        """Numbers i and i + D/2 of a head, as a complex one, turn by position / theta^(2i/D)."""
        half = y.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        rates = theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(y.shape[-2], dtype=torch.float64), rates)
        pairs = torch.complex(y[..., :half], y[..., half:])
        turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def _whole_mlp(self, block: str, x: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
        gate = F.silu(linear(f"{block}.mlp.gate_proj", x))
        return linear(f"{block}.mlp.down_proj", gate * linear(f"{block}.mlp.up_proj", x))

    def _base(self, module: str, x: Tensor) -> Tensor:
        """Llama stores W as [out, in]."""
        return x @ self.weights[f"{module}.weight"].T

    def _norm(self, module: str, x: Tensor) -> Tensor:
        size = x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps
        return self.weights[f"{module}.weight"] * x * size.rsqrt()

    def _sizes(self, module: str) -> tuple[int, int]:
        outputs, inputs = self.weights[f"{module}.weight"].shape
        return inputs, outputs


def _expert(j: int) -> str:
    return GENERALIST if j == 0 else f"specialist.{j}/"


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants of training; the names are those of `TrainingConfig`."""

    rounds: int
    local_steps: int = 10
    learning_rate: float = 2e-3
    final_rate_share: float = 0.1
    router_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    tau: int = 30
    router_steps: int = 10

    def rate(self, t: int) -> float:
        """The experts' learning rate at step t, counted from 0 over all rounds."""
        low = self.final_rate_share * self.learning_rate
        cosine = math.cos(math.pi * t / (self.rounds * self.local_steps))
        return low + 0.5 * (self.learning_rate - low) * (1 + cosine)


class OracleDevice:
    """One device: AdamW on the experts with its train split, on the router with its held-out one.

    Args:
        train_batch: expert step, counted from 0 over all rounds -> its micro-batches.
        valid_batch: router step, counted from 0 over all bursts -> its micro-batches.
        leak: reproduce the public reference implementation, whose optimizers clear only their own
            gradients: the router also follows train gradients, the experts held-out ones.
    """

    def __init__(
        self,
        model: OracleModel,
        train_batch: Batches,
        valid_batch: Batches,
        constants: Constants,
        *,
        leak: bool = False,
    ) -> None:
        self.model = model
        self.train_batch = train_batch
        self.valid_batch = valid_batch
        self.constants = constants
        self.leak = leak
        self.expert_steps = 0
        self.router_steps = 0
        self.experts = self._adamw(model.level(router=False), constants.learning_rate)
        router = model.level(router=True)
        self.router = self._adamw(router, constants.router_learning_rate) if router else None
        for parameter in model.adapters.values():
            parameter.grad = torch.zeros_like(parameter)

    def train_round(self) -> list[float]:
        """The local steps of one round; returns the training loss before each of them."""
        losses = []
        for _ in range(self.constants.local_steps):
            self.experts.param_groups[0]["lr"] = self.constants.rate(self.expert_steps)
            losses.append(self._step(self.experts, self.train_batch(self.expert_steps)))
            self.expert_steps += 1
            if self.router and self.constants.tau and self.expert_steps % self.constants.tau == 0:
                for _ in range(self.constants.router_steps):
                    self._step(self.router, self.valid_batch(self.router_steps))
                    self.router_steps += 1
        return losses

    def _step(self, optimizer: torch.optim.AdamW, batches: Sequence[Batch]) -> float:
        """One step with the mean gradient over micro-batches; returns the mean loss."""
        if not self.leak:
            for parameter in self.model.adapters.values():
                parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        for tokens, targets in batches:
            loss = self.model.loss(tokens, targets) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        if self.leak:  # what the other optimizer holds stays, and is added to
            optimizer.zero_grad(set_to_none=False)
        return total

    def _adamw(self, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.AdamW:
        c = self.constants
        return torch.optim.AdamW(
            parameters, rate, betas=(c.beta1, c.beta2), eps=1e-8, weight_decay=c.weight_decay
        )


def average_generalists(devices: Sequence[OracleDevice]) -> None:
    """Replaces every device's generalist by their uniform average."""
    with torch.no_grad():
        for name in devices[0].model.adapters:
            if name.startswith(GENERALIST):
                total = torch.zeros((), dtype=torch.float64)
                for device in devices:
                    total = total + device.model.adapters[name].double()
                for device in devices:
                    device.model.adapters[name].copy_(total / len(devices))


def run_oracle(devices: Sequence[OracleDevice], rounds: int) -> list[Arrays]:
    """Runs `rounds` rounds; returns every device's adapters after the last average.

    The first round starts from the average of the devices' generalists, so give them equal ones
    where a coordinator would hand out its own. Call it once per set of devices: calling it again
    goes on from where they are.
    """
    for _ in range(rounds):
        average_generalists(devices)
        for device in devices:
            device.train_round()
    average_generalists(devices)
    return [device.model.arrays() for device in devices]
