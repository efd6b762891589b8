"""All programs as one ExecuTorch file whose methods share their weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from executorch.backends.xnnpack import _passes as xnnpack_passes
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor
from torch.fx.traceback import NodeSource

from export.flat_graph import flat_graph
from export.parity import variants
from export.programs import Specification
from export.xnnpack import DECOMPOSITIONS
from export.xnnpack_integers import integer_products

PROGRAM_FILE = "executorch/programs.pte"


def compile_programs(
    programs: Mapping[str, tuple[Specification, Sequence[Tensor]]], *, file: Path, integers: bool
) -> dict[str, int]:
    """Writes `programs` (method name -> program, example arguments) as the methods of one file.

    Args:
        integers: hold the base's large matrices in eight bits, or as a program says.

    Returns:
        Method name -> planned activation arena in bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    graphs = {
        name: flat_graph(s, example, DECOMPOSITIONS) for name, (s, example) in programs.items()
    }
    for name, (specification, example) in programs.items() if integers else ():
        integer_products(graphs[name], variants(specification, example), specification.blocks)
    with torch.no_grad(), _quiet(), _fewer_passes():
        exported = {
            name: torch.export.export(graphs[name], tuple(example), strict=False)
            for name, (_, example) in programs.items()
        }
        edge = to_edge(
            exported,
            compile_config=EdgeCompileConfig(
                _check_ir_validity=False,
                _skip_dim_order=True,
                preserve_ops=[torch.ops.aten.linear.default],  # products on integers
            ),
        )
        # In a joint graph the weights of matrix products arrive as run-time values (a transpose of
        # a constant); without the flag none of them is delegated. It also keeps the weights
        # ordinary constants, which the methods share, instead of a packed copy per method.
        partitioner = XnnpackPartitioner(force_non_static_weights_for_f32_linear=True)
        edge = edge.to_backend(dict.fromkeys(exported, partitioner))
        # Removing view copies fails on views of inputs that a method also returns gradients of.
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                remove_view_copy=False,
                # Else a run copies its inputs first, and the largest of them is a KV cache.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    with file.open("wb") as out:
        program.write_to_file(out)
    return {
        plan.name: sum(plan.non_const_buffer_sizes)
        for plan in program.executorch_program.execution_plan
    }


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


@contextlib.contextmanager
def _fewer_passes():  # type: ignore[no-untyped-def]
    """Runs those of XNNPACK's passes over a delegate that find something in a rewritten graph.

    Each of the seventeen goes through every node, and most look for convolutions, batch norms,
    activations or quantisation: half of the time of lowering, in a profile of `decode`.
    """
    original = xnnpack_preprocess.XNNPACKPassManager
    needed = [
        xnnpack_passes.XNNPACKRemoveCloneOpsTransform,
        xnnpack_passes.ConvertToLinearPass,
        xnnpack_passes.DecomposeConcatenate,
    ]
    xnnpack_preprocess.XNNPACKPassManager = lambda program, passes: original(program, needed)
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = original
