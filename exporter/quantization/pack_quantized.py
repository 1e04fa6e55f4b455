"""compressed-tensors' "pack-quantized": 4 or 8 bits, codes along K in little-endian words, offset instead of signed.

Read as bytes, the packed words of a row are ONNX's UINT4 or UINT8, so the codes stay in the checkpoint's files.
Source: compressed-tensors, compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwenport.exporter.errors import CheckpointError, ConfigError
from qwenport.exporter.keys import short
from qwenport.exporter.quantization.quantization import (
    CODES,
    SCALES,
    WEIGHT,
    Quantization,
    Shape,
    viewed,
)
from qwenport.exporter.safetensors_file import TensorEntry, chunks
from qwenport.wording import cut

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, ZERO_POINT, SHAPE = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)
WORD = 32  # bits


@dataclass(frozen=True)
class PackQuantized(Quantization):
    """See the module."""

    name: ClassVar[str] = FORMAT
    integers: ClassVar[Mapping[str, str]] = {
        PACKED: "I32",
        ZERO_POINT: "I32",
        SHAPE: "I64",
    }

    @property
    def per_word(self) -> int:
        """Codes in a word."""
        return WORD // self.bits

    def objection(self, shape: Shape) -> str | None:
        k = shape[1]
        if k % self.per_word:
            return f"{k} columns are no whole number of words of {self.per_word} codes"
        if k % self.block(k):
            return f"{k} columns are no whole number of groups of {self.group}"
        return None

    def stored(self, shape: Shape) -> dict[str, Shape]:
        n, k = shape
        blocks = k // self.block(k)
        found: dict[str, Shape] = {
            PACKED: (n, k // self.per_word),
            SCALE: (n, blocks),
            SHAPE: (2,),
        }
        if not self.symmetric:
            found[ZERO_POINT] = (-(-n // self.per_word), blocks)
        return found

    def repeated(self, checkpoint: Path, tensors: Mapping[str, TensorEntry]) -> frozenset[str]:
        found = {name for name in tensors if name.endswith(f".{SHAPE}")}
        for name in sorted(found):
            rows, words = tensors[f"{name.removesuffix(SHAPE)}{PACKED}"].shape
            stated = np.frombuffer(b"".join(chunks(checkpoint, tensors[name])), np.dtype("<i8"))
            if stated.tolist() != [rows, words * self.per_word]:
                raise CheckpointError(
                    f"tensor {cut(name)} says {stated.tolist()}; config.json implies {[rows, words * self.per_word]}"
                )
        return frozenset(found)

    def codes(self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
        entry = tensors[f"{linear}.{PACKED}"]
        return viewed(entry, f"{linear}{WEIGHT}.{CODES}", self.code_dtype, shape)

    def scales(self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
        entry = tensors[f"{linear}.{SCALE}"]
        return viewed(entry, f"{linear}{WEIGHT}.{SCALES}", entry.dtype, entry.shape)

    def zero_point_source(self, linear: str) -> str | None:
        return None if self.symmetric else f"{linear}.{ZERO_POINT}"

    def zero_points(self, data: bytes, shape: Shape) -> bytes:
        """The words hold the codes of neighbouring rows; here they are neighbours in a row."""
        n, k = shape
        blocks = k // self.block(k)
        words = np.frombuffer(data, np.dtype("<u4")).reshape(-1, blocks)
        shifts = self.bits * np.arange(self.per_word, dtype=np.uint32)
        codes = (words[:, None, :] >> shifts[:, None]) & np.uint32((1 << self.bits) - 1)
        rows = codes.reshape(-1, blocks)[:n].astype(np.uint8).reshape(-1)
        if self.bits == 8:
            return rows.tobytes()
        padded = np.concatenate([rows, np.zeros(len(rows) % 2, np.uint8)])
        return (padded[0::2] | (padded[1::2] << 4)).tobytes()


def parse_pack_quantized(raw: Mapping[str, Any]) -> PackQuantized:
    """Read a `quantization_config` whose method is "compressed-tensors".

    Raises:
        ConfigError: it asks for what is not supported; says which key.
    """
    known: dict[str, tuple[Any, ...]] = {
        "quant_method": (METHOD,),
        "format": (FORMAT,),
        "quantization_status": ("compressed", "frozen", None),
        "kv_cache_scheme": (None,),
        "sparsity_config": (None, {}),
        "moe_sparsity_config": (None, {}),
        "transform_config": (None, {}),
    }
    free = {"config_groups", "ignore", "global_compression_ratio", "version"}
    for key, value in raw.items():
        if key not in free and key not in known:
            raise _refused(key, value)
        if key in known and value not in known[key]:
            raise _refused(key, value)
    if raw.get("format") != FORMAT:
        raise _refused("format", raw.get("format"))
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigError(
            "quantization_config: config_groups must be one group; checkpoints with several schemes are not supported"
        )
    (group,) = groups.values()
    ignore = raw.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(rule, str) for rule in ignore):
        raise _refused("ignore", ignore)
    return _scheme(group, tuple(ignore))


def _scheme(group: Any, ignore: tuple[str, ...]) -> PackQuantized:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ConfigError(f"quantization_config: config_groups has no weights: {short(group)}")
    for key, value in group.items():
        allowed: tuple[Any, ...] = {
            "targets": (["Linear"],),
            "input_activations": (None,),
            "output_activations": (None,),
            "format": (None, FORMAT),
        }.get(key, ())
        if key != "weights" and value not in allowed:
            raise _refused(key, value)
    weights = group["weights"]
    neutral = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
    only: dict[str, tuple[Any, ...]] = {
        "num_bits": (4, 8),
        "type": ("int",),
        "symmetric": (True, False),
        "strategy": ("group", "channel"),
        "dynamic": (False, None),
        "actorder": (None, "weight", "static"),
        "block_structure": (None,),
    }
    for key, value in weights.items():
        if key in neutral or key == "group_size":
            continue
        if key not in only or not any(value == v and type(value) is type(v) for v in only[key]):
            raise _refused(key, value)
    for key in ("num_bits", "type", "strategy"):
        if key not in weights:
            raise ConfigError(f"quantization_config: weights lack {key}")
    size = weights.get("group_size")
    by_group = weights["strategy"] == "group"
    if by_group and (type(size) is not int or size not in (16, 32, 64, 128, 256)):
        raise ConfigError(
            f"quantization_config: group_size {short(size)} is not supported; supported: 16, 32, 64, 128, 256"
        )
    if not by_group and size not in (None, -1):
        raise _refused("group_size", size)
    return PackQuantized(
        bits=weights["num_bits"],
        group=size if by_group else None,
        symmetric=weights.get("symmetric", True),
        ignore=ignore,
    )


def _refused(key: str, value: Any) -> ConfigError:
    return ConfigError(f"quantization_config: {key} {short(value)} is not supported")
