"""Writes a bundle: compile, check, measure, and only then move it into place."""

from __future__ import annotations

import gc
import math
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
from edge_runtime.memory import return_freed_memory
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
        # Each measures in a process of its own, on one core.
        with ThreadPoolExecutor(2) as pool:
            measurements: list[_Measurement] = []
            for engine in engines:
                chosen = [
                    _Source(s, parity.example_arguments(s, manifest, seed, text))
                    for s in specifications(decoder, manifest, tier, engine)
                    if programs is None or s.name.split(".")[0] in programs
                ]
                sources |= {(engine, source.specification.name): source for source in chosen}
                compile_for = _compile_onnx if engine == "onnxruntime" else _compile_executorch
                manifest.programs.extend(compile_for(chosen, manifest, staging, judged, progress))
                _list_and_write(manifest, staging)
                # Beside the next engine's compilation, which takes one core and little memory; not
                # beside the checks, which take both cores and all the memory there may be.
                if engine != engines[-1]:
                    measurements += _measure(pool, manifest, staging, engine)
            staged = open_bundle(staging)
            references = parity.References()
            for entry, source in _by_function(manifest.programs, sources):
                progress(f"checking {entry.name} for {entry.engine} against PyTorch")
                engine_here = load_engine(entry.engine)
                entry.parity.CopyFrom(
                    parity.check(
                        source.specification, source.example, staged, engine_here, references
                    )
                )
            del references, sources, decoder
            return_freed_memory()
            progress("measuring memory")
            measurements += _measure(pool, manifest, staging, engines[-1])
            _fill_in_costs(manifest, staging, measurements, 4 * base.parameters)
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


def _list_and_write(manifest: pb.Manifest, staging: Path) -> None:
    """Puts the bundle as far as it is there into its manifest, and writes that."""
    del manifest.files[:]
    list_files(manifest, staging)
    write_manifest(manifest, staging)


@dataclass(frozen=True)
class _Measurement:
    """What a process finds out."""

    entries: Sequence[pb.Program]
    packed: bool
    found: Future[list[dict[str, int]]]


def _measure(
    pool: Executor, manifest: pb.Manifest, staging: Path, engine: str
) -> list[_Measurement]:
    """Has an engine's programs measured."""

    def begin(entries: Sequence[pb.Program], *, packed: bool) -> _Measurement:
        names = [entry.name for entry in entries]
        return _Measurement(
            entries, packed, pool.submit(measure, staging, names, engine, packed=packed)
        )

    entries = [e for e in manifest.programs if e.engine == engine and _whole(e, manifest) is e]
    entries.sort(key=lambda entry: math.prod(entry.inputs[0].shape))
    # Not both measure the largest at once.
    return [
        begin(entries, packed=True),
        begin([entry for entry in reversed(entries) if _unpacks(entry)], packed=False),
    ]


def _fill_in_costs(
    manifest: pb.Manifest, staging: Path, measurements: Sequence[_Measurement], base_bytes: int
) -> None:
    """What each program needs, and what each engine costs as a whole."""
    runtime: dict[str, int] = {}
    for measurement in measurements:
        for entry, figure in zip(measurement.entries, measurement.found.result(), strict=True):
            if measurement.packed:
                entry.memory_bytes = figure["program_bytes"]
                runtime[entry.engine] = max(runtime.get(entry.engine, 0), figure["runtime_bytes"])
            else:
                entry.unpacked_memory_bytes = figure["program_bytes"]
    for entry in manifest.programs:
        whole = _whole(entry, manifest)
        entry.memory_bytes = whole.memory_bytes
        entry.unpacked_memory_bytes = whole.unpacked_memory_bytes
    for engine, runtime_bytes in runtime.items():
        files: set[str] = set()
        for entry in manifest.programs:
            if entry.engine == engine:
                files.update(n for n in (entry.file, entry.unsigned_file, *entry.data_files) if n)
        manifest.engines.append(
            pb.EngineCost(
                engine=engine,
                base_bytes=base_bytes,
                disk_bytes=sum((staging / file).stat().st_size for file in files),
                runtime_bytes=runtime_bytes,
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
