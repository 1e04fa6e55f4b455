"""Experts whose columns lie sorted by group (act-order), as a package has them.

The operator gets each expert's weight in its own order of columns: a Gather of the sorted one along K, by the inverse of
the permutation, which TopK computes. No target expands a weight for that: targets multiply by the sorted weight, and
gather the activations by the permutation.
"""

from __future__ import annotations

import onnx_ir as ir

from qwenport.engines.errors import LoweringError


def sorted_weight(weight: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """What a weight [N, K] is gathered from, and its permutation.

    Returns:
        The weight with its columns sorted, and the initializer int64 [K] that has the weight's column of each; or
        `weight` and None if its columns are not gathered.

    Raises:
        LoweringError: its columns are gathered in another way.
    """
    gather = weight.producer()
    if gather is None or gather.op_type != "Gather" or gather.domain != "":
        return weight, None
    stored, inverse = gather.inputs
    axis = gather.attributes.get("axis")
    sort = None if inverse is None else inverse.producer()
    if (
        stored is None
        or sort is None
        or axis is None
        or axis.as_int() != 1
        or sort.op_type != "TopK"
        or inverse is not sort.outputs[1]
        or sort.inputs[0] is None
        or not sort.inputs[0].is_initializer()
        or sort.attributes.get("largest", ir.AttrInt64("largest", 1)).as_int()
    ):
        raise LoweringError(
            f"{gather.name}: an expert's columns can only be gathered by the inverse of a stored permutation"
        )
    return stored, sort.inputs[0]
