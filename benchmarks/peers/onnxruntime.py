"""ONNX Runtime on a graph of its fused operators, cache written in place, all by address."""

from __future__ import annotations

from pathlib import Path

from benchmarks.child import Commands
from benchmarks.peers.common import greedy, main

SETTINGS = (
    "graph of fused operators (gpt2_onnx.py), I/O binding, cache in place; int8: quantize_dynamic "
    "per channel; int4: MatMulNBits, blocks of 32, accuracy_level=4; denormal numbers as zeros"
)


def convert(model: Path, out: Path, weights: str) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from benchmarks.peers.gpt2_onnx import build, in_blocks

    file = out / "model.onnx"
    graph = build(model)
    onnx.save(in_blocks(graph, 4) if weights == "int4" else graph, file)
    if weights == "int8":
        quantize_dynamic(
            file,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of the fused operators
        )


def load(path: Path, weights: str, threads: int, context: int) -> Commands:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    file = str(path / "model.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    shapes = {port.name: port.shape for port in session.get_inputs()}
    vocabulary = session.get_outputs()[0].shape[2]
    caches = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((1, shape[1], context, shape[3]), np.float32)
        )
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    filled = 0

    def step(tokens: list[int]) -> int:
        nonlocal filled
        binding = session.io_binding()
        after = filled + len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens]))
        binding.bind_cpu_input("attention_mask", np.ones((1, after), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(filled, after)[None])
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        filled = after
        logits = next(v for v in binding.get_outputs() if v.shape()[-1] == vocabulary)
        return int(logits.numpy().argmax())

    def reset() -> None:
        nonlocal filled
        filled = 0

    return greedy(step, reset, vocabulary)


if __name__ == "__main__":
    main("onnxruntime", SETTINGS, convert, load)
