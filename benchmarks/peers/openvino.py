"""OpenVINO's CPU plug-in: a stateful model with fused attention, weights compressed by NNCF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.child import Commands
from benchmarks.peers.common import greedy, main

SETTINGS = (
    "stateful key-value cache, PERFORMANCE_HINT=LATENCY, NUM_STREAMS=1; NNCF INT8_SYM, and "
    "INT4_SYM in groups of 64 for all layers; the plug-in's default of an 8-bit cache"
)


def convert(model: Path, out: Path, weights: str) -> None:
    import nncf
    import openvino
    import torch
    import torch.nn.functional as F
    from openvino._offline_transformations import apply_make_stateful_transformation
    from torch import Tensor, nn
    from transformers import GPT2LMHeadModel

    source = GPT2LMHeadModel.from_pretrained(model)
    layers, heads = source.config.n_layer, source.config.n_head
    head_dim = source.config.n_embd // heads

    class Stateful(nn.Module):
        """Attention as the plug-in recognises it: the cache picked by beam, then joined."""

        def __init__(self) -> None:
            super().__init__()
            self.source: Any = source

        def forward(
            self, ids: Tensor, positions: Tensor, mask: Tensor, beams: Tensor, *cache: Tensor
        ) -> tuple[Tensor, ...]:
            transformer = self.source.transformer
            x = transformer.wte(ids) + transformer.wpe(positions)
            batch, length, width = x.shape
            new = []
            for block, key, value in zip(transformer.h, cache[::2], cache[1::2], strict=True):
                parts = block.attn.c_attn(block.ln_1(x)).split(width, 2)
                q, k, v = (
                    part.view(batch, length, heads, head_dim).transpose(1, 2) for part in parts
                )
                k = torch.cat([key.index_select(0, beams), k], 2)
                v = torch.cat([value.index_select(0, beams), v], 2)
                new += [k, v]
                y = F.scaled_dot_product_attention(q, k, v, mask)
                x = x + block.attn.c_proj(y.transpose(1, 2).reshape(batch, length, width))
                x = x + block.mlp(block.ln_2(x))
            final = transformer.ln_f(x[:, -1:])
            return self.source.lm_head(final), *new

    past = 3
    cache = [torch.randn(1, heads, past, head_dim) for _ in range(2 * layers)]
    ids = torch.zeros(1, 5, dtype=torch.long)
    positions = torch.arange(past, past + 5)[None]
    mask = torch.zeros(1, 1, 5, past + 5)
    beams = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        converted = openvino.convert_model(
            Stateful().eval(), example_input=(ids, positions, mask, beams, *cache)
        )
    names = [f"cache.{i}" for i in range(2 * layers)]
    for port, name in zip(
        converted.inputs, ["ids", "positions", "mask", "beams", *names], strict=True
    ):
        port.get_tensor().set_names({name})
    for port, name in zip(converted.outputs, ["logits", *(f"new.{n}" for n in names)], strict=True):
        port.get_tensor().set_names({name})
    shapes = {
        "ids": [-1, -1],
        "positions": [-1, -1],
        "mask": [-1, 1, -1, -1],
        "beams": [-1],
        **{name: [-1, heads, -1, head_dim] for name in names},
    }
    converted.reshape(
        {port: openvino.PartialShape(shapes[port.get_any_name()]) for port in converted.inputs}
    )
    apply_make_stateful_transformation(converted, {name: f"new.{name}" for name in names})
    if weights == "int8":
        converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
    elif weights == "int4":
        converted = nncf.compress_weights(
            converted,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=64,
            ratio=1.0,
            all_layers=True,
        )
    openvino.save_model(converted, out / "model.xml", compress_to_fp16=False)


def load(path: Path, weights: str, threads: int, context: int) -> Commands:
    import numpy as np
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path / "model.xml", "CPU", options)
    request = compiled.create_infer_request()
    vocabulary = compiled.output("logits").get_partial_shape()[2].get_length()
    beams = np.zeros(1, np.int64)
    filled = 0

    def step(tokens: list[int]) -> int:
        nonlocal filled
        length, after = len(tokens), filled + len(tokens)
        mask = np.triu(np.full((length, after), -1e9, np.float32), filled + 1)[None, None]
        inputs = {
            "ids": np.array([tokens]),
            "positions": np.arange(filled, after)[None],
            "mask": mask,
            "beams": beams,
        }
        results = request.infer(inputs, share_inputs=True, share_outputs=True)
        filled = after
        return int(results["logits"].argmax())

    def reset() -> None:
        nonlocal filled
        filled = 0
        request.reset_state()

    return greedy(step, reset, vocabulary)


if __name__ == "__main__":
    main("openvino", SETTINGS, convert, load)
