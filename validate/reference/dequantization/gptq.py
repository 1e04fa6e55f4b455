"""GPTQ: words [K / 8, N] or [K / 4, N] along K, and for each column of the weight the group that `g_idx` names.

A weight is (code - zero point of its group) x scale of its group in the scales' dtype, as in GPTQModel's
`dequantize_weight`. Of zero points in format "gptq" one is added, within the bits of each.
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
from qwenport.validate.reference.files import CONFIG
from qwenport.wording import cut, one_line

METHOD = "gptq"
CODES = ".qweight"

_PLAIN: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8),
    "checkpoint_format": (None, "gptq", "gptq_v2"),
    "format": (None, "gptq", "gptq_v2"),
    "desc_act": (None, False, True),
    "pack_dtype": (None, "int32"),
}


@dataclass(frozen=True)
class Gptq(Quantization):
    """See the module; "L.weight" is quantized where there is an "L.qweight".

    Attributes:
        bits: of a code, 4 or 8.
        group_size: columns in a group; -1 if there is one group.
        less_one: whether zero points are stored minus one.
        act_order: whether the groups' columns are anywhere; if not, `g_idx` may be left out.
    """

    bits: int
    group_size: int
    less_one: bool
    act_order: bool

    @property
    def dequantized_by(self) -> str:
        return BY_FORMULA

    @property
    def places(self) -> int:
        """Codes in an int32."""
        return 32 // self.bits

    def group(self, weight: str) -> int | None:
        return None if self.group_size == -1 else self.group_size

    def quantized(self, names: Iterable[str]) -> set[str]:
        return {f"{name.removesuffix(CODES)}.weight" for name in names if name.endswith(CODES)}

    def tensors(
        self, weight: str, shape: Sequence[int], names: Container[str]
    ) -> dict[str, tuple[int, ...]]:
        (rows, columns), linear = shape, weight.removesuffix(".weight")
        group = columns if self.group_size == -1 else self.group_size
        if columns % group or columns % self.places or rows % self.places:
            raise ValidationError(
                f"{cut(self.path)}: {cut(weight)} has shape {list(shape)}, which words of {self.places} codes and "
                f"groups of {group} columns do not divide"
            )
        held: dict[str, tuple[int, ...]] = {
            linear + CODES: (columns // self.places, rows),
            f"{linear}.qzeros": (columns // group, rows // self.places),
            f"{linear}.scales": (columns // group, rows),
        }
        if self.act_order or f"{linear}.g_idx" in names:
            held[f"{linear}.g_idx"] = (columns,)
        return held

    def shape(self, weight: str, stored: Stored) -> tuple[int, ...]:
        name = weight.removesuffix(".weight") + CODES
        found = self.shape_of(name, stored)
        if len(found) != 2:
            raise ValidationError(f"{cut(self.path)}: {cut(name)} is no matrix")
        return found[1], found[0] * self.places

    def rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, stored: Stored
    ) -> torch.Tensor:
        linear, stop = weight.removesuffix(".weight"), min(stop, shape[0])
        name = f"{linear}.scales"
        scales = self.of_dtype(name, stored.columns(name, start, stop), FLOATS)
        groups = self._groups(linear, shape[1], len(scales), stored)

        name = linear + CODES
        words = self.of_dtype(name, stored.columns(name, start, stop), (torch.int32,))
        codes = torch.stack([self._place(words, place) for place in range(self.places)], dim=1)

        first, last = start // self.places, -(-stop // self.places)
        name = f"{linear}.qzeros"
        words = self.of_dtype(name, stored.columns(name, first, last), (torch.int32,))
        zeros = torch.stack([self._place(words, place) for place in range(self.places)], dim=2)
        zeros = zeros.flatten(1)[:, start - first * self.places :][:, : stop - start]
        if self.less_one:
            zeros = zeros + 1 & (1 << self.bits) - 1

        steps = codes.flatten(0, 1) - zeros[groups]
        return (steps.to(scales.dtype) * scales[groups]).T.contiguous()

    def _groups(self, linear: str, columns: int, count: int, stored: Stored) -> torch.Tensor:
        """The group of each column, int64 [columns].

        Raises:
            ValidationError: there is no such group.
        """
        name = f"{linear}.g_idx"
        if name not in stored.shapes and not self.act_order:
            return torch.arange(columns) // (columns // count)
        found = self.of_dtype(name, stored.rows(name, 0, columns), (torch.int32,)).long()
        if columns and not 0 <= int(found.min()) <= int(found.max()) < count:
            raise ValidationError(
                f"{cut(self.path)}: {cut(name)} names groups from {int(found.min())} to {int(found.max())}; "
                f"there are {count}"
            )
        return found

    def _place(self, words: torch.Tensor, place: int) -> torch.Tensor:
        """The codes in one place of each word, counted from the lowest bits, int16."""
        return (words >> self.bits * place & (1 << self.bits) - 1).to(torch.int16)


def read(path: Path, stated: Mapping[str, Any]) -> Gptq:
    """Read a `quantization_config` whose method is "gptq".

    Raises:
        ValidationError: it states what cannot be dequantized here.
    """
    check_stated(path, KEY, stated, _PLAIN)
    size = stated.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        raise ValidationError(
            f"{cut(path / CONFIG)}: {KEY}.group_size is {one_line(repr(size), 60)}, no size of a group"
        )
    layout = stated.get("checkpoint_format") or stated.get("format") or "gptq"
    return Gptq(path, stated["bits"], size, layout == "gptq", stated.get("desc_act") is True)
