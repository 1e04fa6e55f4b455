"""NaN and infinity are refused in weights, and scales that would make infinity of a code."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwenport.contract import FP8
from qwenport.exporter.errors import ExportError
from qwenport.exporter.quantization import CODES, SCALES
from qwenport.exporter.safetensors_file import TensorEntry
from qwenport.wording import cut

_FARTHEST = {"U4": 15, "U8": 255, FP8: 448}
"""Type of codes -> the largest distance of one from zero or from its zero point."""


def check_finite(name: str, values: torch.Tensor, entries: Mapping[str, TensorEntry]) -> None:
    """Check some of a tensor's values, in any float type.

    Args:
        name: the tensor's; if it is the scales of a quantized weight, the part's in the package.
        values: the values.
        entries: the package's tensors.

    Raises:
        ExportError: one is NaN or infinite, or a scale is so large that it takes a code beyond its dtype.
    """
    known = values.float() if values.dtype == torch.float8_e4m3fn else values
    if not torch.isfinite(known).all():
        kind = "NaN" if known.isnan().any() else "infinity"
        raise ExportError(f"tensor {cut(name)} holds {kind}; the checkpoint is damaged")
    codes = entries.get(f"{name.removesuffix(SCALES)}{CODES}") if name.endswith(SCALES) else None
    if codes is None or not values.numel():
        return
    largest = values.abs().max().item()
    if largest * _FARTHEST[codes.dtype] > torch.finfo(values.dtype).max:
        raise ExportError(
            f"tensor {cut(name)} has a scale of {largest:g}, which takes codes beyond the largest number of its dtype; "
            "the checkpoint is damaged"
        )
