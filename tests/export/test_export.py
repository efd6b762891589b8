"""What `comigs export` writes, what it refuses, and that others can read it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.lowered_backend_module import LoweredBackendModule
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TIER, ExportTiny
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from edge_runtime import adapters, planner
from edge_runtime.adapters import ADAPTER_CONFIG, Stacks
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.engines import _OnnxProgram, allocate, load_engine
from edge_runtime.errors import AdapterError, BaseModelError, BundleError, ParityError, StorageError
from edge_runtime.predict import Predictor
from edge_runtime.training import Evaluator
from export import architecture, mixture, onnx_engine, onnx_graph, parity
from export.base import BUILT_IN, load_base
from export.bundle import export_bundle
from export.flat_graph import flat_graph
from export.gpt2 import GPT2
from export.llama import Llama
from export.mixture import Mixture
from export.onnx_engine import INLINE_BYTES
from export.programs import Specification, specifications
from export.tiers import tiers
from protos import manifest_pb2 as pb

ONE_PROGRAM = ("eval_loss",)


def comigs(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as one gets it; wide enough that no message is broken into lines."""
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


# --- the manifest ------------------------------------------------------------------------------


def test_every_file_is_listed_with_its_size_and_hash(tiny_bundle: Bundle) -> None:
    on_disk = {
        path.relative_to(tiny_bundle.path).as_posix()
        for path in tiny_bundle.path.rglob("*")
        if path.is_file()
    }
    listed = {file.path: file for file in tiny_bundle.manifest.files}
    assert set(listed) == on_disk - {"manifest.json"}
    for path, file in listed.items():
        content = (tiny_bundle.path / path).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for program in tiny_bundle.manifest.programs:
        assert {program.file, *program.data_files} <= set(listed)
    assert not tiny_bundle.path.with_name("bundle.partial").exists()


def test_whoever_may_read_the_manifest_may_read_every_file(tiny_bundle: Bundle) -> None:
    modes = {path.stat().st_mode for path in tiny_bundle.path.rglob("*") if path.is_file()}
    assert modes == {(tiny_bundle.path / "manifest.json").stat().st_mode}


@pytest.mark.parametrize("specialists", [0, 1])
def test_slices_tile_the_vectors(export_tiny: ExportTiny, specialists: int) -> None:
    manifest = export_tiny(Mixture(rank=4, specialists=specialists)).manifest
    names = [role.name for role in manifest.roles]
    assert names == ["generalist", "specialist.1", "router"][: 1 + 2 * specialists]
    assert [role.name for role in manifest.roles if role.shared] == ["generalist"]
    for role in manifest.roles:
        end = 0
        for tensor in (t for t in manifest.tensors if t.role == role.name):
            assert tensor.offset == end, tensor.name
            assert tensor.dtype == "float32"
            end += math.prod(tensor.shape)
        assert end == role.size
    assert {t.role for t in manifest.tensors} == set(names)


def test_programs_say_what_they_take_give_and_need(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert [p.name for p in manifest.programs] == [
        *("train_step.b1", "router_step.b1", "train_step.b2", "router_step.b2"),
        *("train_step.b1.recompute", "router_step.b1.recompute", "eval_loss", "prefill", "decode"),
    ]
    tensors = {t.name: (t.dtype, tuple(t.shape)) for t in manifest.tensors}
    for program in manifest.programs:
        inputs = {port.name: (port.dtype, tuple(port.shape)) for port in program.inputs}
        wanted = set(tensors.items())
        if program.name in ("prefill", "decode"):
            wanted = {item for item in wanted if item[0].startswith("router/")} | {
                (name, ("float32", array.shape)) for name, array in Stacks(manifest).arrays.items()
            }
        assert {item for item in inputs.items() if "/" in item[0]} == wanted
        assert inputs["tokens"][0] == "int64"
        assert 0 < program.memory_bytes < 2**30
        assert program.parity.outputs == len(program.outputs)
        assert 0 <= program.parity.worst_relative_error <= program.parity.tolerance == 1e-4
        assert program.parity.worst_output in [port.name for port in program.outputs]
        if program.name.startswith(("train_step", "router_step")):
            gradients = {
                port.name.removeprefix("grad:"): (port.dtype, tuple(port.shape))
                for port in program.outputs
                if port.name.startswith("grad:")
            }
            part = "router/" if program.name.startswith("router_step") else ""
            assert gradients == {n: v for n, v in tensors.items() if n.startswith(part)}
    (cost,) = manifest.engines
    files = {f for p in manifest.programs for f in (p.file, *p.data_files)}
    assert cost.disk_bytes == sum((tiny_bundle.path / f).stat().st_size for f in files)
    assert cost.runtime_bytes > 2**20


def test_a_routers_step_computes_and_keeps_nothing_for_the_experts(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """On ONNX Runtime it is part of the training step: no file and no memory of its own."""
    for variant in ("b1", "b2", "b1.recompute"):
        whole, part = (
            tiny_bundle.program(f"{kind}.{variant}", "onnxruntime")
            for kind in ("train_step", "router_step")
        )
        assert (part.file, part.memory_bytes) == (whole.file, whole.memory_bytes)
        assert products_run(tiny_bundle, part, tmp_path) <= products_run(
            tiny_bundle, whole, tmp_path
        ) - sum("lora" in port.name for port in whole.outputs)


def products_run(bundle: Bundle, program: pb.Program, folder: Path) -> int:
    """How many products one run of a program takes, as ONNX Runtime's profiler saw it."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(bundle.path / program.file), options)
    inputs, outputs = allocate(program.inputs), allocate(program.outputs)
    _OnnxProgram(program, session).bind(inputs, outputs)()
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")]
    return sum(kind in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul") for kind in kernels)


def copy_tokenizer(base: Path, to: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, to)


def test_the_base_is_stored_once_for_all_programs(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Wide enough that the exporter does not fold transposed copies, as with any real base."""
    wide = tmp_path / "wide"
    config = GPT2Config(vocab_size=4096, n_positions=32, n_embd=128, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(wide)
    copy_tokenizer(tiny_base_dir, wide)
    base = load_base(str(wide))
    bundle = export_bundle(
        base,
        Mixture(rank=4),
        replace(TIER, micro_batches=(1,)),
        engines=("onnxruntime",),
        out=tmp_path / "bundle",
        programs=("train_step", "decode"),
    )
    weights = (bundle.path / "onnx" / "weights.bin").read_bytes()
    assert len(weights) <= 1.15 * 4 * base.parameters
    used: list[set[bytes]] = []
    for program in bundle.manifest.programs:
        used.append(set())
        model = onnx.load(bundle.path / program.file, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                start, length = int(place["offset"]), int(place["length"])
                used[-1].add(weights[start : start + length])
            else:
                assert len(tensor.raw_data) <= INLINE_BYTES
    assert len(used) == 3
    for key, value in base.tensors.items():
        # Of the positions the programs use a part; queries, keys and values are stored apart.
        if value.ndim == 2 and key not in ("wpe.weight", "h.0.attn.c_attn.weight"):
            content = value.numpy().tobytes()
            assert all(content in program for program in used), key
            assert weights.count(content) == 1, key
            assert np.ascontiguousarray(value.numpy().T).tobytes() not in weights, key


def test_the_same_arguments_give_the_same_bundle(
    tiny_base_dir: Path, tmp_path: Path, export_tiny: ExportTiny
) -> None:
    """So that devices may compile for themselves: hashes of programs and adapters agree."""
    one = export_tiny(Mixture(rank=4), programs=ONE_PROGRAM)
    base = load_base(str(tiny_base_dir))
    again, other = (
        export_bundle(
            base,
            Mixture(rank=4),
            TIER,
            engines=("onnxruntime",),
            out=tmp_path / f"seed{seed}",
            seed=seed,
            programs=ONE_PROGRAM,
        )
        for seed in (0, 1)
    )
    hashes = [{f.path: f.sha256 for f in b.manifest.files} for b in (one, again, other)]
    assert hashes[0] == hashes[1]
    assert {path for path in hashes[0] if hashes[0][path] != hashes[2][path]} == {
        "adapters/generalist/adapter_model.safetensors",
        "adapters/specialist.1/adapter_model.safetensors",
        "adapters/router.safetensors",
    }


# --- the parity gate ---------------------------------------------------------------------------


def scaled_gradient(translate: Any, factor: float) -> Any:
    """`translate` with a defect that exporters have had: a gradient `factor` times too large."""

    def defective(*arguments: Any, **options: Any) -> Any:
        (model,) = translate(*arguments, **options)
        victim = next(o.name for o in model.graph.output if "mlp.c_fc.lora_B" in o.name)
        for node in model.graph.node:
            node.output[:] = ["right" if name == victim else name for name in node.output]
        value = np.array(factor, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, "factor"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["right", "factor"], [victim]))
        return [model]

    return defective


@pytest.mark.parametrize("factor", [128.0, 1.001, math.nan])
def test_a_wrong_gradient_is_not_written(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(onnx_engine, "translate", scaled_gradient(onnx_engine.translate, factor))
    out = tmp_path / "bundle"
    with pytest.raises(ParityError, match=r"grad:.*mlp\.c_fc\.lora_B.*nothing was written"):
        export_bundle(
            load_base(str(tiny_base_dir)),
            Mixture(rank=4, targets=("mlp.c_fc",)),
            replace(TIER, micro_batches=(1,)),
            engines=("onnxruntime",),
            out=out,
            programs=("train_step",),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_gate_compares_with_the_program_that_was_meant(
    tiny_bundle: Bundle, tiny_base_dir: Path
) -> None:
    """A bundle of mixing per linear map is not one of whole blocks, or of another scale."""
    engine = load_engine("onnxruntime", threads=1)
    base = load_base(str(tiny_base_dir))
    manifest = tiny_bundle.manifest

    def check(meant: Mixture) -> None:
        decoder = GPT2(base, meant, 32)
        for specification in specifications(decoder, manifest, TIER, engine.name):
            example = parity.example_arguments(specification, manifest, 3)
            parity.check(specification, example, tiny_bundle, engine)

    check(Mixture(rank=4))
    for other in (
        Mixture(rank=4, mixing="per_block"),
        Mixture(rank=4, alpha=16.01),
        Mixture(rank=4, balance_weight=0.02),
    ):
        if other.balance_weight != 0.01:  # with two experts it is a constant in the loss
            with pytest.raises(ParityError, match="loss"):
                check(other)
        else:
            with pytest.raises(ParityError, match="disagrees with PyTorch"):
                check(other)


def test_noise_is_told_of_every_program(tiny_bundle: Bundle, tiny_base_dir: Path) -> None:
    """What float32 leaves uncertain, by float64: bases of large activations need it."""
    decoder = GPT2(load_base(str(tiny_base_dir)), Mixture(rank=4), 32)
    for specification in specifications(decoder, tiny_bundle.manifest, TIER, "onnxruntime"):
        example = parity.example_arguments(specification, tiny_bundle.manifest, 3)
        results = parity._called(specification, example)
        noise = parity._float32_noise(specification, example, results)
        assert noise.keys() == results.keys()
        assert 0 < max(noise.values()) < 1e-4


def test_the_gates_adapters_leave_no_tensor_without_effect(tiny_bundle: Bundle) -> None:
    for vector in mixture.random(tiny_bundle.manifest, 0).values():
        assert (vector != 0).all()


def test_nothing_is_deleted_but_bundles(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    partial = tmp_path / "bundle.partial"

    def export(**more: Any) -> Bundle:
        return export_bundle(
            load_base(str(tiny_base_dir)),
            Mixture(rank=4),
            TIER,
            engines=("onnxruntime",),
            programs=ONE_PROGRAM,
            **{"out": out, **more},
        )

    def precious(directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        (directory / "precious").write_text("mine")
        return directory / "precious"

    with monkeypatch.context() as patch:  # what is refused is refused before anything is compiled
        patch.setattr(onnx_engine, "translate", _broken)
        kept = precious(out)
        with pytest.raises(StorageError, match=r"bundle exists.*--overwrite"):
            export()
        with pytest.raises(StorageError, match=r"bundle is no bundle.*would be deleted.*--out"):
            export(overwrite=True)
        assert kept.read_text() == "mine"
        (out / "manifest.json").write_text('{"name": "a web page"}')
        with pytest.raises(StorageError, match=r"bundle is no bundle"):
            export(overwrite=True)
        (out / "manifest.json").unlink()
        kept.unlink()
        out.rmdir()
        out.write_text("mine")
        with pytest.raises(StorageError, match=r"bundle is no bundle"):
            export(overwrite=True)
        assert out.read_text() == "mine"
        out.unlink()
        kept = precious(tmp_path / "bundle.old")
        with pytest.raises(StorageError, match=r"bundle\.old is no bundle"):
            export()
        assert kept.read_text() == "mine"
        kept.unlink()
        kept = precious(partial)
        with pytest.raises(StorageError, match=r"bundle\.partial is no bundle"):
            export()
        assert kept.read_text() == "mine"
        if Path("/proc").is_mount():
            with pytest.raises(StorageError, match="mounted at /proc"):
                export(out=Path("/proc"), overwrite=True)
    kept.unlink()
    # What a killed export left goes, and an empty directory.
    (partial / "tokenizer.json").write_text("{}")
    out.mkdir()
    export(overwrite=True)
    # What somebody put there is not deleted with it.
    kept = precious(out)
    with pytest.raises(StorageError, match=r"bundle/precious is no part of a bundle.*move it"):
        export(overwrite=True)
    kept.unlink()
    before = (out / "manifest.json").read_text()
    # A failure while overwriting leaves the old one, too.
    with monkeypatch.context() as patch:
        patch.setattr(onnx_engine, "translate", _broken)
        with pytest.raises(RuntimeError, match="exporter"):
            export(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / "manifest.json").read_text() == before
    bundle = export(overwrite=True)
    assert open_bundle(out).manifest == bundle.manifest
    # Behind a link it is the bundle that is replaced.
    made = (out / "manifest.json").stat().st_ino
    out = tmp_path / "link"
    out.symlink_to("bundle")
    export(overwrite=True)
    assert out.is_symlink()
    assert (tmp_path / "bundle" / "manifest.json").stat().st_ino != made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "link"]


def _broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the exporter is broken")


# --- mixtures ----------------------------------------------------------------------------------


def test_whole_blocks_with_another_rank_and_some_targets(export_tiny: ExportTiny) -> None:
    meant = Mixture(mixing="per_block", rank=16, targets=("attn.c_attn", "mlp.c_proj"))
    bundle = export_tiny(meant, programs=ONE_PROGRAM)
    manifest = bundle.manifest
    assert manifest.mixture.mixing == "per_block"
    assert manifest.mixture.rank == 16
    assert list(manifest.mixture.targets) == ["attn.c_attn", "mlp.c_proj"]
    by_role = {
        role: {t.name.split("/")[1].split(".", 3)[3] for t in manifest.tensors if t.role == role}
        for role in ("generalist", "specialist.1", "router")
    }
    assert by_role == {
        "generalist": {
            f"{module}.lora_{side}.weight"
            for module in ("attn.c_attn", "mlp.c_proj")
            for side in "AB"
        },
        "specialist.1": {"mlp.c_proj.lora_A.weight", "mlp.c_proj.lora_B.weight"},
        "router": {"mlp.router.weight"},
    }
    shapes = {t.name: tuple(t.shape) for t in manifest.tensors}
    assert shapes["generalist/transformer.h.1.attn.c_attn.lora_A.weight"] == (16, 32)
    assert shapes["generalist/transformer.h.1.attn.c_attn.lora_B.weight"] == (96, 16)
    assert shapes["specialist.1/transformer.h.0.mlp.c_proj.lora_A.weight"] == (16, 128)
    tokens = np.arange(50) % 200
    engine = load_engine("onnxruntime", threads=1)
    fresh, other = (
        Evaluator(bundle, engine, vectors).loss(tokens)
        for vectors in (adapters.load_fresh(bundle), mixture.random(manifest, 1))
    )
    assert abs(fresh - other) > 1e-3


@pytest.mark.parametrize(
    "values",
    [
        {"mixing": "per_head"},
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": 1e-7},
        {"alpha": 1e7},
        {"alpha": float("nan")},
        {"specialists": -1},
        {"targets": ("mlp.c_fc", "lm_head")},
        {"targets": ("mlp.gate_proj",)},  # of another family
        {"targets": ("attn.c_attn",)},  # leaves a specialist nothing
    ],
)
def test_mixtures_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|choose|need"):
        Mixture(**values).on(architecture.gpt2(GPT2Config()))


# --- PEFT --------------------------------------------------------------------------------------


def test_fresh_experts_open_in_peft(tiny_bundle: Bundle, tiny_base_dir: Path) -> None:
    named = adapters.views(tiny_bundle.manifest, adapters.load_fresh(tiny_bundle))
    for role in ("generalist", "specialist.1"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns about tensors it misses
            model = PeftModel.from_pretrained(
                GPT2LMHeadModel.from_pretrained(tiny_base_dir),
                tiny_bundle.path / "adapters" / role,
            )
        loaded = {
            key.removeprefix("base_model.model.").replace(".default.", "."): value
            for key, value in model.state_dict().items()
            if ".lora_" in key
        }
        ours = {n.split("/")[1]: view for n, view in named.items() if n.startswith(f"{role}/")}
        assert loaded.keys() == ours.keys()
        for key, value in loaded.items():
            np.testing.assert_array_equal(value.numpy(), ours[key])


def test_a_trained_expert_means_the_same_to_peft(
    export_tiny: ExportTiny, tiny_base_dir: Path, tmp_path: Path
) -> None:
    bundle = export_tiny(Mixture(rank=4, specialists=0))
    vectors = mixture.random(bundle.manifest, 8)
    adapters.save_directory(bundle.manifest, vectors, tmp_path)
    base = GPT2LMHeadModel.from_pretrained(tiny_base_dir)
    text = np.random.default_rng(0).integers(0, 256, 2 * TIER.train_length)
    with torch.no_grad():
        bare = base(torch.from_numpy(text)[None]).logits[0]
        model = PeftModel.from_pretrained(base, tmp_path / "adapters" / "generalist").eval()
        want = model(torch.from_numpy(text)[None]).logits[0]
        window = torch.from_numpy(text[: TIER.train_length + 1])
        losses = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:])
    assert (want - bare).abs().max() > 0.05
    engine = load_engine("onnxruntime", threads=1)
    ours = Predictor(bundle, engine, vectors)
    for length in (1, 5, 20, len(text)):
        np.testing.assert_allclose(
            ours.logits(text[:length].tolist()), want[length - 1].numpy(), atol=1e-4
        )
    loss = Evaluator(bundle, engine, vectors).loss(text, most_tokens=TIER.train_length)
    assert loss == pytest.approx(losses.item(), rel=1e-5)


def test_an_expert_of_a_llama_means_the_same_to_peft(
    export_tiny: ExportTiny, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    bundle = export_tiny(Mixture(rank=4, specialists=0), base=tiny_llama_dir)
    vectors = mixture.random(bundle.manifest, 8)
    adapters.save_directory(bundle.manifest, vectors, tmp_path)
    base = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    text = np.random.default_rng(0).integers(0, 256, 30)
    with torch.no_grad():
        bare = base(torch.from_numpy(text)[None]).logits[0]
        model = PeftModel.from_pretrained(base, tmp_path / "adapters" / "generalist").eval()
        want = model(torch.from_numpy(text)[None]).logits[0]
    assert (want - bare).abs().max() > 0.05
    ours = Predictor(bundle, load_engine("onnxruntime", threads=1), vectors)
    for length in (1, 5, 9, 20, len(text)):  # each goes on from the cache of the last
        np.testing.assert_allclose(
            ours.logits(text[:length].tolist()), want[length - 1].numpy(), atol=1e-4
        )


def test_a_step_that_computes_activations_twice_needs_less_memory(
    tiny_base_dir: Path, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=256, n_positions=128, n_embd=128, n_layer=6, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    copy_tokenizer(tiny_base_dir, tmp_path / "base")
    bundle = export_bundle(
        load_base(str(tmp_path / "base")),
        Mixture(rank=4),
        replace(TIER, micro_batches=(4,), train_length=128, context=64),
        engines=("onnxruntime",),
        out=tmp_path / "bundle",
        programs=("train_step", "eval_loss"),
    )
    plain, recomputed = (
        bundle.program(name, "onnxruntime").memory_bytes
        for name in ("train_step.b4", "train_step.b4.recompute")
    )
    assert recomputed < 0.85 * plain  # weights and logits are in both
    fastest, *_, leanest = planner.plans(bundle, "onnxruntime", 8)
    assert (fastest.recompute, fastest.packed) == (False, True)
    assert leanest.recompute
    chosen = planner.choose(bundle, "onnxruntime", 8, leanest.total_bytes)
    assert chosen == leanest
    # With a coordinator that lets updates be compressed.
    shared = sum(role.size for role in bundle.manifest.roles if role.shared)
    in_rounds = planner.plans(bundle, "onnxruntime", 8, shared_bytes=planner.for_rounds())
    assert in_rounds[0].total_bytes == fastest.total_bytes + 28 * shared


@pytest.mark.parametrize("head_dim", [10, 24])
def test_heads_that_onnxruntime_cannot_attend_to_in_place(
    tiny_llama_dir: Path, tmp_path: Path, head_dim: int
) -> None:
    config = LlamaConfig.from_pretrained(tiny_llama_dir, head_dim=head_dim)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    copy_tokenizer(tiny_llama_dir, tmp_path / "base")
    bundle = export_bundle(
        load_base(str(tmp_path / "base")),
        Mixture(rank=4),
        TIER,
        engines=("onnxruntime",),
        out=tmp_path / "bundle",
        programs=("prefill", "decode"),
    )
    ours = Predictor(bundle, load_engine("onnxruntime", threads=1), adapters.load_fresh(bundle))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    text = np.random.default_rng(0).integers(0, 256, 30)
    with torch.no_grad():
        want = model(torch.from_numpy(text)[None]).logits[0].numpy()
    for length in (1, 5, 21, 22, len(text)):
        got = ours.logits(text[:length].tolist())
        np.testing.assert_allclose(got, want[length - 1], atol=1e-4)


@pytest.mark.parametrize("use_rslora", [True, False])
def test_an_adapter_trained_with_peft_is_the_generalist(
    tiny_base_dir: Path, tmp_path: Path, use_rslora: bool
) -> None:
    targets = ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=use_rslora, target_modules=targets, fan_in_fan_out=True
    )
    torch.manual_seed(0)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base_dir), config)
    text = torch.randint(256, (2, 20))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path / "trained")
    out = tmp_path / "bundle"
    done = comigs(
        *("export", "--base", tiny_base_dir, "--tier", "phone-low", "--engine", "onnxruntime"),
        *("--specialists", 0, "--rank", 4, "--alpha", 16, "--targets", ",".join(targets)),
        *("--generalist", tmp_path / "trained", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(out)
    ours = Predictor(bundle, load_engine("onnxruntime", threads=1), adapters.load_fresh(bundle))
    with torch.no_grad():
        want = model(text[:1]).logits[0, -1]
        with model.disable_adapter():
            bare = model(text[:1]).logits[0, -1]
    assert (want - bare).abs().max() > 0.05
    np.testing.assert_allclose(ours.logits(text[0].tolist()), want.numpy(), atol=1e-4)


def test_adapters_of_peft_that_do_not_fit(
    tiny_bundle: Bundle, tmp_path: Path, tiny_base_dir: Path
) -> None:
    def saved(name: str, **options: Any) -> Path:
        base = GPT2LMHeadModel.from_pretrained(tiny_base_dir)
        targets = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        options = {"r": 4, "target_modules": targets, "fan_in_fan_out": True} | options
        get_peft_model(base, LoraConfig(**options)).save_pretrained(tmp_path / name)
        return tmp_path / name

    def refused(path: Path, says: str) -> None:
        with pytest.raises(AdapterError, match=says) as error:
            adapters.load_peft(tiny_bundle.manifest, "generalist", path)
        assert "\n" not in str(error.value)

    adapters.load_peft(tiny_bundle.manifest, "generalist", saved("fits"))
    refused(saved("rank", r=2), r"rank 2, the bundle 4; export with --rank 2")
    refused(saved("dora", use_dora=True), "more than LoRA .use_dora")
    refused(saved("pattern", rank_pattern={"c_fc": 8}), "more than LoRA .rank_pattern")
    refused(saved("pissa", init_lora_weights="pissa"), "more than LoRA .init_lora_weights")
    shouted = saved("olora", init_lora_weights="olora") / ADAPTER_CONFIG
    shouted.write_text(shouted.read_text().replace("olora", "OLoRA"))  # which PEFT takes as well
    refused(shouted.parent, "more than LoRA .init_lora_weights")
    refused(saved("targets", target_modules=["mlp.c_fc"]), "adapter's targets")
    refused(tmp_path / "nowhere", "cannot read")
    broken = saved("broken")
    (broken / "adapter_config.json").write_text("{}")
    refused(broken, "not a LoRA configuration")
    wild = saved("wild") / "adapter_model.safetensors"
    tensors = load_file(wild)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, wild)
    refused(wild.parent, "holds a NaN")


# --- bases -------------------------------------------------------------------------------------


def test_a_directory_saved_by_transformers(tiny_base_dir: Path) -> None:
    base = load_base(str(tiny_base_dir))
    model = GPT2LMHeadModel.from_pretrained(tiny_base_dir)
    assert base.parameters == model.num_parameters()
    state = model.state_dict()
    for key, value in base.tensors.items():
        assert torch.equal(value, state[f"transformer.{key}"]), key
    assert base.tensors["h.0.attn.c_attn.weight"].shape == (32, 96)  # Conv1D: inputs first
    assert base.tokenizer.encode("Hé\n").ids == [*base.tokenizer.encode("Hé").ids, *newline(base)]
    assert base.sha256 == load_base(str(tiny_base_dir)).sha256


def newline(base: Any) -> list[int]:
    ids: list[int] = base.tokenizer.encode("\n").ids
    return ids


def test_a_half_precision_base_and_an_untied_head(tmp_path: Path, tiny_base_dir: Path) -> None:
    config = GPT2Config(
        vocab_size=256, n_positions=32, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    path = tmp_path / "half"
    GPT2LMHeadModel(config).half().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_base_dir / name).read_bytes())
    base = load_base(str(path))
    assert {tensor.dtype for tensor in base.tensors.values()} == {torch.float32}
    assert not torch.equal(base.tensors["lm_head.weight"], base.tensors["wte.weight"])
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32)
    text = torch.arange(20)[None]
    decoder = GPT2(base, Mixture(rank=2), 32)
    with torch.no_grad():
        hidden, _ = decoder.hidden(fresh_tensors(base), text)
        torch.testing.assert_close(hidden @ decoder.head().T, model(text).logits[0])


def test_a_head_of_its_own_though_the_configuration_ties_it(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """As of a checkpoint whose head was trained and whose configuration was left."""
    path = tmp_path / "base"
    config = LlamaConfig.from_pretrained(tiny_llama_dir, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    copy_tokenizer(tiny_llama_dir, path)
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    assert torch.equal(load_base(str(path)).tensors["lm_head.weight"], model.lm_head.weight)

    model.lm_head.weight.data[3, 4] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(BaseModelError, match=r"NaN or an infinity in lm_head\.weight"):
        load_base(str(path))
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="adapter beside the model"):
        load_base(str(path))


def test_text_is_cut_as_the_saved_tokenizer_says(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Of some classes transformers makes a tokenizer anew, and cuts as that class usually does."""
    path = tmp_path / "base"
    shutil.copytree(tiny_base_dir, path)
    saved = json.loads((path / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    del vocabulary[next(token for token, index in vocabulary.items() if index == 255)]
    vocabulary["12"] = 255
    saved["model"]["merges"] = [["1", "2"]]
    saved["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            saved["pre_tokenizer"],
        ],
    }
    (path / "tokenizer.json").write_text(json.dumps(saved))
    of_class = json.loads((path / "tokenizer_config.json").read_text())
    of_class |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "!")
    of_class["tokenizer_class"] = "GPT2Tokenizer"
    (path / "tokenizer_config.json").write_text(json.dumps(of_class))
    assert load_base(str(path)).tokenizer.encode("12").tokens == ["1", "2"]


def save_narrow_llama(vocabulary: int, path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)


@pytest.mark.parametrize("of_class", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", ""])
def test_a_saved_tokenizer_is_taken_as_it_is(tmp_path: Path, of_class: str) -> None:
    """transformers' classes have models and decoders of their own, and add tokens."""
    saved = Tokenizer(Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁caf", -2.0), ("é", -3.0)], 0))
    saved.pre_tokenizer, saved.decoder = Metaspace(), MetaspaceDecoder()
    save_narrow_llama(saved.get_vocab_size(), tmp_path)
    saved.save(str(tmp_path / "tokenizer.json"))
    config = {"unk_token": "<unk>", "pad_token": "<pad>"}
    config |= {"tokenizer_class": of_class} if of_class else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_base(str(tmp_path)).tokenizer
    ids = tokenizer.encode("the café").ids
    assert ids == saved.encode("the café").ids == [1, 2, 3]
    assert tokenizer.decode(ids) == "the café"


def test_a_directory_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer, which puts its first token before any text."""
    save_narrow_llama(64, tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="has no tokenizer"):
        load_base(str(tmp_path))


def test_a_base_that_rounds_as_it_goes_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Its weights look like those of any other."""
    for file in tiny_llama_dir.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    how = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    config["quantization_config"] = {"quant_method": "bitnet", **how}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="save it dequantised"):
        load_base(str(tmp_path))


def test_a_base_that_stays_quantised_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    ).save_pretrained(tmp_path)
    copy_tokenizer(tiny_llama_dir, tmp_path)
    with pytest.raises(BaseModelError, match="save it dequantised"):
        load_base(str(tmp_path))


def test_names_of_one_function(tiny_base_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base_dir, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["activation_function"] = "gelu_pytorch_tanh"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert load_base(str(tmp_path / "base")).sha256 == load_base(str(tiny_base_dir)).sha256
    text = torch.arange(16)[None]
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(path)(text).logits
            for path in (tmp_path / "base", tiny_base_dir)
        )
    torch.testing.assert_close(one, other)


def test_a_llama_with_biases_stretched_positions_and_its_own_head(
    tmp_path: Path, tiny_base_dir: Path
) -> None:
    config = LlamaConfig(
        vocab_size=256,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # transformers makes them zero
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    path = tmp_path / "llama"
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tiny_base_dir / name).read_bytes())
    base = load_base(str(path))
    text = torch.randint(256, (2, 40))
    decoder = Llama(base, Mixture(rank=2), 48)
    with torch.no_grad():
        hidden, _ = decoder.hidden(fresh_tensors(base), text)
        torch.testing.assert_close(
            (hidden @ decoder.head().T).view(2, 40, -1), model(text).logits, atol=1e-4, rtol=1e-4
        )


def fresh_tensors(base: Any) -> dict[str, torch.Tensor]:
    meant = Mixture(rank=2).on(base.architecture)
    _, tensors = mixture.roles_and_tensors(meant, base.architecture)
    return {t.name: torch.zeros(tuple(t.shape)) for t in tensors}


@pytest.mark.parametrize("name", ["nobody/has-this-model", "gpt3", "./no/such/directory"])
def test_a_base_that_is_nowhere(name: str) -> None:
    """Offline, as all tests are."""
    with pytest.raises(BaseModelError, match=r"neither a directory.*go online once") as error:
        load_base(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_directories_that_are_no_base(tmp_path: Path, tiny_base_dir: Path) -> None:
    def refused(path: Path, says: str) -> None:
        with pytest.raises(BaseModelError, match=says) as error:
            load_base(str(path))
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)

    def copy(name: str, *files: str) -> Path:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((tiny_base_dir / file).read_bytes())
        return tmp_path / name

    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    refused(copy("empty"), "not a model")
    refused(copy("no-weights", "config.json", *tokenizer), "not a model")
    cut = copy("cut", "config.json", "model.safetensors", *tokenizer)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(cut, "not a model")
    damaged = copy("damaged", "model.safetensors", *tokenizer)
    (damaged / "config.json").write_text("{")
    refused(damaged, "not a model")
    mute = copy("mute", "config.json", "model.safetensors")
    refused(mute, "has no tokenizer")
    foreign = copy("foreign", "config.json", "model.safetensors")
    for file in tokenizer:
        if (BUILT_IN["gpt2-mini"] / file).exists():
            (foreign / file).write_bytes((BUILT_IN["gpt2-mini"] / file).read_bytes())
    refused(foreign, r"knows \d+ tokens, the model 256")


def test_architectures_that_are_not_supported(
    tmp_path: Path, tiny_base_dir: Path, tiny_llama_dir: Path
) -> None:
    def refused(name: str, base: Path, changed: dict[str, Any], says: str) -> None:
        config = json.loads((base / "config.json").read_text())
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(BaseModelError, match=says):
            load_base(str(path))

    supported = "mistral model; supported architectures: gpt2, llama"
    refused("mistral", tiny_llama_dir, {"model_type": "mistral"}, supported)
    for name, base, odd, says in (
        ("relu", tiny_base_dir, {"activation_function": "relu"}, "activation relu"),
        ("by-layer", tiny_base_dir, {"scale_attn_by_inverse_layer_idx": True}, "scaled by layer"),
        ("wide", tiny_base_dir, {"n_inner": 99}, "MLP of 99"),
        ("empty", tiny_base_dir, {"n_layer": 0}, "no blocks"),
        ("hollow", tiny_llama_dir, {"num_hidden_layers": 0}, "no blocks"),
        ("gelu", tiny_llama_dir, {"hidden_act": "gelu"}, "activation gelu"),
        ("both", tiny_base_dir, {"is_causal": False}, "attention in both directions"),
        ("all", tiny_llama_dir, {"is_causal": False}, "attention in both directions"),
        ("odd", tiny_llama_dir, {"num_key_value_heads": 3}, "heads that share 3 of keys"),
        (
            "dynamic",
            tiny_llama_dir,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of type dynamic",
        ),
    ):
        refused(name, base, odd, f"{says}.*not supported")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "export", "--base", path, "--out", tmp_path / "out"],
        input="y\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == BaseModelError.code
    assert "code of its own; supported architectures: gpt2, llama" in " ".join(done.stderr.split())
    assert not done.stdout, "no question"
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_transformers_would_take_for_another(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    """Of any SentencePiece model it makes a Llama's."""
    from transformers.utils import sentencepiece_model_pb2_new as messages

    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((tiny_llama_dir / file).read_bytes())
    unigram = messages.ModelProto()  # type: ignore[attr-defined]
    unigram.pieces.add(piece="a", score=-1.0)
    (tmp_path / "tokenizer.model").write_bytes(unigram.SerializeToString())
    with pytest.raises(BaseModelError, match=r"give the model its tokenizer\.json"):
        load_base(str(tmp_path))


def test_random_weights_need_no_download() -> None:
    base = load_base("gpt2", random_weights=True)
    assert base.parameters == 124_439_808
    assert base.config.n_layer == 12


def test_the_built_in_base() -> None:
    path = BUILT_IN["gpt2-mini"]
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) <= 25e6
    base = load_base("gpt2-mini")
    assert base.config.model_type == "gpt2"
    assert base.tokenizer.get_vocab_size() <= base.config.vocab_size
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32)
    for text in ("The sun rises in the east and sets in the ", "Guten Tag, wie geht es "):
        ids = base.tokenizer.encode(text).ids
        assert base.tokenizer.decode(ids) == text
        assert len(ids) < 0.6 * len(text)
    text = (
        "It was the best of times, it was the worst of times, and the people of the city knew it."
    )
    ids = torch.tensor([base.tokenizer.encode(text).ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 0.6 * math.log(base.config.vocab_size)  # it has learnt something


# --- the command -------------------------------------------------------------------------------


def test_the_command_from_a_directory_to_a_bundle(tiny_base_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = comigs(
        *("export", "--base", tiny_base_dir, "--tier", "phone-low", "--engine", "onnxruntime"),
        *("--specialists", 2, "--rank", 2, "--targets", "mlp.c_fc,mlp.c_proj", "--out", out),
        *("--format", "json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    bundle = open_bundle(out)
    manifest = bundle.manifest
    assert result["specialists"] == manifest.mixture.specialists == 2
    assert [p["name"] for p in result["programs"]] == [p.name for p in manifest.programs]
    assert all(p["worst_relative_error"] <= p["tolerance"] for p in result["programs"])
    tier = tiers()["phone-low"]
    assert list(manifest.tier.micro_batches) == list(tier.micro_batches)
    assert manifest.tier.context == 32  # the base has no more positions
    assert bundle.experts() == ["generalist", "specialist.1", "specialist.2"]
    for file in manifest.files:
        bundle.file(file.path)
    with pytest.raises(BundleError, match="not listed"):
        bundle.file("manifest.json")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--base", "nobody/has-this-model"), 18, "go online once"),
        (("--tier", "mainframe"), 2, "phone-low"),
        (("--engine", "tensorflow"), 2, "onnxruntime"),
        (("--mixing", "per_head"), 2, "per_linear"),
        (("--weights", "heavy"), 2, "pretrained or random"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = comigs("export", *arguments, "--out", tmp_path / "bundle")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    if code != 2:
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# --- the two compilers -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny_base_dir", "tiny_llama_dir"])
def test_a_program_is_one_delegate_and_valid_onnx(
    export_tiny: ExportTiny, request: pytest.FixtureRequest, family: str
) -> None:
    """Each border of a delegate copies, and costs seconds to compile: there is none inside."""
    bundle = export_tiny(
        Mixture(rank=4, specialists=2),
        base=request.getfixturevalue(family),
        engines=("onnxruntime", "executorch"),
        programs=("train_step", "eval_loss"),
        tier=replace(TIER, micro_batches=(2,)),
    )
    for program in bundle.manifest.programs:
        file = bundle.path / program.file
        if program.engine == "onnxruntime":
            onnx.checker.check_model(file, full_check=True)
            continue
        plans = deserialize_pte_binary(file.read_bytes()).program.execution_plan
        (plan,) = (plan for plan in plans if plan.name == program.method)
        assert len(plan.delegates) == 1


def test_lowering_leaves_no_graph_in_memory(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Each holds all weights, and the gate needs memory for a step of PyTorch's."""
    export_bundle(
        load_base(str(tiny_base_dir)),
        Mixture(rank=4),
        TIER,
        engines=("executorch",),
        out=tmp_path / "bundle",
        programs=("eval_loss", "decode"),
    )
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is LoweredBackendModule]


def test_pytorch_is_asked_once_for_programs_of_one_function(
    tiny_bundle: Bundle, tiny_base_dir: Path
) -> None:
    manifest, asked = tiny_bundle.manifest, list[str]()
    decoder = GPT2(load_base(str(tiny_base_dir)), Mixture(rank=4), 32)

    def counted(each: Specification) -> Specification:
        def call(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            asked.append(each.name)
            return each.call(*values)

        return replace(each, call=call)

    known = {s.name: counted(s) for s in specifications(decoder, manifest, TIER, "onnxruntime")}
    whole, part = known["train_step.b1"], known["router_step.b1"]
    examples = [parity.example_arguments(whole, manifest, seed) for seed in (3, 4)]
    references = parity.References()

    def loss(specification: Specification, example: int) -> float:
        ((_, outputs, _),) = references.cases(specification, examples[example], ())
        assert tuple(outputs) == specification.outputs
        return float(outputs["loss"])

    assert loss(whole, 0) == loss(part, 0) == loss(whole, 0)
    assert asked == ["train_step.b1"]
    assert loss(part, 1) != loss(part, 0), "of other arguments"
    assert asked == ["train_step.b1", "router_step.b1", "router_step.b1"]
    assert loss(whole, 0) != loss(whole, 1), "with other outputs"
    assert asked[3:] == ["train_step.b1"] * 2


def test_an_operator_without_a_translation_is_refused_by_name() -> None:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.erfinv(x),)

    specification = Specification(
        name="p",
        inputs=(("x", torch.float32, (2,)),),
        adapters=(),
        outputs=("y",),
        call=call,
        function="f",
        base=torch.nn.Module(),
    )
    graph = flat_graph(specification, [torch.zeros(2)], onnx_graph.DECOMPOSITIONS)
    with pytest.raises(NotImplementedError, match=r"aten\.erfinv"):
        list(onnx_graph.translate(graph, ["x"], ["y"], examples=[], judged={}))
