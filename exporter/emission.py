"""A traced module -> ONNX nodes, once per occurrence of the module.

The translation is a closed table: an operator that is not in it is an error, never approximated. A handler has
the signature of the torch function it translates, so an argument it does not know is an error too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch.nn import functional

import qwenport.exporter.decoder  # noqa: F401 - defines the operators of the table below
from qwenport.exporter import dual_chunk_attention
from qwenport.exporter.errors import TracingError
from qwenport.exporter.tracing import Call, Ref, Span, Sym, TensorType, Trace, name_of
from qwenport.plugins.nodes import append_node, initializer
from qwenport.plugins.operator import operators

RoundsInput = Callable[["GraphBuilder", ir.Value], ir.Value]
"""(the graph, x [..., K]) -> x rounded; those that are equal do the same."""


@dataclass
class GraphBuilder:
    """An ONNX graph under construction: nodes, and shared initializers.

    Attributes:
        roundings: weight -> appends the rounding of its linear's input, and returns the result.
        input_scales: stacked down projections of experts -> the scales of their gates', ups' and downs' inputs, [E, 3].
    """

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    sizes: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    permutations: dict[ir.Value, ir.Value] = field(default_factory=dict)
    gathered: dict[tuple[ir.Value, ir.Value], ir.Value] = field(default_factory=dict)
    roundings: dict[ir.Value, RoundsInput] = field(default_factory=dict)
    input_scales: dict[ir.Value, ir.Value] = field(default_factory=dict)
    rounded: dict[tuple[ir.Value, RoundsInput], ir.Value] = field(default_factory=dict)

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        domain: str = "",
        attributes: dict[str, Any] | None = None,
    ) -> ir.Value:
        """Append a one-output node and return its output, which has the node's name."""
        (value,) = self.add_many(
            op_type, inputs, name, [(dtype, shape)], domain=domain, attributes=attributes
        )
        return value

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        results: Sequence[tuple[ir.DataType, ir.Shape | None]],
        *,
        domain: str = "",
        attributes: dict[str, Any] | None = None,
    ) -> Sequence[ir.Value]:
        """Append a node with one output per (dtype, shape); several outputs are named name.0, name.1.

        A name already in use gets a number: name, name_2, name_3.
        """
        count = self.names[name] = self.names.get(name, 0) + 1
        if count > 1:
            name = f"{name}_{count}"
        return append_node(
            self.nodes, op_type, inputs, name, results, domain=domain, attributes=attributes
        )

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a node's output exactly this name, and the node too if it has only this output.

        Raises:
            TracingError: the name is in use.
        """
        if name in self.names:
            raise TracingError(f"two values are named {name}")
        self.names[name] = 1
        value.name = name
        node = value.producer()
        assert node is not None
        if len(node.outputs) == 1:
            node.name = name

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the value of an initializer, made on first use."""
        return initializer(self.initializers, tensor)

    def ordered(self, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        """The input of a linear with its last axis in the order of the weight's columns.

        If `permutations` has one for the weight, it is a Gather named `name`, made once for x and the permutation.
        """
        permutation = self.permutations.get(weight)
        if permutation is None:
            return x
        if (x, permutation) not in self.gathered:
            assert x.dtype is not None
            self.gathered[x, permutation] = self.add(
                "Gather",
                [x, permutation],
                name,
                dtype=x.dtype,
                shape=x.shape,
                attributes={"axis": -1},
            )
        return self.gathered[x, permutation]

    def constant(self, values: Sequence[int]) -> ir.Value:
        """Return a shared int64 vector."""
        name = "const_" + "_".join(str(v).replace("-", "m") for v in values)
        return self.initializer(ir.tensor(np.array(values, dtype=np.int64), name=name))

    def size(self, tensor: ir.Value, axis: int) -> ir.Value:
        """Return a size as a one-element vector, made once per tensor and axis."""
        key = (tensor, axis)
        if key not in self.sizes:
            self.sizes[key] = self.add(
                "Shape",
                [tensor],
                f"{tensor.name}.Shape_{axis}",
                dtype=ir.DataType.INT64,
                shape=ir.Shape([1]),
                attributes={"start": axis, "end": axis + 1},
            )
        return self.sizes[key]

    def rounded_for(self, weight: ir.Value, x: ir.Value) -> ir.Value:
        """The input of the linear of `weight` as it multiplies it: `x`, or `x` rounded, once for equal roundings."""
        rounding = self.roundings.get(weight)
        if rounding is None:
            return x
        if (x, rounding) not in self.rounded:
            self.rounded[x, rounding] = rounding(self, x)
        return self.rounded[x, rounding]


def emit(
    traced: Trace,
    builder: GraphBuilder,
    inputs: Sequence[ir.Value],
    parameters: dict[str, ir.Value],
    scope: str,
) -> list[ir.Value]:
    """Write one copy of a traced module into `builder`.

    Args:
        traced: the module.
        builder: the graph.
        inputs: the module's inputs, in order.
        parameters: parameter name -> its initializer's value.
        scope: prefix of every node and value name, e.g. "model.layers.3"; the submodule follows, and then the name
            given by `named` or else the operator.

    Returns:
        The module's outputs.

    Raises:
        TracingError: an operator, or a use of one, has no translation; or a module with named values occurs twice in a
            scope.
    """
    emitter = Emitter(traced, builder, scope)
    emitter.values = [*inputs, *(parameters[name] for name in traced.parameters)]
    for call in traced.calls:
        emitter.values += emitter.translate(call)
    return [emitter.values[ref.index] for ref in traced.outputs]


class Emitter:
    """The handlers' context while one copy is written."""

    def __init__(self, traced: Trace, builder: GraphBuilder, scope: str) -> None:
        self.traced, self.builder, self.scope = traced, builder, scope
        self.values: list[ir.Value] = []
        self.call: Call

    def translate(self, call: Call) -> Sequence[ir.Value]:
        handler = HANDLERS.get(call.function)
        if handler is None:
            raise TracingError(f"{self.scope}: no ONNX translation for {name_of(call.function)}")
        self.call = call
        try:
            made = handler(self, *call.args, **call.kwargs)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise TracingError(
                f"{self.scope}: {name_of(call.function)} is used in a way that is not translated "
                f"({error})"
            ) from error
        values = (made,) if isinstance(made, ir.Value) else made
        if len(values) != len(call.results):
            raise TracingError(
                f"{self.scope}: {name_of(call.function)} has {len(call.results)} results, "
                f"and its translation {len(values)}"
            )
        for ref, value in zip(call.results, values, strict=True):
            if ref in self.traced.names:
                self.builder.rename(value, f"{self.scope}.{self.traced.names[ref]}")
        return values

    def type_of(self, ref: Ref) -> TensorType:
        return self.traced.types[ref.index]

    def op(
        self, op_type: str, *inputs: Ref | ir.Value, like: Ref | None = None, **attributes: Any
    ) -> ir.Value:
        """Append a node with the call's dtype and shape, or with `like`'s dtype and no declared shape."""
        if not all(isinstance(i, Ref | ir.Value) for i in inputs):
            raise ValueError(f"{op_type} needs tensors")
        kind = self.type_of(like or self.call.results[0])
        return self.builder.add(
            op_type,
            [self.values[i.index] if isinstance(i, Ref) else i for i in inputs],
            self.name(op_type),
            dtype=from_torch_dtype(kind.dtype),
            shape=None if like else ir.Shape(kind.shape),
            domain=attributes.pop("domain", ""),
            attributes=attributes,
        )

    def rounds(self, weight: Ref) -> bool:
        return self.values[weight.index] in self.builder.roundings

    def input_scales(self, down: Ref) -> ir.Value | None:
        return self.builder.input_scales.get(self.values[down.index])

    def rounded(self, x: Ref, weight: Ref) -> ir.Value:
        return self.builder.rounded_for(self.values[weight.index], self.values[x.index])

    def ops(
        self, op_type: str, *inputs: Ref | ir.Value, domain: str, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with all of the call's results."""
        kinds = [self.type_of(result) for result in self.call.results]
        return self.builder.add_many(
            op_type,
            [self.values[i.index] if isinstance(i, Ref) else i for i in inputs],
            self.name(op_type),
            [(from_torch_dtype(kind.dtype), ir.Shape(kind.shape)) for kind in kinds],
            domain=domain,
            attributes=attributes,
        )

    def name(self, op_type: str) -> str:
        """A node's name: its place in the module, and its operator."""
        path = f"{self.call.scope}." if self.call.scope else ""
        return f"{self.scope}.{path}{op_type}"

    def size(self, size: Sym) -> ir.Value:
        """The size of a dynamic axis, from the first tensor that has it."""
        for index, kind in enumerate(self.traced.types):
            if size.name in kind.shape:
                return self.builder.size(self.values[index], kind.shape.index(size.name))
        raise AssertionError(size)


def _linear(e: Emitter, x: Ref, weight: Ref, bias: Ref | None = None) -> ir.Value:
    ordered = e.builder.ordered(e.values[x.index], e.values[weight.index], e.name("Gather"))
    given = e.builder.rounded_for(e.values[weight.index], ordered)
    product = e.op("MatMul", given, e.op("Transpose", weight, like=weight, perm=[1, 0]))
    return product if bias is None else e.op("Add", product, bias)


def _reshape(e: Emitter, x: Ref, *sizes: Any) -> ir.Value:
    """Dynamic sizes must keep their position (ONNX: 0 copies that axis)."""
    before = e.type_of(x).shape
    flat = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes
    target = []
    for axis, size in enumerate(flat):
        if isinstance(size, Sym):
            if axis >= len(before) or before[axis] != size.name:
                raise ValueError(f"a reshape moves the dynamic axis {size.name}")
            size = 0
        elif size == 0:
            raise ValueError("a reshape to an empty tensor")
        target.append(size)
    return e.op("Reshape", x, e.builder.constant(target))


def _transpose(e: Emitter, x: Ref, dim0: int, dim1: int) -> ir.Value:
    axes = list(range(len(e.type_of(x).shape)))
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return e.op("Transpose", x, perm=axes)


def _slice(e: Emitter, x: Ref, index: Any) -> ir.Value:
    """x[:, ..., :n] along one axis, n a dynamic size."""
    spans = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(span, Span) for span in spans):
        raise ValueError("only slices are translated")
    cut = [(axis, span) for axis, span in enumerate(spans) if span != Span(None, None, None)]
    if len(cut) != 1:
        raise ValueError("one axis can be sliced")
    ((axis, span),) = cut
    if span.start not in (None, 0) or span.step not in (None, 1) or not isinstance(span.stop, Sym):
        raise ValueError("only slices [:n] are translated")
    constant = e.builder.constant
    return e.op("Slice", x, constant([0]), e.size(span.stop), constant([axis]))


def _sigmoid(e: Emitter, x: Ref) -> ir.Value:
    return e.op("Sigmoid", x)


def _silu(e: Emitter, x: Ref, inplace: bool = False) -> ir.Value:
    assert not inplace
    return e.op("Mul", x, e.op("Sigmoid", x))


def _rms_norm(
    e: Emitter, x: Ref, normalized_shape: tuple[int, ...], weight: Ref, eps: float
) -> ir.Value:
    assert len(normalized_shape) == 1, "over more than one axis"
    return e.op(
        "RMSNormalization",
        x,
        weight,
        axis=-1,
        epsilon=float(eps),
        stash_type=int(ir.DataType.FLOAT),  # mean of squares in fp32, as transformers
    )


def _attention(
    e: Emitter, q: Ref, k: Ref, v: Ref, attn_mask: Ref, *, scale: float, enable_gqa: bool
) -> ir.Value:
    assert isinstance(attn_mask, Ref) and enable_gqa is True
    return e.op("Attention", q, k, v, attn_mask, scale=float(scale))


def _expand(e: Emitter, x: Ref, *sizes: Any) -> ir.Value:
    """ONNX Expand broadcasts both ways: 1 keeps an axis."""
    assert all(isinstance(size, int) for size in sizes), "to a dynamic size"
    return e.op("Expand", x, e.builder.constant([1 if size == -1 else size for size in sizes]))


def _gather(e: Emitter, x: Ref, dim: int, index: Ref) -> ir.Value:
    return e.op("GatherElements", x, index, axis=dim)


def _unsqueeze(e: Emitter, x: Ref, dim: int) -> ir.Value:
    return e.op("Unsqueeze", x, e.builder.constant([dim]))


def _cast(e: Emitter, x: Ref, dtype: torch.dtype) -> ir.Value:
    return e.op("Cast", x, to=int(from_torch_dtype(dtype)))


def _embedding(
    e: Emitter,
    ids: Ref,
    weight: Ref,
    padding_idx: None = None,
    max_norm: None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> ir.Value:
    assert max_norm is None, "max_norm rescales rows"
    return e.op("Gather", weight, ids, axis=0)


def _number(e: Emitter, like: Ref, value: float) -> ir.Value:
    """A constant of a tensor's dtype, shape [1]."""
    dtype = e.type_of(like).dtype
    if dtype == torch.int64:
        return e.builder.constant([int(value)])
    assert dtype == torch.float32, "a number beside a tensor that is not int64 or fp32"
    name = f"const_{value!r}".replace("-", "m")
    return e.builder.initializer(ir.tensor(np.array([value], dtype=np.float32), name=name))


def _binary(op_type: str) -> Callable[..., ir.Value]:
    def handler(e: Emitter, a: Ref, b: Ref | float) -> ir.Value:
        return e.op(op_type, a, b if isinstance(b, Ref) else _number(e, a, b))

    return handler


def _floor_division(e: Emitter, a: Ref, b: int, *, rounding_mode: str) -> ir.Value:
    """Of integers that are not negative: ONNX rounds towards zero."""
    assert rounding_mode == "floor" and e.type_of(a).dtype == torch.int64
    return e.op("Div", a, _number(e, a, b))


def _clamp(e: Emitter, x: Ref, min: float | None = None, max: float | None = None) -> ir.Value:
    values = [e.values[x.index]]
    if min is not None:
        values = [e.op("Max", *values, _number(e, x, min))]
    if max is not None:
        values = [e.op("Min", *values, _number(e, x, max))]
    return values[0]


def _log(e: Emitter, x: Ref) -> ir.Value:
    return e.op("Log", x)


def _tensor_scatter(e: Emitter, past: Ref, update: Ref, write_indices: Ref) -> ir.Value:
    return e.op("TensorScatter", past, update, write_indices, axis=2, mode="linear")


HANDLERS: dict[Any, Callable[..., ir.Value | Sequence[ir.Value]]] = {
    functional.linear: _linear,
    functional.silu: _silu,
    functional.rms_norm: _rms_norm,
    functional.embedding: _embedding,
    functional.scaled_dot_product_attention: _attention,
    torch.Tensor.view: _reshape,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.transpose: _transpose,
    torch.Tensor.unsqueeze: _unsqueeze,
    torch.Tensor.expand: _expand,
    torch.Tensor.gather: _gather,
    torch.Tensor.to: _cast,
    torch.Tensor.__getitem__: _slice,
    torch.Tensor.add: _binary("Add"),
    torch.Tensor.div: _binary("Div"),
    torch.Tensor.mul: _binary("Mul"),
    torch.Tensor.le: _binary("LessOrEqual"),
    torch.sigmoid: _sigmoid,
    torch.ops.qwenport.tensor_scatter.default: _tensor_scatter,
    torch.ops.qwenport.dual_chunk_attention.default: dual_chunk_attention.emit,
    torch.remainder: _binary("Mod"),
    torch.div: _floor_division,
    torch.Tensor.clamp: _clamp,
    torch.log: _log,
    **{operator.torch: operator.emit for operator in operators()},
}
