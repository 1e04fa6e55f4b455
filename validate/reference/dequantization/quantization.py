"""What the oracle asks of a quantized checkpoint's format, whichever it is; a file beside this one is a format.

Nothing here uses the exporter's reading of the same formats: each is written down twice, to be compared.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference.files import CONFIG
from qwenport.validate.reference.rounded_inputs import RoundsInput
from qwenport.wording import cut, one_line

KEY = "quantization_config"
BY_FORMULA = "the formula, computed by validate"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What scales may be."""

Shape = tuple[int, ...]


class Stored(Protocol):
    """A checkpoint's tensors, in transformers' names."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name -> shape of every tensor."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of a tensor as stored; no other row is read."""

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns start..stop-1 of a matrix as stored."""


@dataclass(frozen=True)
class Quantization(ABC):
    """What a checkpoint's config.json says of its quantized weights; a subclass is a format.

    Attributes:
        path: the checkpoint's directory.
    """

    path: Path

    @property
    @abstractmethod
    def dequantized_by(self) -> str:
        """Whose implementation dequantizes."""

    @abstractmethod
    def quantized(self, names: Iterable[str]) -> set[str]:
        """The weights, each "L.weight", that are quantized, as the names of all stored tensors show."""

    @abstractmethod
    def tensors(
        self, weight: str, shape: Sequence[int], names: Container[str]
    ) -> dict[str, tuple[int, ...]]:
        """The tensors that hold a weight [N, K], with their shapes.

        Args:
            weight: "L.weight".
            shape: its shape as transformers has it.
            names: those of all stored tensors, since a format may leave some out.

        Raises:
            ValidationError: the config says nothing of this weight, or no weight of this shape can be stored.
        """

    @abstractmethod
    def group(self, weight: str) -> int | None:
        """Columns of a weight that share a scale; None if all do."""

    @abstractmethod
    def shape(self, weight: str, stored: Stored) -> tuple[int, ...]:
        """The shape of a weight, [N, K], as the checkpoint's tensors have it.

        Raises:
            ValidationError: a tensor that tells it is missing or misshapen.
        """

    @abstractmethod
    def rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, stored: Stored
    ) -> torch.Tensor:
        """Rows start..stop-1 of a weight of that shape, [N, K], in its scales' dtype; a later `stop` is the end.

        Args:
            stored: has the tensors that `tensors` names, whose shapes have been compared.

        Raises:
            ValidationError: the tensors do not make such a weight; says which and why.
        """

    def rounds_input(self, weight: str, stored: Stored) -> RoundsInput | None:
        """The forward pre-hook that rounds the input of a weight's linear; None if it is not rounded.

        Raises:
            ValidationError: its scale is missing, or has a dtype that the format does not.
        """
        return None

    def shape_of(self, name: str, stored: Stored) -> Shape:
        """The shape of a stored tensor.

        Raises:
            ValidationError: there is none of this name.
        """
        if name not in stored.shapes:
            raise ValidationError(f"{cut(self.path)} has no tensor {cut(name)}")
        return stored.shapes[name]

    def of_dtype(
        self, name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]
    ) -> torch.Tensor:
        """The tensor itself.

        Raises:
            ValidationError: it has none of these dtypes.
        """
        if tensor.dtype not in dtypes:
            allowed = " or ".join(map(str, dtypes))
            raise ValidationError(
                f"{cut(self.path)}: {cut(name)} is {tensor.dtype}; the format has {allowed}"
            )
        return tensor


def check_stated(
    path: Path, where: str, stated: Mapping[str, Any], plain: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuse a config by the first of its keys that is none of the values which the oracle dequantizes.

    Args:
        path: the checkpoint's directory.
        where: the place in config.json, for the message.
        stated: what config.json says there; an absent key is None.
        plain: key -> the values allowed.

    Raises:
        ValidationError: names the key.
    """
    for key, allowed in plain.items():
        value = stated.get(key)
        if not any(type(value) is type(other) and value == other for other in allowed):
            told = " or ".join(json.dumps(value) for value in allowed)
            raise ValidationError(
                f"{cut(path / CONFIG)}: {where}.{key} is {one_line(repr(value), 60)}; "
                f"the oracle dequantizes checkpoints where it is {told}"
            )
