"""A flat graph in ExecuTorch's edge dialect.

`torch.export` and `to_edge` come to the same, but trace a graph a dozen times on the way, each time
for one of their passes, and that was half of the time of lowering. A flat graph needs little:

| in the flat graph | in the edge dialect |
|---|---|
| a weight, as an attribute | an input, which the signature calls a buffer |
| a number where the operator has a tensor | a tensor without dimensions |
| a view | a copy, so that every value is contiguous |
| an operator of aten | the operator of that name in the edge dialect |
"""

from __future__ import annotations

from typing import Any

import torch
from executorch.exir import EdgeCompileConfig
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from export.flat_graph import ATEN, TRANSPOSES, axes_of

CONFIG = EdgeCompileConfig(
    _check_ir_validity=False,
    _skip_dim_order=True,
    preserve_ops=[ATEN.linear.default],  # products on integers
)
COPIES: dict[Any, Any] = {
    ATEN.view.default: ATEN.view_copy.default,
    ATEN.expand.default: ATEN.expand_copy.default,
    ATEN.slice.Tensor: ATEN.slice_copy.Tensor,
    ATEN.select.int: ATEN.select_copy.int,
}


def edge_program(flat: fx.GraphModule) -> ExportedProgram:
    """The program of a flat graph, with the graph's weights themselves, not copies."""
    return _Conversion(flat).program()


class _Conversion:
    def __init__(self, flat: fx.GraphModule) -> None:
        self.flat = flat
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.inputs: list[InputSpec] = []
        self.weights: dict[str, Tensor] = {}
        self.lifted: dict[str, fx.Node] = {}
        self.numbers: dict[tuple[float, torch.dtype], str] = {}
        self.fake: FakeTensorMode = next(iter(flat.graph.nodes)).meta["val"].fake_mode

    def program(self) -> ExportedProgram:
        every = list(self.flat.graph.nodes)
        calls = [node for node in every if node.op == "call_function"]
        # A program takes weights first.
        for node in every:
            if node.op == "get_attr":
                self.nodes[node] = self.weight(str(node.target), self.attribute(str(node.target)))
        arguments = {node: self.arguments(node) for node in calls}
        for node in every:
            if node.op == "placeholder":
                self.nodes[node] = self.input(node.name, node.meta["val"], InputKind.USER_INPUT)
        for node in calls:
            self.call(node, arguments[node])
        results: Any = self.flat.graph.output_node().args[0]
        outputs = [self.nodes[node] for node in results]
        self.graph.output(tuple(outputs)).meta["val"] = tuple(n.meta["val"] for n in outputs)
        own = [spec.arg for spec in self.inputs if spec.kind == InputKind.USER_INPUT]
        called = ModuleCallSignature(
            inputs=[],
            outputs=[],
            in_spec=pytree.tree_structure((tuple(own), {})),
            out_spec=pytree.tree_structure(tuple(outputs)),
        )
        given = [TensorArgument(name=node.name) for node in outputs]
        return ExportedProgram(
            root={},
            graph=self.graph,
            graph_signature=ExportGraphSignature(
                self.inputs, [OutputSpec(OutputKind.USER_OUTPUT, each, None) for each in given]
            ),
            state_dict=self.weights,
            range_constraints={},
            module_call_graph=[ModuleCallEntry(fqn="", signature=called)],
            verifiers=[EXIREdgeDialectVerifier(edge_compile_config=CONFIG, class_only=True)],
        )

    def attribute(self, path: str) -> Tensor:
        value: Any = self.flat
        for part in path.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value.detach().contiguous()

    def input(
        self, name: str, value: Tensor, kind: InputKind, target: str | None = None
    ) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        persistent = True if target else None
        self.inputs.append(InputSpec(kind, TensorArgument(name=node.name), target, persistent))
        return node

    def weight(self, name: str, value: Tensor) -> fx.Node:
        name = "weight_" + name.replace(".", "_")
        if name not in self.lifted:
            # A backend gets a copy of its part of a program, in case it changes the graph.
            value.__deepcopy__ = lambda memo: value  # type: ignore[method-assign]
            fake = self.fake.from_tensor(value)
            self.lifted[name] = self.input(name, fake, InputKind.BUFFER, name)
            self.weights[name] = value
        return self.lifted[name]

    def arguments(self, node: fx.Node) -> list[Any]:
        """What a node is called with, of the flat graph or, if it is a number, of the program."""
        arguments: list[Any] = list(node.args)
        schema: Any = getattr(node.target, "_schema", None)  # getitem has none
        for index, declared in enumerate(schema.arguments[: len(arguments)] if schema else ()):
            value = arguments[index]
            if isinstance(value, (int, float)) and isinstance(declared.type, torch.TensorType):
                # XNNPACK takes no integer beside other numbers.
                key = (float(value), node.all_input_nodes[0].meta["val"].dtype)
                name = self.numbers.setdefault(key, f"number_{len(self.numbers)}")
                arguments[index] = self.weight(name, torch.tensor(value, dtype=key[1]))
        return arguments

    def call(self, node: fx.Node, arguments: list[Any]) -> None:
        target: Any = COPIES.get(node.target, node.target)
        arguments = fx.node.map_arg(arguments, lambda each: self.nodes.get(each, each))
        if node.target in TRANSPOSES:
            target, arguments = ATEN.permute_copy.default, [arguments[0], axes_of(node)]
        elif node.target == ATEN.clone.default:
            self.nodes[node] = arguments[0]  # of a view, which here is a copy already
            return
        known = fx.node.map_arg((arguments, node.kwargs), lambda each: each.meta["val"])
        if isinstance(target, torch._ops.OpOverload):
            target = aten_to_edge(target)
        made = self.graph.call_function(target, tuple(arguments), dict(node.kwargs))
        made.meta["val"] = node.meta.get("val")
        with self.fake:
            if made.meta["val"] is None:
                made.meta["val"] = target(*known[0], **known[1])
            elif not made.meta["val"].is_contiguous():
                made.meta["val"] = made.meta["val"].contiguous()
        self.nodes[node] = made
