"""Quantized weights in graphs, as a package has them: made with numpy, for the tests of their lowering."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qwenport.contract import SYMMETRIC_ZEROS, no_progress
from qwenport.engines.onnxruntime_builder import write_lowered

FILE = "weights.bin"
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K]: codes [N, K], scales and zero points [N, K / block]."""

    codes: Any
    scales: Any
    zeros: Any
    bits: int
    symmetric: bool = False

    @property
    def block(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def exact(self) -> Any:
        """The weight in fp64, without a rounding."""
        n, k = self.codes.shape
        centred = self.codes.reshape(n, -1, self.block) - self.zeros[..., None].astype(np.int64)
        return (centred * self.scales[..., None].astype(np.float64)).reshape(n, k)

    @property
    def weight(self) -> Any:
        """The weight in the scales' dtype, as DequantizeLinear has it."""
        return self.exact.astype(np.float32).astype(self.scales.dtype)


def random_weight(
    n: int, blocks: int, block: int, *, bits: int, dtype: str, symmetric: bool, seed: int = 0
) -> Quantized:
    """A weight of [n, blocks * block] in which every code and zero point occurs."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (n, blocks * block), dtype=np.uint8)
    zeros = random.integers(0, 1 << bits, (n, blocks), dtype=np.uint8)
    if symmetric:
        zeros = np.full_like(zeros, 1 << (bits - 1))
    scales = random.uniform(0.01, 0.02, (n, blocks)).astype(DTYPES[dtype])
    return Quantized(codes, scales, zeros, bits, symmetric)


def rounded(weight: Any, block: int, *, bits: int, symmetric: bool) -> Quantized:
    """A weight [N, K] quantized by rounding to nearest; scales in its dtype."""
    n, k = weight.shape
    blocks = weight.astype(np.float32).reshape(n, k // block, block)
    most, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = np.abs(blocks).max(axis=2) / (middle - 1)
        zeros = np.full(scales.shape, middle)
    else:
        low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
        scales = (high - low) / most
        zeros = np.clip(np.round(-low / scales), 0, most)
    scales = np.maximum(scales, 1e-6).astype(weight.dtype)
    codes = np.round(blocks / scales.astype(np.float32)[..., None]) + zeros[..., None]
    codes = np.clip(codes, 0, most).astype(np.uint8).reshape(n, k)
    return Quantized(codes, scales, zeros.astype(np.uint8), bits, symmetric)


def packed(values: Any, bits: int) -> bytes:
    """ONNX's bytes of UINT4 or UINT8: two codes a byte, the low half first, no gaps between rows."""
    flat = values.reshape(-1)
    if bits == 8:
        return flat.tobytes()
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()


def in_file(folder: Path, file: str, name: str, data: bytes, dtype: ir.DataType, shape: Any) -> Any:
    """An initializer whose bytes are appended to a file."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    offset = path.stat().st_size if path.is_file() else 0
    with path.open("ab") as stream:
        stream.write(data)
    tensor = ir.ExternalTensor(
        file, offset, len(data), dtype, shape=ir.Shape(shape), name=name, base_dir=folder
    )
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)


def dequantize_linear(folder: Path, name: str, given: Quantized) -> tuple[list[ir.Value], ir.Node]:
    """The three initializers of a weight, in files below `folder`, and the node that dequantizes them."""
    scale_type = ir.DataType.from_numpy(np.dtype(given.scales.dtype))
    zeros_file = SYMMETRIC_ZEROS if given.symmetric else FILE
    parts = [
        ("codes", packed(given.codes, given.bits), CODES[given.bits], given.codes.shape, FILE),
        ("scales", given.scales.tobytes(), scale_type, given.scales.shape, FILE),
        (
            "zeros",
            packed(given.zeros, given.bits),
            CODES[given.bits],
            given.zeros.shape,
            zeros_file,
        ),
    ]
    values = [
        in_file(folder, file, f"{name}.weight.{part}", data, dtype, shape)
        for part, data, dtype, shape, file in parts
    ]
    attributes = {"axis": 1, "block_size": given.block}
    title = f"{name}.DequantizeLinear"
    node = ir.node("DequantizeLinear", values, attributes=attributes, name=title)
    (made,) = node.outputs
    made.name, made.type = title, ir.TensorType(scale_type)
    made.shape = ir.Shape(given.codes.shape)
    return values, node


def product_of(folder: Path, given: Quantized) -> ir.Model:
    """y = x @ weight^T, with the weight of a linear `l`."""
    values, dequantized = dequantize_linear(folder, "l", given)
    n, k = given.codes.shape
    dtype = dequantized.outputs[0].dtype
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(("m", k)))
    turned = ir.node("Transpose", [dequantized.outputs[0]], attributes={"perm": [1, 0]}, name="t")
    product = ir.node("MatMul", [x, turned.outputs[0]], name="l.MatMul")
    (y,) = product.outputs
    for value, name, shape in ((turned.outputs[0], "t", (k, n)), (y, "y", ("m", n))):
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    graph = ir.Graph(
        [x],
        [y],
        nodes=[dequantized, turned, product],
        initializers=values,
        opset_imports={"": 24},
        name="g",
    )
    return ir.Model(graph, ir_version=11)


def lookup_in(folder: Path, given: Quantized, *, tied: bool) -> ir.Model:
    """rows = weight[ids], with ids int64 [B, S]; a tied head also multiplies by the weight, as `product_of`."""
    model = product_of(folder, given)
    graph, k = model.graph, given.codes.shape[1]
    dequantized = graph[0].outputs[0]
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(("b", "s")))
    gather = ir.node("Gather", [dequantized, ids], attributes={"axis": 0}, name="rows")
    (rows,) = gather.outputs
    rows.name, rows.type, rows.shape = "rows", dequantized.type, ir.Shape(("b", "s", k))
    graph.insert_after(graph[0], gather)
    graph.inputs.insert(0, ids)
    graph.outputs.insert(0, rows)
    if not tied:
        graph.outputs.pop()
        graph.remove([*graph][:1:-1], safe=True)
        graph.inputs.pop()
    return model


def write(folder: Path, target: Path, model: ir.Model, weights: Any) -> None:
    """Write what `for_onnxruntime_engine` returned of a graph whose files lie below `folder`."""
    package: Any = SimpleNamespace(path=folder)
    write_lowered(package, target, model, weights, no_progress)


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


def with_level(model: ir.Model, level: int) -> ir.Model:
    """The same products with another accuracy_level."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return model


def difference(found: Any, wanted: Any) -> float:
    """Relative L2."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
