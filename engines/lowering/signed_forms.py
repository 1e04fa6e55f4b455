"""The forms of quantized weights for `UseSignedCodes`, and where a graph multiplies by such weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwenport.engines.lowering.few_bits import QuantizedWeight, is_symmetric, quantized_weight

INT4, INT8 = ir.DataType.INT4, ir.DataType.INT8


@dataclass(frozen=True)
class Form:
    """How weights become signed. Weights of one form fit into one tensor, one below the other.

    Attributes:
        k: columns of the package's weight.
        block: the package's.
        bits: of the package's codes.
        dtype: of the scales and of the dequantized weight.
        symmetric: whether all zero points are the middle code.
    """

    k: int
    block: int
    bits: int
    dtype: ir.DataType
    symmetric: bool

    @property
    def in_digits(self) -> bool:
        """Whether 8-bit codes are split into two of 4 bits."""
        return self.bits == 8 and self.block != self.k

    @property
    def codes(self) -> ir.DataType:
        """The type of the signed codes."""
        return INT8 if self.bits == 8 and not self.in_digits else INT4

    @property
    def middle(self) -> int:
        """The unsigned code that becomes zero."""
        return 136 if self.in_digits else 1 << (self.bits - 1)

    @property
    def digits(self) -> int:
        """The number of signed codes that a code is made into."""
        return 2 if self.in_digits else 1

    @property
    def blocks(self) -> int:
        """Of a row of the package's weight."""
        return self.k // self.block


@dataclass(frozen=True)
class Product:
    """MatMul(x, Transpose(DequantizeLinear(...)))."""

    node: ir.Node
    transpose: ir.Node
    dequantize: ir.Node
    weight: QuantizedWeight

    @property
    def form(self) -> Form:
        return form_of(self.weight)


def form_of(weight: QuantizedWeight) -> Form:
    return Form(weight.k, weight.block, weight.bits, weight.rounded, is_symmetric(weight.zeros))


def is_dequantized(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and node.domain == ""


def producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


def products_by_input(graph: ir.Graph) -> list[list[Product]]:
    """The products by quantized weights; those of one input and one form together."""
    found: dict[tuple[ir.Value | None, Form], list[Product]] = {}
    for node in graph:
        transpose = producer(node, 1) if node.op_type == "MatMul" and node.domain == "" else None
        dequantize = None
        if transpose is not None and transpose.op_type == "Transpose":
            perm = transpose.attributes.get("perm")
            turned = perm is not None and tuple(perm.as_ints()) == (1, 0)
            dequantize = producer(transpose, 0) if turned else None
        if transpose is not None and dequantize is not None and is_dequantized(dequantize):
            product = Product(node, transpose, dequantize, quantized_weight(dequantize))
            found.setdefault((node.inputs[0], product.form), []).append(product)
    return list(found.values())
