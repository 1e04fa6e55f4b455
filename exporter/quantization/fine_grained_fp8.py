"""Qwen's and DeepSeek's FP8: numbers of 8 bits, and a factor for each block of 128 x 128 (`weight_scale_inv`).

No runtime here multiplies by such blocks, so the export dequantizes the weight to the model's dtype: code * factor in
fp32, rounded once. The kernels that these checkpoints are made for also round activations to FP8, in groups of 128.
transformers does not where it dequantizes, and a package does not either.
Source: transformers, integrations/finegrained_fp8.py (Fp8Dequantize, FP8Linear).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from qwenport.contract import BY_SAFETENSORS, FP8
from qwenport.exporter.errors import ExportError
from qwenport.exporter.quantization.quantization import LINEAR, Group, Quantization
from qwenport.exporter.quantization.settings import Settings, check_pattern, refused
from qwenport.exporter.quantization.storage import (
    WEIGHT,
    WHOLE,
    Part,
    Repacked,
    Shape,
    Storage,
)
from qwenport.exporter.safetensors_file import TensorEntry
from qwenport.wording import cut

METHOD = "fp8"
SCALE = "weight_scale_inv"
HEAD = "lm_head"
MOST_BLOCK = 1 << 20


@dataclass(frozen=True)
class FineGrainedFP8(Storage):
    """See the module.

    Attributes:
        block_rows, block_columns: of a block; the last ones of a weight may be smaller.
    """

    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    format: str = METHOD
    block_rows: int = 128
    block_columns: int = 128

    integers: ClassVar[Mapping[str, str]] = {WEIGHT.removeprefix("."): FP8}
    is_whole: ClassVar[bool] = True
    note: ClassVar[str | None] = (
        "weights in FP8 blocks are dequantized to the model's dtype; activations are not rounded to FP8, as the "
        "checkpoint's own kernels do"
    )

    @property
    def part_names(self) -> tuple[str, ...]:
        return (WHOLE,)

    def in_words(self) -> str:
        return (
            f"FP8 in blocks of {self.block_rows} x {self.block_columns}, dequantized by the export"
        )

    def objection(self, shape: Shape) -> str | None:
        return None

    def stored(self, shape: Shape) -> dict[str, Shape]:
        rows, columns = shape
        blocks = (-(-rows // self.block_rows), -(-columns // self.block_columns))
        return {"weight": shape, SCALE: blocks}

    def parts(
        self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry], dtype: str
    ) -> dict[str, Part]:
        sources = tensors[f"{linear}{WEIGHT}"], tensors[f"{linear}.{SCALE}"]
        return {WHOLE: Repacked(dtype, shape, sources, partial(self._dequantized, sources, dtype))}

    def _dequantized(
        self, sources: Sequence[TensorEntry], dtype: str, read: Sequence[bytes]
    ) -> bytes:
        """The weight's bytes, of its codes' and factors'.

        Raises:
            ExportError: a value is not finite.
        """
        import torch

        entry, factors = sources
        target = BY_SAFETENSORS[dtype].torch
        codes = torch.frombuffer(bytearray(read[0]), dtype=torch.float8_e4m3fn).view(entry.shape)
        scale = torch.frombuffer(bytearray(read[1]), dtype=BY_SAFETENSORS[factors.dtype].torch)
        by_column = scale.view(factors.shape).float().repeat_interleave(self.block_columns, dim=1)
        made = torch.empty(entry.shape, dtype=target)
        for block, factor in enumerate(by_column[:, : entry.shape[1]]):
            rows = slice(block * self.block_rows, (block + 1) * self.block_rows)
            made[rows] = (codes[rows].float() * factor).to(target)
            if not torch.isfinite(made[rows]).all():
                raise ExportError(
                    f"tensor {cut(entry.name)} holds NaN or values that {BY_SAFETENSORS[dtype].name} does not have"
                )
        return made.view(torch.uint8).numpy().tobytes()


def parse_fine_grained_fp8(raw: Mapping[str, Any]) -> Quantization:
    """Read a `quantization_config` whose method is "fp8".

    Raises:
        ConfigError: it asks for what is not supported; says which key.
    """
    settings = Settings("", raw)
    settings.required("quant_method", METHOD)
    settings.required("activation_scheme", "dynamic")
    settings.only("fmt", "e4m3")
    settings.only("scale_fmt", "float", None)
    settings.only("expert_dtype", "fp8", None)
    settings.only("modules_to_convert", None, [])
    settings.neutral("dequantize")  # how transformers is to load it
    rows, columns = _block(settings.take("weight_block_size"))
    lists = [settings.take(key) for key in ("modules_to_not_convert", "ignored_layers")]
    settings.finish()
    kept = [given for given in lists if given is not None]
    if len(kept) > 1:
        raise refused("ignored_layers beside modules_to_not_convert", kept[1])
    if kept and not (isinstance(kept[0], list) and all(isinstance(n, str) for n in kept[0])):
        raise refused("modules_to_not_convert", kept[0])
    storage = FineGrainedFP8(block_rows=rows, block_columns=columns)
    ignore = tuple(_rule(name) for name in kept[0]) if kept else (HEAD,)
    return Quantization((Group((LINEAR,), storage),), ignore)


def _block(given: Any) -> tuple[int, int]:
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(type(size) is int and 0 < size <= MOST_BLOCK for size in given)
    ):
        raise refused("weight_block_size", given)
    return given[0], given[1]


def _rule(name: str) -> str:
    """What transformers does not convert by this name: modules that it begins, as a pattern, or ends."""
    check_pattern("modules_to_not_convert", name)
    return rf"re:(?:{name})(?:(?<=\.)|(?=\.|$))|.*{re.escape(name)}$"
