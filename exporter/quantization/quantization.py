"""How a checkpoint stores linears at low bit: what every format states of itself.

A package holds such a weight [N, K] as three tensors, whatever the format: codes, scales and zero points, in blocks
along K. `DequantizeLinear` makes the weight of them: (code - zero point) * scale.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from qwenport.exporter.safetensors_file import TensorEntry

CODES = "codes"
"""After a weight's name and a dot: its codes, [N, K]."""
SCALES = "scales"
"""The same: its scales, [N, K / block]."""
ZEROS = "zeros"
"""The same: its zero points, [N, K / block]."""
WEIGHT = ".weight"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Quantization(ABC):
    """The `quantization_config` of a checkpoint; a subclass is a format.

    Attributes:
        bits: of a code, 4 or 8.
        group: values along K that share a scale; None if all of a row do.
        symmetric: whether every zero point is the middle code.
        ignore: linears that are stored as they are: names, or "re:" and a pattern that their names begin with.
    """

    bits: int
    group: int | None
    symmetric: bool
    ignore: tuple[str, ...]

    name: ClassVar[str]
    """In messages and in manifests."""
    integers: ClassVar[Mapping[str, str]]
    """Suffix of a tensor -> its dtype in safetensors, if it holds integers."""

    @property
    def code_dtype(self) -> str:
        """The codes' type: "U4" or "U8"."""
        return f"U{self.bits}"

    @property
    def middle(self) -> int:
        """The code of zero in a symmetric weight."""
        return 1 << (self.bits - 1)

    def block(self, k: int) -> int:
        """Values along K that share a scale, for a weight of K columns."""
        return self.group or k

    def covers(self, parameter: str) -> bool:
        """Whether a parameter is the weight of a quantized linear.

        Args:
            parameter: in transformers' names; the experts of a layer are single linears.
        """
        linear = parameter.removesuffix(WEIGHT)
        if linear == parameter or linear.endswith(("norm", "embed_tokens")):
            return False
        return not any(_names(rule, linear) for rule in self.ignore)

    def repeated(self, checkpoint: Path, tensors: Mapping[str, TensorEntry]) -> frozenset[str]:
        """The tensors that only repeat what config.json says.

        Args:
            checkpoint: the directory.
            tensors: all of its tensors; their shapes are as the format wants them.

        Raises:
            CheckpointError: one says something else.
        """
        return frozenset()

    @abstractmethod
    def objection(self, shape: Shape) -> str | None:
        """Why no weight [N, K] of this shape can be stored; None if it can."""

    @abstractmethod
    def stored(self, shape: Shape) -> dict[str, Shape]:
        """Suffix -> shape of the checkpoint's tensors of a weight [N, K]; suffixes follow the linear's name."""

    @abstractmethod
    def codes(self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
        """The codes [N, K], as they lie in the checkpoint."""

    @abstractmethod
    def scales(self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
        """The scales [N, K / block], as they lie in the checkpoint."""

    @abstractmethod
    def zero_points(self, data: bytes, shape: Shape) -> bytes:
        """The zero points [N, K / block] as ONNX packs them, of the checkpoint's tensor `zero_point_source` names.

        Args:
            data: that tensor's bytes.
            shape: the weight's, [N, K].
        """

    @abstractmethod
    def zero_point_source(self, linear: str) -> str | None:
        """The checkpoint's tensor of zero points; None if the format is symmetric."""

    def describe(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "format": self.name,
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "ignore": list(self.ignore),
        }


def viewed(entry: TensorEntry, name: str, dtype: str, shape: Shape) -> TensorEntry:
    """The bytes of a tensor under another name, type and shape."""
    return replace(entry, name=name, dtype=dtype, shape=shape)


def _names(rule: str, linear: str) -> bool:
    if rule.startswith("re:"):
        return re.match(rule.removeprefix("re:"), linear) is not None
    return linear == rule or linear.startswith(f"{rule}.")
