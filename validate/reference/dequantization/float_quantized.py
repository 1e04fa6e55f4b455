"""compressed-tensors' FP8: dequantized by the library where it is installed, else code x scale in the scale's dtype.

"L.weight" is quantized where there is an "L.weight_scale". An "L.input_scale" rounds the linear's input.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
from qwenport.validate.reference.rounded_inputs import RoundsInput
from qwenport.wording import cut

LIBRARY, FORMATS = "compressed-tensors", ("float-quantized", "naive-quantized")
SCALE, INPUT_SCALE = ".weight_scale", ".input_scale"  # after "L"

_PLAIN: dict[str, tuple[Any, ...]] = {
    "format": FORMATS,
    "quantization_status": ("compressed", "frozen", None),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_PLAIN_GROUP: dict[str, tuple[Any, ...]] = {
    "format": (None, *FORMATS),
    "output_activations": (None,),
}
_EIGHT_BITS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (None, True),
    "block_structure": (None,),
    "actorder": (None,),
}
_PLAIN_WEIGHTS = {**_EIGHT_BITS, "strategy": ("channel", "tensor"), "dynamic": (None, False)}
_PLAIN_INPUTS = {**_EIGHT_BITS, "scale_dtype": (None,)}


@dataclass(frozen=True)
class FloatQuantized(Quantization):
    """See the module.

    Attributes:
        stated: the config's only group.
        format: as the config names it.
    """

    stated: Mapping[str, Any]
    format: str

    @property
    def dequantized_by(self) -> str:
        return f"{LIBRARY} {importlib.metadata.version(LIBRARY)}" if _has_library() else BY_FORMULA

    def group(self, weight: str) -> int | None:
        return None

    def quantized(self, names: Iterable[str]) -> set[str]:
        return {f"{name.removesuffix(SCALE)}.weight" for name in names if name.endswith(SCALE)}

    @property
    def _by_row(self) -> bool:
        return bool(self.stated["weights"]["strategy"] == "channel")

    @property
    def _inputs(self) -> Mapping[str, Any] | None:
        inputs: Mapping[str, Any] | None = self.stated.get("input_activations")
        return inputs

    def tensors(
        self, weight: str, shape: Sequence[int], names: Container[str]
    ) -> dict[str, tuple[int, ...]]:
        linear = weight.removesuffix(".weight")
        held = {weight: tuple(shape), linear + SCALE: (shape[0], 1) if self._by_row else (1,)}
        if self._inputs is not None and not self._inputs.get("dynamic"):
            held[linear + INPUT_SCALE] = (1,)
        return held

    def shape(self, weight: str, stored: Stored) -> tuple[int, ...]:
        return self.shape_of(weight, stored)

    def rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, stored: Stored
    ) -> torch.Tensor:
        name = weight.removesuffix(".weight") + SCALE
        codes = self.of_dtype(weight, stored.rows(weight, start, stop), (torch.float8_e4m3fn,))
        scale = stored.rows(name, *((start, stop) if self._by_row else (0, 1)))
        scale = self.of_dtype(name, scale, FLOATS)
        with reported(self.path, f"{cut(weight)} cannot be dequantized"):
            return by_library(self, codes, scale) if _has_library() else by_formula(codes, scale)

    def rounds_input(self, weight: str, stored: Stored) -> RoundsInput | None:
        if self._inputs is None:
            return None
        if self._inputs.get("dynamic"):
            return RoundsInput(self._inputs, None)
        name = weight.removesuffix(".weight") + INPUT_SCALE
        self.shape_of(name, stored)
        scale = self.of_dtype(name, stored.rows(name, 0, 1), FLOATS)
        return RoundsInput(self._inputs, scale.reshape(1).clone())


def read(path: Path, stated: Mapping[str, Any]) -> FloatQuantized:
    """Read a `quantization_config` whose format is one of FORMATS.

    Raises:
        ValidationError: it states what cannot be dequantized here.
    """
    check_stated(path, KEY, stated, _PLAIN)
    groups = stated["config_groups"]
    if len(groups) != 1:
        raise ValidationError(
            f"{cut(path / CONFIG)}: {KEY}.config_groups has {len(groups)} groups; the oracle dequantizes one in FP8"
        )
    ((name, group),) = groups.items()
    where = f"{KEY}.config_groups.{name}"
    check_stated(path, where, group, _PLAIN_GROUP)
    check_stated(path, f"{where}.weights", group["weights"], _PLAIN_WEIGHTS)
    inputs = group.get("input_activations")
    if inputs is not None:
        strategy = "token" if inputs.get("dynamic") is True else "tensor"
        plain = {**_PLAIN_INPUTS, "dynamic": (None, False, True), "strategy": (strategy,)}
        check_stated(path, f"{where}.input_activations", inputs, plain)
    return FloatQuantized(path, group, stated["format"])


def by_library(how: FloatQuantized, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' decompression; shapes as for `by_formula`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(how.format)
    scheme = QuantizationScheme.model_validate(dict(how.stated))
    made = compressor.decompress({"weight": codes, "weight_scale": scale}, scheme)
    weight: torch.Tensor = made["weight"]
    return weight


def by_formula(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """code x scale, rounded once: codes [rows, columns], scales [rows, 1] or of one element."""
    return codes.to(scale.dtype) * scale


def _has_library() -> bool:
    return importlib.util.find_spec("compressed_tensors") is not None
