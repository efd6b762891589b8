"""Flat graphs to one ExecuTorch program whose methods share their weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from torch import Tensor, fx
from torch.fx.traceback import NodeSource

PROGRAM_FILE = "executorch/programs.pte"


def compile_programs(
    graphs: Mapping[str, tuple[fx.GraphModule, Sequence[Tensor]]], *, file: Path
) -> dict[str, int]:
    """Writes all of `graphs` (method name -> graph, example arguments) as the methods of one file.

    Returns:
        Method name -> planned activation arena in bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), _quiet():
        exported = {
            method: torch.export.export(graph_module, tuple(arguments), strict=False)
            for method, (graph_module, arguments) in graphs.items()
        }
        # In a joint graph the weights of matrix products arrive as run-time values (a transpose of
        # a constant); without the flag none of them is delegated. It also keeps the weights
        # ordinary constants, which the methods share, instead of a packed copy per method.
        edge = to_edge_transform_and_lower(
            exported,
            partitioner={
                method: [XnnpackPartitioner(force_non_static_weights_for_f32_linear=True)]
                for method in exported
            },
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        # Removing view copies fails on views of inputs that a method also returns gradients of.
        program = edge.to_executorch(ExecutorchBackendConfig(remove_view_copy=False))
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
