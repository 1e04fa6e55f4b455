"""Attention over the whole cache by lengths: nothing is cut, so nothing is copied.

Myelin, TensorRT's compiler, gives K and V the stride order of q, and copies them where it chooses q's. Marked as a
network output, q stays in rows of heads, and the kernel reads the caches as they lie. The scale is multiplied in before
the rotation: after it, the marked tensor would not be what the kernel reads.
"""

from __future__ import annotations

from typing import Any

from qwenport.contract import INPUT_IDS, WRITE_INDICES, query
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.attention_forms.surgery import CachedAttention, Surgery


def lengths_after(surgery: Surgery) -> Any:
    """The keys that each row has after this step, int64 [batch]."""
    starts = surgery.cast(surgery.inputs[WRITE_INDICES], surgery.trt.int64)
    return surgery.elementwise(starts, "SUM", surgery.size(surgery.inputs[INPUT_IDS], 1))


class Direct:
    """IAttention(q, k, v, mask) -> one with key lengths and a causal mask aligned at the end of each row."""

    def __init__(self, surgery: Surgery, lengths: Any = None) -> None:
        """Prepare what all layers share.

        Args:
            surgery: the network.
            lengths: keys to attend to, int64 [batch]; those that a row has after this step by default.
        """
        self._surgery = surgery
        lengths = lengths_after(surgery) if lengths is None else lengths
        self._lengths = surgery.cast(lengths, surgery.trt.int32)

    def replace(self, found: CachedAttention) -> Any:
        """The attention's result, [batch, heads, seq, head_dim]; its queries become the output `query.{layer}`.

        Raises:
            LoweringError: the queries are not rotated by TensorRT's own layer.
        """
        surgery, trt = self._surgery, self._surgery.trt
        rotation, queries = found.rotation, found.queries
        if rotation is None or rotation.type != trt.LayerType.ROTARY_EMBEDDING:
            raise LoweringError(
                f"decoder layer {found.layer}: the queries are not rotated by TensorRT's own layer"
            )
        scale = surgery.number(found.scale, 4, queries.dtype)
        rotation.set_input(0, surgery.elementwise(rotation.get_input(0), "PROD", scale))
        surgery.scaled[queries.name] = (query(found.layer), found.scale)
        queries.name = query(found.layer)
        surgery.network.mark_output(queries)
        layer = surgery.network.add_attention_v2(
            queries,
            found.keys,
            found.values,
            trt.AttentionNormalizationOp.SOFTMAX,
            trt.CausalMaskKind.LOWER_RIGHT,
        )
        layer.key_value_lengths = self._lengths
        return layer.get_output(0)
