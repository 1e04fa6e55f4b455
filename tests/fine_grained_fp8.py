"""Writes checkpoints in Qwen's and DeepSeek's FP8, with a factor for each block, with torch alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LARGEST = 448.0


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn [N, K] and factors [ceil(N / rows), ceil(K / columns)], in the weight's dtype."""
    rows, columns = weight.shape
    filled = torch.nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = filled.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    factors = (blocks.abs().amax((1, 3)) / LARGEST).to(weight.dtype)
    factors[factors == 0] = 1
    steps = (blocks / factors.float()[:, None, :, None]).clamp(-LARGEST, LARGEST)
    codes = steps.flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn), factors


def write_fine_grained_fp8(
    source: Path,
    target: Path,
    *,
    block: tuple[int, int] = (128, 128),
    kept: Iterable[str] | None = ("lm_head",),
) -> Path:
    """Write a checkpoint of one file with its linears in FP8.

    Args:
        block: rows and columns with one factor.
        kept: modules_to_not_convert, names of modules and their ends; None leaves it out.
    """
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in sorted(tensors):
        linear = name.removesuffix(".weight")
        ends = ("embed_tokens", "lm_head", "mlp.gate", *(kept or ()))
        if tensors[name].dim() != 2 or linear.endswith(ends):
            continue
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name], block)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
        **({} if kept is None else {"modules_to_not_convert": list(kept)}),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target
