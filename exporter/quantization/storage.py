"""How a weight is stored at low bit: what every format states of itself.

A package holds such a weight [N, K] as parts, whatever the format. Of integers they are codes, scales and zero points,
in blocks along K, and `DequantizeLinear` makes the weight of them: (code - zero point) * scale. Of FP8 they are codes
and scales, one for each row or for all. What no runtime multiplies by is dequantized by the export: its part is the
weight itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qwenport.exporter.safetensors_file import TensorEntry

CODES = "codes"
"""After a weight's name and a dot: its codes, [N, K]."""
SCALES = "scales"
"""The same: its scales, [N, K / block]; of FP8 [N] or []."""
ZEROS = "zeros"
"""The same: its zero points, [N, K / block]."""
PERMUTATION = "permutation"
"""The same: int64 [K], the input column of each column of its codes; only if they are in another order."""
INPUT_SCALE = "input_scale"
"""The same: the scale [] that its linear's input is rounded with."""
WHOLE = "whole"
"""Instead of all of these: the weight [N, K]; it has the weight's name."""
WEIGHT = ".weight"
STATIC, DYNAMIC = "static", "dynamic"
"""How a linear rounds its input to FP8: with INPUT_SCALE, or with the largest absolute value of each token."""
Shape = tuple[int, ...]


def part_name(weight: str, part: str) -> str:
    """The name in the graph of a part of "L.weight"."""
    return weight if part == WHOLE else f"{weight}.{part}"


@dataclass(frozen=True)
class ByReference:
    """A part that is the checkpoint's own bytes.

    Attributes:
        entry: where they lie; its dtype and shape are the part's.
    """

    entry: TensorEntry


@dataclass(frozen=True)
class Middle:
    """Zero points that all are the middle code.

    Attributes:
        dtype: "U4" or "U8".
        shape: [N, K / block].
    """

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Repacked:
    """A part that the export writes.

    Attributes:
        dtype: as in a safetensors header, or "U4": two to a byte, the first in its low half.
        shape: the part's.
        sources: the checkpoint's tensors that it is made of.
        repack: their bytes, in order -> the part's bytes.
    """

    dtype: str
    shape: Shape
    sources: tuple[TensorEntry, ...]
    repack: Callable[[Sequence[bytes]], bytes]


Part = ByReference | Middle | Repacked
Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Storage(ABC):
    """How weights are stored; a subclass is a format.

    Attributes:
        bits: of a code, 4 or 8.
        group: values along K that share a scale; None if all of a row do.
        symmetric: whether every zero point is the middle code.
        format: the format's name, for manifests.
        activations: how the linear's input is rounded to FP8: STATIC, DYNAMIC or, if it is not, None.
    """

    bits: int
    group: int | None
    symmetric: bool
    format: str

    activations: str | None = None

    integers: ClassVar[Mapping[str, str]]
    """Suffix of a tensor -> its dtype in safetensors, if it holds integers or FP8."""
    is_whole: ClassVar[bool] = False
    """Whether the only part is WHOLE."""
    note: ClassVar[str | None] = None
    """What users of such a checkpoint should know; None if there is nothing to say."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of `parts`."""
        return CODES, SCALES, ZEROS

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

    def in_words(self) -> str:
        """For people: "4 bits in groups of 128, symmetric"."""
        scales = "per row" if self.group is None else f"in groups of {self.group}"
        return f"{self.bits} bits {scales}, {'' if self.symmetric else 'a'}symmetric"

    @abstractmethod
    def objection(self, shape: Shape) -> str | None:
        """Why no weight [N, K] of this shape can be stored; None if it can."""

    @abstractmethod
    def stored(self, shape: Shape) -> dict[str, Shape]:
        """Suffix -> shape of the checkpoint's tensors of a weight [N, K]; suffixes follow the linear's name."""

    def optional(self, shape: Shape) -> dict[str, Shape]:
        """As `stored`: the tensors that a checkpoint may leave out."""
        return {}

    @abstractmethod
    def parts(
        self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry], dtype: str
    ) -> dict[str, Part]:
        """Each part, CODES or another of the names above -> what it is made of.

        Args:
            linear: its name, without ".weight".
            shape: the weight's, [N, K].
            tensors: the checkpoint's; their shapes are those of `stored`.
            dtype: the package's, as in a safetensors header.
        """

    def order(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> Order | None:
        """The columns of the weight in the order that its codes have in a package; None if it is the weight's own.

        Args:
            linear, shape, tensors: as for `parts`.
            checkpoint: the directory, of which a small tensor is read.

        Raises:
            CheckpointError: the columns do not make groups of one size.
        """
        return None

    def check(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> frozenset[str]:
        """Read the small tensors that must say what config.json does; returns those that are not needed further.

        Args:
            linear, shape, tensors: as for `parts`.
            checkpoint: the directory.

        Raises:
            CheckpointError: one says something else.
        """
        return frozenset()


def viewed(entry: TensorEntry, name: str, dtype: str, shape: Shape) -> TensorEntry:
    """The bytes of a tensor under another name, type and shape."""
    return replace(entry, name=name, dtype=dtype, shape=shape)
