"""Flat graphs of aten operators as ONNX graphs.

Written out here, and not left to an exporter, for what the programs gain by it:

* a matrix product takes its transposes as flags, so that a weight is stored once although the
  forward pass multiplies by W and the backward pass by its transpose;
* what is added to a product, and the number it is scaled by, become part of it (Gemm);
* compiling takes seconds, most of which tracing is.

With an int8 base, products with large frozen matrices are integer products of weights that were
quantised here, symmetrically and per output, and activations that are quantised as they come, per
token. Programs that continue a text by few tokens have products that bring their own activations to
eight bits, and of four-bit weights those alone have four.

All these take a matrix of eight bits from the same bytes: output by output, unsigned around 128.
Integer products want them signed, for which newer processors have instructions. x86 without VNNI
has others, which cut sums: for it there is a second graph, with unsigned weights.

An operator that is not listed here is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from export.flat_graph import (
    ATEN,
    TRANSPOSES,
    Decompositions,
    axes_of,
    decompositions,
    is_transpose,
    untransposed,
)
from export.programs import BLOCK_MULTIPLES, BLOCKS, Blocks
from export.rounding import (
    SMALLEST_EMBEDDING,
    Judged,
    block_lengths,
    coarse_and_even_products,
    coarse_products,
    eight_bits,
)

OPSET = 20
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
IR_VERSION = 10
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
# Matrices with fewer numbers stay float32: they cost little and an integer product gains little.
SMALLEST_QUANTISED = 2**15
BLOCK_MULTIPLE = BLOCK_MULTIPLES["onnxruntime"]
MIDDLE = 128  # what stands for zero in bytes
DECOMPOSITIONS: Decompositions = decompositions(lambda x: x.sum(-1, keepdim=True))

Argument: TypeAlias = Any  # an fx.Node or what it was called with: numbers, lists, None


@dataclass(frozen=True)
class Product:
    """alpha * A @ B of two matrices, by value name, each perhaps transposed."""

    a: str
    b: str
    transposed_a: bool
    transposed_b: bool
    alpha: float = 1.0


def translate(
    graph_module: fx.GraphModule,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    int8: bool = False,
    blocks: Blocks | None = None,
    examples: Sequence[Sequence[Tensor]],
    judged: Judged,
    length: int = 0,
) -> Iterator[onnx.ModelProto]:
    """The ONNX model of a flat graph, with the weights inside.

    If it has integer products of signed weights, a second one follows, in which they are unsigned.

    Args:
        int8: quantise the large frozen matrices.
        blocks: quantise them in this way instead of with a scale for each column.
        examples: with `int8`, inputs on which to see which products rounding is too coarse for.
        judged: what programs with the same weights and the same kind of text have shown of that.
        length: dimensions that are a multiple of it are free (0: none is).

    Raises:
        NotImplementedError: the graph holds an operator that has no translation.
    """
    translation = _Translation(graph_module, int8, blocks, length)
    if blocks:
        translation.block_lengths = block_lengths(
            graph_module,
            examples,
            translation.quantised,
            lambda weight, inputs: translation.blocks_of(weight).lengths(inputs),
        )
    elif int8 and length:  # even ones: a tenth of the time; of a training step less
        translation.coarse, translation.even = coarse_and_even_products(
            graph_module, examples, translation.quantised
        )
    elif int8:
        translation.coarse = coarse_products(graph_module, examples, translation.quantised, judged)
    yield translation.model(input_names, output_names)
    if translation.matrices:
        unsigned = _Translation(graph_module, int8, blocks, length, signed=False)
        unsigned.coarse, unsigned.even = translation.coarse, translation.even
        unsigned.block_lengths, unsigned.rounded = translation.block_lengths, translation.rounded
        yield unsigned.model(input_names, output_names)


class _Translation:
    """The ONNX graph as it grows, and what each fx node is called in it."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        int8: bool,
        blocks: Blocks | None,
        length: int,
        *,
        signed: bool = True,
    ) -> None:
        self.module = graph_module
        self.int8 = int8
        self.blocks = blocks
        self.length = length
        self.signed = signed
        products = (n for n in graph_module.graph.nodes if n.target == ATEN.mm.default)
        factors = [(untransposed(node.args[1]), is_transpose(node.args[1])) for node in products]
        self.coarse: set[fx.Node] = set()  # products for which rounding is too coarse
        self.even: set[fx.Node] = set()  # for which all tokens may be rounded on one scale
        self.block_lengths: dict[fx.Node, int] = {}  # of products with weights in blocks
        # Weights, and the axis that is summed over.
        self.factors = {node.target: int(t) for node, t in factors if node.op == "get_attr"}
        self.head = factors[-1][0].target if factors else ""  # of programs that continue a text
        self.rounded: dict[str, tuple[Tensor, Tensor]] = {}  # weights, see `integers`
        self.matrices: dict[str, tuple[str, str, bool]] = {}  # weights, see `integer_matrix`
        self.embeddings: set[str] = set()  # quantised weights of which rows are looked up
        self.names: dict[fx.Node, str] = {}
        self.products: dict[fx.Node, Product] = {}
        self.in_blocks: dict[fx.Node, onnx.NodeProto] = {}  # products that could take a bias
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        # Further outputs of operators, and what was emitted once for all its users.
        self.further: dict[tuple[str, str], str] = {}

    def model(self, input_names: Sequence[str], output_names: Sequence[str]) -> onnx.ModelProto:
        """The whole graph, translated."""
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, input_names, strict=True):
            self.names[node] = name
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                self.names[node] = node.target
            elif node.op == "call_function":
                self.call(node)
        results: Any = self.module.graph.output_node().args[0]
        self.return_as(output_names, results)
        nodes = self.needed(output_names)
        graph = helper.make_graph(
            nodes,
            "program",
            [self.port(*port) for port in zip(input_names, placeholders, strict=True)],
            [self.port(*port) for port in zip(output_names, results, strict=True)],
            list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets)

    def call(self, node: fx.Node) -> None:
        translate_one = TRANSLATIONS.get(node.target)
        if translate_one is None:
            raise NotImplementedError(f"{node.target} has no translation to ONNX")
        self.names[node] = translate_one(self, node, *node.args, **node.kwargs)

    def name(self, argument: Argument, like: Argument = None) -> str:
        """What `argument` is called; a number becomes a constant of the dtype of `like`."""
        if isinstance(argument, fx.Node):
            return self.names[argument]
        dtype = like.meta["val"].dtype if isinstance(like, fx.Node) else torch.int64
        return self.constant(torch.tensor(argument, dtype=dtype))

    def is_free(self, size: int) -> bool:
        """Whether a dimension of that size depends on the number of tokens."""
        return self.length > 0 and size % self.length == 0

    def port(self, name: str, node: fx.Node) -> onnx.ValueInfoProto:
        value = node.meta["val"]
        shape = ["tokens" if size == self.length else size for size in value.shape]
        return helper.make_tensor_value_info(name, TYPES[value.dtype], shape)

    def shape(self, node: fx.Node) -> str:
        """A constant: what to reshape to; of the free dimension there is what is left."""
        return self.constant(
            torch.tensor([-1 if self.is_free(size) else size for size in _shape(node)])
        )

    def return_as(self, names: Sequence[str], nodes: Sequence[fx.Node]) -> None:
        """Lets the values of `nodes` be outputs, where they are computed if that can be."""
        made = {value for emitted in self.nodes for value in emitted.output}
        renamed: dict[str, str] = {}
        copied = []
        for name, node in zip(names, nodes, strict=True):
            value = self.name(node)
            if value in made and value not in renamed:
                renamed[value] = name
            else:
                copied.append((value, name))
        for emitted in self.nodes:
            for values in (emitted.input, emitted.output):
                for index, value in enumerate(values):
                    if value in renamed:
                        values[index] = renamed[value]
        for value, name in copied:
            self.nodes.append(helper.make_node("Identity", [renamed.get(value, value)], [name]))

    def weight(self, attribute: str) -> Tensor:
        value: Tensor = getattr(self.module, attribute).detach()
        return value

    def store(self, name: str, value: Tensor) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(value.contiguous().numpy(), name)
        return name

    def constant(self, value: Tensor) -> str:
        return self.store(f"constant_{value.dtype}_{value.tolist()}".replace(" ", ""), value)

    def emit(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Appends an operator; the name of its first output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        more = [f"{name}.{i}" for i in range(1, outputs)]
        self.nodes.append(helper.make_node(kind, inputs, [name, *more], **attributes))
        return name

    def gemm(self, product: Product, added: str | None = None) -> str:
        return self.emit(
            "Gemm",
            *(product.a, product.b, *([added] if added else [])),
            transA=int(product.transposed_a),
            transB=int(product.transposed_b),
            alpha=product.alpha,
        )

    def matrix(self, node: fx.Node) -> tuple[str, bool]:
        """A factor of a product: (value name, whether it is to be transposed)."""
        if is_transpose(node):
            return self.name(node.args[0]), True
        return self.name(node), False

    def sole_product(self, argument: Argument) -> Product | None:
        """The product behind `argument`, if nobody else wants it as it is."""
        if not isinstance(argument, fx.Node) or len(argument.users) != 1:
            return None
        return self.products.get(argument)

    def needed(self, outputs: Sequence[str]) -> list[onnx.NodeProto]:
        """The operators that `outputs` depend on: not the products that became part of others."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        for name in set(self.initializers) - wanted:
            del self.initializers[name]
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and node.target in wanted:
                self.store(node.target, self.weight(node.target))
        return kept[::-1]

    # --- an int8 base --------------------------------------------------------------------------

    def quantised(self, node: fx.Node) -> bool:
        """Whether `node` is a frozen matrix of products that is stored in int8."""
        shape = _shape(node)
        if not self.int8 or node.op != "get_attr" or node.target not in self.factors:
            return False
        whole = not self.blocks or shape[self.factors[node.target]] % BLOCK_MULTIPLE == 0
        return whole and shape.numel() >= SMALLEST_QUANTISED

    def integers(self, attribute: str, transposed: bool) -> tuple[Tensor, Tensor]:
        """A weight, or its transpose, as bytes (outputs, inputs) around MIDDLE and float32 scales
        (outputs,)."""
        if attribute not in self.rounded:
            value = self.weight(attribute)
            integers, scales = eight_bits(value.T if transposed else value)
            self.rounded[attribute] = (integers.to(torch.int16) + MIDDLE).to(torch.uint8), scales
        return self.rounded[attribute]

    def integer_matrix(self, attribute: str, transposed: bool) -> tuple[str, str, bool]:
        """A weight as integers (outputs, inputs) of products of many rows.

        Signed ones are made when a program is loaded, of the bytes that programs share. Products
        with them are twice as fast.

        Args:
            transposed: whether the product is with the weight's transpose.

        Returns:
            Its name, that of its scales, and whether such a product was its first use. That is the
            forward pass, and says what the outputs are; the backward pass sums over them, with the
            same scales.
        """
        if attribute not in self.matrices:
            stored, scale = self.integers(attribute, transposed=not transposed)
            if self.signed:
                bits = self.store(f"{attribute}.bits", stored.view(torch.int8))
                highest = self.constant(torch.tensor(-MIDDLE, dtype=torch.int8))
                matrix = self.emit("BitwiseXor", bits, highest)  # they differ in their highest bit
            else:
                matrix = self.store(f"{attribute}.bytes", stored)
            scales = self.store(f"{attribute}.scale", scale)
            self.matrices[attribute] = matrix, scales, transposed
        return self.matrices[attribute]

    def zeros(self, shape: tuple[int, ...]) -> str:
        """What stands for zero in an `integer_matrix`, so often."""
        if self.signed:
            return self.store(f"zeros_{list(shape)}", torch.zeros(shape, dtype=torch.int8))
        return self.store(f"middles_{list(shape)}", torch.full(shape, MIDDLE, dtype=torch.uint8))

    def integer_product(
        self, a: str, b: fx.Node, transposed: bool, coarse: bool, even: bool
    ) -> str:
        """a @ b, or a @ b.T, of a float32 matrix and a quantised weight.

        With `coarse`, what rounding left of `a` gets a product of its own. With `even`, its rows
        share a scale.
        """
        attribute = str(b.target)
        stored, scales, first = self.integer_matrix(attribute, transposed)
        backward = transposed != first
        x = self.emit("Mul", a, scales) if backward else a
        factor = self.constant(torch.tensor(1.0)) if backward else scales
        if even and not backward:
            return self.integer_gemm(x, stored, factor, transposed=True)
        # Tokens differ in size. Brought to the same first, each is quantised on its own scale.
        rows = self.constant(torch.tensor([1]))
        largest = self.emit("ReduceMax", self.emit("Abs", x), rows, keepdims=1)
        size = self.emit("Max", largest, self.constant(torch.tensor(1e-30)))
        level = self.emit("Div", x, size)
        product = self.integer_gemm(level, stored, factor, not backward)
        # Summed over the vocabulary: probabilities, most of them far smaller than a step.
        if coarse or (backward and attribute in self.embeddings):
            step = self.emit("DynamicQuantizeLinear", level, outputs=3)
            rounded = self.emit("DequantizeLinear", step, f"{step}.1", f"{step}.2")
            rest = self.emit("Sub", level, rounded)
            second = self.integer_gemm(rest, stored, factor, not backward)
            product = self.emit("Add", product, second)
        return self.emit("Mul", product, size)

    def integer_gemm(self, a: str, integers: str, scales: str, transposed: bool) -> str:
        """a @ (integers scales), or with the integers transposed, `a` rounded on one scale."""
        zero = self.zeros(tuple(self.initializers[scales].dims))
        if not transposed:
            factors = (a, integers, scales) if self.signed else (a, integers, scales, zero)
            return self.emit("DynamicQuantizeMatMul", *factors, domain=MICROSOFT)
        rounded = self.emit("DynamicQuantizeLinear", a, outputs=3)
        return self.emit(
            "QGemm",
            *(rounded, f"{rounded}.1", f"{rounded}.2", integers, scales, zero),
            domain=MICROSOFT,
            transB=1,
        )

    def blocks_of(self, attribute: str) -> Blocks:
        """How a weight is quantised in blocks."""
        assert self.blocks is not None
        # Four bits cost more in the head, which tells words apart, than anywhere else.
        return BLOCKS["int8"] if attribute == self.head else self.blocks

    def block_product(self, a: str, b: fx.Node, transposed: bool, size: int) -> str:
        """a @ b, or a @ b.T, of a float32 matrix and a weight, in blocks.

        Each `size` inputs share a scale: of a row of `a`, and, with four bits, of a weight's
        output, which else has one for all.
        """
        attribute = str(b.target)
        bits = self.blocks_of(attribute).bits
        inputs, outputs = _shape(b)[::-1] if transposed else _shape(b)
        if bits == 8:
            stored, scale = self.integers(attribute, transposed=not transposed)
            integers = stored.view(outputs, -1, size)
            scales = scale.repeat_interleave(inputs // size)
        else:
            value = self.weight(attribute)
            integers, scales = four_bits(value if transposed else value.T, size)
        return self.emit(
            "MatMulNBits",
            a,
            self.store(f"{attribute}.int{bits}.blocks", integers),
            self.store(f"{attribute}.int{bits}.scales", scales),
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=size,
            accuracy_level=4,  # activations in int8, on a scale for each block
        )

    def integer_rows(self, a: fx.Node, index: str) -> str:
        """Rows of an embedding, as float32.

        They are stored once with a tied head, on its scales. What it costs a real base,
        tests/export/test_bases_in_packages.py bounds.
        """
        attribute = str(a.target)
        self.embeddings.add(attribute)
        integers, scale = self.integers(attribute, transposed=False)
        if self.length:  # few rows of the file
            stored, middle = self.store(f"{attribute}.bytes", integers), float(MIDDLE)
        else:  # many, of what is in memory for the head
            stored, _, _ = self.integer_matrix(attribute, transposed=True)
            middle = 0.0 if self.signed else float(MIDDLE)
        rows = self.emit("Gather", stored, index, axis=0)
        numbers = self.emit("Cast", rows, to=TensorProto.FLOAT)
        if middle:
            numbers = self.emit("Sub", numbers, self.constant(torch.tensor(middle)))
        scales = self.store(f"{attribute}.row_scale", scale.unsqueeze(1))
        return self.emit("Mul", numbers, self.emit("Gather", scales, index, axis=0))


def four_bits(value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as integers from 0 to 15 around 8, with a scale for each `size` inputs.

    The largest number of a block gets the lowest integer, which has no positive counterpart: so
    the whole range is used (llama.cpp's Q4_0).

    Returns:
        uint8 (out, in / size, size / 2), the first of two in the lower half, and float32
        (out in / size,).
    """
    blocks = value.reshape(value.shape[0], -1, size)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = torch.where(largest == 0, 1.0, largest / -8)
    integers = (torch.round(blocks / scales) + 8).clamp(0, 15).to(torch.uint8)
    return integers[..., ::2] | (integers[..., 1::2] << 4), scales.reshape(-1)


# --- one function per kind of operator -----------------------------------------------------------


def _mm(t: _Translation, node: fx.Node, a: fx.Node, b: fx.Node) -> str:
    factor = untransposed(b)
    if t.quantised(factor) and t.blocks:
        size = t.block_lengths[node]
        result = t.block_product(t.name(a), factor, transposed=factor is not b, size=size)
        t.in_blocks[node] = t.nodes[-1]
        return result
    if t.quantised(factor):
        transposed, coarse, even = factor is not b, node in t.coarse, node in t.even
        return t.integer_product(t.name(a), factor, transposed=transposed, coarse=coarse, even=even)
    (a_name, transposed_a), (b_name, transposed_b) = t.matrix(a), t.matrix(b)
    t.products[node] = Product(a_name, b_name, transposed_a, transposed_b)
    return t.gemm(t.products[node])


def _add(t: _Translation, node: fx.Node, a: Argument, b: Argument) -> str:
    if isinstance(a, fx.Node) and a in t.in_blocks and len(a.users) == 1 and _is_bias(b):
        t.in_blocks[a].input.extend(["", "", t.name(b)])
        return t.name(a)
    for summand, other in ((b, a), (a, b)):
        product = t.sole_product(summand)
        # Gemm broadcasts what it adds, not the product.
        if product and isinstance(other, fx.Node) and _shape(summand) == _shape(node):
            return t.gemm(product, t.name(other))
    return t.emit("Add", t.name(a, b), t.name(b, a))


def _is_bias(value: Argument) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and len(_shape(value)) == 1


def _mul(t: _Translation, node: fx.Node, a: Argument, b: Argument) -> str:
    product = t.sole_product(a)
    if product and isinstance(b, (int, float)):
        t.products[node] = replace(product, alpha=product.alpha * b)
        return t.gemm(t.products[node])
    return t.emit("Mul", t.name(a, b), t.name(b, a))


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _binary(kind: str) -> Callable[..., str]:
    def call(t: _Translation, node: fx.Node, a: Argument, b: Argument) -> str:
        return t.emit(kind, t.name(a, b), t.name(b, a))

    return call


def _unary(kind: str) -> Callable[..., str]:
    def call(t: _Translation, node: fx.Node, a: fx.Node) -> str:
        return t.emit(kind, t.name(a))

    return call


def _rsqrt(t: _Translation, node: fx.Node, a: fx.Node) -> str:
    return t.emit("Reciprocal", t.emit("Sqrt", t.name(a)))


def _reverse_sub(t: _Translation, node: fx.Node, a: fx.Node, b: float) -> str:
    return t.emit("Sub", t.name(b, a), t.name(a))


def _clone(t: _Translation, node: fx.Node, a: fx.Node, **layout: Any) -> str:
    return t.name(a)


def _reshape(t: _Translation, node: fx.Node, a: fx.Node, shape: Argument) -> str:
    return t.emit("Reshape", t.name(a), t.shape(node))


def _expand(t: _Translation, node: fx.Node, a: fx.Node, shape: Argument) -> str:
    return t.emit("Expand", t.name(a), t.constant(torch.tensor(list(_shape(node)))))


def _transpose(t: _Translation, node: fx.Node, a: fx.Node, *axes: Argument) -> str:
    return t.emit("Transpose", t.name(a), perm=axes_of(node))


def _slice(
    t: _Translation,
    node: fx.Node,
    a: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    bounds = ([start or 0], [np.iinfo(np.int64).max if end is None else end], [dim], [step])
    return t.emit("Slice", t.name(a), *(t.constant(torch.tensor(bound)) for bound in bounds))


def _pad(
    t: _Translation, node: fx.Node, a: fx.Node, pads: Sequence[int], value: float = 0.0
) -> str:
    before = [0] * len(_shape(node))
    after = list(before)
    for i in range(len(pads) // 2):
        before[-1 - i], after[-1 - i] = pads[2 * i], pads[2 * i + 1]
    return t.emit("Pad", t.name(a), t.constant(torch.tensor(before + after)), t.name(value, a))


def _cat(t: _Translation, node: fx.Node, parts: Sequence[fx.Node], dim: int = 0) -> str:
    return t.emit("Concat", *map(t.name, parts), axis=dim)


def _stack(t: _Translation, node: fx.Node, parts: Sequence[fx.Node], dim: int = 0) -> str:
    if dim == 0:  # the same memory as one after the other
        return t.emit("Reshape", t.emit("Concat", *map(t.name, parts), axis=0), t.shape(node))
    axis = t.constant(torch.tensor([dim]))
    return t.emit("Concat", *(t.emit("Unsqueeze", t.name(p), axis) for p in parts), axis=dim)


def _reduce(kind: str) -> Callable[..., str]:
    def call(
        t: _Translation,
        node: fx.Node,
        a: fx.Node,
        dims: Sequence[int] | None = None,
        keepdim: bool = False,
    ) -> str:
        axes = list(dims) if dims else list(range(len(_shape(a))))
        return t.emit(kind, t.name(a), t.constant(torch.tensor(axes)), keepdims=int(keepdim))

    return call


def _softmax(t: _Translation, node: fx.Node, a: fx.Node, dim: int, half: bool) -> str:
    return t.emit("Softmax", t.name(a), axis=dim)


def _layer_norm(
    t: _Translation, node: fx.Node, x: fx.Node, shape: Argument, w: fx.Node, b: fx.Node, eps: float
) -> str:
    inputs = (t.name(x), t.name(w), t.name(b))
    return t.emit("LayerNormalization", *inputs, outputs=3, axis=-1, epsilon=eps)


def _getitem(t: _Translation, node: fx.Node, a: fx.Node, index: int) -> str:
    name = t.name(a)
    return t.further.get((name, str(index)), f"{name}.{index}") if index else name


def _index(t: _Translation, node: fx.Node, a: fx.Node, indices: Sequence[fx.Node]) -> str:
    (index,) = indices
    if t.int8 and a.op == "get_attr" and _shape(a).numel() >= SMALLEST_EMBEDDING:
        return t.integer_rows(a, t.name(index))
    return t.emit("Gather", t.name(a), t.name(index), axis=0)


def _index_select(t: _Translation, node: fx.Node, a: fx.Node, dim: int, index: fx.Node) -> str:
    return t.emit("Gather", t.name(a), t.name(index), axis=dim)


def _clamp(
    t: _Translation,
    node: fx.Node,
    a: fx.Node,
    low: float | None = None,
    high: float | None = None,
    **named: float,
) -> str:
    bounds = (low, high if high is not None else named.get("max"))
    return t.emit("Clip", t.name(a), *("" if x is None else t.name(x, a) for x in bounds))


def _positions(t: _Translation, node: fx.Node, tokens: fx.Node, position: fx.Node) -> str:
    filled = t.emit("Add", t.name(position), t.emit("Shape", t.name(tokens)))
    scalar = t.constant(torch.tensor([], dtype=torch.int64))
    bounds = [t.emit("Reshape", value, scalar) for value in (t.name(position), filled)]
    at = t.emit("Range", *bounds, t.constant(torch.tensor(1)))
    t.further[at, "1"] = filled
    return at


def _cached_attention(
    t: _Translation,
    node: fx.Node,
    q: fx.Node,
    k: fx.Node | None,
    v: fx.Node | None,
    keys: fx.Node,
    values: fx.Node,
    filled: fx.Node,
    heads: int,
    *rotary: fx.Node,
) -> str:
    total = t.name(filled)
    if (total, "last") not in t.further:
        before = t.emit("Sub", total, t.constant(torch.tensor([1])))
        t.further[total, "last"] = t.emit("Cast", before, to=TensorProto.INT32)
        scalar = t.emit("Reshape", total, t.constant(torch.tensor([], dtype=torch.int64)))
        t.further[total, "scalar"] = t.emit("Cast", scalar, to=TensorProto.INT32)
    rows = [
        t.emit("Reshape", t.name(x), t.constant(torch.tensor([1, -1, _shape(x)[1]]))) if x else ""
        for x in (q, k, v)
    ]
    # Where the caller passes one memory for the cache and its update, nothing of it is copied.
    attended = t.emit(
        "GroupQueryAttention",
        *(*rows, t.name(keys), t.name(values)),
        *(t.further[total, "last"], t.further[total, "scalar"]),
        *map(t.name, rotary),
        outputs=3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=_shape(keys)[1],
        do_rotary=int(bool(rotary)),
    )
    result = t.emit("Reshape", attended, t.constant(torch.tensor([-1, heads * _shape(keys)[3]])))
    t.further[result, "1"], t.further[result, "2"] = f"{attended}.1", f"{attended}.2"
    return result


def _gelu(t: _Translation, node: fx.Node, a: fx.Node, approximate: str = "none") -> str:
    return t.emit("Gelu", t.name(a), approximate=approximate)


def _rms_norm(t: _Translation, node: fx.Node, x: fx.Node, weight: fx.Node, epsilon: float) -> str:
    # ONNX Runtime's own, in ONNX's domain.
    return t.emit(
        "SimplifiedLayerNormalization", t.name(x), t.name(weight), axis=-1, epsilon=epsilon
    )


def _silu(t: _Translation, node: fx.Node, a: fx.Node) -> str:
    return t.emit("QuickGelu", t.name(a), alpha=1.0, domain=MICROSOFT)


def _to_copy(t: _Translation, node: fx.Node, a: fx.Node, **options: Any) -> str:
    return t.emit("Cast", t.name(a), to=TYPES[node.meta["val"].dtype])


TRANSLATIONS: dict[Any, Callable[..., str]] = {
    ATEN.mm.default: _mm,
    ATEN.bmm.default: _binary("MatMul"),
    ATEN.add.Tensor: _add,
    ATEN.sub.Tensor: _binary("Sub"),
    ATEN.mul.Tensor: _mul,
    ATEN.div.Tensor: _binary("Div"),
    ATEN.rsub.Scalar: _reverse_sub,
    ATEN.ge.Tensor: _binary("GreaterOrEqual"),
    ATEN.neg.default: _unary("Neg"),
    ATEN.exp.default: _unary("Exp"),
    ATEN.rsqrt.default: _rsqrt,
    ATEN.log.default: _unary("Log"),
    ATEN.sigmoid.default: _unary("Sigmoid"),
    ATEN.clone.default: _clone,
    ATEN.view.default: _reshape,
    ATEN.expand.default: _expand,
    **dict.fromkeys(TRANSPOSES, _transpose),
    ATEN.slice.Tensor: _slice,
    ATEN.constant_pad_nd.default: _pad,
    ATEN.cat.default: _cat,
    ATEN.stack.default: _stack,
    ATEN.sum.default: _reduce("ReduceSum"),
    ATEN.sum.dim_IntList: _reduce("ReduceSum"),
    ATEN.amax.default: _reduce("ReduceMax"),
    ATEN._softmax.default: _softmax,
    ATEN.native_layer_norm.default: _layer_norm,
    operator.getitem: _getitem,
    ATEN.index.Tensor: _index,
    ATEN.index_select.default: _index_select,
    ATEN.clamp.default: _clamp,
    ATEN._to_copy.default: _to_copy,
    ATEN.gelu.default: _gelu,
    ATEN.silu.default: _silu,
    torch.ops.comigs.rms_norm.default: _rms_norm,
    torch.ops.comigs.positions.default: _positions,
    torch.ops.comigs.cached_attention.default: _cached_attention,
}
