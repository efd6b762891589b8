"""All programs as one ExecuTorch file whose methods share their weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints
from unittest.mock import patch

import torch
from executorch.backends.transforms.addmm_mm_to_linear import apply_addmm_mm_to_linear_transform
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.partition.config import gemm_configs
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir._serialize import _dataclass
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.canonical_partitioners.pattern_op_partitioner import (
    generate_grouped_partitions_from_list_of_nodes,
)
from executorch.exir.backend.utils import WhyNoPartition, is_same_node
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule
from torch.fx.passes.infra.partitioner import Partition
from torch.fx.passes.utils.fuser_utils import validate_partition
from torch.fx.traceback import NodeSource

from export.edge_dialect import CONFIG, edge_program
from export.programs import Specification
from export.rounding import Judged
from export.xnnpack_integers import Rounded, integer_products

# Where the operator is that calls a delegate, which has the module's name.
delegates = import_module("torch._higher_order_ops.executorch_call_delegate")
PROGRAM_FILE = "executorch/programs.pte"


Method: TypeAlias = tuple[GraphModule, Specification, Sequence[Sequence[Tensor]]]
"""A program: `flat_graph` of it with `xnnpack.DECOMPOSITIONS`, and inputs on which to see where
eight bits are too coarse."""


def write_programs(
    methods: Mapping[str, Method],
    *,
    file: Path,
    integers: bool,
    judged: Judged,
) -> dict[str, int]:
    """Writes programs as the methods, of these names, of one file.

    Args:
        integers: hold the base's large matrices in eight bits, or as a program says.
        judged: where programs that train have shown eight bits to be too coarse.

    Returns:
        Method name -> planned activation arena in bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    rounded: Rounded = {}
    # Those of most tokens first: they show best what eight bits are too coarse for.
    largest_first = sorted(methods.values(), key=lambda method: -method[2][0][0].numel())
    for graph, specification, examples in largest_first if integers else ():
        of_its_kind = judged if specification.trains else {}
        integer_products(graph, examples, specification.blocks, rounded, of_its_kind)
    for graph, _, _ in methods.values():
        _separate_storages(graph)
    with torch.no_grad(), _quiet(), _shortened():
        edge = EdgeProgramManager(
            {name: edge_program(graph) for name, (graph, _, _) in methods.items()},
            compile_config=CONFIG,
        )
        # In a joint graph the weights of matrix products arrive as run-time values (a transpose of
        # a constant); without the flag none of them is delegated. It also keeps the weights
        # ordinary constants, which the methods share, instead of a packed copy per method.
        partitioner = _Partitioner(force_non_static_weights_for_f32_linear=True)
        edge = edge.to_backend(dict.fromkeys(methods, partitioner))
        # Removing view copies fails on views of inputs that a method also returns gradients of.
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                remove_view_copy=False,
                # Else a run copies its inputs first, and the largest of them is a KV cache.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    # What they remember holds every graph that they have seen, with all weights.
    is_same_node.cache_clear()
    FakeTensorMode.cache_clear()
    with file.open("wb") as out:
        program.write_to_file(out)
    return {
        plan.name: sum(plan.non_const_buffer_sizes)
        for plan in program.executorch_program.execution_plan
    }


def _separate_storages(graph_module: GraphModule) -> None:
    """Gives constants that are a part of something larger a storage of their own.

    XNNPACK's serializer writes a constant's whole storage, from its start: of three biases that are
    parts of one tensor, it would write the first one three times.
    """
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value: Tensor = getattr(graph_module, node.target)
            if value.untyped_storage().nbytes() != value.nbytes:
                value.data = value.detach().clone()


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The lowering prints progress and warnings that no user can act on.

    It also copies each node's history at each of its hundreds of passes, a fifth of its time;
    nobody reads that history, so here it is shared instead.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    NodeSource.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            del NodeSource.__deepcopy__  # type: ignore[attr-defined]
            logging.disable(previous)


class _Partitioner(XnnpackPartitioner):  # type: ignore[misc]
    """Tries what our graphs are written for before anything else: all that XNNPACK takes as one.

    The general search merges operators one by one and looks for cycles each time.
    """

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        with patch.object(ep, "_graph_signature", _Signature.of(ep)):
            groups = self.get_matched_nodes_from_configs(ep)
        every = [node for group in groups for node in group]
        if validate_partition(every):
            return [Partition(id=0, nodes=every)]
        found: list[Partition] = generate_grouped_partitions_from_list_of_nodes(
            ep.graph_module, groups
        )
        return found


class _Signature(ExportGraphSignature):
    """One that does not change any more: to ask which inputs are weights takes no time."""

    inputs_to_buffers = cached_property(ExportGraphSignature.inputs_to_buffers.fget)  # type: ignore
    inputs_to_parameters = cached_property(ExportGraphSignature.inputs_to_parameters.fget)  # type: ignore

    @classmethod
    def of(cls, program: ExportedProgram) -> _Signature:
        signature = program.graph_signature
        return cls(signature.input_specs, signature.output_specs)


def _results(delegate: Any, *arguments: Tensor) -> list[Tensor]:
    """What calling a delegate gives where nothing but shapes is asked for."""
    output = delegate.original_module.graph.output_node()
    return [node.meta["val"] for node in output.args[0]]


class _Store(NamedDataStore):  # type: ignore[misc]
    """A delegate's weights, by a hash of them: those that several delegates have are held once."""

    def __init__(self, known: dict[str, bytes]) -> None:
        super().__init__()
        self.known = known

    def add_named_data(self, key: str, data: bytes, *options: object, **named: object) -> None:
        super().add_named_data(key, self.known.setdefault(key, data), *options, **named)


class _Passes:
    """Of XNNPACK's passes over a delegate those that find something in our graphs: a product with
    a transposed matrix becomes a linear map.

    The others look for what is not there; each would trace the graph again.
    """

    def __init__(self, program: ExportedProgram, passes: object) -> None:
        self.program = program

    def transform(self) -> ExportedProgram:
        apply_addmm_mm_to_linear_transform(self.program.graph)
        self.program._graph_signature = _Signature.of(self.program)
        return self.program


@contextlib.contextmanager
def _shortened():  # type: ignore[no-untyped-def]
    """Leaves out what XNNPACK's lowering does again and again, and finds nothing or the same."""
    with (
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", _Passes),
        # Modules that an operator comes from: here it comes from none.
        patch.object(gemm_configs, "get_source_partitions", lambda graph, modules: {}),
        # To say why an operator stays outside, they keep it, its graph and all weights.
        patch.object(WhyNoPartition, "__call__", lambda *_, **__: None),
        patch.object(delegates, "call_delegate_cpu", _results),
        patch.object(_dataclass, "get_type_hints", cache(get_type_hints)),
        patch.object(xnnpack_preprocess, "NamedDataStore", partial(_Store, {})),
    ):
        yield
