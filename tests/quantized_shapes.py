"""Quantized checkpoints in the shape of real models, with random codes: for what depends on sizes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from quantized import quantization_config
from safetensors.torch import save_file

from qwenport.exporter import parse_config
from qwenport.exporter.expected import expected_tensors

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-qwen2.5"


def write_shape(
    config: dict[str, Any],
    folder: Path,
    *,
    layers: int,
    bits: int,
    group: int | None,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a checkpoint whose decoder layers have quantized linears; the router and the vocabulary have none.

    Args:
        config: config.json of the model.
        folder: to create.
        layers: the first so many of its decoder layers.
        bits: 4 or 8.
        group: columns with one scale; None for one scale per row.
        symmetric: whether there are no zero points.
        dtype: of scales and of what is not quantized.
    """
    config = {**config, "num_hidden_layers": layers, "max_window_layers": layers}
    ignore = ["lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$"]
    generator = torch.Generator().manual_seed(7)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)

    tensors = {}
    for name, shape in expected_tensors(parse_config(config)).items():
        if "proj.weight" not in name:
            tensors[name] = torch.full(shape, 0.02, dtype=dtype)
            continue
        rows, columns = shape
        blocks = columns // (group or columns)
        tensors[f"{name}_packed"] = numbers(rows, columns * bits // 32)
        tensors[f"{name}_scale"] = torch.rand(rows, blocks, generator=generator).to(dtype)
        tensors[f"{name}_shape"] = torch.tensor(shape)
        if not symmetric:
            tensors[f"{name}_zero_point"] = numbers(rows * bits // 32, blocks)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = quantization_config(
        bits=bits, group=group, symmetric=symmetric, ignore=ignore
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder
