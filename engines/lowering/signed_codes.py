"""Quantized weights in the forms that TensorRT fuses with a product or a gather: signed codes, all zero points zero.

A package has a weight [N, K] as unsigned codes q, scales s and zero points z in blocks along K: s (q - z). TensorRT has
signed types without zero points. With the middle code m,

    x W^T = x (s (q - m))^T - sums(x) c^T,    c = s (z - m)

where `sums` adds the columns of x in each block. Symmetric weights have z = m, and no second product. TensorRT rounds
s (q - m), c, the sums and both products to the model's dtype, where a package rounds s (q - z) and one product.

It multiplies by 4 bits in blocks, and by 8 bits with a scale per row. 8 bits in blocks become two digits of 4 bits
each, q = 16 h + l, side by side along K: [x x] times 16 s (h - 8) and s (l - 8), with m = 136.

Experts are gathered before they are multiplied by: their digits are added, and c is subtracted from the weights
themselves. Where the columns are sorted (act-order), the operator is given their order too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import DOMAIN, MOE_EXPERTS
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.act_order import columns_of, sorted_weight
from qwenport.engines.lowering.few_bits import QuantizedWeight, quantized_weight
from qwenport.engines.lowering.made_tensors import (
    Correction,
    MadeTensor,
    Part,
    digit_scales,
    digits,
    repeated,
    signed,
)
from qwenport.engines.lowering.signed_forms import (
    INT4,
    Form,
    Product,
    form_of,
    is_dequantized,
    producer,
    products_by_input,
)
from qwenport.engines.lowering.signed_nodes import SignedNodes
from qwenport.plugins.moe_experts import INPUTS
from qwenport.plugins.nodes import append_node, initializer, remove_unused

INT32 = ir.DataType.INT32
FILE = "codes.bin"
"""Holds the new tensors, next to the lowered model."""
LEAST_BLOCK, MOST_BLOCK = 16, 128
"""TensorRT multiplies by 4 bits in blocks of powers of two, from the one to the other."""
SUMS = 8
"""A product by corrections is fused if the sums are a multiple of this."""
ALIGNMENT = 64


@dataclass(frozen=True)
class SignedWeight:
    """What one DequantizeLinear of the lowered graph dequantizes.

    Attributes:
        node: its name, and its output's.
        weights: the package's weights in it.
        elements: of its codes.
        dtype: of its codes.
        correction: what is subtracted; None of symmetric weights.
        columns: the initializer int32 [experts, K] that has, for each column of an expert's codes, the column of its
            input; None if they are the input's own, and of what is no stack of experts.
    """

    node: str
    weights: tuple[str, ...]
    elements: int
    dtype: ir.DataType
    correction: Correction | None
    columns: str | None = None


@dataclass(frozen=True)
class SignedCodes:
    """What `UseSignedCodes` leaves beside the graph.

    Attributes:
        tensors: what FILE must hold, and `bytes` its size.
        weights: the quantized ones.
    """

    tensors: tuple[MadeTensor, ...] = ()
    bytes: int = 0
    weights: tuple[SignedWeight, ...] = ()


class UseSignedCodes(InPlacePass):
    """DequantizeLinear of unsigned codes -> of signed ones. Products by weights of one kind with one input are merged.

    Attributes:
        made: what else there is, after `call`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = SignedCodes()

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: a weight that TensorRT would expand, or that is used as none can be.
        """
        work = _Work(model.graph)
        for node in [*model.graph]:
            if node.op_type == MOE_EXPERTS and node.domain == DOMAIN:
                work.experts(node)
        for group in products_by_input(model.graph):
            work.products(group)
        for node in [*model.graph]:
            if is_dequantized(node) and node.name not in work.names:
                work.rows(node)
        self.made = SignedCodes(tuple(work.tensors), work.end, tuple(work.weights))
        return PassResult(model, bool(work.weights))


class _Work:
    """The changes to one graph.

    Attributes:
        tensors, weights: as in `SignedCodes`.
        names: of the new DequantizeLinear nodes.
        end: of the file so far.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.tensors: list[MadeTensor] = []
        self.weights: list[SignedWeight] = []
        self.names: set[str] = set()
        self.end = 0
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def products(self, group: Sequence[Product]) -> None:
        """Products of one input by weights of one form: one product, split."""
        first, form = group[0], group[0].form
        weights = [product.weight for product in group]
        x = first.node.inputs[0]
        assert x is not None
        name = f"{first.dequantize.name}.signed"
        correction = self._correction(name, weights, form)
        dequantized = self._dequantized(name, weights, form, correction, first.dequantize)
        nodes = SignedNodes(self.graph, f"{first.node.name}.signed", form.dtype)
        factor = nodes.op("Concat", x, x, axis=-1) if form.in_digits else x
        y = nodes.op("MatMul", factor, nodes.op("Transpose", dequantized, perm=[1, 0]))
        if correction is not None:
            sums = self._sums.get((x, form.block))
            if sums is None:
                sums = self._sums[x, form.block] = nodes.sums(x, form, correction.rows)
            values = self.graph.initializers[correction.name]
            y = nodes.op("Sub", y, nodes.op("Mul" if form.blocks == 1 else "MatMul", sums, values))
        outputs = [product.node.outputs[0] for product in group]
        shapes = [value.shape for value in outputs]
        results = [y] if len(group) == 1 else nodes.split(y, [w.n for w in weights], shapes)
        self.graph.insert_before(first.node, nodes.made)
        for product, old, new in zip(group, outputs, results, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            self.graph.remove(product.node, safe=True)
            self._left(product.transpose, {})
            self.graph.remove(product.transpose, safe=True)
            gathered = correction is None and len(group) == 1
            self._left(product.dequantize, {"Gather": dequantized} if gathered else {})
            self._remove(product.dequantize)

    def experts(self, node: ir.Node) -> None:
        """A mixture's weights, and the order of their columns if it is not their input's.

        Raises:
            LoweringError: TensorRT would expand them.
        """
        stacks = [stack for stack in node.inputs[3:5] if stack is not None]
        columns = [columns_of(stack) for stack in stacks]
        ordered = any(column.is_needed for column in columns)
        names = [f"{stack.name}.columns" if ordered else None for stack in stacks]
        for stack, name in zip(stacks, names, strict=True):
            self.stack(stack, name)
        if ordered:
            made = [
                self._add(f"{stack.name}.columns", INT32, column.shape, column.parts())
                for stack, column in zip(stacks, columns, strict=True)
            ]
            node.resize_inputs(len(INPUTS) + len(made))
            for index, value in enumerate(made, len(INPUTS)):
                node.replace_input_with(index, value)

    def stack(self, stack: ir.Value, columns: str | None) -> None:
        """A mixture's weights [experts, rows, columns]: each expert's dequantized, then stacked.

        Raises:
            LoweringError: TensorRT would expand them.
        """
        reshape = stack.producer()
        concat = None if reshape is None else producer(reshape, 0)
        stacked = [] if concat is None else [value for value in concat.inputs if value is not None]
        parts = [sorted_weight(value)[0].producer() for value in stacked]
        nodes = [node for node in parts if node is not None and is_dequantized(node)]
        if reshape is None or concat is None or not nodes:
            return
        weights = [quantized_weight(node) for node in nodes]
        form = form_of(weights[0])
        if len(nodes) != len(parts) or {form_of(weight) for weight in weights} != {form}:
            raise LoweringError(
                f"{stack.name}: experts that are not all quantized in one way cannot be stacked"
            )
        name = f"{stack.name}.DequantizeLinear"
        correction = self._correction(name, weights, form, of_experts=True)
        made = self._dequantized(name, weights, form, correction, concat, columns)
        if correction is not None:
            new = SignedNodes(self.graph, f"{stack.name}.signed", form.dtype)
            made = new.corrected(made, self.graph.initializers[correction.name], form)
            self.graph.insert_before(concat, new.made)
        reshape.replace_input_with(0, made)
        remove_unused(self.graph, concat.outputs[0])
        for node in nodes:
            self._left(node, {})

    def rows(self, node: ir.Node) -> None:
        """A weight whose rows are only gathered: an embedding.

        Raises:
            LoweringError: it is used in another way, or cannot be dequantized without a correction.
        """
        weight = quantized_weight(node)
        form = form_of(weight)
        if not form.symmetric or form.in_digits:
            raise LoweringError(
                f"{node.name}: rows are gathered only of symmetric weights, of 4 bits or with a scale per row"
            )
        dequantized = self._dequantized(f"{node.name}.signed", [weight], form, None, node)
        self._left(node, {"Gather": dequantized})
        self._remove(node)

    def _left(self, node: ir.Node, allowed: dict[str, ir.Value]) -> None:
        """Give what still uses a weight another value: first inputs of the operators that have one.

        Raises:
            LoweringError: another operator uses it.
        """
        for use in [*node.outputs[0].uses()]:
            if use.node.op_type not in allowed or use.idx != 0:
                raise LoweringError(
                    f"{node.name}: used by {use.node.name}; TensorRT takes a quantized weight that is transposed and "
                    "multiplied by once, stacked for MoEExperts, or without zero points gathered"
                )
            use.node.replace_input_with(0, allowed[use.node.op_type])

    def _dequantized(
        self,
        name: str,
        weights: Sequence[QuantizedWeight],
        form: Form,
        correction: Correction | None,
        before: ir.Node,
        columns: str | None = None,
    ) -> ir.Value:
        """DequantizeLinear of matrices one below the other.

        Raises:
            LoweringError: TensorRT has no such blocks.
        """
        rows, k = sum(weight.n for weight in weights), form.digits * form.k
        block = form.k
        attributes = {"axis": 0}
        shape: tuple[int, ...] = (rows,)
        if form.codes == INT4:
            block = min(form.block & -form.block, MOST_BLOCK)
            attributes, shape = {"axis": 1, "block_size": block}, (rows, k // block)
        if form.codes == INT4 and block < LEAST_BLOCK:
            raise LoweringError(
                f"{weights[0].codes.name}: blocks of {form.block} values; TensorRT needs a multiple of {LEAST_BLOCK}"
            )
        make = digits if form.in_digits else signed
        scale = partial(digit_scales if form.in_digits else repeated, repeats=form.block // block)
        codes = self._add(
            f"{name}.codes", form.codes, (rows, k), [partial(make, w) for w in weights]
        )
        scales = self._add(
            f"{name}.scales", form.dtype, shape, [partial(scale, w) for w in weights]
        )
        made = tuple(str(w.codes.name).removesuffix(".codes") for w in weights)
        self.weights.append(SignedWeight(name, made, rows * k, form.codes, correction, columns))
        self.names.add(name)
        nodes: list[ir.Node] = []
        inputs, results = [codes, scales], [(form.dtype, codes.shape)]
        append_node(nodes, "DequantizeLinear", inputs, name, results, attributes=attributes)
        self.graph.insert_before(before, nodes)
        return nodes[0].outputs[0]

    def _correction(
        self,
        name: str,
        weights: Sequence[QuantizedWeight],
        form: Form,
        *,
        of_experts: bool = False,
    ) -> Correction | None:
        """What the sums are multiplied by, with its initializer; None if there is nothing to correct."""
        if form.symmetric and not form.in_digits:
            return None
        rows = form.blocks
        if form.blocks > 1 and not of_experts:
            rows += -form.blocks % SUMS
        made = Correction(
            f"{name}.correction", tuple(weights), form.middle, rows, form.digits, of_experts
        )
        n = sum(weight.n for weight in weights)
        shape = (n, rows, 1) if of_experts else (rows, n)
        self._add(made.name, form.dtype, shape, [made.stored])
        return made

    def _add(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], parts: Iterable[Part]
    ) -> ir.Value:
        """A new initializer; its bytes are in FILE."""
        length = -(-math.prod(shape) * dtype.bitwidth // 8)
        self.tensors.append(MadeTensor(self.end, tuple(parts)))
        tensor = ir.ExternalTensor(FILE, self.end, length, dtype, shape=ir.Shape(shape), name=name)
        self.end += length + -length % ALIGNMENT
        return initializer(self.graph.initializers, tensor)

    def _remove(self, node: ir.Node) -> None:
        """Remove a DequantizeLinear, and the initializers that were only its own."""
        inputs = [value for value in node.inputs if value is not None]
        self.graph.remove(node, safe=True)
        for value in inputs:
            if value.is_initializer() and not value.uses():
                del self.graph.initializers[str(value.name)]
