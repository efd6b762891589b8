"""What the compiler asks of a base: its sizes, and the linear maps that can carry LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this module is imported before it is known whether the compiler is installed
    from transformers import GPT2Config, LlamaConfig


@dataclass(frozen=True)
class LinearMap:
    """A linear map of every block.

    `name` is its path in the block; `routed` says that it is part of the MLP, where every expert
    has a LoRA pair of its own.
    """

    name: str
    inputs: int
    outputs: int
    routed: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder.

    Attributes:
        name: the family, as transformers calls it.
        key_value_heads: heads of keys and values; groups of query heads share one.
        positions: tokens that the base was trained for.
        blocks: path of the list of blocks in the transformers model.
        maps: a block's linear maps, in the order of the adapters' tensors.
    """

    name: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    blocks: str
    maps: tuple[LinearMap, ...]

    def targets(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.maps)


def gpt2(config: GPT2Config) -> Architecture:
    """What a GPT-2 configuration of transformers describes."""
    width = config.n_embd
    return Architecture(
        name="gpt2",
        layers=config.n_layer,
        width=width,
        heads=config.n_head,
        key_value_heads=config.n_head,
        head_dim=width // config.n_head,
        vocabulary=config.vocab_size,
        positions=config.n_positions,
        blocks="transformer.h",
        maps=(
            LinearMap("attn.c_attn", width, 3 * width, routed=False),
            LinearMap("attn.c_proj", width, width, routed=False),
            LinearMap("mlp.c_fc", width, 4 * width, routed=True),
            LinearMap("mlp.c_proj", 4 * width, width, routed=True),
        ),
    )


def llama(config: LlamaConfig) -> Architecture:
    """What a Llama configuration of transformers describes."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    key_value_heads = config.num_key_value_heads or heads
    head_dim = config.head_dim or width // heads
    queries, keys = heads * head_dim, key_value_heads * head_dim
    return Architecture(
        name="llama",
        layers=config.num_hidden_layers,
        width=width,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        blocks="model.layers",
        maps=(
            LinearMap("self_attn.q_proj", width, queries, routed=False),
            LinearMap("self_attn.k_proj", width, keys, routed=False),
            LinearMap("self_attn.v_proj", width, keys, routed=False),
            LinearMap("self_attn.o_proj", queries, width, routed=False),
            LinearMap("mlp.gate_proj", width, inner, routed=True),
            LinearMap("mlp.up_proj", width, inner, routed=True),
            LinearMap("mlp.down_proj", inner, width, routed=True),
        ),
    )
