"""Where eight bits are too coarse for activations, and how short blocks must be there."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, fx, nn

from export.programs import BLOCKS
from export.rounding import Judged, block_lengths, coarse_and_even_products, coarse_products

INPUTS, MASSIVE = 256, 200


@pytest.fixture(scope="module")
def product() -> fx.GraphModule:
    """x @ W, of which W ignores one of the inputs."""
    return product_with(a_weight())


def a_weight() -> Tensor:
    weight = torch.randn(INPUTS, 8, generator=torch.Generator().manual_seed(0))
    weight[MASSIVE] = 0.0
    return weight


def product_with(weight: Tensor, *, transposed: bool = False) -> fx.GraphModule:
    root = nn.Module()
    root.register_buffer("weight", weight)
    graph = fx.Graph()
    x = graph.placeholder("x")
    factor = graph.get_attr("weight")
    if transposed:
        factor = graph.call_function(torch.ops.aten.t.default, (factor,))
        factor.meta["val"] = weight.T
    graph.output(graph.call_function(torch.ops.aten.mm.default, (x, factor)))
    return fx.GraphModule(root, graph)


def activations(largest: float) -> list[Tensor]:
    x = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(1))
    x[2, MASSIVE] = largest
    return [x]


def is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr"


def lengths(_: str, inputs: int) -> list[int]:
    return BLOCKS["int8"].lengths(inputs)


@pytest.mark.parametrize(
    ("largest", "length"),
    [((1.0,), 128), ((1000.0,), 32), ((1.0, 1000.0), 32), ((1000.0, 1.0), 32)],
)
def test_blocks_are_as_long_as_every_example_allows(
    product: fx.GraphModule, largest: tuple[float, ...], length: int
) -> None:
    examples = [activations(each) for each in largest]
    assert list(block_lengths(product, examples, is_weight, lengths).values()) == [length]


def test_a_massive_activation_is_too_coarse_for_one_scale(product: fx.GraphModule) -> None:
    coarse, even = coarse_and_even_products(product, [activations(1.0)], is_weight)
    assert not coarse
    assert len(even) == 1
    examples = [activations(1.0), activations(1000.0)]
    coarse, even = coarse_and_even_products(product, examples, is_weight)
    assert len(coarse) == 1
    assert not even


def test_tokens_of_different_size_do_not_share_a_scale(product: fx.GraphModule) -> None:
    sizes = torch.logspace(0, 2, len(activations(1.0)[0])).unsqueeze(1)
    examples = [activations(1.0), [activations(1.0)[0] * sizes]]
    assert coarse_and_even_products(product, examples, is_weight) == (set(), set())


def test_programs_with_the_same_weight_share_what_one_has_shown() -> None:
    judged: Judged = {}
    weight, first, massive = a_weight(), [activations(1.0)], [activations(1000.0)]
    place = weight.data_ptr()
    assert len(coarse_products(product_with(weight), massive, is_weight, judged)) == 1
    assert len(coarse_products(product_with(weight), first, is_weight, judged)) == 1
    # Neither another weight, not even in the place of one that is gone, nor the other way round.
    transposed = product_with(weight, transposed=True)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    assert not coarse_products(transposed, [[x]], is_weight, judged)
    del weight, transposed
    gc.collect()
    others = [a_weight() for _ in range(20)]
    assert place not in {other.data_ptr() for other in others}
    assert not coarse_products(product_with(others[0]), first, is_weight, judged)
    # What one example shows no other takes back.
    for examples in (first + massive, massive + first):
        assert len(coarse_products(product_with(a_weight()), examples, is_weight, {})) == 1


def test_blocks_divide_the_inputs() -> None:
    found = {n: BLOCKS["int8"].lengths(n) for n in (768, 192, 96, 48)}
    assert found == {768: [256, 128, 64, 32], 192: [64, 32], 96: [32], 48: [16]}
    assert BLOCKS["int4"].lengths(768) == [32]
