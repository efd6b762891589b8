"""GPT-2 as an ONNX graph of ONNX Runtime's fused operators, as its own model builder writes them.

Embedding, `SkipLayerNormalization`, one product for queries, keys and values,
`GroupQueryAttention` over a cache that is written in place, `FastGelu`; logits of the last token.
Inputs are those that ONNX Runtime GenAI gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from benchmarks.peers.common import config

MICROSOFT = "com.microsoft"


def build(model: Path) -> onnx.ModelProto:
    """The float32 graph of a GPT-2 that transformers saved."""
    sizes, tensors = config(model), load_file(model / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    heads, layers, epsilon = sizes["n_head"], sizes["n_layer"], sizes["layer_norm_epsilon"]
    head_dim = sizes["n_embd"] // heads
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(key: str) -> str:
        return constant(key, tensors[key])

    def node(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        domain = MICROSOFT if kind in FUSED else ""
        nodes.append(helper.make_node(kind, inputs, list(outputs), domain=domain, **attributes))
        return outputs[0]

    def linear(x: str, key: str) -> str:
        product = node("MatMul", [x, weight(f"{key}.weight")], f"{key}.product")
        return node("Add", [product, weight(f"{key}.bias")], f"{key}.out")

    def add_and_norm(x: str, delta: str, key: str) -> tuple[str, str]:
        normed, total = f"{key}.normed", f"{key}.sum"
        inputs = [x, delta, weight(f"{key}.weight"), weight(f"{key}.bias")]
        node("SkipLayerNormalization", inputs, normed, "", "", total, epsilon=epsilon)
        return normed, total

    one = constant("one", np.array([1], np.int64))
    total = node("ReduceSum", ["attention_mask", one], "filled", keepdims=0)
    last = node("Sub", [total, constant("one.scalar", np.array(1, np.int64))], "filled.last")
    lengths = node("Cast", [last], "lengths", to=TensorProto.INT32)
    shape = node("Shape", ["attention_mask"], "mask.shape", start=1, end=2)
    squeezed = node("Squeeze", [shape, constant("zero", np.array([0], np.int64))], "mask.length")
    length = node("Cast", [squeezed], "total.length", to=TensorProto.INT32)
    x = node("Gather", [weight("wte.weight"), "input_ids"], "tokens")
    delta = node("Gather", [weight("wpe.weight"), "position_ids"], "positions")
    for layer in range(layers):
        block = f"h.{layer}"
        normed, x = add_and_norm(x, delta, f"{block}.ln_1")
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        qkv = linear(normed, f"{block}.attn.c_attn")
        attended = node(
            "GroupQueryAttention",
            [qkv, "", "", *past, lengths, length],
            f"{block}.attended",
            *present,
            num_heads=heads,
            kv_num_heads=heads,
            do_rotary=0,
        )
        delta = linear(attended, f"{block}.attn.c_proj")
        normed, x = add_and_norm(x, delta, f"{block}.ln_2")
        inner = node("FastGelu", [linear(normed, f"{block}.mlp.c_fc")], f"{block}.inner")
        delta = linear(inner, f"{block}.mlp.c_proj")
    normed, _ = add_and_norm(x, delta, "ln_f")
    ends = [constant("minus.one", np.array([-1], np.int64)), constant("end", np.array([2**31]))]
    final = node("Slice", [normed, *ends, one], "final")
    node("MatMul", [final, constant("head", tensors["wte.weight"].T)], "logits")

    def value(name: str, dtype: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, dtype, list(shape))

    def cache(kind: str) -> list[Any]:
        return [
            value(
                f"{kind}.{layer}.{part}", TensorProto.FLOAT, "B", heads, f"{kind}.length", head_dim
            )
            for layer in range(layers)
            for part in ("key", "value")
        ]

    graph = helper.make_graph(
        nodes,
        "gpt2",
        [
            value("input_ids", TensorProto.INT64, "B", "T"),
            value("attention_mask", TensorProto.INT64, "B", "S"),
            value("position_ids", TensorProto.INT64, "B", "T"),
            *cache("past_key_values"),
        ],
        [value("logits", TensorProto.FLOAT, "B", 1, sizes["vocab_size"]), *cache("present")],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


FUSED = ("FastGelu", "GroupQueryAttention", "SkipLayerNormalization")


def in_blocks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """The same with every product's weights in blocks of 32, activations in int8."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made
