"""torch module -> ONNX nodes: `trace` on the meta device once, `emit` as often as the module occurs.

The translation is a closed table: an operator that is not in it is an error, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qwenport.exporter.errors import TracingError

IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Trace:
    """A traced module: its operator graph and the names of its parameters, in input order."""

    program: torch.export.ExportedProgram
    parameters: tuple[str, ...]
    num_inputs: int


def trace(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    dynamic_shapes: Sequence[dict[int, Any]],
) -> Trace:
    """Trace `module` on meta tensors; `dynamic_shapes` names each input's dynamic axes.

    Raises:
        TracingError: torch specialised an axis that was to stay dynamic, or could not trace.
    """
    if len({id(tensor) for tensor in inputs}) != len(inputs):
        # torch.export would take two inputs for one: cos for sin, key for value.
        raise TracingError(
            f"{type(module).__name__}: every example input must be a tensor of its own"
        )
    positional = tuple(dynamic_shapes)
    takes_varargs = any(p.kind is p.VAR_POSITIONAL for p in _parameters_of(module.forward))
    shapes: Any = (positional[0], positional[1:]) if takes_varargs else positional
    try:
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises many kinds; each means: not traceable as asked
        raise TracingError(f"torch.export failed on {type(module).__name__}: {error}") from error
    signature = program.graph_signature
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    if signature.buffers:
        raise TracingError(f"{type(module).__name__} has a buffer: {signature.buffers[0]}")
    by_placeholder = signature.inputs_to_parameters
    parameters = tuple(by_placeholder[p] for p in placeholders if p in by_placeholder)
    return Trace(program, parameters, len(inputs))


def _parameters_of(function: Callable[..., Any]) -> list[Any]:
    import inspect

    return list(inspect.signature(function).parameters.values())


@dataclass
class GraphBuilder:
    """An ONNX graph under construction: nodes, and initializers that are made once and shared."""

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    sizes: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

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
        """Append a one-output node and return its output, named as the node.

        A name that is taken gets a number: name, name_2, name_3.
        """
        count = self.names[name] = self.names.get(name, 0) + 1
        if count > 1:
            name = f"{name}_{count}"
        node = ir.node(op_type, inputs, domain=domain, attributes=attributes, name=name)
        (value,) = node.outputs
        value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
        self.nodes.append(node)
        return value

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the value of an initializer, made on first use."""
        name = tensor.name
        assert name is not None
        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,  # type: ignore[arg-type]
                const_value=tensor,
            )
        return self.initializers[name]

    def constant(self, values: Sequence[int]) -> ir.Value:
        """Return a shared int64 vector."""
        name = "const_" + "_".join(str(v).replace("-", "m") for v in values)
        return self.initializer(ir.tensor(np.array(values, dtype=np.int64), name=name))


def emit(
    traced: Trace,
    builder: GraphBuilder,
    inputs: Sequence[ir.Value],
    parameters: dict[str, ir.Value],
    scope: str,
) -> list[ir.Value]:
    """Write one copy of a traced module into `builder`.

    Args:
        inputs: the module's inputs, in order.
        parameters: parameter name -> its initializer's value.
        scope: prefix of every node and value name, e.g. "model.layers.3".

    Returns:
        The module's outputs.

    Raises:
        TracingError: an operator without translation.
    """
    return _Emitter(traced, builder, parameters, scope).run(inputs)


class _Emitter:
    def __init__(
        self, traced: Trace, builder: GraphBuilder, parameters: dict[str, ir.Value], scope: str
    ) -> None:
        self.traced, self.builder, self.parameters, self.scope = traced, builder, parameters, scope
        self.values: dict[torch.fx.Node, ir.Value] = {}

    def run(self, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        supplied = iter(inputs)
        weights = iter(self.traced.parameters)
        outputs: list[ir.Value] = []
        signature = self.traced.program.graph_signature
        for node in self.traced.program.graph.nodes:
            if node.op == "placeholder":
                is_weight = node.name in signature.inputs_to_parameters
                self.values[node] = self.parameters[next(weights)] if is_weight else next(supplied)
            elif node.op == "output":
                outputs = [self.values[value] for value in node.args[0]]
            else:
                self._call(node)
        return outputs

    def _call(self, node: torch.fx.Node) -> None:
        handler = HANDLERS.get(str(node.target))
        if handler is None:
            raise TracingError(f"{self.scope}: no ONNX translation for {node.target}")
        try:
            result = handler(self, node)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise TracingError(
                f"{self.scope}: {node.target} is used in a way that is not translated ({error!r})"
            ) from error
        if result is not None:
            self.values[node] = result

    def op(
        self,
        node: torch.fx.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        like: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append an ONNX node for an fx node. Its dtype and shape are the fx node's, or `like`'s dtype."""
        domain = attributes.pop("domain", "")
        if like is None:
            meta = node.meta["val"]
            dtype, shape = IR_DTYPES[meta.dtype], _shape(meta)
        else:
            dtype, shape = _dtype_of(like), None
        name = f"{self.scope}.{_module_path(node)}{op_type}"
        return self.builder.add(
            op_type, inputs, name, dtype=dtype, shape=shape, domain=domain, attributes=attributes
        )

    def value(self, argument: Any) -> ir.Value:
        if not isinstance(argument, torch.fx.Node) or argument not in self.values:
            raise TracingError(f"{self.scope}: expected a tensor, found {argument!r}")
        return self.values[argument]


def _dtype_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _shape(meta: torch.Tensor) -> ir.Shape:
    return ir.Shape([size if isinstance(size, int) else str(size) for size in meta.shape])


def _module_path(node: torch.fx.Node) -> str:
    """Where in the module the operator stands, e.g. "self_attn.q_proj."."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return f"{paths[-1]}." if paths else ""


def _linear(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x, weight, bias = (*node.args, None)[:3]
    transposed = e.op(node, "Transpose", [e.value(weight)], like=e.value(weight), perm=[1, 0])
    product = e.op(node, "MatMul", [e.value(x), transposed])
    return product if bias is None else e.op(node, "Add", [product, e.value(bias)])


def _reshape(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    """Symbolic sizes must stay in their place (ONNX: 0 copies that axis)."""
    x = node.args[0]
    assert isinstance(x, torch.fx.Node)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    sizes = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(before) and str(before[axis]) == str(size):
            sizes.append(0)
        else:
            raise TracingError(f"{e.scope}: a reshape moves a dynamic axis: {before} -> {after}")
    return e.op(node, "Reshape", [e.value(x), e.builder.constant(sizes)])


def _transpose(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x, first, second = node.args
    axes = list(range(node.meta["val"].dim()))
    axes[first], axes[second] = axes[second], axes[first]  # type: ignore[index]
    return e.op(node, "Transpose", [e.value(x)], perm=axes)


def _slice(e: _Emitter, node: torch.fx.Node) -> ir.Value | None:
    x, axis, start, end, step = (*node.args, 1)[:5]
    assert isinstance(axis, int)
    if start in (None, 0) and (end, step) == (2**63 - 1, 1):
        return e.value(x)  # [:]
    if start not in (None, 0) or step != 1 or not isinstance(end, torch.fx.Node):
        raise TracingError(f"{e.scope}: only slices [:n] are translated")
    constants = e.builder.constant([0]), e.value(end), e.builder.constant([axis])
    return e.op(node, "Slice", [e.value(x), *constants])


def _sym_size(e: _Emitter, node: torch.fx.Node) -> ir.Value | None:
    """A size as a one-element vector; made once per tensor and axis for the whole graph."""
    x, axis = node.args
    assert isinstance(axis, int)
    if all(str(user.target) not in ("aten.slice.Tensor",) for user in node.users):
        return None  # reshapes copy the axis instead
    tensor = e.value(x)
    key = (tensor, axis)
    if key not in e.builder.sizes:
        e.builder.sizes[key] = e.builder.add(
            "Shape",
            [tensor],
            f"{tensor.name}.Shape_{axis}",
            dtype=ir.DataType.INT64,
            shape=ir.Shape([1]),
            attributes={"start": axis, "end": axis + 1},
        )
    return e.builder.sizes[key]


def _silu(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x = e.value(node.args[0])
    return e.op(node, "Mul", [x, e.op(node, "Sigmoid", [x])])


def _rms_norm(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x, normalized_shape, weight, eps = node.args
    assert len(normalized_shape) == 1  # type: ignore[arg-type]
    return e.op(
        node,
        "RMSNormalization",
        [e.value(x), e.value(weight)],
        axis=-1,
        epsilon=float(eps),  # type: ignore[arg-type]
        stash_type=int(ir.DataType.FLOAT),  # mean of squares in fp32, as transformers
    )


def _attention(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    q, k, v, mask, *rest = node.args
    if any(rest) or mask is None or node.kwargs.get("enable_gqa") is not True:
        raise TracingError(f"{e.scope}: attention must have an explicit mask and grouped heads")
    inputs = [e.value(argument) for argument in (q, k, v, mask)]
    return e.op(node, "Attention", inputs, scale=float(node.kwargs["scale"]))  # type: ignore[arg-type]


def _expand(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    """ONNX Expand broadcasts both ways: 1 keeps an axis."""
    x, sizes = node.args
    kept = []
    for size in sizes:  # type: ignore[union-attr]
        if not isinstance(size, int):
            raise TracingError(f"{e.scope}: expand to a dynamic size")
        kept.append(1 if size == -1 else size)
    return e.op(node, "Expand", [e.value(x), e.builder.constant(kept)])


def _gather(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x, axis, index = node.args
    return e.op(node, "GatherElements", [e.value(x), e.value(index)], axis=axis)


def _unsqueeze(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x, axis = node.args
    assert isinstance(axis, int)
    return e.op(node, "Unsqueeze", [e.value(x), e.builder.constant([axis])])


def _cast(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    x = e.value(node.args[0])
    to = IR_DTYPES[node.meta["val"].dtype]
    return x if x.dtype == to else e.op(node, "Cast", [x], to=int(to))


def _embedding(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    weight, ids = node.args[:2]
    return e.op(node, "Gather", [e.value(weight), e.value(ids)], axis=0)


def _binary(op_type: str) -> Callable[[_Emitter, torch.fx.Node], ir.Value]:
    def handler(e: _Emitter, node: torch.fx.Node) -> ir.Value:
        if node.kwargs:
            raise TracingError(f"{e.scope}: {node.target} with {dict(node.kwargs)}")
        return e.op(node, op_type, [e.value(argument) for argument in node.args])

    return handler


def _rotary(e: _Emitter, node: torch.fx.Node) -> ir.Value:
    inputs = [e.value(argument) for argument in node.args]
    return e.op(node, "RotaryEmbedding", inputs, domain="qwenport")


HANDLERS: dict[str, Callable[[_Emitter, torch.fx.Node], ir.Value | None]] = {
    "aten.linear.default": _linear,
    "aten.view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten.transpose.int": _transpose,
    "aten.slice.Tensor": _slice,
    "aten.sym_size.int": _sym_size,
    "aten.silu.default": _silu,
    "aten.rms_norm.default": _rms_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.expand.default": _expand,
    "aten.gather.default": _gather,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.to.dtype": _cast,
    "aten.embedding.default": _embedding,
    # states what the fake tensors already carry; computes nothing
    "aten._assert_tensor_metadata.default": lambda e, node: None,
    "aten.le.Tensor": _binary("LessOrEqual"),
    "aten.add.Tensor": _binary("Add"),
    "aten.mul.Tensor": _binary("Mul"),
    "qwenport.rotary_embedding.default": _rotary,
    "qwenport.tensor_scatter.default": lambda e, node: e.op(
        node, "TensorScatter", [e.value(a) for a in node.args], axis=2, mode="linear"
    ),
}
