"""What a merged LoRA adapter adds to the checkpoint's matrices, computed here anew: (alpha / r) B A, in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qwenport.validate.failures import reported
from qwenport.validate.reference.files import opened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class MergedAdapter:
    """The adapter of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        """Read its scale and names.

        Raises:
            ValidationError: it cannot be read.
        """
        self._file = path / WEIGHTS
        with reported(path / CONFIG, "not the settings of an adapter"):
            settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            self._scale = settings["lora_alpha"] / settings["r"]
        with opened(self._file) as content:
            self._names = frozenset(content.keys())

    def added(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """What is added to rows start..stop-1 of a tensor, fp64 [rows, columns]; None if nothing is."""
        module = PREFIX + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in self._names:
            return None
        with opened(self._file) as content:
            a = content.get_tensor(f"{module}.lora_A.weight").double()
            b = content.get_slice(f"{module}.lora_B.weight")[start:stop].double()
        added: torch.Tensor = (b @ a) * self._scale
        return added
