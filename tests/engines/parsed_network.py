"""A mixture of experts' part of a parsed TensorRT network, evaluated in NumPy: what TensorRT understood.

Every layer's outputs must have the dtype and shape that TensorRT states, and every index must be in range. A
layer or a mode that is not listed is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Network:
    """Evaluates tensors of an INetworkDefinition by name."""

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.made = trt, {}
        # the layer's kind is read before its class is set: afterwards `type` may be the layer's own parameter
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            kind = layer.type.name
            for output in range(layer.num_outputs):
                self.made[layer.get_output(output).name] = (layer, kind)
        self.gathered: list[tuple[tuple[int, ...], int]] = []
        """Of every gather: the shape gathered from, and how many indices."""

    def value(self, name: str, known: dict[str, Array]) -> Array:
        """The tensor of that name; `known` has the inputs, and gets everything that is computed."""
        if name not in known:
            layer, kind = self.made[name]
            count = range(layer.num_inputs)
            given = [layer.get_input(i) for i in count]
            inputs = [None if t is None else self.value(t.name, known) for t in given]
            layer.__class__ = getattr(self.trt, _CLASSES[kind])
            results = getattr(self, f"_{kind.lower()}")(layer, *inputs)
            for index, result in enumerate(results):
                tensor = layer.get_output(index)
                assert np.dtype(self.trt.nptype(tensor.dtype)) == result.dtype, layer.name
                assert len(tensor.shape) == result.ndim, layer.name
                stated = zip(tensor.shape, result.shape, strict=True)
                assert all(a in (-1, b) for a, b in stated), layer.name
                known[tensor.name] = result
        return known[name]

    def _dtype(self, layer: Any, output: int = 0) -> Any:
        return self.trt.nptype(layer.get_output(output).dtype)

    def _constant(self, layer: Any) -> list[Array]:
        weights = layer.weights
        values = weights.numpy() if hasattr(weights, "numpy") else weights
        return [np.array(values).reshape(tuple(layer.shape)).astype(self._dtype(layer))]

    def _cast(self, layer: Any, x: Array) -> list[Array]:
        return [x.astype(self.trt.nptype(layer.to_type))]

    def _shape(self, layer: Any, x: Array) -> list[Array]:
        return [np.array(x.shape, dtype=np.int64)]

    def _shuffle(self, layer: Any, x: Array, target: Array | None = None) -> list[Array]:
        x = x.transpose(tuple(layer.first_transpose)[: x.ndim])
        if target is None:
            try:
                sizes = list(layer.reshape_dims)
            except (TypeError, ValueError):  # it does not reshape
                sizes = list(x.shape)
        else:
            sizes = [int(size) for size in target]
        if layer.zero_is_placeholder:
            sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        x = x.reshape(sizes)
        return [x.transpose(tuple(layer.second_transpose)[: x.ndim])]

    def _elementwise(self, layer: Any, a: Array, b: Array) -> list[Array]:
        assert a.ndim == b.ndim
        name = layer.op.name
        if name == "DIV":
            return [a / b if a.dtype.kind == "f" else np.trunc(a / b).astype(a.dtype)]
        return [_ELEMENTWISE[name](a, b)]

    def _slice(self, layer: Any, x: Array, *given: Array | None) -> list[Array]:
        parts = []
        for index, name in enumerate(("start", "shape", "stride")):
            values = given[index] if index < len(given) else None
            parts.append([int(v) for v in (getattr(layer, name) if values is None else values)])
        ranges = [s + np.arange(n) * d for s, n, d in zip(*parts, strict=True)]
        assert all(
            not r.size or (r.min() >= 0 and r.max() < n)
            for r, n in zip(ranges, x.shape, strict=True)
        )
        return [x[np.ix_(*ranges)]]

    def _concatenation(self, layer: Any, *parts: Array) -> list[Array]:
        return [np.concatenate(parts, axis=layer.axis)]

    def _gather(self, layer: Any, x: Array, indices: Array) -> list[Array]:
        assert indices.min() >= 0
        assert indices.max() < x.shape[layer.axis]
        if layer.mode == self.trt.GatherMode.ELEMENT:
            return [np.take_along_axis(x, indices, layer.axis)]
        assert layer.mode == self.trt.GatherMode.DEFAULT
        assert layer.num_elementwise_dims == 0
        self.gathered.append((x.shape, indices.size))
        return [np.take(x, indices, axis=layer.axis)]

    def _reduce(self, layer: Any, x: Array) -> list[Array]:
        assert layer.op == self.trt.ReduceOperation.SUM
        return [x.sum(axis=_axes(layer.axes), keepdims=layer.keep_dims, dtype=x.dtype)]

    def _topk(self, layer: Any, x: Array, count: Array | None = None) -> list[Array]:
        assert layer.op == self.trt.TopKOperation.MAX
        (axis,) = _axes(layer.axes)
        k = layer.k if count is None else int(count)
        order = np.argsort(-x, axis=axis, kind="stable").take(range(k), axis=axis)
        return [np.take_along_axis(x, order, axis), order.astype(self._dtype(layer, 1))]

    def _softmax(self, layer: Any, x: Array) -> list[Array]:
        (axis,) = _axes(layer.axes)
        powers = np.exp(x - x.max(axis, keepdims=True))
        return [powers / powers.sum(axis, keepdims=True)]

    def _select(self, layer: Any, condition: Array, a: Array, b: Array) -> list[Array]:
        return [np.where(condition, a, b)]

    def _matrix_multiply(self, layer: Any, a: Array, b: Array) -> list[Array]:
        transpose = self.trt.MatrixOperation.TRANSPOSE
        a = a.swapaxes(-1, -2) if layer.op0 == transpose else a
        return [a @ (b.swapaxes(-1, -2) if layer.op1 == transpose else b)]

    def _activation(self, layer: Any, x: Array) -> list[Array]:
        assert layer.type == self.trt.ActivationType.SIGMOID
        return [1 / (1 + np.exp(-x))]

    def _fill(self, layer: Any, shape: Array, start: Array, steps: Array) -> list[Array]:
        assert layer.operation == self.trt.FillOperation.LINSPACE
        return [(start + np.arange(int(shape[0])) * steps[0]).astype(self._dtype(layer))]

    def _scatter(self, layer: Any, x: Array, indices: Array, updates: Array) -> list[Array]:
        assert layer.mode == self.trt.ScatterMode.ELEMENT
        assert len(np.unique(indices)) == indices.size
        result = x.copy()
        np.put_along_axis(result, indices, updates, layer.axis)
        return [result]

    def _cumulative(self, layer: Any, x: Array, axis: Array) -> list[Array]:
        assert layer.op == self.trt.CumulativeOperation.SUM
        assert not layer.exclusive
        assert not layer.reverse
        return [np.cumsum(x, axis=int(axis))]

    def _unsqueeze(self, layer: Any, x: Array, axes: Array) -> list[Array]:
        return [np.expand_dims(x, tuple(int(axis) for axis in axes))]

    def _squeeze(self, layer: Any, x: Array, axes: Array) -> list[Array]:
        return [np.squeeze(x, tuple(int(axis) for axis in axes))]


def _axes(mask: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(8) if mask >> axis & 1)


_CLASSES = {
    "CONSTANT": "IConstantLayer",
    "CAST": "ICastLayer",
    "SHAPE": "IShapeLayer",
    "SHUFFLE": "IShuffleLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "SLICE": "ISliceLayer",
    "CONCATENATION": "IConcatenationLayer",
    "GATHER": "IGatherLayer",
    "REDUCE": "IReduceLayer",
    "TOPK": "ITopKLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "SELECT": "ISelectLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "ACTIVATION": "IActivationLayer",
    "FILL": "IFillLayer",
    "SCATTER": "IScatterLayer",
    "CUMULATIVE": "ICumulativeLayer",
    "UNSQUEEZE": "IUnsqueezeLayer",
    "SQUEEZE": "ISqueezeLayer",
}
_ELEMENTWISE = {
    "FLOOR_DIV": np.floor_divide,
    "SUM": np.add,
    "SUB": np.subtract,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "EQUAL": np.equal,
    "LESS": np.less,
    "GREATER": np.greater,
    "OR": np.logical_or,
    "AND": np.logical_and,
}
