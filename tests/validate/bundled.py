"""The bundled checkpoints, the ways in which a package is judged, and small checkpoints made for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from qwenport.validate import Report, ScenarioResult

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
IN_CHUNKS = EXAMPLES / "tiny-qwen2.5-1m"
WAYS: dict[str, dict[str, Any]] = {
    "package": {},
    "network": {"judged_as": "tensorrt-network"},
    "network, exact": {"judged_as": "tensorrt-network", "exact": True},
}


def make_checkpoint(
    folder: Path,
    rope: dict[str, Any] | None = None,
    *,
    family: type = Qwen2Config,
    positions: int = 64,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A random two-layer checkpoint with biases and norms that are not trivial."""
    config = family(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return folder


def status(report: Report) -> dict[str, str]:
    """Row -> what became of it."""
    return {scenario.name: scenario.status for scenario in report.scenarios}


def failing(report: Report) -> set[str]:
    """The rows that failed."""
    return {name for name, found in status(report).items() if found == "failed"}


def row(report: Report, name: str) -> ScenarioResult:
    """The row of that name."""
    (found,) = [scenario for scenario in report.scenarios if scenario.name == name]
    return found


def strict_json(text: str) -> Any:
    """JSON without the NaN and Infinity that Python would read."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)
