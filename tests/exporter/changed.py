"""Copies of quantized checkpoints with something changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, Any]], Any]


def changed(
    checkpoint: Path, target: Path, *, config: Change | None = None, tensors: Change | None = None
) -> Path:
    """A copy of a checkpoint of one file, with its quantization_config or its tensors changed."""
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).symlink_to(file)
    if config is not None:
        stated = json.loads((checkpoint / "config.json").read_text())
        config(stated["quantization_config"])
        (target / "config.json").unlink()
        (target / "config.json").write_text(json.dumps(stated))
    if tensors is not None:
        stored: dict[str, torch.Tensor] = load_file(checkpoint / "model.safetensors")
        tensors(stored)
        (target / "model.safetensors").unlink()
        save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_to(**values: Any) -> Change:
    """A change that sets keys."""
    return lambda stated: stated.update(values)
