"""llama.cpp through the C interface that llama-cpp-python brings: no sampler, no tokenizer."""

from __future__ import annotations

import ctypes
from pathlib import Path

from benchmarks.child import Commands
from benchmarks.peers.common import config, greedy, main

SETTINGS = "llama_decode; GGUF F32, Q8_0, Q4_0, the tied head included; built from source"
# transformers' name of a block's part -> GGUF's.
BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NORMS = ("ln_1", "ln_2")


def convert(model: Path, out: Path, weights: str) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from safetensors.numpy import load_file

    kind = {"float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}[weights]
    large = GGMLQuantizationType[kind]
    sizes, tensors = config(model), load_file(model / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    writer = GGUFWriter(out / "model.gguf", "gpt2")
    writer.add_block_count(sizes["n_layer"])
    writer.add_context_length(sizes["n_positions"])
    writer.add_embedding_length(sizes["n_embd"])
    writer.add_feed_forward_length(4 * sizes["n_embd"])
    writer.add_head_count(sizes["n_head"])
    writer.add_layer_norm_eps(sizes["layer_norm_epsilon"])
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, value: np.ndarray, dtype: GGMLQuantizationType) -> None:
        value = np.ascontiguousarray(value, np.float32)
        writer.add_tensor(name, quants.quantize(value, dtype), raw_dtype=dtype)

    plain = GGMLQuantizationType.F32
    add("token_embd.weight", tensors["wte.weight"], large)
    add("position_embd.weight", tensors["wpe.weight"], plain)
    for part in ("weight", "bias"):
        add(f"output_norm.{part}", tensors[f"ln_f.{part}"], plain)
    for layer in range(sizes["n_layer"]):
        for theirs, ours in BLOCK.items():
            matrix = tensors[f"h.{layer}.{theirs}.weight"].T
            add(f"blk.{layer}.{ours}.weight", matrix, plain if theirs in NORMS else large)
            add(f"blk.{layer}.{ours}.bias", tensors[f"h.{layer}.{theirs}.bias"], plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path, weights: str, threads: int, context: int) -> Commands:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model_options = llama_cpp.llama_model_default_params()
    model_options.n_gpu_layers = 0
    file = str(path / "model.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(file, model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = context
    options.n_threads = options.n_threads_batch = threads
    state = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(state, batch):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(state, -1)
        address = ctypes.cast(logits, ctypes.c_void_p).value
        buffer = (ctypes.c_float * vocabulary).from_address(address or 0)
        return int(np.frombuffer(buffer, np.float32).argmax())

    def reset() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)

    return greedy(step, reset, vocabulary)


if __name__ == "__main__":
    main("llama-cpp-python", SETTINGS, convert, load)
