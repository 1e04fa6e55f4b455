"""What a merged LoRA adapter adds to a checkpoint's matrices, fp64: by peft where it is installed, else computed here.

Without peft it is (alpha / r) B A, written down once more, apart from the exporter's.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from qwenport.validate.failures import reported
from qwenport.validate.reference.files import opened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class MergedAdapter:
    """The adapter of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        """Read its settings and names.

        Raises:
            ValidationError: the adapter cannot be read.
        """
        self._file = path / WEIGHTS
        with reported(path / CONFIG, "not the settings of an adapter"):
            settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            self._scale = settings["lora_alpha"] / settings["r"]
            self._peft = _peft_settings(path)
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
        added: torch.Tensor = (
            (b @ a) * self._scale if self._peft is None else _by_peft(self._peft, a, b)
        )
        return added


def _peft_settings(path: Path) -> Any:
    """The adapter's settings as peft reads them; None where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    settings = peft.LoraConfig.from_pretrained(str(path))
    settings.target_modules = {"matrix"}
    return settings


def _by_peft(settings: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What peft adds to a matrix, given an adapter's two for it."""
    import peft

    with torch.device("meta"):  # the matrix itself is not looked at
        holder = torch.nn.ModuleDict({"matrix": torch.nn.Linear(a.shape[1], len(b), bias=False)})
        adapted: Any = peft.inject_adapter_in_model(settings, holder)
        layer = adapted["matrix"]
    layer.lora_A["default"].weight = torch.nn.Parameter(a, requires_grad=False)
    layer.lora_B["default"].weight = torch.nn.Parameter(b, requires_grad=False)
    added: torch.Tensor = layer.get_delta_weight("default")
    return added
