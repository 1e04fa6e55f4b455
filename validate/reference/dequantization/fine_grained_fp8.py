"""FP8 with a factor for each block, as Qwen and DeepSeek publish it: dequantized by transformers' own operation.

transformers derives the blocks from the factors' shape, so a weight that ends inside a block is first filled up to
whole blocks; otherwise it would be refused, or cut into other blocks than those of the config.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import pad

from qwenport.contract import BY_TORCH_NAME
from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.validate.reference.dequantization.quantization import (
    FLOATS,
    KEY,
    Quantization,
    Stored,
    check_stated,
)
from qwenport.validate.reference.files import CONFIG
from qwenport.wording import cut, one_line

METHOD = "fp8"
SCALE = "_scale_inv"  # after "L.weight"

_PLAIN: dict[str, tuple[Any, ...]] = {
    "activation_scheme": ("dynamic",),
    "fmt": (None, "e4m3"),
    "scale_fmt": (None, "float"),
    "expert_dtype": (None, "fp8"),
    "modules_to_convert": (None, []),
}


@dataclass(frozen=True)
class FineGrainedFP8(Quantization):
    """See the module.

    Attributes:
        block: rows and columns with one factor.
        dtype: the model's, that values are rounded to.
    """

    block: tuple[int, int]
    dtype: torch.dtype

    @property
    def dequantized_by(self) -> str:
        return f"transformers {transformers.__version__}, to {self.dtype}"

    def group(self, weight: str) -> int | None:
        return None

    def quantized(self, names: Iterable[str]) -> set[str]:
        return {name.removesuffix(SCALE) for name in names if name.endswith(f".weight{SCALE}")}

    def tensors(
        self, weight: str, shape: Sequence[int], names: Container[str]
    ) -> dict[str, tuple[int, ...]]:
        counts = [-(-size // block) for size, block in zip(shape, self.block, strict=True)]
        return {weight: tuple(shape), weight + SCALE: tuple(counts)}

    def shape(self, weight: str, stored: Stored) -> tuple[int, ...]:
        return self.shape_of(weight, stored)

    def rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, stored: Stored
    ) -> torch.Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        height, width = self.block
        stop = min(stop, shape[0])
        first, last = start // height, -(-stop // height)
        codes = stored.rows(weight, first * height, stop)
        codes = self.of_dtype(weight, codes, (torch.float8_e4m3fn,))
        factors = stored.rows(weight + SCALE, first, last)
        factors = self.of_dtype(weight + SCALE, factors, FLOATS)
        missing = (0, -shape[1] % width, 0, -len(codes) % height)
        filled = pad(codes.view(torch.uint8), missing).view(codes.dtype)
        with reported(self.path, f"{cut(weight)} cannot be dequantized"):
            made: torch.Tensor = Fp8Dequantize(None)._dequantize_one(filled, factors, self.dtype)
        return made[start - first * height : stop - first * height, : shape[1]]


def read(path: Path, stated: Mapping[str, Any]) -> FineGrainedFP8:
    """Read a `quantization_config` whose method is "fp8".

    Raises:
        ValidationError: it states what cannot be dequantized here.
    """
    check_stated(path, KEY, stated, _PLAIN)
    rows, columns = stated["weight_block_size"]
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named not in BY_TORCH_NAME:
        raise ValidationError(
            f"{cut(path / CONFIG)}: its dtype is {one_line(named, 60)}, and weights are rounded to it"
        )
    return FineGrainedFP8(path, (rows, columns), BY_TORCH_NAME[named].torch)
