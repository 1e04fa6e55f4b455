"""Packages with weights in FP8 on onnxruntime: the engine keeps the codes, and computes what the package does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from float_quantized import write_float_quantized
from safetensors import safe_open

from qwenport import engines
from qwenport.contract import ENGINE_WEIGHTS
from qwenport.engines import OnnxRuntimeSession
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering import DequantizeFloat8AtLoad, for_onnxruntime
from qwenport.exporter import Package, export

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
GATES = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
SCHEMES: dict[str, tuple[Path, dict[str, Any]]] = {
    "rows": (DENSE, {}),
    "one scale": (DENSE, {"by_row": False}),
    "static": (DENSE, {"activations": "static"}),
    "dynamic": (DENSE, {"activations": "dynamic"}),
    "experts": (MIXTURE, {"ignore": ("lm_head", *GATES)}),
}
TEXTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [900, 11]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Package]:
    folder, done = tmp_path_factory.mktemp("float8"), {}

    def make(name: str) -> Package:
        if name not in done:
            source, how = SCHEMES[name]
            checkpoint = write_float_quantized(source, folder / name, **how)
            done[name] = export(checkpoint, folder / f"{name}.package")
        return done[name]

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_an_engine_computes_what_its_package_does(
    name: str, made: Callable[[str], Package], tmp_path: Path
) -> None:
    """To the last bit, so that no input is rounded the other way."""
    package = made(name)
    engines.build(package.path, tmp_path / "engine", target="onnxruntime")
    engine = engines.load_engine(tmp_path / "engine")
    found, wanted = (
        np.concatenate(
            OnnxRuntimeSession(source, max_batch=2, capacity=32).prefill(TEXTS, all_logits=True)
        )
        for source in (engine, package)
    )
    np.testing.assert_array_equal(found, wanted)
    with safe_open(tmp_path / "engine" / ENGINE_WEIGHTS, framework="np") as stored:
        codes = [name for name in stored.keys() if name.endswith(".codes")]  # noqa: SIM118
        assert codes
        assert {stored.get_slice(name).get_dtype() for name in codes} == {"F8_E4M3"}


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_is_left_that_is_dequantized_at_every_step(
    name: str, made: Callable[[str], Package]
) -> None:
    model = for_onnxruntime(made(name).read_model(), on_cpu=True)
    left = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(left) == (20 if name == "static" else 0)  # the inputs', shared
    assert not any(node.inputs[0].is_initializer() for node in left if node.inputs[0] is not None)


def test_scales_of_columns_are_refused(made: Callable[[str], Package]) -> None:
    model = made("rows").read_model()
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    with pytest.raises(LoweringError, match="its scales are not those of its rows"):
        for_onnxruntime(model, on_cpu=True)


def test_a_graph_without_codes_is_left_alone() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24}), ir_version=11)
    assert not DequantizeFloat8AtLoad(model)(model).modified
