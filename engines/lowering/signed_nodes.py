"""The nodes around weights of signed codes: sums for corrections, and corrected weights of experts."""

from __future__ import annotations

import onnx_ir as ir

from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.products import NewNodes
from qwenport.engines.lowering.signed_forms import Form


def sums_of(nodes: NewNodes, x: ir.Value, form: Form, rows: int) -> ir.Value:
    """x [batch, seq, K] -> the sums of its blocks [batch, seq, rows]; beyond K there are zeros.

    It is padded before it is summed: TensorRT makes one kernel of that, and two of the opposite.

    Raises:
        LoweringError: x has other axes.
    """
    if x.shape is None or len(x.shape) != 3:
        raise LoweringError(f"{x.name}: has not three axes")
    if rows == 1:
        return nodes.op("ReduceSum", x, nodes.integers(-1), keepdims=1)
    padding = rows * form.block - form.k
    if padding:
        x = nodes.op("Pad", x, nodes.integers(0, 0, 0, 0, 0, padding))
    blocks = nodes.op("Reshape", x, nodes.integers(0, 0, rows, form.block))
    return nodes.op("ReduceSum", blocks, nodes.integers(-1), keepdims=0)


def corrected(nodes: NewNodes, weight: ir.Value, correction: ir.Value, form: Form) -> ir.Value:
    """A weight [N, digits * K], its digits added up, minus the correction [N, blocks, 1] of each block.

    TensorRT does that to the gathered experts alone, in the kernel that dequantizes them; it would not with a ReduceSum
    of the digits. The low digits, which are the smaller numbers, are corrected first.
    """
    assert weight.shape is not None
    n = int(weight.shape.numpy()[0])
    high = None
    if form.in_digits:
        high, weight = nodes.split(weight, [form.k] * 2, [ir.Shape((n, form.k))] * 2)
    blocks = nodes.op("Reshape", weight, nodes.integers(n, form.blocks, form.block))
    centred = nodes.op("Sub", blocks, correction)
    made = nodes.op("Reshape", centred, nodes.integers(n, form.k))
    return made if high is None else nodes.op("Add", high, made)
