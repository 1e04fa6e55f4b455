"""Checkpoints quantized by AWQ and GPTQ, from the directory to a verdict: `validate` passes their packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_words import write_awq, write_gptq
from transformers import Qwen2MoeConfig

from qwenport.exporter import export
from qwenport.validate import validate

from .bundled import make_checkpoint

DENSE: dict[str, Any] = {}
MIXTURE: dict[str, Any] = {
    "family": Qwen2MoeConfig,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
CASES: dict[str, tuple[dict[str, Any], Callable[..., Path], dict[str, Any]]] = {
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
    model, write, how = CASES[name]
    source = make_checkpoint(tmp_path / "source", dtype=torch.float16, **model)
    checkpoint = write(source, tmp_path / "checkpoint", **how)
    export(checkpoint, tmp_path / "package")
    report = validate(tmp_path / "package", checkpoint, budget="quick")
    assert report.passed, report.verdict
    assert report.reference_weights.endswith("the formula, computed by validate")
