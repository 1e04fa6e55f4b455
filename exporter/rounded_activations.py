"""Rounding a linear's input to FP8 (e4m3) and back, in standard ONNX: what compressed-tensors computes, bit for bit.

    static:  QuantizeLinear and DequantizeLinear, with the checkpoint's scale
    dynamic: s = max |x| over a token / 448, or eps if that is 0; Cast(x / s) * s

Every operation rounds to the model's dtype. Casts to e4m3 saturate at 448, and division by the scale may reach it.
Linears with the same input and scale share the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from qwenport.exporter.emission import GraphBuilder

FP8 = ir.DataType.FLOAT8E4M3FN
LARGEST = 448.0


@dataclass(frozen=True)
class Rounding:
    """How inputs are rounded.

    Attributes:
        scale: a scalar of the input's dtype; None for a scale for each token.
    """

    scale: ir.Value | None

    def __call__(self, builder: GraphBuilder, x: ir.Value) -> ir.Value:
        """Append the nodes for `x`, [..., K], and return the result, of its dtype and shape."""
        return _dynamic(builder, x) if self.scale is None else _static(builder, x, self.scale)


def _static(builder: GraphBuilder, x: ir.Value, scale: ir.Value) -> ir.Value:
    assert x.dtype is not None
    codes = builder.add(
        "QuantizeLinear",
        [x, scale],
        f"{x.name}.QuantizeLinear",
        dtype=FP8,
        shape=x.shape,
        attributes={"output_dtype": int(FP8), "saturate": 1},
    )
    return builder.add(
        "DequantizeLinear", [codes, scale], f"{x.name}.rounded", dtype=x.dtype, shape=x.shape
    )


def _dynamic(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    assert x.dtype is not None and x.shape is not None
    dtype = x.dtype
    by_token = ir.Shape([*x.shape[:-1], 1])

    def op(
        op_type: str,
        *inputs: ir.Value,
        result: ir.DataType = dtype,
        shape: ir.Shape | None = x.shape,
        name: str | None = None,
        **attributes: int,
    ) -> ir.Value:
        made = name or f"{x.name}.rounded.{op_type}"
        return builder.add(op_type, inputs, made, dtype=result, shape=shape, attributes=attributes)

    def number(name: str, value: float) -> ir.Value:
        tensor = torch.tensor(value, dtype=to_torch_dtype(dtype))
        return builder.initializer(ir.tensor(tensor, name=f"fp8.{name}"))

    largest = op("ReduceMax", op("Abs", x), builder.constant([-1]), shape=by_token, keepdims=1)
    scale = op("Div", largest, number("largest", LARGEST), shape=by_token)
    is_zero = op("Equal", scale, number("zero", 0.0), result=ir.DataType.BOOL, shape=by_token)
    eps = torch.finfo(to_torch_dtype(dtype)).eps
    scale = op("Where", is_zero, number("eps", eps), scale, shape=by_token)
    codes = op("Cast", op("Div", x, scale), result=FP8, to=int(FP8), saturate=1)
    steps = op("Cast", codes, to=int(dtype))
    return op("Mul", steps, scale, name=f"{x.name}.rounded")
