"""Changes to a parsed TensorRT network: where attention reads the cache, and layers to put in its place.

A network refers to its constants' memory without copying it: whoever holds the network must keep `Surgery.constants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import KEY_POSITIONS, POSITION_IDS, caches, present
from qwenport.engines.errors import LoweringError


@dataclass(frozen=True)
class CachedAttention:
    """A decoder layer's attention in a parsed network.

    Attributes:
        layer: the decoder layer's number.
        attention: the parser's IAttention, which has a mask.
        queries: the rotated queries, not scaled yet: [batch, heads, seq, head_dim].
        rotation: the layer that makes them; None for a network input.
        keys: the updated cache, [batch, kv_heads, slots, head_dim].
        values: the same of the values.
        scale: what a product of a query and a key is multiplied by.
        result: the attention's result, [batch, heads, seq, head_dim].
    """

    layer: int
    attention: Any
    queries: Any
    rotation: Any
    keys: Any
    values: Any
    scale: float
    result: Any

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.queries.shape[1])


class Surgery:
    """Reads a network's attentions and adds layers to it.

    Attributes:
        network: an INetworkDefinition.
        trt: the module it comes from.
        inputs: the network's inputs by name.
        constants: arrays that must live as long as the network.
        scaled: tensor that was renamed -> its new name, and what its values are now multiplied by.
    """

    def __init__(self, network: Any, trt: Any) -> None:
        self.network, self.trt = network, trt
        self.constants: list[NDArray[Any]] = []
        self.scaled: dict[str, tuple[str, float]] = {}
        self._makers: dict[str, tuple[Any, str]] = {}
        self._readers: dict[str, list[tuple[Any, int]]] = {}
        inputs = (network.get_input(index) for index in range(network.num_inputs))
        self.inputs = {tensor.name: tensor for tensor in inputs}
        for number in range(network.num_layers):
            layer = network.get_layer(number)
            for index in range(layer.num_outputs):
                self._makers[layer.get_output(index).name] = (layer, layer.type.name)
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None:
                    self._readers.setdefault(tensor.name, []).append((layer, index))

    def layers(self, kind: str) -> list[Any]:
        """The parsed network's layers of a kind, by its name in LayerType."""
        made = dict.fromkeys(layer for layer, found in self._makers.values() if found == kind)
        return list(made)

    def maker(self, tensor: Any, kind: str) -> Any:
        """The layer that makes a tensor of the parsed network, if it is of that kind; otherwise None."""
        layer, found = self._makers.get(tensor.name, (None, ""))
        return layer if found == kind else None

    def readers(self, tensor: Any) -> tuple[tuple[Any, int], ...]:
        """The parsed network's layers that read a tensor, and as which of their inputs."""
        return tuple(self._readers.get(tensor.name, ()))

    def replace(self, result: Any, made: Any) -> None:
        """Let every reader of a tensor of the parsed network read `made`, which takes over its name."""
        name, readers = result.name, self.readers(result)
        result.name = f"{name}.masked"
        made.name = name
        for reader, index in readers:
            reader.set_input(index, made)

    def attentions(self) -> tuple[CachedAttention, ...]:
        """Every decoder layer's attention, in order.

        Raises:
            LoweringError: one does not read its cache as the exporter writes it.
        """
        found = self.layers("ATTENTION_INPUT")
        numbers = {
            tuple(present(cache) for cache in caches(number)): number
            for number in range(len(found))
        }
        attentions = []
        for layer in found:
            layer.__class__ = self.trt.IAttentionInputLayer
            attention, name = layer.attention, layer.name
            (queries, q), (keys, k), (values, v) = (
                self._source(attention.get_input(index)) for index in range(3)
            )
            held = (keys.name, values.name)
            if held not in numbers or v != 1:
                raise LoweringError(f"{name}: it attends to {keys.name} and {values.name}")
            if attention.mask is None or not self._is_causal(attention.mask):
                raise LoweringError(f"{name}: its mask is not {KEY_POSITIONS} <= {POSITION_IDS}")
            result, rotation = attention.get_output(0), self._makers.get(queries.name, (None,))[0]
            attentions.append(
                CachedAttention(
                    numbers[held],
                    attention,
                    queries,
                    rotation,
                    keys,
                    values,
                    q * k,
                    result,
                )
            )
        return tuple(sorted(attentions, key=lambda found: found.layer))

    def _source(self, tensor: Any) -> tuple[Any, float]:
        """Back past the parser's scaling and the slice to the active span; also by how much it was scaled."""
        scale = 1.0
        while tensor.name in self._makers:
            layer, kind = self._makers[tensor.name]
            if kind == "ELEMENTWISE":
                factor = self._number(layer.get_input(1))
                if factor is None:
                    break
                scale *= factor
            elif kind != "SLICE":
                break
            tensor = layer.get_input(0)
        return tensor, scale

    def _number(self, tensor: Any) -> float | None:
        """The value of a cast constant of one element; None if it is something else."""
        cast, kind = self._makers.get(tensor.name, (None, ""))
        if kind != "CAST" or tuple(tensor.shape) != (1, 1, 1, 1):
            return None
        constant, kind = self._makers.get(cast.get_input(0).name, (None, ""))
        if kind != "CONSTANT":
            return None
        constant.__class__ = self.trt.IConstantLayer
        return float(np.asarray(constant.weights).reshape(-1)[0])

    def _is_causal(self, mask: Any) -> bool:
        """Whether a mask is what the exporter writes: key_positions <= position_ids."""
        layer, kind = self._makers.get(mask.name, (None, ""))
        if kind != "ELEMENTWISE":
            return False
        parts = [self._makers.get(layer.get_input(i).name, (None, "")) for i in range(2)]
        compared = set()
        for part, kind in parts:
            if kind != "ELEMENTWISE":
                return False
            sides = [part.get_input(index) for index in range(2)]
            if [tuple(side.shape) for side in sides] != [(1, 1, 1, -1), (-1, 1, -1, 1)]:
                return False
            part.__class__ = self.trt.IElementWiseLayer
            compared.add((part.op.name, *map(self._reshaped, sides)))
        layer.__class__ = self.trt.IElementWiseLayer
        wanted = {(op, KEY_POSITIONS, POSITION_IDS) for op in ("LESS", "EQUAL")}
        return layer.op.name == "OR" and compared == wanted

    def _reshaped(self, tensor: Any) -> str:
        """The name of what a tensor has the values of."""
        while tensor.name in self._makers:
            layer, kind = self._makers[tensor.name]
            if kind not in ("SHUFFLE", "UNSQUEEZE"):
                break
            tensor = layer.get_input(0)
        return str(tensor.name)

    def constant(self, array: NDArray[Any]) -> Any:
        """A constant tensor."""
        self.constants.append(array)
        return self.network.add_constant(array.shape, self.trt.Weights(array)).get_output(0)

    def number(self, value: float, rank: int, dtype: Any) -> Any:
        """A floating-point number of some rank and TensorRT dtype."""
        made = self.constant(np.full((1,) * rank, value, dtype=np.float32))
        return made if dtype == self.trt.float32 else self.cast(made, dtype)

    def sizes(self, *values: int) -> Any:
        """An int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def elementwise(self, first: Any, operation: str, second: Any) -> Any:
        """`operation` of two tensors, by its name in ElementWiseOperation."""
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self.network.add_elementwise(first, second, kind).get_output(0)

    def cast(self, tensor: Any, dtype: Any) -> Any:
        """A tensor in another dtype."""
        return self.network.add_cast(tensor, dtype).get_output(0)

    def size(self, tensor: Any, axis: int) -> Any:
        """The size of an axis, int64 [1]."""
        shape = self.network.add_shape(tensor).get_output(0)
        return self.network.add_slice(shape, (axis,), (1,), (1,)).get_output(0)

    def first(self, tensor: Any, sizes: Sequence[Any]) -> Any:
        """The slice of `sizes` (numbers, or int64 [1]) that begins at the origin."""
        rank = len(sizes)
        parts = [self.sizes(size) if isinstance(size, int) else size for size in sizes]
        concatenated = self.network.add_concatenation(parts)
        concatenated.axis = 0
        layer = self.network.add_slice(tensor, (0,) * rank, (1,) * rank, (1,) * rank)
        layer.set_input(2, concatenated.get_output(0))
        return layer.get_output(0)

    def reshape(self, tensor: Any, *sizes: int) -> Any:
        """A tensor in another shape; 0 copies a size and -1 is computed."""
        layer = self.network.add_shuffle(tensor)
        layer.reshape_dims = sizes
        return layer.get_output(0)

    def unsqueeze(self, tensor: Any, axis: int) -> Any:
        """A tensor with another axis of size 1."""
        return self.network.add_unsqueeze(tensor, self.sizes(axis)).get_output(0)

    def reduce(self, tensor: Any, operation: str, axis: int, *, keep: bool) -> Any:
        """The SUM or MAX over an axis, which is kept with size 1 or dropped."""
        kind = getattr(self.trt.ReduceOperation, operation)
        return self.network.add_reduce(tensor, kind, 1 << axis, keep).get_output(0)

    def exp(self, tensor: Any) -> Any:
        """e to the power of each element."""
        return self.network.add_unary(tensor, self.trt.UnaryOperation.EXP).get_output(0)

    def select(self, condition: Any, then: Any, otherwise: Any) -> Any:
        """`then` where the condition holds."""
        return self.network.add_select(condition, then, otherwise).get_output(0)
