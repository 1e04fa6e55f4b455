"""AWQ's "gemm": 4 bits; codes and zero points in words along N, in an order of their own within each word.

Source: AutoAWQ, awq/utils/packing_utils.py and awq/modules/linear/gemm.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.quantization.quantization import LINEAR, ROUTERS, Group, Quantization
from qwenport.exporter.quantization.settings import Settings, refused
from qwenport.exporter.quantization.storage import (
    CODES,
    Part,
    Repacked,
    Shape,
    Storage,
)
from qwenport.exporter.quantization.words import (
    Codes,
    packed,
    scales_and_zeros,
    transposed,
    unpacked,
    words_of,
)
from qwenport.exporter.safetensors_file import TensorEntry, chunks
from qwenport.wording import cut

METHOD, FORMAT = "awq", "gemm"
QWEIGHT, QZEROS, QSCALES = "qweight", "qzeros", "scales"
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of a word's eight columns, the one whose code is in its i-th four bits."""
MIDDLES = 0x88888888
"""A word of zero points of a symmetric weight."""
WORDS_AT_ONCE = 16  # of a row: what is in memory besides the codes stays in the processor's cache

# What a tool notes for itself or for a kernel; the stored numbers mean the same.
NEUTRAL = (
    "act_group_aware",
    "batch_size",
    "cache_block_outputs",
    "damp_percent",
    "dataset",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "max_input_length",
    "meta",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_to_fuse",
    "pad_token_id",
    "sym",
    "tokenizer",
    "true_sequential",
)


@dataclass(frozen=True)
class Awq(Storage):
    """See the module."""

    format: str = METHOD
    integers: ClassVar[Mapping[str, str]] = {QWEIGHT: "I32", QZEROS: "I32"}

    def objection(self, shape: Shape) -> str | None:
        n, k = shape
        if n % PER_WORD:
            return f"{n} rows are no whole number of words of {PER_WORD} codes"
        if k % self.block(k) or k % 2:
            return f"{k} columns are no whole number of groups of {self.group or 2}"
        return None

    def stored(self, shape: Shape) -> dict[str, Shape]:
        n, k = shape
        blocks = k // self.block(k)
        return {
            QWEIGHT: (k, n // PER_WORD),
            QZEROS: (blocks, n // PER_WORD),
            QSCALES: (blocks, n),
        }

    def check(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> frozenset[str]:
        if self.symmetric:
            entry = tensors[f"{linear}.{QZEROS}"]
            if any((np.frombuffer(c, "<u4") != MIDDLES).any() for c in chunks(checkpoint, entry)):
                raise CheckpointError(
                    f"tensor {cut(entry.name)} has zero points other than {self.middle}, and config.json says "
                    "zero_point false"
                )
        return frozenset()

    def parts(
        self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry], dtype: str
    ) -> dict[str, Part]:
        codes, scales, zeros = (tensors[f"{linear}.{s}"] for s in (QWEIGHT, QSCALES, QZEROS))
        return {
            CODES: Repacked(
                self.code_dtype, shape, (codes,), lambda read: self.codes(read[0], shape)
            ),
            **scales_and_zeros(self, scales, zeros, shape[0], self.zero_points),
        }

    def codes(self, data: bytes, shape: Shape) -> bytes:
        """Those of ONNX, [N, K], of `qweight`'s bytes."""
        n, k = shape
        words = words_of(data, n // PER_WORD)
        made = np.empty((n // PER_WORD, PER_WORD, k // 2), np.uint8)
        for start in range(0, len(made), WORDS_AT_ONCE):
            some = made[start : start + WORDS_AT_ONCE]
            along = np.ascontiguousarray(words[:, start : start + WORDS_AT_ONCE].T)
            octets = along.view(np.uint8).reshape(len(along), k, 4)
            for place in range(4):
                even, odd = (np.ascontiguousarray(octets[:, i::2, place]) for i in (0, 1))
                some[:, ORDER[2 * place]] = (even & 15) | (odd << 4)
                some[:, ORDER[2 * place + 1]] = (even >> 4) | (odd & 0xF0)
        return made.tobytes()

    def zero_points(self, data: bytes, shape: Shape) -> bytes:
        """Those of ONNX, [N, blocks], of `qzeros`' bytes."""
        n, _ = shape
        places = unpacked(words_of(data, n // PER_WORD), self.bits).reshape(-1, PER_WORD)
        codes: Codes = np.empty_like(places)
        codes[:, ORDER] = places
        return packed(transposed(codes.reshape(-1, n)), self.bits)


def parse_awq(raw: Mapping[str, Any]) -> Quantization:
    """Read a `quantization_config` whose method is "awq".

    Raises:
        ConfigError: it asks for what is not supported; says which key.
    """
    settings = Settings("", raw)
    settings.only("quant_method", METHOD)
    settings.only("method", METHOD, None)
    for key in ("version", "format", "checkpoint_format"):
        settings.only(key, FORMAT, FORMAT.upper(), None)
    bits = settings.required("bits", 4)
    size = settings.required("group_size", 32, 64, 128, -1)
    zero_point = settings.only("zero_point", True, False)
    settings.only("desc_act", False, None)
    settings.only("lm_head", False, None)
    settings.only("pack_dtype", "int32", None)
    settings.only("dynamic", None, {})
    for key in ("block_name_to_quantize", "modules_in_block_to_quantize"):
        settings.only(key, None)
    unconverted = settings.names("modules_to_not_convert")
    if settings.take("backend") == "llm-awq":
        raise refused("backend", "llm-awq")  # transformers reads another layout then
    settings.neutral(*NEUTRAL)
    settings.finish()
    parts = (f"re:.*{re.escape(part)}" for part in unconverted)
    group = None if size == -1 else size
    storage = Awq(bits, group, symmetric=not zero_point)
    return Quantization((Group((LINEAR,), storage),), ("lm_head", ROUTERS, *parts))
