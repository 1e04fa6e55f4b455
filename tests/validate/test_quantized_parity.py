"""Checkpoints quantized by AWQ and GPTQ, from the directory to a verdict: `validate` passes their packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from float_quantized import write_float_quantized
from quantized_words import write_awq, write_gptq
from random_model import make_checkpoint

from qwenport.exporter import export
from qwenport.validate import validate

from .test_quantized_origin import SPARSE

DENSE: dict[str, Any] = {}
CASES: dict[str, tuple[dict[str, Any], Callable[..., Path], dict[str, Any]]] = {
    "awq": (DENSE, write_awq, {}),
    "awq, mixture": (SPARSE, write_awq, {"group": -1, "zero_point": False}),
    "gptq": (DENSE, write_gptq, {"kept": ["v_proj"], "dynamic": {r"-:.*\.v_proj$": {}}}),
    "gptq, act-order": (
        DENSE,
        write_gptq,
        {"version": 2, "act_order": True, "symmetric": False, "zero_biases": True},
    ),
    "gptq, mixture": (SPARSE, write_gptq, {"bits": 8, "group": -1, "symmetric": False}),
    "gptq, mixture, act-order": (SPARSE, write_gptq, {"act_order": True, "symmetric": False}),
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


@pytest.mark.slow
def test_a_network_passes_whose_products_are_corrected(tmp_path: Path) -> None:
    """Two digits and zero points far from the middle: each product is the difference of larger ones, in fp16."""
    source = make_checkpoint(tmp_path / "source", dtype=torch.float16)
    how = {"bits": 8, "group": 32, "symmetric": False, "act_order": True}
    checkpoint = write_gptq(source, tmp_path / "checkpoint", **how)
    export(checkpoint, tmp_path / "package")
    report = validate(
        tmp_path / "package", checkpoint, judged_as="tensorrt-network", budget="quick"
    )
    assert report.passed, report.verdict


@pytest.mark.slow
def test_a_network_passes_whose_inputs_are_rounded_to_fp8(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    checkpoint = write_float_quantized(source, tmp_path / "checkpoint", activations="dynamic")
    export(checkpoint, tmp_path / "package")
    report = validate(
        tmp_path / "package", checkpoint, judged_as="tensorrt-network", budget="quick"
    )
    assert report.passed, report.verdict
