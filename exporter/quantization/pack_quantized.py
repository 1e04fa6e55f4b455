"""compressed-tensors' "pack-quantized": 4 or 8 bits, codes along K in little-endian words, offset instead of signed.

Read as bytes, the packed words of a row are ONNX's UINT4 or UINT8, so the codes stay in the checkpoint's files.
Source: compressed-tensors, compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.quantization.settings import Settings
from qwenport.exporter.quantization.storage import (
    CODES,
    SCALES,
    WEIGHT,
    ZEROS,
    ByReference,
    Middle,
    Part,
    Repacked,
    Shape,
    Storage,
    viewed,
)
from qwenport.exporter.quantization.words import WORD, packed, transposed, unpacked, words_of
from qwenport.exporter.safetensors_file import TensorEntry, chunks
from qwenport.wording import cut

FORMAT = "pack-quantized"
PACKED, SCALE, ZERO_POINT, SHAPE = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)


@dataclass(frozen=True)
class PackQuantized(Storage):
    """See the module."""

    format: str = FORMAT
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

    def check(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> frozenset[str]:
        name = f"{linear}.{SHAPE}"
        stated = np.frombuffer(b"".join(chunks(checkpoint, tensors[name])), np.dtype("<i8"))
        if stated.tolist() != list(shape):
            raise CheckpointError(
                f"tensor {cut(name)} says {stated.tolist()}; config.json implies {list(shape)}"
            )
        return frozenset([name])

    def parts(
        self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry], dtype: str
    ) -> dict[str, Part]:
        packed, scales = tensors[f"{linear}.{PACKED}"], tensors[f"{linear}.{SCALE}"]
        zeros: Part = Middle(self.code_dtype, scales.shape)
        if not self.symmetric:
            stored = tensors[f"{linear}.{ZERO_POINT}"]
            zeros = Repacked(
                self.code_dtype,
                scales.shape,
                (stored,),
                lambda read: self.zero_points(read[0], scales.shape),
            )
        weight = f"{linear}{WEIGHT}"
        return {
            CODES: ByReference(viewed(packed, f"{weight}.{CODES}", self.code_dtype, shape)),
            SCALES: ByReference(viewed(scales, f"{weight}.{SCALES}", scales.dtype, scales.shape)),
            ZEROS: zeros,
        }

    def zero_points(self, data: bytes, shape: Shape) -> bytes:
        """Those of ONNX, [N, blocks], of the checkpoint's, whose words hold the codes of neighbouring rows."""
        n, blocks = shape
        along_rows = transposed(words_of(data, blocks))
        codes = unpacked(along_rows, self.bits)[:, :n]
        return packed(transposed(codes), self.bits)


def parse_weights(weights: Settings, activations: Settings | None) -> PackQuantized:
    """Read a group's `weights`, and its `input_activations`, which must be none.

    Raises:
        ConfigError: it asks for what is not supported; says which key.
    """
    if activations is not None:
        raise activations.refused()
    weights.neutral("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    bits = weights.required("num_bits", 4, 8)
    weights.required("type", "int")
    symmetric = weights.only("symmetric", True, False)
    strategy = weights.required("strategy", "group", "channel")
    weights.only("dynamic", False, None)
    weights.only(
        "actorder", None, False, "weight", "static"
    )  # these permute nothing that is stored
    weights.only("block_structure", None)
    sizes = (16, 32, 64, 128, 256) if strategy == "group" else (None, -1)
    size = (weights.required if strategy == "group" else weights.only)("group_size", *sizes)
    weights.finish()
    return PackQuantized(bits, size if strategy == "group" else None, symmetric)
