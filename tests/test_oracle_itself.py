"""The oracle against Hugging Face's models and against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.oracle import (
    Arrays,
    Batch,
    Batches,
    Constants,
    LlamaOracle,
    OracleDevice,
    OracleModel,
    balance_loss,
    mixing_weights,
    run_oracle,
)

CONFIG = GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2)
MIXINGS = ("per_linear", "per_block")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only loses by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    """A GPT-2 with random biases and norms too, so that leaving one out shows."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(seed: int) -> list[Batch]:
    text = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(seed))
    return [(text[:, :-1], text[:, 1:])]


def train_batch(step: int) -> Sequence[Batch]:
    return batch(step)


def valid_batch(step: int) -> Sequence[Batch]:
    return batch(1000 + step)


def other_batch(step: int) -> Sequence[Batch]:
    return batch(2000 + step)


def random_values(model: OracleModel, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.2, parameter.shape).astype(np.float32)
        for name, parameter in model.adapters.items()
    }


def random_model(
    base: GPT2LMHeadModel, mixing: str = "per_linear", experts: int = 2, balance: float = 0.01
) -> OracleModel:
    model = OracleModel(base, mixing=mixing, experts=experts, rank=4, balance_weight=balance)
    model.load(random_values(model))
    return model


def logits_of(base: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return base(tokens).logits


def merged(base: GPT2LMHeadModel, model: OracleModel) -> GPT2LMHeadModel:
    """A GPT-2 with the generalist's deltas added to its weights; only right for weight 1."""
    copy = GPT2LMHeadModel(CONFIG).double().eval()
    copy.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, a in model.adapters.items():
            if name.startswith("generalist/") and "lora_A" in name:
                b = model.adapters[name.replace("lora_A", "lora_B")]
                module = copy.get_submodule(name.split("/")[1].removesuffix(".lora_A.weight"))
                module.weight += (16 / math.sqrt(4)) * (b @ a).T
    return copy


def different(one: Arrays, other: Arrays) -> set[str]:
    """The roles in which two devices differ."""
    return {name.split("/")[0] for name in one if not np.array_equal(one[name], other[name])}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_fresh_adapters_leave_gpt2_as_it_is(
    base: GPT2LMHeadModel, mixing: str, experts: int
) -> None:
    tokens, _ = batch(0)[0]
    logits, _ = OracleModel(base, mixing=mixing, experts=experts)(tokens)
    torch.testing.assert_close(logits, logits_of(base, tokens))


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("experts", [1, 3])
def test_equal_experts_are_gpt2_with_merged_weights(
    base: GPT2LMHeadModel, mixing: str, experts: int
) -> None:
    model = random_model(base, mixing, experts)
    with torch.no_grad():
        for name, parameter in model.adapters.items():
            if name.startswith("specialist"):
                parameter.copy_(model.adapters["generalist/" + name.split("/")[1]])
    tokens, _ = batch(0)[0]
    want = logits_of(merged(base, model), tokens)
    assert (want - logits_of(base, tokens)).abs().max() > 0.1
    torch.testing.assert_close(model(tokens)[0], want)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_equal_experts_are_a_llama_with_merged_weights(mixing: str) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = LlamaOracle(base, mixing=mixing, experts=3, rank=4)
    model.load(random_values(model))
    tokens, _ = batch(0)[0]
    with torch.no_grad():
        bare = base(tokens).logits
        for name, parameter in model.adapters.items():
            if name.startswith("specialist"):
                parameter.copy_(model.adapters["generalist/" + name.split("/")[1]])
        got = model(tokens)[0]
        for name, a in model.adapters.items():
            if name.startswith("generalist/") and "lora_A" in name:
                b = model.adapters[name.replace("lora_A", "lora_B")]
                module = base.get_submodule(name.split("/")[1].removesuffix(".lora_A.weight"))
                module.weight += (16 / math.sqrt(4)) * (b @ a)
        want = base(tokens).logits
    assert (want - bare).abs().max() > 0.1
    # transformers keeps its rotary frequencies in float32.
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class MixedMLP(torch.nn.Module):
    """Stands in for a block's MLP in Hugging Face's model; mixes with merged weights, per token."""

    def __init__(self, mlp: torch.nn.Module, model: OracleModel, layer: int) -> None:
        super().__init__()
        self.mlp, self.model, self.path = mlp, model, f"transformer.h.{layer}.mlp"

    def weight(self, target: str, p: torch.Tensor) -> torch.Tensor:
        """W + sum_j p_j s B_j A_j, stored as [in, out]."""
        weight = self.mlp.get_submodule(target).weight
        for role, p_j in zip(("generalist", "specialist.1", "specialist.2"), p, strict=True):
            path = f"{role}/{self.path}.{target}.lora_"
            b, a = (self.model.adapters[f"{path}{half}.weight"] for half in "BA")
            weight = weight + p_j * (16 / math.sqrt(4)) * (b @ a).T
        return weight

    def once(self, token: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        hidden = token @ self.weight("c_fc", p) + self.mlp.c_fc.bias
        return self.mlp.act(hidden) @ self.weight("c_proj", p) + self.mlp.c_proj.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        router = self.model.adapters[f"router/{self.path}.router.weight"]
        y = []
        for token in x.flatten(0, 1):
            scores = router @ token
            scores[scores.argmin()] = -math.inf  # top-2 of three
            p = scores.softmax(dim=0)
            if self.model.mixing == "per_linear":
                y.append(self.once(token, p))
            else:
                y.append(
                    sum(
                        p_j * self.once(token, one)
                        for p_j, one in zip(p, torch.eye(3), strict=True)
                    )
                )
        return torch.stack(y).reshape(x.shape)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_three_experts_are_gpt2_with_weights_merged_per_token(
    base: GPT2LMHeadModel, mixing: str
) -> None:
    model = random_model(base, mixing, experts=3)
    want = merged(base, model)  # for the attention
    for layer, block in enumerate(want.transformer.h):
        plain = base.transformer.h[layer].mlp
        block.mlp = MixedMLP(plain, model, layer)
    tokens, _ = batch(0)[0]
    torch.testing.assert_close(model(tokens)[0].detach(), logits_of(want, tokens))


def test_the_loss_is_cross_entropy_and_the_weighted_balance_loss(base: GPT2LMHeadModel) -> None:
    tokens, targets = batch(0)[0]
    model = random_model(base, experts=3, balance=0.5)
    logits, routed = model(tokens)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    want = want + 0.5 * (balance_loss(routed[0], 2) + balance_loss(routed[1], 2)) / 2
    torch.testing.assert_close(model.loss(tokens, targets), want)


def test_the_ways_to_mix_differ_once_experts_differ(base: GPT2LMHeadModel) -> None:
    tokens, _ = batch(0)[0]
    linear, block = (random_model(base, mixing)(tokens)[0] for mixing in MIXINGS)
    assert (linear - block).abs().max() > 1e-3


def test_names_and_shapes_of_the_tensors(base: GPT2LMHeadModel) -> None:
    model = OracleModel(base, experts=3, rank=4, targets=("attn.c_attn", "mlp.c_proj"))
    shapes = {name: tuple(p.shape) for name, p in model.adapters.items() if ".h.1." in name}
    assert shapes == {
        "generalist/transformer.h.1.attn.c_attn.lora_A.weight": (4, 32),
        "generalist/transformer.h.1.attn.c_attn.lora_B.weight": (96, 4),
        "generalist/transformer.h.1.mlp.c_proj.lora_A.weight": (4, 128),
        "generalist/transformer.h.1.mlp.c_proj.lora_B.weight": (32, 4),
        "specialist.1/transformer.h.1.mlp.c_proj.lora_A.weight": (4, 128),
        "specialist.1/transformer.h.1.mlp.c_proj.lora_B.weight": (32, 4),
        "specialist.2/transformer.h.1.mlp.c_proj.lora_A.weight": (4, 128),
        "specialist.2/transformer.h.1.mlp.c_proj.lora_B.weight": (32, 4),
        "router/transformer.h.1.mlp.router.weight": (3, 32),
    }
    assert len(list(model.parameters())) == len(model.adapters)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(
    "targets", [(), OracleModel.attention, OracleModel.mlp[:1], OracleModel.mlp[1:]]
)
def test_any_set_of_targets_runs(
    base: GPT2LMHeadModel, mixing: str, targets: tuple[str, ...]
) -> None:
    tokens, wanted = batch(0)[0]
    model = OracleModel(base, mixing=mixing, targets=targets)
    model.load(random_values(model))
    changed = not torch.allclose(model(tokens)[0], logits_of(base, tokens))
    assert changed == bool(targets)
    assert model.loss(tokens, wanted).isfinite()


def test_two_of_three_experts_carry_weight() -> None:
    third = math.log(3)
    logits = torch.tensor([[0.0, third, -1.0], [5.0, 0.0, 5.0], [2.0, 2.0, 2.0]])
    want = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(mixing_weights(logits, 2), want)
    many = mixing_weights(torch.randn(500, 3), 2)
    assert ((many > 0).sum(dim=-1) == 2).all()
    torch.testing.assert_close(many.sum(dim=-1), torch.ones(500))


def test_balance_loss_of_three_experts_by_hand() -> None:
    """Softmax (1/6, 2/6, 3/6) and (5/8, 2/8, 1/8): the tokens choose {1, 2} and {0, 1}.

    f = (1/2, 1, 1/2); P = (19/48, 14/48, 15/48);
    (19/96 + 2 * (14/48 + 15/96)) / 5 = (105/96) / 5 = 7/32.
    """
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0], [5.0, 2.0, 1.0]]))
    logits.requires_grad_()
    loss = balance_loss(logits, 2)
    assert loss.item() == pytest.approx(7 / 32)
    loss.backward()
    # d loss / d logit_j = p_j (c_j - sum_i p_i c_i) / 2 tokens, c = (f_0, 2 f_1, 2 f_2) / 5
    assert logits.grad is not None
    c = np.array([0.5, 2.0, 1.0]) / 5
    for p, grad in zip([[1 / 6, 2 / 6, 3 / 6], [5 / 8, 2 / 8, 1 / 8]], logits.grad, strict=True):
        np.testing.assert_allclose(grad, np.array(p) * (c - np.dot(p, c)) / 2, rtol=1e-5)


def test_balance_loss_of_two_experts_has_no_gradient(base: GPT2LMHeadModel) -> None:
    tokens, targets = batch(0)[0]
    gradients = []
    for weight in (0.0, 100.0):
        model = random_model(base, balance=weight)
        model.loss(tokens, targets).backward()
        gradients.append({name: p.grad for name, p in model.adapters.items()})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 1e-6, name
        torch.testing.assert_close(plain, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_the_rate_falls_by_a_cosine_to_its_share() -> None:
    constants = Constants(rounds=4, local_steps=5, learning_rate=1.0, final_rate_share=0.2)
    assert [constants.rate(t) for t in (0, 10, 20)] == pytest.approx([1.0, 0.6, 0.2])
    assert all(a > b for a, b in pairwise(constants.rate(t) for t in range(21)))


def test_the_first_step_is_adamw_with_the_mean_gradient(base: GPT2LMHeadModel) -> None:
    """AdamW's first step is w (1 - rate decay) - rate g / (|g| + eps)."""
    model, twin = random_model(base), random_model(base)
    two = [*batch(1), *batch(2)]
    constants = Constants(rounds=1, local_steps=1, learning_rate=0.1, weight_decay=0.5, tau=0)
    OracleDevice(model, lambda _: two, valid_batch, constants).train_round()
    (sum(twin.loss(*micro) for micro in two) / 2).backward()
    for name, before in twin.adapters.items():
        step = 0.1 * before.grad / (before.grad.abs() + 1e-8)
        want = before if name.startswith("router") else before * (1 - 0.1 * 0.5) - step
        torch.testing.assert_close(model.adapters[name].detach(), want.detach())


def test_the_router_trains_in_bursts_counted_over_rounds(base: GPT2LMHeadModel) -> None:
    log: list[tuple[str, int]] = []

    def logged(kind: str, step: int) -> Sequence[Batch]:
        log.append((kind, step))
        return batch(step)

    constants = Constants(rounds=2, local_steps=2, tau=3, router_steps=2)
    device = OracleDevice(
        random_model(base), lambda t: logged("t", t), lambda t: logged("v", t), constants
    )
    run_oracle([device], 2)
    assert log == [("t", 0), ("t", 1), ("t", 2), ("v", 0), ("v", 1), ("t", 3)]


@pytest.mark.parametrize("leak", [False, True])
def test_only_a_leak_lets_a_level_see_the_other_split(base: GPT2LMHeadModel, leak: bool) -> None:
    def run(train: Batches, valid: Batches, **rates: float) -> Arrays:
        constants = Constants(rounds=1, local_steps=3, tau=2, router_steps=2, **rates)
        model = random_model(base, experts=3)
        return run_oracle([OracleDevice(model, train, valid, constants, leak=leak)], 1)[0]

    still = {"router_learning_rate": 0.0}
    held_out = [run(train_batch, valid, **still) for valid in (valid_batch, other_batch)]
    still = {"learning_rate": 0.0}
    trained = [run(train, valid_batch, **still) for train in (train_batch, other_batch)]
    experts, router = different(*held_out), different(*trained)
    assert experts == ({"generalist", "specialist.1", "specialist.2"} if leak else set())
    assert router == ({"router"} if leak else set())


def test_a_leak_would_be_caught(base: GPT2LMHeadModel) -> None:
    one, other = (
        run_oracle(
            [
                OracleDevice(
                    random_model(base),
                    train_batch,
                    valid_batch,
                    Constants(rounds=2, local_steps=2, tau=2, router_steps=2),
                    leak=leak,
                )
            ],
            2,
        )[0]
        for leak in (False, True)
    )
    for name in one:
        assert np.abs(one[name] - other[name]).max() > 1e-4, name


def test_a_round_averages_the_generalist_and_nothing_else(base: GPT2LMHeadModel) -> None:
    constants = Constants(rounds=1, local_steps=2, tau=1, router_steps=1)
    batches = (train_batch, valid_batch, other_batch)
    alone = [OracleDevice(random_model(base), b, b, constants) for b in batches]
    for device in alone:
        device.train_round()
    together = [OracleDevice(random_model(base), b, b, constants) for b in batches]
    results = run_oracle(together, 1)
    for name in results[0]:
        each = [device.model.arrays()[name] for device in alone]
        assert not np.array_equal(each[0], each[1]), name
        if name.startswith("generalist"):
            each = [np.mean(each, axis=0)] * 3
        for got, want in zip(results, each, strict=True):
            np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-7)


def test_the_next_round_starts_from_the_average_and_keeps_adamw(base: GPT2LMHeadModel) -> None:
    constants = Constants(rounds=2, local_steps=1, tau=0)
    batches = (train_batch, other_batch)
    devices = [OracleDevice(random_model(base), b, b, constants) for b in batches]
    run_oracle(devices, 1)
    state = devices[0].experts.state[devices[0].model.level(router=False)[0]]
    assert state["step"] == 1
    first = [{n: p.detach().clone() for n, p in d.model.adapters.items()} for d in devices]
    assert all(torch.equal(first[0][n], first[1][n]) for n in first[0] if n.startswith("gen"))
    run_oracle(devices, 1)
    assert state["step"] == 2
    assert devices[0].experts.param_groups[0]["lr"] == pytest.approx(2e-3 * 0.55)
    whole = [OracleDevice(random_model(base), b, b, constants) for b in batches]
    for got, device in zip(run_oracle(whole, 2), devices, strict=True):
        assert not different(got, device.model.arrays())
