"""Writes a bundle: compile, check, measure, and only then move it into place."""

from __future__ import annotations

import gc
import json
import shutil
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from edge_runtime import adapters
from edge_runtime.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    list_files,
    open_bundle,
    write_manifest,
)
from edge_runtime.engines import load_engine
from edge_runtime.errors import StorageError
from edge_runtime.files import removed_on_failure, storage_errors
from edge_runtime.measure import measure
from export import mixture as mixtures
from export import parity
from export.base import Base
from export.decoder import Decoder
from export.gpt2 import GPT2
from export.llama import Llama
from export.mixture import Mixture
from export.programs import Specification, specifications
from export.tiers import Tier
from protos import manifest_pb2 as pb

TOKENIZER_FILE = "tokenizer.json"
OUR_NAMES = {MANIFEST, TOKENIZER_FILE, "adapters", "onnx", "executorch"}  # of what a bundle holds
DECODERS: dict[str, type[Decoder]] = {"gpt2": GPT2, "llama": Llama}
Progress = Callable[[str], None]


def export_bundle(
    base: Base,
    mixture: Mixture,
    tier: Tier,
    *,
    engines: Sequence[str],
    out: Path,
    precision: str = "float32",
    seed: int = 0,
    programs: Sequence[str] | None = None,
    generalist: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Compiles every program of `tier` for `engines` and writes the bundle to `out`.

    Args:
        precision: how the large frozen matrices are held, one of PRECISIONS.
        seed: of the fresh adapters and of the parity gate's inputs.
        generalist: directory of an adapter that PEFT trained, which the generalist starts as.
        programs: only those whose name before the dot is listed (default: all).
        overwrite: replace an existing bundle; it stays whole until the new one is complete.
        progress: told what happens, one line at a time.

    Raises:
        ValueError: the mixture names other targets than the base has.
        AdapterError: `generalist` cannot be read, or has another rank or other targets.
        ParityError: a program disagrees with PyTorch; `out` is untouched.
        StorageError: `out` exists and `overwrite` is not set, or is no bundle, or cannot be
            replaced; or a directory beside it, `out` with `.partial` or `.old`, is in the way; or
            one cannot be written.
    """
    architecture = base.architecture
    mixture = mixture.on(architecture)
    tier = tier.fitted(architecture.positions)
    out = out.resolve()  # behind a link, the bundle is replaced and not the link
    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists; give another --out, or --overwrite to replace it")
    if out.is_mount():
        raise StorageError(
            f"a file system is mounted at {out}, which cannot be replaced; give a directory in it"
        )
    _keep_what_is_not_ours(out)
    staging, old = (out.with_name(out.name + end) for end in (".partial", ".old"))
    _keep_what_is_not_ours(staging)
    _keep_what_is_not_ours(old)
    shutil.rmtree(staging, ignore_errors=True)
    with storage_errors(staging), removed_on_failure(staging):
        staging.mkdir(parents=True)
        manifest = _manifest(base, mixture, tier, precision)
        # Not with its own `save`, which raises bare Exception when the disk is full.
        tokenizer = base.tokenizer.to_str(pretty=True)
        (staging / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
        vectors = mixtures.fresh(manifest, seed)
        if generalist is not None:
            vectors["generalist"] = adapters.load_peft(manifest, "generalist", generalist)
        adapters.save_directory(manifest, vectors, staging)
        longest = max(tier.context, tier.train_length)
        decoder = DECODERS[architecture.name](base, mixture, longest)
        text = None if precision == "float32" else parity.sample_text(base.tokenizer)
        sources: dict[tuple[str, str], _Source] = {}
        for engine in engines:
            chosen = [
                _Source(s, parity.example_arguments(s, manifest, seed, text))
                for s in specifications(decoder, manifest, tier, engine)
                if programs is None or s.name.split(".")[0] in programs
            ]
            sources |= {(engine, source.specification.name): source for source in chosen}
            compile_for = _compile_onnx if engine == "onnxruntime" else _compile_executorch
            manifest.programs.extend(compile_for(chosen, manifest, staging, progress))
        list_files(manifest, staging)
        write_manifest(manifest, staging)
        staged = open_bundle(staging)
        for entry in manifest.programs:
            progress(f"checking {entry.name} for {entry.engine} against PyTorch")
            source = sources[entry.engine, entry.name]
            engine_here = load_engine(entry.engine)
            entry.parity.CopyFrom(
                parity.check(source.specification, source.example, staged, engine_here)
            )
        for engine in engines:
            progress(f"measuring memory under {engine}")
            _measure(manifest, staging, engine, 4 * base.parameters)
        write_manifest(manifest, staging)
        _let_others_read(manifest, staging)
        _replace(out, staging, old)
    return open_bundle(out)


def _replace(out: Path, by: Path, old: Path) -> None:
    """Puts the directory `by` in the place of `out`, if that is there; it is at `old` meanwhile."""
    shutil.rmtree(old, ignore_errors=True)
    if not out.exists():
        by.rename(out)
        return
    out.rename(old)
    try:
        by.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _keep_what_is_not_ours(path: Path) -> None:
    """
    Raises:
        StorageError: to delete `path` would lose what no export wrote: it is a file, or a directory
            with something in it that is no part of a bundle, whole or as a kill left it.
    """
    if not path.exists():
        return
    if not path.is_dir() or not _is_bundle(path):
        raise StorageError(
            f"{path} is no bundle, and would be deleted; choose another --out, or move it away"
        )
    for each in path.iterdir():
        if each.name not in OUR_NAMES:
            raise StorageError(
                f"{each} is no part of a bundle, and would be deleted; move it out of there, or "
                "choose another --out"
            )


def _is_bundle(directory: Path) -> bool:
    """Of any version; an export that was killed wrote the tokenizer first, and nothing before."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return (directory / TOKENIZER_FILE).is_file() or not any(directory.iterdir())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest


def _let_others_read(manifest: pb.Manifest, directory: Path) -> None:
    """Gives all files the manifest's mode, which is the umask's.

    Adapters are written for their owner only, since a device's are private. A bundle's are not, and
    a coordinator may run as another user.
    """
    mode = stat.S_IMODE((directory / MANIFEST).stat().st_mode)
    for entry in manifest.files:
        (directory / entry.path).chmod(mode)


@dataclass(frozen=True)
class _Source:
    """A program before compilation, with arguments to trace and to check it on."""

    specification: Specification
    example: list[Tensor]


def _manifest(base: Base, mixture: Mixture, tier: Tier, precision: str) -> pb.Manifest:
    """Everything that is known before a program is compiled."""
    architecture = base.architecture
    roles, tensors = mixtures.roles_and_tensors(mixture, architecture)
    start = base.config.bos_token_id
    if not isinstance(start, int) or start >= architecture.vocabulary:
        start = -1
    return pb.Manifest(
        format_version=FORMAT_VERSION,
        minimum_reader_version=FORMAT_VERSION,
        base=pb.Base(
            name=base.name,
            architecture=architecture.name,
            sha256=base.sha256,
            parameters=base.parameters,
            layers=architecture.layers,
            width=architecture.width,
            heads=architecture.heads,
            key_value_heads=architecture.key_value_heads,
            vocabulary=architecture.vocabulary,
            positions=architecture.positions,
            precision=precision,
        ),
        tokenizer=pb.Tokenizer(file=TOKENIZER_FILE, start_id=start),
        mixture=mixture.to_manifest(),
        roles=roles,
        tensors=tensors,
        tier=tier.to_manifest(),
    )


def _entry(source: _Source) -> pb.Program:
    """The manifest's entry, without what depends on the engine."""

    specification = source.specification

    def port(name: str, value: Tensor) -> pb.Port:
        result = pb.Port(name=name, dtype=str(value.dtype).removeprefix("torch."))
        for axis, size in enumerate(value.shape):
            free = size == specification.length  # which is 0 if nothing is free
            result.shape.append(specification.longest if free else size)
            if free:
                result.tokens_axis = axis
        return result

    inputs = [*(name for name, _, _ in specification.inputs), *specification.adapters]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # shapes alone
        results = specification.call(*map(mode.from_tensor, source.example))
    return pb.Program(
        name=specification.name,
        inputs=[port(n, v) for n, v in zip(inputs, source.example, strict=True)],
        outputs=[port(n, v) for n, v in zip(specification.outputs, results, strict=True)],
    )


def _compile_onnx(
    programs: Sequence[_Source], manifest: pb.Manifest, staging: Path, progress: Progress
) -> list[pb.Program]:
    from export import onnx_engine

    store = onnx_engine.WeightStore(staging)
    entries: list[pb.Program] = []
    # Those first that join weights, which the others take a part of.
    for source in sorted(programs, key=lambda each: not each.specification.length):
        entry = _entry(source)
        entry.engine = "onnxruntime"
        entry.data_files.append(onnx_engine.WEIGHTS_FILE)
        entries.append(entry)
        same = [e for e in entries if e.name == source.specification.same_as]
        if same:
            entry.file, entry.unsigned_file = same[0].file, same[0].unsigned_file
            continue
        progress(f"compiling {entry.name} for onnxruntime")
        entry.file = f"onnx/{entry.name}.onnx"
        unsigned = onnx_engine.compile_program(
            source.specification,
            source.example,
            [port.name for port in entry.inputs],
            file=staging / entry.file,
            store=store,
            int8=manifest.base.precision != "float32",
        )
        if unsigned:
            entry.unsigned_file = unsigned.relative_to(staging).as_posix()
    order = [source.specification.name for source in programs]
    return sorted(entries, key=lambda entry: order.index(entry.name))


def _compile_executorch(
    programs: Sequence[_Source], manifest: pb.Manifest, staging: Path, progress: Progress
) -> list[pb.Program]:
    from export import executorch_engine

    entries = [_entry(source) for source in programs]
    progress(f"compiling {', '.join(entry.name for entry in entries)} for executorch")
    for entry in entries:
        entry.engine = "executorch"
        entry.file = executorch_engine.PROGRAM_FILE
        entry.method = entry.name.replace(".", "_")
    arenas = executorch_engine.compile_programs(
        {e.method: (s.specification, s.example) for e, s in zip(entries, programs, strict=True)},
        file=staging / executorch_engine.PROGRAM_FILE,
        integers=manifest.base.precision != "float32",
    )
    gc.collect()  # graphs refer to each other in circles, and they hold the rounded weights
    for entry in entries:
        entry.planned_arena_bytes = arenas[entry.method]
    return entries


def _measure(manifest: pb.Manifest, staging: Path, engine: str, base_bytes: int) -> None:
    """Fills in what each program of `engine` needs, and what the engine costs as a whole."""
    runtime = 0
    files: set[str] = set()
    every = [p for p in manifest.programs if p.engine == engine]
    # A router's step that is part of a training step needs nothing besides.
    steps = {(p.file, p.method): p for p in every if p.name.startswith("train_step")}
    parts = [p for p in every if p.name.startswith("router_step") and (p.file, p.method) in steps]
    entries = [p for p in every if p not in parts]
    training = [
        entry
        for entry in reversed(entries)  # so that not both measure the largest at once
        if entry.name.startswith(("train_step", "eval_loss")) and engine == "onnxruntime"
    ]
    with ThreadPoolExecutor(2) as pool:  # each measures in a process of its own, on one core
        figures, unpacked = pool.map(
            lambda chosen, packed: measure(
                staging, [e.name for e in chosen], engine, packed=packed
            ),
            (entries, training),
            (True, False),
        )
    for entry, measured in zip(entries, figures, strict=True):
        entry.memory_bytes = measured["program_bytes"]
        runtime = max(runtime, measured["runtime_bytes"])
        files.update(n for n in (entry.file, entry.unsigned_file, *entry.data_files) if n)
    for entry, measured in zip(training, unpacked, strict=True):
        entry.unpacked_memory_bytes = measured["program_bytes"]
    for entry in parts:
        step = steps[entry.file, entry.method]
        entry.memory_bytes = step.memory_bytes
        entry.unpacked_memory_bytes = step.unpacked_memory_bytes
    manifest.engines.append(
        pb.EngineCost(
            engine=engine,
            base_bytes=base_bytes,
            disk_bytes=sum((staging / file).stat().st_size for file in files),
            runtime_bytes=runtime,
        )
    )
