"""compressed-tensors' "pack-quantized": dequantized by the library where it is installed, else computed here.

Without the library the format is written down once more: codes are shifted out of their words, and a weight is
(code - zero point) x scale in the scales' dtype.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
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

LIBRARY, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE, ZERO_POINT = "_packed", "_scale", "_shape", "_zero_point"  # after "L.weight"
WORD = 32  # bits
BITS = (4, 8)

# What else a config may say, and what it must say there: anything else changes the values or the arithmetic.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "format": (FORMAT,),
    "quantization_status": ("compressed", "frozen"),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_PLAIN_GROUP: dict[str, tuple[Any, ...]] = {
    "format": (None, FORMAT),
    "input_activations": (None,),
    "output_activations": (None,),
}
_PLAIN_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": BITS,
    "type": ("int",),
    "strategy": ("group", "channel"),
    "dynamic": (None, False),
    "actorder": (None, False, "weight", "static"),
}


@dataclass(frozen=True)
class Scheme:
    """How a group of weights is quantized.

    Attributes:
        bits: of a code, 4 or 8.
        group_size: columns with one scale; None if a scale is for a whole row.
        symmetric: whether the zero point is the middle of the codes; if not, it is stored.
        targets: the modules: names, "re:" and a pattern, or "Linear" or "Embedding" for all of them.
        stated: the group as config.json has it, for the library.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    targets: tuple[str, ...]
    stated: Mapping[str, Any]

    @property
    def per_word(self) -> int:
        """Codes in an int32."""
        return WORD // self.bits

    def words(self, codes: int) -> int:
        """The number of int32 that `codes` codes are packed into."""
        return -(-codes // self.per_word)


@dataclass(frozen=True)
class PackQuantized(Quantization):
    """See the module; "L.weight" is quantized where there is an "L.weight_packed".

    Attributes:
        schemes: the groups of the config.
    """

    schemes: tuple[Scheme, ...]

    @property
    def dequantized_by(self) -> str:
        return f"{LIBRARY} {importlib.metadata.version(LIBRARY)}" if _has_library() else BY_FORMULA

    def quantized(self, names: Iterable[str]) -> set[str]:
        return {name.removesuffix(PACKED) for name in names if name.endswith(f".weight{PACKED}")}

    def scheme_of(self, weight: str) -> Scheme:
        """The scheme of "L.weight". As in the library, a name goes before a pattern, and a pattern before a class.

        Raises:
            ValidationError: no group of the config has it as a target.
        """
        linear = weight.removesuffix(".weight")
        by_target = {target: scheme for scheme in self.schemes for target in scheme.targets}
        patterns = sorted(target for target in by_target if target.startswith("re:"))
        matching = [target for target in patterns if re.match(target.removeprefix("re:"), linear)]
        kind = "Embedding" if linear.endswith("embed_tokens") else "Linear"
        for target in (linear, *matching, kind):
            if target in by_target:
                return by_target[target]
        raise ValidationError(
            f"{cut(self.path / CONFIG)}: no group of its {KEY} targets {cut(linear)}, whose weight is quantized"
        )

    def tensors(
        self, weight: str, shape: Sequence[int], names: Container[str]
    ) -> dict[str, tuple[int, ...]]:
        scheme = self.scheme_of(weight)
        rows, columns = shape
        group = scheme.group_size or columns
        if columns % group:
            raise ValidationError(
                f"{cut(self.path)}: {cut(weight)} has {columns} columns, which groups of {group} do not divide"
            )
        held = {
            weight + PACKED: (rows, scheme.words(columns)),
            weight + SCALE: (rows, columns // group),
            weight + SHAPE: (2,),
        }
        if not scheme.symmetric:
            held[weight + ZERO_POINT] = (scheme.words(rows), columns // group)
        return held

    def group(self, weight: str) -> int | None:
        return self.scheme_of(weight).group_size

    def shape(self, weight: str, stored: Stored) -> tuple[int, ...]:
        name = weight + SHAPE
        if (found := self.shape_of(name, stored)) != (2,):
            raise ValidationError(
                f"{cut(self.path)}: tensor {cut(name)} has shape {list(found)}; the format has [2]"
            )
        return tuple(stored.rows(name, 0, 2).tolist())

    def rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, stored: Stored
    ) -> torch.Tensor:
        # With zero points, which are packed along N, the other rows of their first word are dequantized as well.
        scheme = self.scheme_of(weight)
        if (stated := self.shape(weight, stored)) != tuple(shape):
            raise ValidationError(
                f"{cut(self.path)}: {cut(weight + SHAPE)} is {one_line(list(stated), 40)}; "
                f"transformers' weight has shape {list(shape)}"
            )
        stop = min(stop, shape[0])
        first = start if scheme.symmetric else start - start % scheme.per_word
        packed = self._rows(weight + PACKED, first, stop, stored, (torch.int32,))
        scale = self._rows(weight + SCALE, first, stop, stored, FLOATS)
        zero_point = None
        if not scheme.symmetric:
            words = (first // scheme.per_word, scheme.words(stop))
            zero_point = self._rows(weight + ZERO_POINT, *words, stored, (torch.int32,))
        dequantize = by_library if _has_library() else by_formula
        with reported(self.path, f"{cut(weight)} cannot be dequantized"):
            return dequantize(scheme, packed, scale, zero_point, shape[1])[start - first :]

    def _rows(
        self, name: str, start: int, stop: int, stored: Stored, dtypes: Sequence[torch.dtype]
    ) -> torch.Tensor:
        return self.of_dtype(name, stored.rows(name, start, stop), dtypes)


def read(path: Path, stated: Mapping[str, Any]) -> PackQuantized:
    """Read a `quantization_config` whose method is "compressed-tensors".

    Raises:
        ValidationError: it states what cannot be dequantized here.
    """
    check_stated(path, KEY, stated, _PLAIN)
    schemes = []
    for name, group in stated["config_groups"].items():
        where = f"{KEY}.config_groups.{name}"
        check_stated(path, where, group, _PLAIN_GROUP)
        weights = group["weights"]
        check_stated(path, f"{where}.weights", weights, _PLAIN_WEIGHTS)
        schemes.append(
            Scheme(
                bits=weights["num_bits"],
                group_size=_group_size(path, where, weights),
                symmetric=weights["symmetric"],
                targets=tuple(group["targets"]),
                stated=group,
            )
        )
    return PackQuantized(path, tuple(schemes))


def by_library(
    scheme: Scheme,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    columns: int,
) -> torch.Tensor:
    """compressed-tensors' decompression; shapes as for `by_formula`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor([len(packed), columns]),
    }
    if zero_point is not None:
        # With a single row of words, the library takes a view that only column-major words have (0.20.1).
        columns_first = zero_point.T.clone(memory_format=torch.contiguous_format)
        tensors["weight_zero_point"] = columns_first.T
    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    made = compressor.decompress(tensors, QuantizationScheme.model_validate(dict(scheme.stated)))
    weight: torch.Tensor = made["weight"]
    return weight


def by_formula(
    scheme: Scheme,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    columns: int,
) -> torch.Tensor:
    """(code - zero point) x scale, rounded once.

    Args:
        packed: the codes, int32 [rows, words], packed along the columns.
        scale: [rows, groups], one group or more.
        zero_point: int32 [words, groups], packed along the rows; None for the middle of the codes.
        columns: of the result; the last word of a row may have more codes.

    Returns:
        The weights, [rows, columns] in the dtype of `scale`.
    """
    codes = _unpacked(packed, scheme.bits, columns)
    if zero_point is None:
        zeros = torch.full(scale.shape, 1 << (scheme.bits - 1), dtype=torch.int16)
    else:
        zeros = _unpacked(zero_point.T, scheme.bits, len(packed)).T.to(torch.int16)
    groups = codes.unflatten(1, (scale.shape[1], -1))
    steps = groups - zeros[:, :, None]  # at most 255 in size: exact in every dtype
    return (steps.to(scale.dtype) * scale[:, :, None]).flatten(1)


def _unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row, uint8 [rows, count]; a word has its first code in its lowest bits."""
    codes = torch.empty((*words.shape, WORD // bits), dtype=torch.uint8)
    for place in range(WORD // bits):
        codes[..., place] = (words >> (bits * place)) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count]


def _has_library() -> bool:
    return importlib.util.find_spec("compressed_tensors") is not None


def _group_size(path: Path, where: str, weights: Mapping[str, Any]) -> int | None:
    size = weights.get("group_size")
    if weights["strategy"] == "channel":
        return None
    if not isinstance(size, int) or size < 1:
        raise ValidationError(
            f"{cut(path / CONFIG)}: {where}.weights.group_size is {one_line(repr(size), 60)}, no size of a group"
        )
    return size
