"""Experts whose columns lie sorted by group (act-order), as a package has them.

The operator gets each expert's weight in its own order of columns: a Gather of the sorted one along K, by the inverse
of the permutation, which TopK computes. No target expands a weight for that: targets multiply by the sorted weight,
and gather the activations by the permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.made_tensors import Part, read
from qwenport.engines.lowering.products import producer


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


@dataclass(frozen=True)
class Columns:
    """Which column of its input each column of each expert's codes is multiplied by, for TensorRT.

    Attributes:
        permutations: of each expert, the initializer int64 [k]; None if its columns are in their own order.
        k: columns of an expert's weight.
    """

    permutations: tuple[ir.Value | None, ...]
    k: int

    @property
    def is_needed(self) -> bool:
        """Whether they are not the input's own columns."""
        return any(order is not None for order in self.permutations)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor: [experts, k]."""
        return len(self.permutations), self.k

    def parts(self) -> Iterator[Part]:
        """The tensor's bytes, int32, one expert at a time."""
        return (partial(self._of, order) for order in self.permutations)

    def _of(self, permutation: ir.Value | None) -> bytes:
        own = np.arange(self.k) if permutation is None else read(permutation).view(np.int64)
        return own.astype(np.int32).tobytes()


def columns_of(stack: ir.Value) -> Columns:
    """The columns of a mixture's weights [experts, rows, columns], quantized or not.

    Raises:
        LoweringError: they are gathered in a way that TensorRT cannot be given.
    """
    assert stack.shape is not None
    experts, _, k = stack.shape.numpy()
    reshape = stack.producer()
    concat = None if reshape is None else producer(reshape, 0)
    stacked = [] if concat is None else [value for value in concat.inputs if value is not None]
    orders = [sorted_weight(value)[1] for value in stacked]
    if not any(orders):
        return Columns((None,) * experts, k)
    parts = len(orders) // experts
    by_expert = [orders[at : at + parts] for at in range(0, len(orders), parts)]
    if any(len(set(some)) > 1 for some in by_expert):
        raise LoweringError(
            f"{stack.name}: the two weights of an expert with one input have their columns in different orders; "
            "--target onnxruntime runs them"
        )
    return Columns(tuple(some[0] for some in by_expert), k)
