"""Attention of single tokens as products and sums over chunks of the cache; of more tokens, the parser's own.

A fused kernel gets a copy of K and V. A product that is summed at once is fused with the read, so a decode step reads
the cache where it lies, in chunks that run in parallel, and then combines the chunks' partial softmaxes in fp32. A
step has one number of tokens, so one of the two branches is cut down to a single chunk by arithmetic on shapes.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from qwenport.contract import CHUNK, KEY_POSITIONS, POSITION_IDS
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.attention_forms.surgery import CachedAttention, Surgery

MASKED_SCORE = -3e38
"""The score of a masked key: finite, since the maximum of a chunk without visible keys is subtracted from itself."""


class Chunked:
    """IAttention(q, k, v, mask) -> chunks for one token, and the same IAttention for several.

    Attributes:
        chunks, prefill_keys: int64 [1], the chunks that the branch for one token reads in this step, and the keys that
            the branch for several does: one chunk where the step is the other's.
        prefills: int64 [1], 0 for a step of one token, else 1.
    """

    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery
        keys, positions = surgery.inputs[KEY_POSITIONS], surgery.inputs[POSITION_IDS]
        self._rows, seq = (surgery.size(positions, axis) for axis in range(2))
        span = surgery.size(keys, 0)
        one = surgery.sizes(1)
        # 1 for a step of one token, else 0
        decodes = surgery.elementwise(
            surgery.elementwise(surgery.sizes(2), "SUB", seq), "MAX", surgery.sizes(0)
        )
        prefills = surgery.elementwise(one, "SUB", decodes)

        def either(decoding: Any, prefilling: Any) -> Any:
            return surgery.elementwise(
                surgery.elementwise(decodes, "PROD", decoding),
                "SUM",
                surgery.elementwise(prefills, "PROD", prefilling),
            )

        chunk = surgery.sizes(CHUNK)
        self.chunks = either(surgery.elementwise(span, "FLOOR_DIV", chunk), one)
        self.prefill_keys = either(chunk, span)
        self._decodes = surgery.reshape(surgery.elementwise(seq, "EQUAL", one), 1, 1, 1, 1)
        self.prefills = prefills

    def replace(self, found: CachedAttention) -> Any:
        """The attention's result, [batch, heads, seq, head_dim]."""
        return self.join(self.of_one(found, scaled=False), self._of_many(found))

    def join(self, decoded: Any, prefilled: Any) -> Any:
        """The result of the branch that this step's number of tokens calls for."""
        return self._surgery.select(self._decodes, decoded, prefilled)

    def of_one(self, found: CachedAttention, *, scaled: bool) -> Any:
        """Attention of each row's first token: [batch, heads, 1, head_dim].

        Args:
            found: the attention.
            scaled: whether its queries are scaled already.

        Raises:
            LoweringError: the cache cannot be cut into chunks.
        """
        return self.attend(
            self.first_query(found.queries, found.keys, None if scaled else found.scale),
            found.keys,
            found.values,
            self.by_chunk(self._decode_mask),
        )

    def first_query(self, queries: Any, keys: Any, scale: float | None) -> Any:
        """Each row's first query, scaled, [batch, kv_heads, 1, group, 1, head_dim] in fp32.

        Args:
            queries: [batch, heads, seq, head_dim].
            keys: the cache.
            scale: what to multiply by; None for nothing.
        """
        surgery, (_, heads, _, head_dim) = self._surgery, queries.shape
        kv_heads = keys.shape[1]
        first = surgery.first(queries, [surgery.size(queries, 0), heads, 1, head_dim])
        if scale is not None:
            # not together with the other branch's queries: sharing that product stops Myelin (utils.cpp:3613)
            first = surgery.elementwise(first, "PROD", surgery.number(scale, 4, queries.dtype))
        rows = surgery.reshape(first, 0, kv_heads, 1, heads // kv_heads, 1, head_dim)
        return surgery.cast(rows, surgery.trt.float32)

    def by_chunk(self, mask: Any) -> Any:
        """[batch, 1, 1, chunks * CHUNK] -> [batch, 1, chunks, 1, CHUNK]."""
        return self._surgery.reshape(mask, 0, 1, -1, 1, CHUNK)

    def attend(self, queries: Any, keys: Any, values: Any, seen: Any) -> Any:
        """Attention of one token of each row: [batch, heads, 1, head_dim] in the cache's dtype.

        Args:
            queries: fp32 [batch, kv_heads, 1 or chunks, group, 1 or CHUNK, head_dim].
            keys, values: the caches.
            seen: which keys are attended to, bool [batch, 1, chunks, 1, CHUNK].

        Raises:
            LoweringError: the caches cannot be cut into chunks.
        """
        surgery, float32 = self._surgery, self._surgery.trt.float32
        _, kv_heads, slots, head_dim = keys.shape
        if slots % CHUNK:
            raise LoweringError(f"a cache of {slots} slots is not a multiple of {CHUNK}")
        dtype, group = keys.dtype, queries.shape[3]
        keys, values = (
            surgery.unsqueeze(
                surgery.first(
                    surgery.reshape(cache, 0, kv_heads, slots // CHUNK, CHUNK, head_dim),
                    [surgery.size(cache, 0), kv_heads, self.chunks, CHUNK, head_dim],
                ),
                3,
            )
            for cache in (keys, values)
        )
        # from here [batch, kv_heads, chunks, group, CHUNK or 1, head_dim], in fp32
        products = surgery.elementwise(queries, "PROD", surgery.cast(keys, float32))
        scores = surgery.select(
            seen,
            surgery.reduce(products, "SUM", 5, keep=False),
            surgery.number(MASKED_SCORE, 5, float32),
        )
        maxima = surgery.reduce(scores, "MAX", 4, keep=True)
        # a chunk without visible keys has the maximum MASKED_SCORE: its weights would be 1, not 0
        weights = surgery.select(
            seen,
            surgery.exp(surgery.elementwise(scores, "SUB", maxima)),
            surgery.number(0, 5, float32),
        )
        weighted = surgery.elementwise(
            surgery.unsqueeze(weights, 5), "PROD", surgery.cast(values, float32)
        )
        mixed = surgery.reduce(weighted, "SUM", 4, keep=False)
        sums = surgery.reduce(weights, "SUM", 4, keep=True)
        shares = surgery.exp(
            surgery.elementwise(maxima, "SUB", surgery.reduce(maxima, "MAX", 2, keep=True))
        )
        above, below = (
            surgery.reduce(surgery.elementwise(shares, "PROD", part), "SUM", 2, keep=False)
            for part in (mixed, sums)
        )
        result = surgery.cast(surgery.elementwise(above, "DIV", below), dtype)
        return surgery.reshape(result, 0, kv_heads * group, 1, head_dim)

    def _of_many(self, found: CachedAttention) -> Any:
        """Attention of all tokens: the parser's, over the active span, its scale applied to the queries alone."""
        surgery, attention = self._surgery, found.attention
        _, kv_heads, _, head_dim = found.keys.shape
        attention.set_input(
            0,
            surgery.elementwise(
                found.queries, "PROD", surgery.number(found.scale, 4, found.queries.dtype)
            ),
        )
        for index, cache in enumerate((found.keys, found.values), start=1):
            rows = surgery.size(cache, 0)
            attention.set_input(
                index, surgery.first(cache, [rows, kv_heads, self.prefill_keys, head_dim])
            )
        attention.mask = self._prefill_mask
        return found.result

    @cached_property
    def _decode_mask(self) -> Any:
        surgery = self._surgery
        return self._visible(
            surgery.first(
                surgery.inputs[KEY_POSITIONS],
                [surgery.elementwise(self.chunks, "PROD", surgery.sizes(CHUNK))],
            ),
            surgery.first(surgery.inputs[POSITION_IDS], [self._rows, 1]),
        )

    @cached_property
    def _prefill_mask(self) -> Any:
        surgery = self._surgery
        keys = surgery.first(surgery.inputs[KEY_POSITIONS], [self.prefill_keys])
        return self._visible(keys, surgery.inputs[POSITION_IDS])

    def _visible(self, keys: Any, positions: Any) -> Any:
        """Whether a token attends to a key, bool [batch, 1, tokens, keys]."""
        surgery = self._surgery
        later = surgery.elementwise(
            surgery.reshape(keys, 1, 1, 1, -1),
            "GREATER",
            surgery.unsqueeze(surgery.unsqueeze(positions, 1), 3),
        )
        return surgery.network.add_unary(later, surgery.trt.UnaryOperation.NOT).get_output(0)
