"""One ONNX graph for two programs, of which the lesser one leaves out some outputs.

ONNX Runtime computes a whole graph, whichever outputs are asked for. Two graphs would be two
sessions, and the weights, in the order that products want them in, twice in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edge_runtime.engines import EVERY_OUTPUT


def add_switch(model: ModelProto, optional: Sequence[str]) -> None:
    """Puts what only the `optional` float32 outputs need into branches: without the input
    EVERY_OUTPUT, or where it is true, they are computed as before, and else they are empty.

    Operators that depend on each other share a branch, which stands where the last of them stood:
    what they read is not kept for longer than before.
    """
    graph = model.graph
    nodes = list(graph.node)
    always = _behind(nodes, [port.name for port in graph.output if port.name not in optional])
    branches = _connected(nodes, sorted(set(range(len(nodes))) - always))
    ports = {port.name: port for port in graph.output}
    for branch in branches:
        nodes[branch[-1]] = _branch([nodes[index] for index in branch], ports)
    ends = {branch[-1] for branch in branches}
    kept = [node for index, node in enumerate(nodes) if index in always | ends]
    del graph.node[:]
    graph.node.extend(kept)
    graph.input.append(helper.make_tensor_value_info(EVERY_OUTPUT, TensorProto.BOOL, []))
    graph.initializer.append(numpy_helper.from_array(np.array(True), EVERY_OUTPUT))


def _behind(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> set[int]:
    """Which of the operators `outputs` depend on."""
    wanted, found = set(outputs), set()
    for index in reversed(range(len(nodes))):
        if wanted.intersection(nodes[index].output):
            wanted.update(nodes[index].input)
            found.add(index)
    return found


def _connected(nodes: Sequence[NodeProto], chosen: Sequence[int]) -> list[list[int]]:
    """Those of `nodes` that are `chosen`, by whether they depend on each other, in their order."""
    makers: dict[str, list[int]] = {}  # of a value: all that what makes it is connected with
    for index in chosen:
        group = [index]
        for value in nodes[index].input:
            other = makers.get(value, group)
            if other is group:
                continue
            small, group = sorted((other, group), key=len)
            group += small
            makers |= {value: group for moved in small for value in nodes[moved].output}
        makers |= {value: group for value in nodes[index].output}
    return [sorted(group) for group in {id(group): group for group in makers.values()}.values()]


def _branch(nodes: Sequence[NodeProto], ports: dict[str, ValueInfoProto]) -> NodeProto:
    """The operators, or instead of what they make of `ports`, nothing."""
    made = [value for node in nodes for value in node.output if value in ports]
    for node in nodes:
        for values in (node.input, node.output):
            # Names are unique in a graph and its branches together.
            values[:] = [f"{value}.made" if value in made else value for value in values]
    ranks = {name: len(ports[name].type.tensor_type.shape.dim) for name in made}
    then, otherwise = [], []
    for name in made:
        then.append(ValueInfoProto(name=f"{name}.made", type=ports[name].type))
        empty = [0] * ranks[name]
        otherwise.append(helper.make_tensor_value_info(f"{name}.none", TensorProto.FLOAT, empty))
    nothing = [
        helper.make_node(
            "Constant",
            [],
            [port.name],
            value=numpy_helper.from_array(np.zeros([0] * ranks[name], np.float32)),
        )
        for name, port in zip(made, otherwise, strict=True)
    ]
    return helper.make_node(
        "If",
        [EVERY_OUTPUT],
        made,
        then_branch=helper.make_graph(nodes, "then", [], then),
        else_branch=helper.make_graph(nothing, "else", [], otherwise),
    )
