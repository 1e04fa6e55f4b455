"""Writes checkpoints in compressed-tensors' FP8 formats, with torch alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

LARGEST = 448.0
CALIBRATION = [*range(3, 67), 1, 900, 11, 500, 37]


def quantize(weight: torch.Tensor, *, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn [N, K] and scales [N, 1] or [1], in the weight's dtype."""
    largest = weight.float().abs()
    largest = largest.amax(1, keepdim=True) if by_row else largest.max().reshape(1)
    scales = (largest / LARGEST).to(weight.dtype)
    scales[scales == 0] = 1
    steps = (weight.float() / scales.float()).clamp(-LARGEST, LARGEST)
    return steps.to(torch.float8_e4m3fn), scales


def input_scales(source: Path, share: float) -> dict[str, torch.Tensor]:
    """Linear -> largest absolute input on a text, times `share`, / 448: bf16 [1]. Below 1 some inputs saturate.

    Of experts, with all of the text's tokens; half of the experts have another scale for up than for gate.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    def scale(x: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        return (times * share * x.abs().max() / LARGEST).to(torch.bfloat16).reshape(1)

    def watching(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            found[name] = scale(inputs[0])

        return hook

    def watching_experts(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            for expert, stack in enumerate(module.gate_up_proj):
                gate, up = (inputs[0] @ stack.T).chunk(2, -1)
                found[f"{name}.{expert}.gate_proj"] = scale(inputs[0])
                found[f"{name}.{expert}.up_proj"] = scale(inputs[0], 0.7 if expert % 2 else 1.0)
                found[f"{name}.{expert}.down_proj"] = scale(torch.nn.functional.silu(gate) * up)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watching(name))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(watching_experts(name))
    with torch.inference_mode():
        model(torch.tensor([CALIBRATION]))
    return found


def quantization_config(
    *, by_row: bool, activations: str | None, ignore: Iterable[str]
) -> dict[str, Any]:
    """What config.json says of it, as llm-compressor writes it."""
    common: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "symmetric": True,
        "type": "float",
    }
    weights = {
        **common,
        "dynamic": False,
        "observer": "minmax",
        "strategy": "channel" if by_row else "tensor",
    }
    inputs = {
        None: None,
        "static": {**common, "dynamic": False, "observer": "minmax", "strategy": "tensor"},
        "dynamic": {**common, "dynamic": True, "observer": None, "strategy": "token"},
    }[activations]
    return {
        "config_groups": {
            "group_0": {
                "input_activations": inputs,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": "naive-quantized" if activations is None else "float-quantized",
        "global_compression_ratio": 1.5,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def write_float_quantized(
    source: Path,
    target: Path,
    *,
    by_row: bool = True,
    activations: str | None = None,
    ignore: Iterable[str] = ("lm_head",),
    share: float = 0.8,
) -> Path:
    """Write a checkpoint of one file with its linears in FP8, except for those that `ignore` names.

    Args:
        by_row: a scale for each row, or else for the whole weight.
        activations: None, "static" or "dynamic".
        ignore: linears, by name or as "re:PATTERN".
        share: of the largest input that static scales reach.
    """
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    scales = input_scales(source, share) if activations == "static" else {}
    for name in sorted(tensors):
        linear = name.removesuffix(".weight")
        if tensors[name].dim() != 2 or linear.endswith("embed_tokens") or _named(linear, ignore):
            continue
        tensors[name], tensors[f"{linear}.weight_scale"] = quantize(tensors[name], by_row=by_row)
        if activations == "static":
            tensors[f"{linear}.input_scale"] = scales[linear]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        by_row=by_row, activations=activations, ignore=ignore
    )
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _named(linear: str, patterns: Iterable[str]) -> bool:
    return any(
        bool(re.match(pattern[3:], linear)) if pattern.startswith("re:") else pattern == linear
        for pattern in patterns
    )
