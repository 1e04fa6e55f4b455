"""Quantized checkpoints for the tests, in compressed-tensors' layout, by rounding to the nearest code.

Nothing here uses Qwenport or the library: the codes are packed as bytes, two to a byte or one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        codes: uint8 [N, K], each below 2^bits.
        scales: [N, K / group], in the dtype of the matrix.
        zeros: uint8 [N, K / group].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int

    def dequantized(self) -> torch.Tensor:
        """(code - zero) x scale, [N, K] in the dtype of the scales."""
        group = self.codes.shape[1] // self.scales.shape[1]
        steps = self.codes.double() - self.zeros.double().repeat_interleave(group, dim=1)
        exact = steps * self.scales.double().repeat_interleave(group, dim=1)
        return exact.to(self.scales.dtype)

    def tensors(self, weight: str, *, symmetric: bool) -> dict[str, torch.Tensor]:
        """The tensors of "L.weight" as a checkpoint has them."""
        stored = {
            f"{weight}_packed": packed(self.codes, self.bits),
            f"{weight}_scale": self.scales,
            f"{weight}_shape": torch.tensor(self.codes.shape),
        }
        if not symmetric:
            along_rows = packed(self.zeros.T, self.bits).T
            stored[f"{weight}_zero_point"] = along_rows.contiguous()
        return stored


def quantize(weight: torch.Tensor, bits: int, group: int | None, *, symmetric: bool) -> Quantized:
    """Round a matrix to the nearest codes; None for `group` is one scale for each row."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, group or columns)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    most = 2**bits - 1
    scales = ((high - low) / most).to(weight.dtype)
    scales[scales == 0] = 1
    divisors = scales.float()
    middle = torch.full_like(divisors, 2 ** (bits - 1))
    zeros = middle if symmetric else (-low / divisors).round().clamp(0, most)
    codes = (groups / divisors[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, most).reshape(rows, columns).to(torch.uint8)
    return Quantized(codes, scales, zeros.to(torch.uint8), bits)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [N, K] as little-endian int32 [N, words], the first code in the lowest bits; 0 fills the last word."""
    per_word = 32 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    octets = filled if bits == 8 else filled[:, 0::2] | filled[:, 1::2] << 4
    return octets.clone(memory_format=torch.contiguous_format).view(torch.int32)


def quantization_config(
    *, bits: int, group: int | None, symmetric: bool, ignore: Iterable[str]
) -> dict[str, Any]:
    """What config.json says of it, as llm-compressor writes it."""
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel" if group is None else "group",
        "symmetric": symmetric,
        "type": "int",
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def write_pack_quantized(
    source: Path,
    target: Path,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    ignore: Iterable[str] = ("lm_head",),
) -> Path:
    """Write a checkpoint of one file with its linears quantized, except for those that `ignore` names.

    Args:
        bits: 4 or 8.
        group: columns with one scale; None for one scale per row.
        ignore: linears, by name or as "re:PATTERN".
    """
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in sorted(tensors):
        linear = name.removesuffix(".weight")
        if tensors[name].dim() != 2 or linear.endswith("embed_tokens") or _named(linear, ignore):
            continue
        made = quantize(tensors.pop(name), bits, group, symmetric=symmetric)
        tensors |= made.tensors(name, symmetric=symmetric)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        bits=bits, group=group, symmetric=symmetric, ignore=ignore
    )
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _named(linear: str, patterns: Iterable[str]) -> bool:
    return any(
        bool(re.match(pattern[3:], linear)) if pattern.startswith("re:") else pattern == linear
        for pattern in patterns
    )
