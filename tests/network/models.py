"""Small ONNX models, what onnxruntime computes of them, and what the interpreter does.

Neither side sees the other: one is given the ONNX model, the other what TensorRT's parser makes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qwenport.validate.network import Interpreter, ParsedNetwork, parse_model

Array = np.ndarray
Arrays = Mapping[str, Array]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)
FP32 = np.dtype(np.float32)
INT32, INT64, BOOL = np.dtype(np.int32), np.dtype(np.int64), np.dtype(bool)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 5)


def shapes(min_rank: int = 1, max_rank: int = 4) -> Any:
    """A shape; no axis is empty, for TensorRT knows many empty tensors only when it builds."""
    return st.lists(sizes, min_size=min_rank, max_size=max_rank).map(tuple)


def random_array(seed: int, shape: Sequence[int], dtype: Any = FP32, spread: float = 4.0) -> Array:
    """Normal numbers of that spread; whole numbers for integers, either for bool."""
    drawn = np.random.default_rng(seed).standard_normal(tuple(shape)) * spread
    return drawn > 0 if np.dtype(dtype) == BOOL else np.asarray(drawn).astype(dtype)


def draw_array(
    draw: st.DrawFn, shape: Sequence[int], dtype: Any = FP32, spread: float = 4
) -> Array:
    return random_array(draw(seeds), shape, dtype, spread)


Axis = tuple[str, int]  # of an input


def draw_stated(
    draw: st.DrawFn, arrays: Arrays, *, alike: Sequence[set[Axis]] = ()
) -> frozenset[Axis]:
    """Which axes the model states; the others are dynamic. Of axes that are `alike` it states all or none."""
    every = [(name, axis) for name, array in arrays.items() for axis in range(np.ndim(array))]
    drawn = set(draw(st.lists(st.sampled_from(every), unique=True))) if every else set()
    for axes in alike:
        drawn |= axes if drawn & axes else set()
    return frozenset(drawn)


def int64(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def element(array: Array) -> int:
    """ONNX's number for an array's dtype."""
    return helper.np_dtype_to_tensor_dtype(array.dtype)


def proto(
    nodes: Sequence[onnx.NodeProto],
    inputs: Arrays,
    outputs: Collection[str],
    *,
    constants: Arrays | None = None,
    stated: Collection[Axis] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model of opset 24 whose output types onnx infers.

    Args:
        nodes: the graph.
        inputs: name -> a value that says dtype and sizes.
        outputs: names.
        constants: name -> initializer.
        stated: (input, axis) of the sizes that the model states; None: all of them.
        functions: model-local functions.
    """
    infos = []
    for name, array in inputs.items():
        sizes_ = [
            size if stated is None or (name, axis) in stated else f"{name}.{axis}"
            for axis, size in enumerate(array.shape)
        ]
        infos.append(helper.make_tensor_value_info(name, element(array), sizes_))
    graph = helper.make_graph(
        list(nodes),
        "graph",
        infos,
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(x), name) for name, x in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("test", 1)]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=11, functions=list(functions)
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for known, value in zip(inferred.graph.output, model.graph.output, strict=True):
        kind = known.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, None))
    return model


def one(
    operator: str,
    operands: Mapping[str, Array | None],
    *,
    constant: Collection[str] = (),
    stated: Collection[Axis] | None = None,
    outputs: Sequence[str] = ("y",),
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node. A `constant` operand is an initializer, one that is None is absent."""
    given = {name: array for name, array in operands.items() if array is not None}
    names = [name if name in given else "" for name in operands]
    node = helper.make_node(operator, names, list(outputs), name="node", **attributes)
    return proto(
        [node],
        {name: array for name, array in given.items() if name not in constant},
        outputs,
        constants={name: given[name] for name in constant},
        stated=stated,
    )


def to_torch(array: Array) -> torch.Tensor:
    """The same values in memory of its own; torch knows no ml_dtypes."""
    array = np.array(array, order="C")
    if array.dtype != BF16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def to_numpy(tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.contiguous().view(torch.int16).numpy().view(BF16)


def parse(model: onnx.ModelProto, folder: Path = Path()) -> ParsedNetwork:
    return parse_model(ir.from_proto(model), folder)


def evaluate(
    parsed: ParsedNetwork, inputs: Arrays, wanted: Sequence[str], *, exact: bool = False
) -> list[Array]:
    """The interpreter's values of the wanted tensors."""
    program = Interpreter(parsed, exact=exact).program(list(inputs), wanted)
    values = program.run({name: to_torch(array) for name, array in inputs.items()})
    return [to_numpy(values[name]) for name in wanted]


def run_onnxruntime(model: onnx.ModelProto, inputs: Arrays) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[Array] = session.run(None, {name: np.asarray(x) for name, x in inputs.items()})
    return results


def kinds_of(parsed: ParsedNetwork) -> set[str]:
    """The kinds of a network's layers, "REDUCE"; where they have an operation also "REDUCE SUM"."""
    found = set()
    for layer, kind in parsed.layers():
        found.add(kind)
        if kind in _OPERATIONS:
            interface, attribute = _OPERATIONS[kind]
            layer.__class__ = getattr(parsed.trt, interface)
            found.add(f"{kind} {getattr(layer, attribute).name}")
    return found


_OPERATIONS = {
    "ELEMENTWISE": ("IElementWiseLayer", "op"),
    "UNARY": ("IUnaryLayer", "op"),
    "ACTIVATION": ("IActivationLayer", "type"),
    "REDUCE": ("IReduceLayer", "op"),
}


def check(
    model: onnx.ModelProto,
    inputs: Arrays,
    *kinds: str,
    rtol: float = 0.0,
    atol: Any = 0.0,
) -> None:
    """The interpreter's outputs are onnxruntime's in dtype, shape and value.

    Args:
        model: what both are given.
        inputs: name -> value.
        kinds: what the network must have, so that the test is of what it says it is of.
        rtol, atol: as in numpy.allclose; atol may be an array. Equality without them.
    """
    parsed = parse(model)
    assert set(kinds) <= kinds_of(parsed)
    wanted = [output.name for output in model.graph.output]
    expected = run_onnxruntime(model, inputs)
    for got, want in zip(evaluate(parsed, inputs, wanted), expected, strict=True):
        same(got, want, rtol=rtol, atol=atol)


def same(got: Array, want: Array, *, rtol: float = 0.0, atol: Any = 0.0) -> None:
    """Two arrays of one dtype and shape, equal or within the tolerance; NaN equals NaN."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.dtype.kind in "bi" or (rtol == 0 and np.all(np.asarray(atol) == 0)):
        np.testing.assert_array_equal(got, want)
        return
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    np.testing.assert_array_equal(np.where(finite, 0, a), np.where(finite, 0, b))
    with np.errstate(invalid="ignore"):
        excess = np.where(finite, np.abs(a - b) - (atol + rtol * np.abs(b)), -1)
    assert (excess <= 0).all(), f"worst difference {np.where(finite, np.abs(a - b), 0).max()}"


__all__ = ["TensorProto", "helper"]
