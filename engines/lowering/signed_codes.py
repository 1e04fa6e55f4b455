"""Quantized weights in the forms that TensorRT fuses with a product or a gather: signed codes, all zero points zero.

A package has a weight [N, K] as unsigned codes q, scales s and zero points z in blocks along K: s (q - z). TensorRT has
signed types without zero points. With the middle code m,

    x W^T = x (s (q - m))^T - sums(x) c^T,    c = s (z - m)

where `sums` adds the columns of x in each block. Symmetric weights have z = m, and no second product. TensorRT rounds
s (q - m), c, the sums and both products to the model's dtype, where a package rounds s (q - z) and one product.

It multiplies by 4 bits in blocks, and by 8 bits with a scale per row; in fp16, which is all that SM75 has, the input of
such a product has two dimensions (`NewNodes.flat_product`). 8 bits in blocks become two digits of 4 bits each,
q = 16 h + l, side by side along K: [x x] times 16 s (h - 8) and s (l - 8), with m = 136.

Experts are gathered before they are multiplied by: their digits are added, and c is subtracted from the weights
themselves. Where the columns are sorted (act-order), the operator is given their order too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import DOMAIN, MOE_EXPERTS
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.act_order import columns_of, sorted_weight
from qwenport.engines.lowering.few_bits import (
    QuantizedWeight,
    dequantizes_integers,
    quantized_weight,
)
from qwenport.engines.lowering.made_tensors import (
    Correction,
    MadeFile,
    SignedWeight,
    digit_scales,
    digits,
    repeated,
    signed,
)
from qwenport.engines.lowering.products import (
    NewNodes,
    producer,
    redirect,
    replace_products,
)
from qwenport.engines.lowering.signed_forms import (
    INT4,
    Form,
    Product,
    form_of,
    products_by_input,
)
from qwenport.engines.lowering.signed_nodes import corrected, sums_of
from qwenport.plugins.moe_experts import INPUTS
from qwenport.plugins.nodes import append_node, remove_unused

INT32 = ir.DataType.INT32
LEAST_BLOCK, MOST_BLOCK = 16, 128
"""TensorRT multiplies by 4 bits in blocks of powers of two, from the one to the other."""
SUMS = 8
"""A product by corrections is fused if the sums are a multiple of this."""


class UseSignedCodes(InPlacePass):
    """DequantizeLinear of unsigned codes -> of signed ones. Products by weights of one kind with one input are merged.

    Weights in FP8 stay.
    """

    def __init__(self, file: MadeFile) -> None:
        """Take the file that gets the new tensors."""
        super().__init__()
        self.file = file

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: a weight that TensorRT would expand, or that is used as none can be.
        """
        work = _Work(model.graph, self.file)
        for node in [*model.graph]:
            if node.op_type == MOE_EXPERTS and node.domain == DOMAIN:
                work.experts(node)
        for group in products_by_input(model.graph):
            work.products(group)
        for node in [*model.graph]:
            if dequantizes_integers(node) and node.name not in work.names:
                work.rows(node)
        return PassResult(model, bool(work.names))


class _Work:
    """The changes to one graph.

    Attributes:
        names: of the new DequantizeLinear nodes.
    """

    def __init__(self, graph: ir.Graph, file: MadeFile) -> None:
        self.graph, self.file = graph, file
        self.names: set[str] = set()
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def products(self, group: Sequence[Product]) -> None:
        """Products of one input by weights of one form: one product, split."""
        first, form = group[0], group[0].form
        weights = [product.weight for product in group]
        x = first.x
        name = f"{first.dequantize.name}.signed"
        correction = self._correction(name, weights, form)
        dequantized = self._dequantized(name, weights, form, correction, first.dequantize)
        nodes = NewNodes(self.graph, f"{first.node.name}.signed", form.dtype)
        factor = nodes.op("Concat", x, x, axis=-1) if form.in_digits else x
        transposed = nodes.op("Transpose", dequantized, perm=[1, 0])
        if form.is_flat:
            y = nodes.flat_product(factor, transposed, form.k, sum(w.n for w in weights))
        else:
            y = nodes.op("MatMul", factor, transposed)
        if correction is not None:
            sums = self._sums.get((x, form.block))
            if sums is None:
                sums = self._sums[x, form.block] = sums_of(nodes, x, form, correction.rows)
            values = self.graph.initializers[correction.name]
            y = nodes.op("Sub", y, nodes.op("Mul" if form.blocks == 1 else "MatMul", sums, values))
        shapes = [product.node.outputs[0].shape for product in group]
        results = nodes.split(y, [w.n for w in weights], shapes)
        self.graph.insert_before(first.node, nodes.made)
        gathered = correction is None and len(group) == 1
        replace_products(self.graph, group, results, dequantized if gathered else None)

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
                self.file.add(
                    self.graph, f"{stack.name}.columns", INT32, column.shape, column.parts()
                )
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
        nodes = [node for node in parts if node is not None and dequantizes_integers(node)]
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
            new = NewNodes(self.graph, f"{stack.name}.signed", form.dtype)
            made = corrected(new, made, self.graph.initializers[correction.name], form)
            self.graph.insert_before(concat, new.made)
        reshape.replace_input_with(0, made)
        remove_unused(self.graph, concat.outputs[0])
        for node in nodes:
            redirect(node, {})

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
        redirect(node, {"Gather": dequantized})
        remove_unused(self.graph, node.outputs[0])

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
        codes = self.file.add(
            self.graph,
            f"{name}.codes",
            form.codes,
            (rows, k),
            [partial(make, w) for w in weights],
        )
        scales = self.file.add(
            self.graph, f"{name}.scales", form.dtype, shape, [partial(scale, w) for w in weights]
        )
        made = tuple(str(w.codes.name).removesuffix(".codes") for w in weights)
        self.file.weights.append(
            SignedWeight(name, made, rows * k, form.codes, correction, columns)
        )
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
        padded = form.blocks > 1 and not of_experts
        rows = form.blocks + (-form.blocks % SUMS if padded else 0)
        made = Correction(
            f"{name}.correction", tuple(weights), form.middle, rows, form.digits, of_experts
        )
        n = sum(weight.n for weight in weights)
        shape = (n, rows, 1) if of_experts else (rows, n)
        self.file.add(self.graph, made.name, form.dtype, shape, [made.stored])
        return made
