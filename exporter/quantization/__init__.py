"""Low-bit formats of checkpoints: a registry. A new format is one file here, and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.keys import short
from qwenport.exporter.quantization import awq, compressed_tensors, fine_grained_fp8, gptq
from qwenport.exporter.quantization.quantization import Quantization
from qwenport.exporter.quantization.storage import (
    CODES,
    DYNAMIC,
    INPUT_SCALE,
    PERMUTATION,
    SCALES,
    STATIC,
    WEIGHT,
    WHOLE,
    ZEROS,
    ByReference,
    Middle,
    Part,
    Repacked,
    Storage,
    part_name,
    viewed,
)

__all__ = [
    "CODES",
    "DYNAMIC",
    "INPUT_SCALE",
    "PERMUTATION",
    "SCALES",
    "STATIC",
    "WEIGHT",
    "WHOLE",
    "ZEROS",
    "ByReference",
    "Middle",
    "Part",
    "Quantization",
    "Repacked",
    "Storage",
    "parse_quantization",
    "part_name",
    "viewed",
]

METHODS: Mapping[str, Callable[[Mapping[str, Any]], Quantization]] = {
    compressed_tensors.METHOD: compressed_tensors.parse_compressed_tensors,
    awq.METHOD: awq.parse_awq,
    gptq.METHOD: gptq.parse_gptq,
    fine_grained_fp8.METHOD: fine_grained_fp8.parse_fine_grained_fp8,
}


def parse_quantization(raw: Any) -> Quantization | None:
    """Read config.json's `quantization_config`; None if there is none.

    Raises:
        ConfigError: a method, a format or a setting that is not supported.
    """
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ConfigError(f"config.json: quantization_config must be an object, found {short(raw)}")
    method = raw.get("quant_method")
    if method is None and any(key.startswith(("load_in_", "bnb_")) for key in raw):
        method = "bitsandbytes"
    if method is None:
        raise ConfigError(
            f"config.json: quantization_config.quant_method is missing; supported: {', '.join(METHODS)}"
        )
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(
            f"config.json: checkpoints quantized by {short(method)} are not supported; supported: "
            f"{', '.join(METHODS)} (quantization_config.quant_method)"
        )
    return METHODS[method](raw)
