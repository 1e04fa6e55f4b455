"""Weights and inputs in FP8 in the forms that TensorRT multiplies.

A weight's codes stay as they are, with a scale per row; one scale for the whole weight is repeated. Where inputs are
not rounded, TensorRT dequantizes inside the product. Where they are,

    x' W^T = s (q (p t)^T),    q = x / s rounded to FP8, p the weight's codes, t its scales

it multiplies q by p and then by t and s, in one more kernel. Those steps are in fp32 here. In half precision TensorRT
would write q p^T, which is above fp16's largest number in ordinary models, and round the product of two scales.
It makes a division by a constant a multiplication by its reciprocal in the same dtype, so those are in fp32 too; the
result is rounded as in the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import DOMAIN, FP32, MOE_EXPERTS
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.float8 import (
    FLOAT8,
    Float8Weight,
    float8_weight,
    is_float8_weight,
)
from qwenport.engines.lowering.made_tensors import MadeFile, SignedWeight, read, row_scales
from qwenport.engines.lowering.products import (
    Multiplication,
    NewNodes,
    multiplications,
    producer,
    redirect,
    replace_products,
)
from qwenport.plugins.nodes import append_node, initializer, remove_unused

SINGLE = FP32.ir


@dataclass(frozen=True)
class RoundedInput:
    """An input that is rounded to FP8.

    Attributes:
        codes: FP8, [..., K].
        scale: of the package's dtype, a scalar or [..., 1].
    """

    codes: ir.Value
    scale: ir.Value


@dataclass(frozen=True)
class Product(Multiplication):
    """A product by a weight in FP8."""

    weight: Float8Weight


class MultiplyByFloat8(InPlacePass):
    """Products by weights in FP8, those of one input merged, and the rounding of their inputs. Experts are one matrix.

    The rounded inputs stay in the graph under their names. Nothing reads them, so that an engine does not compute them,
    but `validate` does.
    """

    def __init__(self, file: MadeFile) -> None:
        """Take the file that gets the new tensors."""
        super().__init__()
        self.file = file

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: a weight that is used as none can be, or an input that is rounded in another way.
        """
        graph = model.graph
        if not any(map(is_float8_weight, graph)):
            return PassResult(model, False)
        work = _Work(graph, self.file)
        of_experts: list[ir.Value] = []
        for node in [*graph]:
            if node.op_type == MOE_EXPERTS and node.domain == DOMAIN:
                assert node.inputs[0] is not None
                of_experts.append(node.inputs[0])
                for stack in node.inputs[3:5]:
                    assert stack is not None
                    work.stack(stack)
        groups: dict[tuple[ir.Value, ir.DataType], list[Product]] = {}
        for each in multiplications(graph):
            if is_float8_weight(each.dequantize):
                weight = float8_weight(each.dequantize)
                product = Product(each.node, each.transpose, each.dequantize, weight)
                groups.setdefault((each.x, weight.rounded), []).append(product)
        given = dict.fromkeys([*(x for x, _ in groups), *of_experts])
        rounded = {x: found for x in given if (found := work.rounded(x)) is not None}
        for (x, _), group in groups.items():
            work.product(group, rounded.get(x))
        for node in [*graph]:
            if is_float8_weight(node) and node.name not in work.names:
                work.rows(node)
        return PassResult(model, True)


class _Work:
    """The changes to one graph.

    Attributes:
        names: of the new DequantizeLinear nodes.
    """

    def __init__(self, graph: ir.Graph, file: MadeFile) -> None:
        self.graph, self.file = graph, file
        self.names: set[str] = set()

    def rounded(self, x: ir.Value) -> RoundedInput | None:
        """How an input is rounded, from now on as TensorRT takes it; None if it is not.

        Raises:
            LoweringError: in another way than the exporter does.
        """
        node = x.producer()
        if node is None or not str(x.name).partition(".rounded")[1]:
            return None
        quantize = producer(node, 0)
        if node.op_type == "DequantizeLinear" and quantize is not None:
            return self._static(node, quantize)
        if node.op_type == "Mul" and quantize is not None:
            return self._dynamic(node, quantize)
        raise LoweringError(f"{x.name}: is not rounded to FP8 as an export does it")

    def _static(self, node: ir.Node, quantize: ir.Node) -> RoundedInput:
        """DequantizeLinear(QuantizeLinear(x, s), s)."""
        x, scale = quantize.inputs[:2]
        assert x is not None and scale is not None and x.dtype is not None
        nodes = NewNodes(self.graph, f"{node.name}.signed", x.dtype)
        steps = nodes.op("Div", nodes.cast(x, SINGLE), nodes.cast(scale, SINGLE), dtype=SINGLE)
        codes = self._codes(nodes, nodes.cast(steps, x.dtype))
        self.graph.insert_before(node, nodes.made)
        node.replace_input_with(0, codes)
        self.graph.remove(quantize, safe=True)
        return RoundedInput(codes, scale)

    def _dynamic(self, node: ir.Node, steps: ir.Node) -> RoundedInput:
        """Mul(Cast(Cast(x / s)), s), s = Where(s is 0, eps, max |x| / 448)."""
        to_codes, scale = producer(steps, 0), node.inputs[1]
        where = None if scale is None else scale.producer()
        quotient = None if where is None else producer(where, 2)
        if to_codes is None or quotient is None or quotient.op_type != "Div":
            raise LoweringError(f"{node.name}: is not rounded to FP8 as an export does it")
        ratio, largest, most = to_codes.inputs[0], *quotient.inputs
        assert scale is not None and ratio is not None and scale.dtype is not None
        assert largest is not None and most is not None
        nodes = NewNodes(self.graph, f"{quotient.name}.signed", scale.dtype)
        exact = nodes.op("Div", nodes.cast(largest, SINGLE), nodes.cast(most, SINGLE), dtype=SINGLE)
        made = nodes.cast(exact, scale.dtype)
        self.graph.insert_before(quotient, nodes.made)
        quotient.outputs[0].replace_all_uses_with(made)
        self.graph.remove(quotient, safe=True)
        nodes = NewNodes(self.graph, f"{node.name}.signed", scale.dtype)
        codes = self._codes(nodes, ratio)
        dequantized = nodes.op("DequantizeLinear", codes, self._one(scale.dtype), shape=ratio.shape)
        self.graph.insert_before(node, nodes.made)
        node.replace_input_with(0, dequantized)
        self.graph.remove(steps, safe=True)
        self.graph.remove(to_codes, safe=True)
        return RoundedInput(codes, scale)

    def _codes(self, nodes: NewNodes, steps: ir.Value) -> ir.Value:
        assert steps.dtype is not None
        how = {"output_dtype": int(FLOAT8), "saturate": 1}
        one = self._one(steps.dtype)
        return nodes.op("QuantizeLinear", steps, one, dtype=FLOAT8, shape=steps.shape, **how)

    def _one(self, dtype: ir.DataType) -> ir.Value:
        tensor = ir.tensor(np.array(1, dtype.numpy()), dtype, name=f"float8.one.{dtype.name}")
        return initializer(self.graph.initializers, tensor)

    def product(self, group: Sequence[Product], rounded: RoundedInput | None) -> None:
        """Products of one input: one product, split."""
        first = group[0]
        weights = [product.weight for product in group]
        dtype = weights[0].rounded
        computed = dtype if rounded is None else SINGLE
        name = f"{first.dequantize.name}.signed"
        dequantized = self._dequantized(name, weights, computed, first.dequantize)
        nodes = NewNodes(self.graph, f"{first.node.name}.signed", dtype)
        x = first.x
        if rounded is not None:
            x = nodes.op("DequantizeLinear", rounded.codes, self._one(SINGLE), dtype=SINGLE)
        turned = nodes.op("Transpose", dequantized, dtype=computed, perm=[1, 0])
        y = nodes.op("MatMul", x, turned, dtype=computed)
        if rounded is not None:
            y = nodes.op("Mul", y, nodes.cast(rounded.scale, SINGLE), dtype=SINGLE)
            y = nodes.cast(y, dtype)
        shapes = [product.node.outputs[0].shape for product in group]
        results = nodes.split(y, [weight.n for weight in weights], shapes)
        self.graph.insert_before(first.node, nodes.made)
        gathered = rounded is None and len(group) == 1
        replace_products(self.graph, group, results, dequantized if gathered else None)

    def stack(self, stack: ir.Value) -> None:
        """A mixture's weights [experts, rows, columns]: one matrix dequantized, of which the chosen are gathered.

        Raises:
            LoweringError: experts are not all in FP8.
        """
        reshape = stack.producer()
        concat = None if reshape is None else producer(reshape, 0)
        stacked = [] if concat is None else [value for value in concat.inputs if value is not None]
        parts = [value.producer() for value in stacked]
        nodes = [node for node in parts if node is not None and is_float8_weight(node)]
        if reshape is None or concat is None or not nodes:
            return
        if len(nodes) != len(parts):
            raise LoweringError(f"{stack.name}: some of its experts are in FP8, others are not")
        weights = [float8_weight(node) for node in nodes]
        name = f"{stack.name}.DequantizeLinear"
        made = self._dequantized(name, weights, weights[0].rounded, concat)
        reshape.replace_input_with(0, made)
        remove_unused(self.graph, concat.outputs[0])
        for node in nodes:
            redirect(node, {})

    def rows(self, node: ir.Node) -> None:
        """A weight whose rows are only gathered: an embedding.

        Raises:
            LoweringError: it is used in another way.
        """
        weight = float8_weight(node)
        dequantized = self._dequantized(f"{node.name}.signed", [weight], weight.rounded, node)
        redirect(node, {"Gather": dequantized})
        remove_unused(self.graph, node.outputs[0])

    def _dequantized(
        self, name: str, weights: Sequence[Float8Weight], dtype: ir.DataType, before: ir.Node
    ) -> ir.Value:
        """DequantizeLinear of matrices one below the other, to a dtype that holds the scales exactly."""
        rows, columns = sum(weight.n for weight in weights), weights[0].k
        codes = self.file.add(
            self.graph,
            f"{name}.codes",
            FLOAT8,
            (rows, columns),
            [partial(_bytes_of, weight.codes) for weight in weights],
        )
        scales = self.file.add(
            self.graph,
            f"{name}.scales",
            dtype,
            (rows,),
            [partial(row_scales, weight, dtype) for weight in weights],
        )
        made = tuple(str(weight.codes.name).removesuffix(".codes") for weight in weights)
        self.file.weights.append(SignedWeight(name, made, rows * columns, FLOAT8, None))
        self.names.add(name)
        nodes: list[ir.Node] = []
        inputs, results = [codes, scales], [(dtype, codes.shape)]
        append_node(nodes, "DequantizeLinear", inputs, name, results, attributes={"axis": 0})
        self.graph.insert_before(before, nodes)
        return nodes[0].outputs[0]


def _bytes_of(value: ir.Value) -> bytes:
    return read(value).tobytes()
