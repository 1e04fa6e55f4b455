"""Models of a single call of an operator, whose only definition is the function body in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import torch

ELEMENTS = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
INTEGERS = {torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64}
Ports = Mapping[str, tuple[ir.DataType, int]]  # each input's or output's dtype and number of axes


def model_of_call(
    name: str, body: ir.Function, inputs: Ports, outputs: Ports, **attributes: Any
) -> onnx.ModelProto:
    """A model of one call, with every axis symbolic."""

    def value(port: str, element: ir.DataType, rank: int) -> ir.Value:
        shape = ir.Shape([f"{port}_{axis}" for axis in range(rank)])
        return ir.Value(name=port, type=ir.TensorType(element), shape=shape)

    ins = [value(port, *kind) for port, kind in inputs.items()]
    outs = [value(port, *kind) for port, kind in outputs.items()]
    call = ir.node(name, ins, attributes, domain="qwenport", outputs=outs, name="call")
    imports = {"": body.opset_imports[""], "qwenport": 1}
    graph = ir.Graph(ins, outs, nodes=[call], opset_imports=imports, name="one")
    return ir.serde.serialize_model(ir.Model(graph, ir_version=11, functions=[body]))


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # names of axes that turn out to be equal are no news
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def array(tensor: torch.Tensor) -> np.ndarray:
    """As NumPy; bf16 as ml_dtypes has it."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def tensor(values: np.ndarray) -> torch.Tensor:
    if values.dtype.name != "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(values))
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)


def run_in_session(session: ort.InferenceSession, *drawn: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of onnxruntime, whose NumPy interface takes no bf16 but whose values do."""
    feeds = {}
    for port, given in zip(session.get_inputs(), drawn, strict=True):
        bits = given.view(torch.int16) if given.dtype == torch.bfloat16 else given
        feeds[port.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(bits.numpy()), int((ELEMENTS | INTEGERS)[given.dtype])
        )
    return [torch.from_numpy(v.numpy()) for v in session.run_with_ort_values(None, feeds)]


def run_in_onnx(model: onnx.ModelProto, *drawn: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of onnx's own evaluator."""
    feeds = {port.name: array(t) for port, t in zip(model.graph.input, drawn, strict=True)}
    with np.errstate(all="ignore"):  # its sigmoid overflows where it does not matter
        return [tensor(y) for y in onnx.reference.ReferenceEvaluator(model).run(None, feeds)]


@contextlib.contextmanager
def registered(schema: onnx.defs.OpSchema) -> Iterator[None]:
    onnx.defs.register_schema(schema)
    try:
        yield
    finally:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)
