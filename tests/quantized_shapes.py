"""Quantized checkpoints in the shape of real models, with random codes: for what depends on sizes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantized import quantization_config
from quantized_words import order_of
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
    ignore = ["lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$"]
    generator = torch.Generator().manual_seed(7)

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        blocks = columns // (group or columns)
        found = {
            f"{name}.weight_packed": _numbers(generator, rows, columns * bits // 32),
            f"{name}.weight_scale": torch.rand(rows, blocks, generator=generator).to(dtype),
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            found[f"{name}.weight_zero_point"] = _numbers(generator, rows * bits // 32, blocks)
        return found

    stated = quantization_config(bits=bits, group=group, symmetric=symmetric, ignore=ignore)
    return _write(config, folder, layers, dtype, linear, stated)


def write_gptq_shape(
    config: dict[str, Any],
    folder: Path,
    *,
    layers: int,
    bits: int,
    group: int,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a checkpoint as `write_shape` in the format of GPTQ with act-order; arguments as there."""
    generator, per_word = torch.Generator().manual_seed(7), 32 // bits
    middle = sum(((1 << (bits - 1)) - 1) << (bits * place) for place in range(per_word))

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        blocks = columns // group
        zeros = _numbers(generator, blocks, rows // per_word)
        return {
            f"{name}.qweight": _numbers(generator, columns // per_word, rows),
            f"{name}.qzeros": torch.full_like(zeros, middle) if symmetric else zeros,
            f"{name}.scales": torch.rand(blocks, rows, generator=generator).to(dtype),
            f"{name}.g_idx": (order_of(name, columns) // group).int(),
        }

    stated = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": True,
    }
    return _write(config, folder, layers, dtype, linear, stated)


def _numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)


def _write(
    config: dict[str, Any],
    folder: Path,
    layers: int,
    dtype: torch.dtype,
    linear: Callable[[str, int, int], dict[str, torch.Tensor]],
    stated: dict[str, Any],
) -> Path:
    """Write a checkpoint whose linears' tensors are those of `linear`, of its name, rows and columns."""
    config = {**config, "num_hidden_layers": layers, "max_window_layers": layers}
    tensors = {}
    for name, shape in expected_tensors(parse_config(config)).items():
        if "proj.weight" in name:
            tensors |= linear(name.removesuffix(".weight"), *shape)
        else:
            tensors[name] = torch.full(shape, 0.02, dtype=dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = stated
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder
