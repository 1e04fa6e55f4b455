"""The bundled models with quantized linears: packages and engines compute what the dequantized weights give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors import safe_open

from qwenport import engines
from qwenport.contract import ENGINE_WEIGHTS, MODEL
from qwenport.engines import OnnxRuntimeSession, start_onnxruntime
from qwenport.engines.lowering import ALIGNMENT, for_onnxruntime, for_onnxruntime_engine
from qwenport.exporter import Package, export

from .quantized_graphs import (
    Quantized,
    count,
    dequantize_linear,
    difference,
    rounded,
    with_level,
    write,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
POSITIONS = 64
TEXTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [900, 11]]
CASES = [
    (DENSE, "fp32", 4, 32, True),
    (DENSE, "fp32", 4, 64, False),  # an odd number of blocks
    (DENSE, "bf16", 4, None, False),
    (DENSE, "fp16", 8, 64, True),
    (DENSE, "bf16", 8, None, False),
    (MIXTURE, "fp32", 4, 32, False),
    (MIXTURE, "bf16", 8, None, True),
]
FP32_ERROR = 1e-5
INT8_ERROR = 0.02
"""Of logits, with the activations of every linear in int8; 0.003 to 0.006 is measured."""


@dataclass(frozen=True)
class Made:
    """A package with the bundled model, and its weights in two forms."""

    package: Package
    weights: dict[str, Quantized]

    def graph(self, make: Callable[[Quantized], Any] | None = None) -> ir.Model:
        """The package's graph with quantized linears; with `make`, their weights are what it returns."""
        model = self.package.read_model()
        for name, weight in self.weights.items():
            if make is None:
                quantize(model, self.package.path, name, weight)
            else:
                values = make(weight)
                initializer = model.graph.initializers[f"{name}.weight"]
                tensor = ir.Tensor(values, name=initializer.name)
                initializer.const_value, initializer.type = tensor, ir.TensorType(tensor.dtype)
        return model


def linears(
    package: Package, bits: int, group: int | None, symmetric: bool
) -> dict[str, Quantized]:
    """Every linear of the decoder layers, quantized; the head is tied to the embedding."""
    found = {}
    for name, value in package.read_model().graph.initializers.items():
        if name.endswith("proj.weight"):
            weight = numbers(value.const_value)
            block = group or weight.shape[1]
            found[name.removesuffix(".weight")] = rounded(
                weight, block, bits=bits, symmetric=symmetric
            )
    return found


def numbers(tensor: Any) -> Any:
    with open(tensor.path, "rb") as stream:
        stream.seek(tensor.offset)
        data = stream.read(tensor.length)
    return np.frombuffer(data, tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def quantize(model: ir.Model, folder: Path, name: str, weight: Quantized) -> None:
    """Replace the weight of a linear by DequantizeLinear of its codes."""
    old = model.graph.initializers.pop(f"{name}.weight")
    values, node = dequantize_linear(folder, name, weight)
    model.graph.insert_before(model.graph[0], node)
    old.replace_all_uses_with(node.outputs[0])
    for value in values:
        model.graph.initializers[str(value.name)] = value


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0].name}-{c[1]}-{c[2]}bit-{c[3]}-{c[4]}")
def made(request: Any, tmp_path: Path) -> Made:
    checkpoint, dtype, bits, group, symmetric = request.param
    package = export(checkpoint, tmp_path / "package", dtype=dtype, weights="copy")
    return Made(package, linears(package, bits, group, symmetric))


def logits_of(package: Package, model: bytes | str, folder: Path) -> Any:
    session = OnnxRuntimeSession(
        package,
        max_batch=2,
        capacity=32,
        load=lambda: start_onnxruntime(model, folder, threads=1),
    )
    found = [*session.prefill(TEXTS, all_logits=True), session.decode([3, 4])]
    return np.concatenate(found)


def serialized(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def test_a_package_computes_what_its_dequantized_weights_give(made: Made) -> None:
    folder = made.package.path
    quantized, plain = (
        for_onnxruntime(made.graph(make), on_cpu=True) for make in (None, lambda w: w.weight)
    )
    assert not count(quantized, "DequantizeLinear")
    single = made.package.dtype == "fp32"
    assert count(quantized, "MatMulNBits") == (len(made.weights) if single else 0)
    found, wanted = (logits_of(made.package, serialized(m), folder) for m in (quantized, plain))
    assert difference(found, wanted) < FP32_ERROR


def test_an_engine_computes_what_its_weights_give_without_a_rounding(
    made: Made, tmp_path: Path
) -> None:
    engine, weights = for_onnxruntime_engine(made.graph(), rope_rows=POSITIONS, file=ENGINE_WEIGHTS)
    kinds = [node.op_type for node in engine.graph]
    assert kinds.count("MatMulNBits") == len(made.weights)
    assert "DequantizeLinear" not in kinds
    casts = [node.attributes["to"].as_int() for node in engine.graph if node.op_type == "Cast"]
    assert set(casts) <= {int(ir.DataType.INT64)}  # of routing
    folder = tmp_path / "engine"
    folder.mkdir()
    write(made.package.path, folder, engine, weights)
    check_file(made, folder / ENGINE_WEIGHTS, engine)
    found = logits_of(made.package, str(folder / MODEL), folder)
    exact = logits_of(made.package, serialized(with_level(engine, 1)), folder)

    wide = made.graph(lambda w: w.exact.astype(np.float32))
    plain = for_onnxruntime(wide, on_cpu=True)
    wanted = logits_of(made.package, serialized(plain), made.package.path)
    assert difference(exact, wanted) < FP32_ERROR
    assert difference(found, wanted) < INT8_ERROR


def check_file(made: Made, file: Path, engine: ir.Model) -> None:
    """Codes as bytes, everything else in fp32, and nothing else, at aligned places."""
    expected = 0
    for weight in made.weights.values():
        n, k = weight.codes.shape
        block = min(weight.block & -weight.block, 128)
        blocks = k // block
        expected += n * k * weight.bits // 8 + 4 * n * blocks
        expected += 0 if weight.symmetric else n * -(-blocks * weight.bits // 8)
    quantized = {f"{name}.weight" for name in made.weights}
    for name, value in made.package.read_model().graph.initializers.items():
        if name not in quantized and isinstance(value.const_value, ir.ExternalTensor):
            rows = (POSITIONS,) if name.startswith("rope.") else ()
            shape = (*rows, *value.shape.numpy()[len(rows) :])
            expected += 4 * int(np.prod(shape))
    with safe_open(file, framework="np") as stored:
        codes = stored.get_slice(f"{next(iter(made.weights))}.weight.codes")
        assert codes.get_dtype() == "U8"
    lengths = {
        name: value.const_value
        for name, value in engine.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert sum(tensor.length for tensor in lengths.values()) == expected
    assert 0 <= file.stat().st_size - expected < 50_000
    for tensor in lengths.values():
        assert tensor.offset % min(ALIGNMENT, tensor.length & -tensor.length) == 0


def test_a_package_is_exact_however_it_is_opened(tmp_path: Path) -> None:
    package = export(EXAMPLES / "quantized" / "w4a16", tmp_path / "package")
    notes: list[str] = []
    opened = [
        OnnxRuntimeSession(package, max_batch=2, capacity=32),
        engines.open_session(package.path, max_batch=2, capacity=32, note=notes.append),
    ]
    one, other = (np.concatenate(s.prefill(TEXTS, all_logits=True)) for s in opened)
    np.testing.assert_array_equal(one, other)
    assert len(notes) == 1
    assert f"qwenport build {package.path} ENGINE --target onnxruntime" in notes[0]


def test_an_engine_without_a_file_of_its_own_refers_to_the_package(tmp_path: Path) -> None:
    package = export(DENSE, tmp_path / "package", dtype="fp32", weights="copy")
    made = Made(package, linears(package, 4, 64, False))
    engine, weights = for_onnxruntime_engine(made.graph(), rope_rows=POSITIONS, file=None)
    assert not weights
    wide = for_onnxruntime(made.graph(lambda w: w.weight), on_cpu=True)
    found, wanted = (
        logits_of(package, serialized(model), package.path)
        for model in (with_level(engine, 1), wide)
    )
    assert difference(found, wanted) < FP32_ERROR
