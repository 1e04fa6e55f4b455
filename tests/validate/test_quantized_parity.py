"""Checkpoints quantized by AWQ and GPTQ, from the directory to a verdict: `validate` passes their packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantized_words import write_awq, write_gptq

from qwenport.exporter import export
from qwenport.validate import validate

from .bundled import DENSE, MIXTURE

CASES: dict[str, tuple[Path, Callable[..., Path], dict[str, Any]]] = {
    "awq": (DENSE, write_awq, {}),
    "awq, mixture": (MIXTURE, write_awq, {"group": -1, "zero_point": False}),
    "gptq": (DENSE, write_gptq, {"kept": ["v_proj"], "dynamic": {r"-:.*\.v_proj$": {}}}),
    "gptq, act-order": (
        DENSE,
        write_gptq,
        {"version": 2, "act_order": True, "symmetric": False, "zero_biases": True},
    ),
    "gptq, mixture": (MIXTURE, write_gptq, {"bits": 8, "group": -1, "symmetric": False}),
    "gptq, mixture, act-order": (MIXTURE, write_gptq, {"act_order": True, "symmetric": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_package_passes_in_every_way(name: str, tmp_path: Path) -> None:
    source, write, how = CASES[name]
    checkpoint = write(source, tmp_path / "checkpoint", **how)
    export(checkpoint, tmp_path / "package")
    report = validate(tmp_path / "package", checkpoint, budget="quick")
    assert report.passed, report.verdict
    assert report.reference_weights.endswith("the formula, computed by validate")
