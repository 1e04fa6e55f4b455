"""Dual chunk attention over a cache: what the traced decoder calls, and its translation into ONNX.

A query has three rotations, and a key one. The three are multiplied by the keys at once, so that a step reads K once;
each score is then one of three, by the distance between the chunks of its query and its key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

if TYPE_CHECKING:
    from qwenport.exporter.emission import Emitter
    from qwenport.exporter.tracing import Ref

_LIBRARY = torch.library.Library("qwenport", "FRAGMENT")
_LIBRARY.define(
    "dual_chunk_attention(Tensor same, Tensor previous, Tensor older, Tensor k, Tensor v, Tensor mask, "
    "Tensor is_same, Tensor is_previous, float scale) -> Tensor"
)
_LOWEST = torch.finfo(torch.float32).min


def dual_chunk_attention(
    queries: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    is_same: torch.Tensor,
    is_previous: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Grouped-query attention whose queries depend on the chunk of the key; one softmax in fp32 over all keys.

    Args:
        queries: rotated for keys in the query's own chunk, in the one before, and in older ones; each
            [B, heads, S, head_dim].
        k, v: [B, kv_heads, N, head_dim].
        mask, is_same, is_previous: bool [B, 1, S, N]: which keys are attended to; which are in the query's chunk or a
            later one; which are in the chunk before it or a later one.
        scale: the factor of scores.

    Returns:
        [B, heads, S, head_dim].
    """
    result: torch.Tensor = torch.ops.qwenport.dual_chunk_attention.default(
        *queries, k, v, mask, is_same, is_previous, scale
    )
    return result


def _attend(
    same: torch.Tensor,
    previous: torch.Tensor,
    older: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    is_same: torch.Tensor,
    is_previous: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    groups = same.shape[1] // k.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    scores = [q.float() @ keys.float().mT * scale for q in (same, previous, older)]
    chosen = torch.where(is_same, scores[0], torch.where(is_previous, scores[1], scores[2]))
    weights = torch.softmax(chosen.masked_fill(~mask, _LOWEST), dim=-1)
    return weights.to(v.dtype) @ values


_LIBRARY.impl("dual_chunk_attention", _attend, "CompositeExplicitAutograd")


def emit(
    e: Emitter,
    same: Ref,
    previous: Ref,
    older: Ref,
    k: Ref,
    v: Ref,
    mask: Ref,
    is_same: Ref,
    is_previous: Ref,
    scale: float,
) -> ir.Value:
    """The nodes of `dual_chunk_attention`."""
    builder, kind = e.builder, e.values[same.index].dtype
    _, heads, _, head_dim = e.type_of(same).shape
    kv_heads = e.type_of(k).shape[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(head_dim, int)
    assert kind is not None

    def node(
        op_type: str, *inputs: ir.Value, dtype: ir.DataType = kind, **attributes: Any
    ) -> ir.Value:
        return builder.add(
            op_type, inputs, e.name(op_type), dtype=dtype, shape=None, attributes=attributes
        )

    def sizes(*parts: int | ir.Value) -> ir.Value:
        vectors = [builder.constant([part]) if isinstance(part, int) else part for part in parts]
        return node("Concat", *vectors, dtype=ir.DataType.INT64, axis=0)

    def number(value: float, name: str) -> ir.Value:
        return builder.initializer(ir.tensor(np.array(value, np.float32), name=f"const_{name}"))

    fp32, third = ir.DataType.FLOAT, builder.constant([2])
    seq = builder.size(e.values[same.index], 2)
    span = builder.size(e.values[v.index], 2)
    each = [node("Unsqueeze", e.values[q.index], third) for q in (same, previous, older)]
    queries = node("Concat", *each, axis=2)
    rows = node("Reshape", queries, builder.constant([0, kv_heads, -1, head_dim]))
    keys = node("Transpose", e.values[k.index], perm=[0, 1, 3, 2])
    if kind != fp32:  # a product in half precision rounds scores, which fused attention does not
        rows, keys = (node("Cast", part, dtype=fp32, to=int(fp32)) for part in (rows, keys))
    product = node("MatMul", rows, keys, dtype=fp32)
    product = node("Reshape", product, sizes(0, heads, 3, seq, -1), dtype=fp32)
    scores = builder.add_many(
        "Split",
        [product],
        e.name("Split"),
        [(fp32, None)] * 3,
        attributes={"axis": 2, "num_outputs": 3},
    )

    def where(which: Ref, yes: ir.Value, no: ir.Value) -> ir.Value:
        condition = node("Unsqueeze", e.values[which.index], third, dtype=ir.DataType.BOOL)
        return node("Where", condition, yes, no, dtype=fp32)

    chosen = where(is_same, scores[0], where(is_previous, scores[1], scores[2]))
    scaled = node("Mul", chosen, number(scale, "scale"), dtype=fp32)
    masked = where(mask, scaled, number(_LOWEST, "lowest"))
    weights = node("Softmax", masked, dtype=fp32, axis=-1)
    if kind != fp32:
        weights = node("Cast", weights, to=int(kind))
    grouped = node("Reshape", weights, sizes(0, kv_heads, -1, span))
    mixed = node("MatMul", grouped, e.values[v.index])
    return e.op("Reshape", mixed, sizes(0, heads, seq, head_dim))
