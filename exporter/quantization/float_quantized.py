"""compressed-tensors' FP8, "float-quantized" and, of weights alone, "naive-quantized": numbers of 8 bits and scales.

The codes are ONNX's FLOAT8E4M3FN and stay in the checkpoint's files. A weight is code * scale in the scale's dtype.
A linear's input may be rounded to FP8 as well, which is part of the model's mathematics: with a scale from calibration
(static), or one for each token (dynamic).
Source: compressed-tensors, compressors/naive_quantized and quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qwenport.contract import BF16, FP8, FP16
from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.quantization.settings import Settings
from qwenport.exporter.quantization.storage import (
    CODES,
    DYNAMIC,
    INPUT_SCALE,
    SCALES,
    STATIC,
    WEIGHT,
    ByReference,
    Part,
    Shape,
    Storage,
    part_name,
    viewed,
)
from qwenport.exporter.safetensors_file import TensorEntry, chunks
from qwenport.wording import cut

FORMATS = ("float-quantized", "naive-quantized")
SCALE = "weight_scale"
EXPERT = ".experts."


@dataclass(frozen=True)
class FloatQuantized(Storage):
    """See the module.

    Attributes:
        by_row: whether each row has a scale; otherwise one is for the whole weight.
    """

    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    format: str = FORMATS[0]
    by_row: bool = True

    integers: ClassVar[Mapping[str, str]] = {WEIGHT.removeprefix("."): FP8}

    @property
    def part_names(self) -> tuple[str, ...]:
        return CODES, SCALES, *([INPUT_SCALE] if self.activations == STATIC else [])

    def in_words(self) -> str:
        inputs = f", {self.activations} activations" if self.activations else ""
        return f"FP8 per {'row' if self.by_row else 'tensor'}{inputs}"

    def objection(self, shape: Shape) -> str | None:
        return None

    def stored(self, shape: Shape) -> dict[str, Shape]:
        found: dict[str, Shape] = {"weight": shape, SCALE: (shape[0], 1) if self.by_row else ()}
        return found | ({INPUT_SCALE: ()} if self.activations == STATIC else {})

    def check(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> frozenset[str]:
        if self.activations == STATIC:
            name = f"{linear}.{INPUT_SCALE}"
            scale = _number(checkpoint, tensors[name])
            if not 0 < scale < math.inf:
                raise CheckpointError(f"tensor {cut(name)} is {scale}; a scale is more than 0")
        return frozenset()

    def parts(
        self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry], dtype: str
    ) -> dict[str, Part]:
        weight = f"{linear}{WEIGHT}"

        def part(name: str, suffix: str, shape: Shape) -> ByReference:
            entry = tensors[f"{linear}.{suffix}"]
            return ByReference(viewed(entry, part_name(weight, name), entry.dtype, shape))

        found: dict[str, Part] = {
            CODES: part(CODES, "weight", shape),
            SCALES: part(SCALES, SCALE, (shape[0],) if self.by_row else ()),
        }
        if self.activations == STATIC:
            # experts' are stacked
            found[INPUT_SCALE] = part(INPUT_SCALE, INPUT_SCALE, (1,) if EXPERT in linear else ())
        return found


def _number(checkpoint: Path, entry: TensorEntry) -> float:
    """The value of a tensor of one number."""
    data = b"".join(chunks(checkpoint, entry))
    if entry.dtype == BF16.safetensors:
        data = b"\0\0" + data  # the upper half of fp32
    (value,) = struct.unpack("<e" if entry.dtype == FP16.safetensors else "<f", data)
    return float(value)


def parse_weights(weights: Settings, activations: Settings | None) -> FloatQuantized:
    """Read a group's `weights` and `input_activations`.

    Raises:
        ConfigError: they ask for what is not supported; says which key.
    """
    _common(weights)
    strategy = weights.required("strategy", "channel", "tensor")
    weights.only("dynamic", False, None)
    weights.neutral("scale_dtype")  # they are stored
    weights.finish()
    rounding = None
    if activations is not None:
        _common(activations)
        rounding = DYNAMIC if activations.only("dynamic", False, True) else STATIC
        activations.required("strategy", "token" if rounding == DYNAMIC else "tensor")
        activations.only("scale_dtype", None)
        activations.finish()
    return FloatQuantized(by_row=strategy == "channel", activations=rounding)


def _common(settings: Settings) -> None:
    settings.neutral("observer", "observer_kwargs", "zp_dtype")
    settings.required("type", "float")
    settings.required("num_bits", 8)
    settings.only("symmetric", True)
    settings.only("group_size", None, -1)
    settings.only("block_structure", None)
    settings.only("actorder", None)
