"""Dequantizes the weights of a quantized checkpoint for the oracle; each format is one file here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.validate.reference.dequantization import (
    awq,
    fine_grained_fp8,
    float_quantized,
    gptq,
    pack_quantized,
)
from qwenport.validate.reference.dequantization.quantization import (
    KEY,
    Quantization,
    Stored,
    check_stated,
)
from qwenport.validate.reference.files import CONFIG
from qwenport.wording import cut

__all__ = ["Quantization", "Stored", "read_quantization", "refuse_quantized_tied_head"]

Read = Callable[[Path, Mapping[str, Any]], Quantization]
"""(directory, quantization_config) -> the quantization."""
FORMATS: Mapping[str, Read] = {
    pack_quantized.FORMAT: pack_quantized.read,
    **dict.fromkeys(float_quantized.FORMATS, float_quantized.read),
}
"""Those of compressed-tensors."""


def _compressed_tensors(path: Path, stated: Mapping[str, Any]) -> Quantization:
    check_stated(path, KEY, stated, {"format": tuple(FORMATS)})
    return FORMATS[stated["format"]](path, stated)


METHODS: Mapping[str, Read] = {
    pack_quantized.LIBRARY: _compressed_tensors,
    awq.METHOD: awq.read,
    gptq.METHOD: gptq.read,
    fine_grained_fp8.METHOD: fine_grained_fp8.read,
}
"""By quant_method."""


def read_quantization(path: Path) -> Quantization | None:
    """The quantization of a checkpoint; None if its config.json states none.

    Raises:
        ValidationError: config.json cannot be read, or states one that cannot be dequantized here.
    """
    with reported(path / CONFIG, f"its {KEY} cannot be read"):
        stated = json.loads((path / CONFIG).read_text(encoding="utf-8")).get(KEY)
        if stated is None:
            return None
        check_stated(path, KEY, stated, {"quant_method": tuple(METHODS)})
        return METHODS[stated["quant_method"]](path, stated)


def refuse_quantized_tied_head(path: Path, names: Iterable[str], *, tied: bool) -> None:
    """Refuse a quantized head beside an embedding that is the head too.

    Raises:
        ValidationError: it names the tensor.
    """
    for name in sorted(names) if tied else ():
        if name.startswith("lm_head.") and not name.endswith(".weight"):
            raise ValidationError(
                f"{cut(path)}: no place for tensor {cut(name)}: the head is tied to the embedding"
            )
