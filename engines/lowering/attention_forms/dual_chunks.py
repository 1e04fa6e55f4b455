"""Dual chunk attention of single tokens, over chunks of the cache in place; of more tokens, the package's own.

The chunks of `chunked` are of keys that one block of threads reads, those of dual chunk attention of positions. Which
of a token's three queries a key is multiplied by is chosen key by key within the layer that reads K: K is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwenport.contract import CHUNK, caches, present
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.attention_forms.chunked import Chunked
from qwenport.engines.lowering.attention_forms.surgery import Surgery


@dataclass(frozen=True)
class DualChunkAttention:
    """A decoder layer's dual chunk attention in a parsed network.

    Attributes:
        queries: rotated for keys in the query's chunk, in the one before and in older ones; not scaled yet, each
            [batch, heads, seq, head_dim].
        keys, values: the updated caches, [batch, kv_heads, slots, head_dim].
        masks: bool [batch, 1, seq, span]: which keys are attended to, which are in the query's chunk or later, and
            which are in the chunk before it or later.
        scale: what a product of a query and a key is multiplied by.
        result: [batch, heads, seq, head_dim].
    """

    queries: tuple[Any, Any, Any]
    keys: Any
    values: Any
    masks: tuple[Any, Any, Any]
    scale: float
    result: Any


def dual_chunk_attentions(surgery: Surgery) -> tuple[DualChunkAttention, ...]:
    """Every decoder layer's, in order; none if the network has no dual chunk attention.

    Raises:
        LoweringError: one is not as the exporter writes it.
    """
    walk = _Walk(surgery)
    softmaxes = [
        layer
        for layer in surgery.layers("SOFTMAX")
        if surgery.maker(layer.get_input(0), "SELECT") is not None  # a router's reads no selection
    ]
    found = {one.keys.name: one for one in map(walk.around, softmaxes)}
    held = [tuple(present(cache) for cache in caches(layer)) for layer in range(len(found))]
    for keys, values in held:
        if keys not in found or found[keys].values.name != values:
            raise LoweringError(f"no dual chunk attention reads {keys} and {values}")
    return tuple(found[keys] for keys, _ in held)


class _Walk:
    """From a softmax back to what its scores are made of, and on to the attention's result."""

    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery

    def around(self, softmax: Any) -> DualChunkAttention:
        """The attention that a softmax belongs to."""
        visible, scaled, _ = self._inputs(softmax.get_input(0), "SELECT")
        chosen, factor = self._inputs(scaled, "ELEMENTWISE")
        is_same, first, others = self._inputs(chosen, "SELECT")
        is_previous, second, third = self._inputs(others, "SELECT")
        products = {self._part(part, index) for index, part in enumerate((first, second, third))}
        if len(products) != 1:
            raise self._strange(softmax.name, "scores of several products")
        rows, columns = self._inputs(products.pop(), "MATRIX_MULTIPLY")
        queries = [self._back(part) for part in self._inputs(self._back(rows), "CONCATENATION")]
        if len(queries) != 3:
            raise self._strange(softmax.name, f"{len(queries)} queries")
        mixed = self._reader(softmax.get_output(0), "MATRIX_MULTIPLY")
        result = self._reader(mixed.get_output(0), "SHUFFLE").get_output(0)
        keys, values = (
            self._inputs(self._back(tensor), "SLICE")[0] for tensor in (columns, mixed.get_input(1))
        )
        same, previous, older = queries
        return DualChunkAttention(
            (same, previous, older),
            keys,
            values,
            (self._back(visible), self._back(is_same), self._back(is_previous)),
            self._number(self._back(factor)),
            result,
        )

    def _inputs(self, tensor: Any, kind: str) -> list[Any]:
        """The inputs of the layer of some kind that makes a tensor."""
        layer = self._surgery.maker(tensor, kind)
        if layer is None:
            raise self._strange(tensor.name, f"not made by {kind}")
        inputs = (layer.get_input(index) for index in range(layer.num_inputs))
        return [tensor for tensor in inputs if tensor is not None]

    def _back(self, tensor: Any) -> Any:
        """Back past layers that leave the values and their order as they are, and transposition."""
        while True:
            for kind in ("SHUFFLE", "UNSQUEEZE", "CAST"):
                layer = self._surgery.maker(tensor, kind)
                if layer is not None:
                    tensor = layer.get_input(0)
                    break
            else:
                return tensor

    def _part(self, tensor: Any, index: int) -> Any:
        """The product that a tensor is the part number `index` of."""
        layer = self._surgery.maker(tensor, "SLICE")
        if layer is None:
            raise self._strange(tensor.name, "not a part of the scores")
        layer.__class__ = self._surgery.trt.ISliceLayer
        if tuple(layer.start) != (0, 0, index, 0, 0):
            raise self._strange(tensor.name, f"a part that starts at {tuple(layer.start)}")
        return self._back(layer.get_input(0))

    def _reader(self, tensor: Any, kind: str) -> Any:
        """The layer of some kind that reads a tensor, on past those that leave its values as they are."""
        while True:
            readers = [
                reader
                for reader, index in self._surgery.readers(tensor)
                if index == 0 and reader.type.name != "SHAPE"
            ]
            if len(readers) != 1:
                raise self._strange(tensor.name, f"read by {len(readers)} layers")
            if readers[0].type.name == kind:
                return readers[0]
            if readers[0].type.name not in ("SHUFFLE", "CAST"):
                raise self._strange(tensor.name, f"read by {readers[0].type.name}")
            tensor = readers[0].get_output(0)

    def _number(self, tensor: Any) -> float:
        constant = self._surgery.maker(tensor, "CONSTANT")
        if constant is None:
            raise self._strange(tensor.name, "not a number to scale by")
        constant.__class__ = self._surgery.trt.IConstantLayer
        return float(np.asarray(constant.weights).reshape(-1)[0])

    @staticmethod
    def _strange(name: str, what: str) -> LoweringError:
        return LoweringError(
            f"{name}: dual chunk attention as the exporter does not write it: {what}"
        )


class DualChunks:
    """Dual chunk attention -> chunks of the cache for one token, and the same attention for several."""

    def __init__(self, surgery: Surgery, attentions: tuple[DualChunkAttention, ...]) -> None:
        """Prepare what all layers share.

        Args:
            surgery: the network.
            attentions: all of its attentions.

        Raises:
            LoweringError: they have different masks.
        """
        self._surgery, self._chunked = surgery, Chunked(surgery)
        masks = attentions[0].masks
        names = {tuple(mask.name for mask in found.masks) for found in attentions}
        if len(names) != 1:
            raise LoweringError(f"dual chunk attention by {len(names)} sets of masks")
        keys = surgery.elementwise(self._chunked.chunks, "PROD", surgery.sizes(CHUNK))
        readers = [surgery.readers(mask) for mask in masks]
        self._seen, self._same, self._previous = (
            self._chunked.by_chunk(surgery.first(mask, [surgery.size(mask, 0), 1, 1, keys]))
            for mask in masks
        )
        for mask, reading in zip(masks, readers, strict=True):
            # the spans of K and V in the other branch follow from the masks' shape
            cut = surgery.first(
                mask,
                [surgery.size(mask, 0), 1, surgery.size(mask, 2), self._chunked.prefill_keys],
            )
            for reader, index in reading:
                reader.set_input(index, cut)

    def replace(self, found: DualChunkAttention) -> Any:
        """The attention's result, [batch, heads, seq, head_dim]."""
        surgery, chunked = self._surgery, self._chunked
        same, previous, older = (
            chunked.first_query(queries, found.keys, found.scale) for queries in found.queries
        )
        by_key = surgery.select(
            surgery.unsqueeze(self._same, 5),
            same,
            surgery.select(surgery.unsqueeze(self._previous, 5), previous, older),
        )
        decoded = chunked.attend(by_key, found.keys, found.values, self._seen)
        return chunked.join(decoded, found.result)
