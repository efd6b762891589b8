"""ONNX Runtime GenAI on the graph that its model builder would write, which knows no GPT-2."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.child import Commands
from benchmarks.peers.common import config, greedy, main

SETTINGS = (
    "Generator, greedy, past_present_share_buffer; graph of fused operators (gpt2_onnx.py); int8 "
    "and int4: MatMulNBits, blocks of 32, accuracy_level=4; denormal numbers as zeros"
)


def convert(model: Path, out: Path, weights: str) -> None:
    import onnx

    from benchmarks.peers.gpt2_onnx import build, in_blocks

    graph = build(model)
    bits = {"int8": 8, "int4": 4}.get(weights)
    onnx.save(in_blocks(graph, bits) if bits else graph, out / "model.onnx")
    sizes = config(model)
    cache = {
        f"{kind}_{part}_names": f"{name}.%d.{part}"
        for kind, name in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    described = {
        "model": {
            "type": "llama",  # a decoder with a key-value cache; GPT-2's own type packs it
            "vocab_size": sizes["vocab_size"],
            "context_length": sizes["n_positions"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "decoder": {
                "filename": "model.onnx",
                "hidden_size": sizes["n_embd"],
                "head_size": sizes["n_embd"] // sizes["n_head"],
                "num_attention_heads": sizes["n_head"],
                "num_key_value_heads": sizes["n_head"],
                "num_hidden_layers": sizes["n_layer"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    **{k: v for k, v in cache.items() if k.startswith("past")},
                },
                "outputs": {
                    "logits": "logits",
                    **{k: v for k, v in cache.items() if k.startswith("present")},
                },
            },
        },
        "search": {"max_length": sizes["n_positions"], "past_present_share_buffer": True},
    }
    (out / "genai_config.json").write_text(json.dumps(described, indent=2))


def load(path: Path, weights: str, threads: int, context: int) -> Commands:
    import onnxruntime_genai as genai

    # Threads are a session option, which the model's configuration holds.
    file = path / "genai_config.json"
    described = json.loads(file.read_text())
    described["model"]["decoder"]["session_options"] = {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "session.set_denormal_as_zero": "1",
    }
    file.write_text(json.dumps(described, indent=2))
    model = genai.Model(str(path))
    options = genai.GeneratorParams(model)
    options.set_search_options(
        max_length=context, past_present_share_buffer=True, do_sample=False, batch_size=1
    )
    generator = genai.Generator(model, options)
    fed = 0

    def step(tokens: list[int]) -> int:
        nonlocal fed
        # It has appended the token that it chose by itself.
        if fed == 0:
            generator.append_tokens(tokens)
        fed += 1
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])

    def reset() -> None:
        nonlocal fed
        fed = 0
        generator.rewind_to(0)

    return greedy(step, reset, described["model"]["vocab_size"])


if __name__ == "__main__":
    main("onnxruntime-genai", SETTINGS, convert, load)
