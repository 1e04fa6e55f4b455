"""AWQ's "gemm": words [K, N / 8] of 4-bit codes, shifted out one place at a time and put into the columns' order.

The order is that of AutoAWQ's `reverse_awq_order`, and a weight is (code - zero point) x scale in the scales' dtype, as
in its `dequantize_gemm`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference.dequantization.quantization import (
    BY_FORMULA,
    FLOATS,
    KEY,
    Quantization,
    Stored,
    check_stated,
)
from qwenport.wording import cut

METHOD = "awq"
CODES = ".qweight"
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word has the codes of its eight columns: in which four bits, from the lowest."""

_PLAIN: dict[str, tuple[Any, ...]] = {
    "bits": (4,),
    "version": (None, "gemm", "GEMM"),
    "format": (None, "gemm", "GEMM"),
    "zero_point": (None, True, False),
    "desc_act": (None, False),
}


@dataclass(frozen=True)
class Awq(Quantization):
    """See the module; "L.weight" is quantized where there is an "L.qweight".

    Attributes:
        group_size: columns with one scale; -1 if a scale is for a whole row.
    """

    group_size: int

    @property
    def dequantized_by(self) -> str:
        return BY_FORMULA

    def group(self, weight: str) -> int | None:
        return None if self.group_size == -1 else self.group_size

    def quantized(self, names: Iterable[str]) -> set[str]:
        return {f"{name.removesuffix(CODES)}.weight" for name in names if name.endswith(CODES)}

    def tensors(
        self, weight: str, shape: Sequence[int], names: Container[str]
    ) -> dict[str, tuple[int, ...]]:
        (rows, columns), linear = shape, weight.removesuffix(".weight")
        group = columns if self.group_size == -1 else self.group_size
        if columns % group or rows % len(PLACES):
            raise ValidationError(
                f"{cut(self.path)}: {cut(weight)} has shape {list(shape)}, which words of 8 rows and groups of {group} "
                "columns do not divide"
            )
        return {
            linear + CODES: (columns, rows // len(PLACES)),
            f"{linear}.qzeros": (columns // group, rows // len(PLACES)),
            f"{linear}.scales": (columns // group, rows),
        }

    def shape(self, weight: str, stored: Stored) -> tuple[int, ...]:
        name = weight.removesuffix(".weight") + CODES
        found = self.shape_of(name, stored)
        if len(found) != 2:
            raise ValidationError(f"{cut(self.path)}: {cut(name)} is no matrix")
        return found[1] * len(PLACES), found[0]

    def rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, stored: Stored
    ) -> torch.Tensor:
        linear, stop = weight.removesuffix(".weight"), min(stop, shape[0])
        first, last = start // len(PLACES), -(-stop // len(PLACES))

        def words(suffix: str) -> torch.Tensor:
            found = stored.columns(linear + suffix, first, last)
            codes = _in_order(self.of_dtype(linear + suffix, found, (torch.int32,)))
            return codes[:, start - first * len(PLACES) :][:, : stop - start]

        name = f"{linear}.scales"
        scales = self.of_dtype(name, stored.columns(name, start, stop), FLOATS)
        codes, zeros = words(CODES), words(".qzeros")
        each = shape[1] // len(scales)
        steps = codes - zeros.repeat_interleave(each, dim=0)
        made = steps.to(scales.dtype) * scales.repeat_interleave(each, dim=0)
        return made.T.contiguous()


def read(path: Path, stated: Mapping[str, Any]) -> Awq:
    """Read a `quantization_config` whose method is "awq".

    Raises:
        ValidationError: it states what cannot be dequantized here.
    """
    check_stated(path, KEY, stated, _PLAIN)
    size = stated.get("group_size", 128)
    check_stated(path, KEY, {"group_size": size}, {"group_size": (32, 64, 128, -1)})
    return Awq(path, size)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """The codes of words [rows, columns] as int16 [rows, 8 * columns]."""
    codes = [(words >> 4 * place & 15).to(torch.int16) for place in PLACES]
    return torch.stack(codes, dim=2).flatten(1)
