"""The forms of weights of integers for `UseSignedCodes`, and where a graph multiplies by them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwenport.engines.lowering.few_bits import QuantizedWeight, is_symmetric, quantized_weight
from qwenport.engines.lowering.float8 import dequantizes_float8
from qwenport.engines.lowering.products import Multiplication, multiplications

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
    def is_flat(self) -> bool:
        """Whether products have their input in two dimensions, as SM75 wants it. Its only dtype is fp16."""
        return self.codes == INT8 and self.dtype == ir.DataType.FLOAT16

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
class Product(Multiplication):
    """A product by a weight of integers."""

    weight: QuantizedWeight

    @property
    def form(self) -> Form:
        return form_of(self.weight)


def form_of(weight: QuantizedWeight) -> Form:
    return Form(weight.k, weight.block, weight.bits, weight.rounded, is_symmetric(weight.zeros))


def products_by_input(graph: ir.Graph) -> list[list[Product]]:
    """The products by weights of integers; those of one input and one form together."""
    found: dict[tuple[ir.Value, Form], list[Product]] = {}
    for each in multiplications(graph):
        if not dequantizes_float8(each.dequantize):
            weight = quantized_weight(each.dequantize)
            product = Product(each.node, each.transpose, each.dequantize, weight)
            found.setdefault((product.x, product.form), []).append(product)
    return list(found.values())
