"""Writes a bundle: compile, check, measure, and only then move it into place."""

from __future__ import annotations

import gc
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

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
from edge_runtime.files import removed_on_failure, storage_errors
from edge_runtime.measure import measure
from export import mixture as mixtures
from export import parity
from export.base import Base
from export.decoder import Decoder
from export.flat_graph import flat_graph, results_of
from export.gpt2 import GPT2
from export.llama import Llama
from export.mixture import Mixture
from export.places import TOKENIZER_FILE, places, replace
from export.programs import Specification, specifications
from export.rounding import Judged
from export.tiers import Tier
from protos import manifest_pb2 as pb

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
        StorageError: as `places`, or it cannot be written.
    """
    architecture = base.architecture
    mixture = mixture.on(architecture)
    tier = tier.fitted(architecture.positions)
    out, staging, old = places(out, overwrite=overwrite)
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
        judged: Judged = {}  # by all programs that train, of either engine
        sources: dict[tuple[str, str], _Source] = {}
        for engine in engines:
            chosen = [
                _Source(s, parity.example_arguments(s, manifest, seed, text))
                for s in specifications(decoder, manifest, tier, engine)
                if programs is None or s.name.split(".")[0] in programs
            ]
            sources |= {(engine, source.specification.name): source for source in chosen}
            compile_for = _compile_onnx if engine == "onnxruntime" else _compile_executorch
            manifest.programs.extend(compile_for(chosen, manifest, staging, judged, progress))
        list_files(manifest, staging)
        write_manifest(manifest, staging)
        staged = open_bundle(staging)
        references = parity.References()
        for entry, source in _by_function(manifest.programs, sources):
            progress(f"checking {entry.name} for {entry.engine} against PyTorch")
            engine_here = load_engine(entry.engine)
            entry.parity.CopyFrom(
                parity.check(source.specification, source.example, staged, engine_here, references)
            )
        del references
        progress("measuring memory")
        _measure(manifest, staging, engines, 4 * base.parameters)
        write_manifest(manifest, staging)
        _let_others_read(manifest, staging)
        replace(out, staging, old)
    return open_bundle(out)


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

    @property
    def examples(self) -> list[Sequence[Tensor]]:
        """Inputs of the traced shape, to see what eight bits are too coarse for."""
        every = parity.variants(self.specification, self.example)
        return [values for values in every if values[0].shape == self.example[0].shape]


def _by_function(
    programs: Iterable[pb.Program], sources: Mapping[tuple[str, str], _Source]
) -> list[tuple[pb.Program, _Source]]:
    """Programs of the same function one after the other."""
    paired = [(entry, sources[entry.engine, entry.name]) for entry in programs]
    functions = list(dict.fromkeys(source.specification.function for _, source in paired))
    return sorted(paired, key=lambda pair: functions.index(pair[1].specification.function))


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


def _entry(source: _Source, results: Sequence[Tensor]) -> pb.Program:
    """The manifest's entry, without what depends on the engine.

    Args:
        results: of the shapes and dtypes of the program's outputs.
    """
    specification, arguments = source.specification, source.example

    def port(name: str, value: Tensor) -> pb.Port:
        result = pb.Port(name=name, dtype=str(value.dtype).removeprefix("torch."))
        for axis, size in enumerate(value.shape):
            free = size == specification.length  # which is 0 if nothing is free
            result.shape.append(specification.longest if free else size)
            if free:
                result.tokens_axis = axis
        return result

    inputs = [*(name for name, _, _ in specification.inputs), *specification.adapters]
    return pb.Program(
        name=specification.name,
        inputs=[port(n, v) for n, v in zip(inputs, arguments, strict=True)],
        outputs=[port(n, v) for n, v in zip(specification.outputs, results, strict=True)],
    )


def _compile_onnx(
    programs: Sequence[_Source],
    manifest: pb.Manifest,
    staging: Path,
    judged: Judged,
    progress: Progress,
) -> list[pb.Program]:
    from export import onnx_engine, onnx_graph

    store = onnx_engine.WeightStore(staging)
    entries: dict[str, pb.Program] = {}
    # Those first that join weights, which the others take a part of; then those of most tokens,
    # which show best what eight bits are too coarse for.
    order = sorted(programs, key=lambda s: (not s.specification.length, -s.example[0].numel()))
    for source in order:
        specification = source.specification
        if specification.same_as in entries:
            entries[specification.name] = _part(entries[specification.same_as], specification)
            continue
        progress(f"compiling {specification.name} for onnxruntime")
        graph = flat_graph(specification, source.example, onnx_graph.DECOMPOSITIONS)
        entry = entries[specification.name] = _entry(source, results_of(graph))
        entry.engine = "onnxruntime"
        entry.data_files.append(onnx_engine.WEIGHTS_FILE)
        entry.file = f"onnx/{entry.name}.onnx"
        unsigned = onnx_engine.write_program(
            graph,
            specification,
            source.examples,
            [port.name for port in entry.inputs],
            file=staging / entry.file,
            store=store,
            int8=manifest.base.precision != "float32",
            judged=judged if specification.trains else {},
        )
        if unsigned:
            entry.unsigned_file = unsigned.relative_to(staging).as_posix()
    return [entries[source.specification.name] for source in programs]


def _part(whole: pb.Program, specification: Specification) -> pb.Program:
    """The entry of a program that is `whole` without some of its outputs."""
    entry = pb.Program()
    entry.CopyFrom(whole)
    entry.name = specification.name
    outputs = {port.name: port for port in whole.outputs}
    del entry.outputs[:]
    entry.outputs.extend(outputs[name] for name in specification.outputs)
    return entry


def _compile_executorch(
    programs: Sequence[_Source],
    manifest: pb.Manifest,
    staging: Path,
    judged: Judged,
    progress: Progress,
) -> list[pb.Program]:
    from export import executorch_engine, xnnpack

    names = [source.specification.name for source in programs]
    progress(f"compiling {', '.join(names)} for executorch")
    graphs = [flat_graph(s.specification, s.example, xnnpack.DECOMPOSITIONS) for s in programs]
    entries = [_entry(s, results_of(graph)) for s, graph in zip(programs, graphs, strict=True)]
    for entry in entries:
        entry.engine = "executorch"
        entry.file = executorch_engine.PROGRAM_FILE
        entry.method = entry.name.replace(".", "_")
    arenas = executorch_engine.write_programs(
        {
            entry.method: (graph, source.specification, source.examples)
            for entry, graph, source in zip(entries, graphs, programs, strict=True)
        },
        file=staging / executorch_engine.PROGRAM_FILE,
        integers=manifest.base.precision != "float32",
        judged=judged,
    )
    graphs.clear()
    gc.collect()  # graphs refer to each other in circles, and they hold the rounded weights
    for entry in entries:
        entry.planned_arena_bytes = arenas[entry.method]
    return entries


def _measure(manifest: pb.Manifest, staging: Path, engines: Sequence[str], base_bytes: int) -> None:
    """Fills in what each program needs, and what each engine costs as a whole."""
    measured = [entry for entry in manifest.programs if _whole(entry, manifest) is entry]
    jobs = []
    for engine in engines:
        packed = [entry for entry in measured if entry.engine == engine]
        # Reversed, so that not both measure the largest at once.
        unpacked = [entry for entry in reversed(packed) if _unpacks(entry)]
        jobs += [(engine, True, packed), (engine, False, unpacked)]
    with ThreadPoolExecutor(2) as pool:  # each measures in a process of its own, on one core
        figures = pool.map(
            lambda job: measure(staging, [p.name for p in job[2]], job[0], packed=job[1]), jobs
        )
    runtime = dict.fromkeys(engines, 0)
    for (engine, is_packed, entries), found in zip(jobs, figures, strict=True):
        for entry, figure in zip(entries, found, strict=True):
            if is_packed:
                entry.memory_bytes = figure["program_bytes"]
                runtime[engine] = max(runtime[engine], figure["runtime_bytes"])
            else:
                entry.unpacked_memory_bytes = figure["program_bytes"]
    for entry in manifest.programs:
        whole = _whole(entry, manifest)
        entry.memory_bytes = whole.memory_bytes
        entry.unpacked_memory_bytes = whole.unpacked_memory_bytes
    for engine in engines:
        files: set[str] = set()
        for entry in manifest.programs:
            if entry.engine == engine:
                files.update(n for n in (entry.file, entry.unsigned_file, *entry.data_files) if n)
        manifest.engines.append(
            pb.EngineCost(
                engine=engine,
                base_bytes=base_bytes,
                disk_bytes=sum((staging / file).stat().st_size for file in files),
                runtime_bytes=runtime[engine],
            )
        )


def _unpacks(entry: pb.Program) -> bool:
    """Whether an engine can run the program with weights as they are in their file."""
    return entry.engine == "onnxruntime" and entry.name.startswith(("train_step", "eval_loss"))


def _whole(entry: pb.Program, manifest: pb.Manifest) -> pb.Program:
    """The training step that a router's step is a part of, and nothing besides; else the program
    itself."""
    if not entry.name.startswith("router_step"):
        return entry
    steps = (p for p in manifest.programs if p.name.startswith("train_step"))
    place = entry.engine, entry.file, entry.method
    return next((p for p in steps if (p.engine, p.file, p.method) == place), entry)
