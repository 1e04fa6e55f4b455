"""AWQ's and GPTQ's packages as engines for onnxruntime: inputs are gathered in the order of the codes' columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantized_words import write_awq, write_gptq
from safetensors import safe_open

from qwenport import engines
from qwenport.contract import ENGINE_WEIGHTS, MODEL
from qwenport.engines import OnnxRuntimeSession
from qwenport.engines.lowering import for_onnxruntime
from qwenport.exporter import export

from .quantized_graphs import count, difference, with_level
from .test_quantized_engine import INT8_ERROR, TEXTS, logits_of, serialized

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
LINEARS = 35
ROUNDED = 2e-3
"""Of logits: the package rounds weights to fp16, an engine does not."""
CASES: dict[str, tuple[Callable[..., Path], dict[str, Any], int]] = {
    "awq": (write_awq, {}, 0),
    "gptq": (write_gptq, {"symmetric": False, "group": 64}, 0),
    "gptq, act-order": (write_gptq, {"act_order": True, "symmetric": False}, 4 * 5),
    "gptq, act-order, 8 bits": (write_gptq, {"act_order": True, "bits": 8}, 4 * 5),
}


@pytest.mark.parametrize("name", CASES)
def test_an_engine_multiplies_by_the_codes_of_gathered_inputs(name: str, tmp_path: Path) -> None:
    write, how, orders = CASES[name]
    checkpoint = write(DENSE, tmp_path / "checkpoint", **how)
    package = export(checkpoint, tmp_path / "package", weights="copy")
    exact = for_onnxruntime(package.read_model(), on_cpu=True)
    assert count(exact, "Gather") == 1 + orders
    assert not count(exact, "DequantizeLinear")
    wanted = logits_of(package, serialized(exact), package.path)

    engines.build(package.path, tmp_path / "engine", target="onnxruntime")
    engine = engines.load_engine(tmp_path / "engine")
    session = OnnxRuntimeSession(engine, max_batch=2, capacity=32)
    found = np.concatenate([*session.prefill(TEXTS, all_logits=True), session.decode([3, 4])])
    assert difference(found, wanted) < INT8_ERROR
    model = ir.load(tmp_path / "engine" / MODEL)
    assert count(model, "MatMulNBits") == LINEARS
    assert count(model, "Gather") == 1 + orders
    with safe_open(tmp_path / "engine" / ENGINE_WEIGHTS, framework="np") as stored:
        names = [key for key in stored.keys() if key.endswith("permutation")]  # noqa: SIM118
        assert len(names) == orders
        assert all(stored.get_slice(key).get_dtype() == "I64" for key in names)

    wide = with_level(model, 1)
    single = logits_of(package, serialized(wide), tmp_path / "engine")
    assert difference(single, wanted) < ROUNDED


def test_each_expert_multiplies_by_its_codes_inputs_gathered_in_its_own_order(
    tmp_path: Path,
) -> None:
    checkpoint = write_gptq(MIXTURE, tmp_path / "checkpoint", act_order=True)
    package = export(checkpoint, tmp_path / "package", weights="copy")
    given = package.read_model()
    restored = [n for n in given.graph if n.op_type == "Gather" and ".experts." in str(n.name)]
    linears = count(given, "DequantizeLinear")
    exact = for_onnxruntime(given, on_cpu=True)
    assert not count(exact, "DequantizeLinear")
    wanted = logits_of(package, serialized(exact), package.path)

    engines.build(package.path, tmp_path / "engine", target="onnxruntime")
    engine = engines.load_engine(tmp_path / "engine")
    session = OnnxRuntimeSession(engine, max_batch=2, capacity=32)
    found = np.concatenate([*session.prefill(TEXTS, all_logits=True), session.decode([3, 4])])
    assert difference(found, wanted) < INT8_ERROR
    model = ir.load(tmp_path / "engine" / MODEL)
    assert count(model, "MatMulNBits") == linears
    assert not count(model, "DequantizeLinear")
    of_experts = [
        node
        for node in model.graph
        if node.op_type == "Gather"
        and ".experts." in (name := str(node.inputs[1].name))
        and name.endswith(".permutation")
    ]
    assert 3 * len(of_experts) == 2 * len(restored) > 0  # gate and up share theirs
    single = logits_of(package, serialized(with_level(model, 1)), tmp_path / "engine")
    assert difference(single, wanted) < ROUNDED
