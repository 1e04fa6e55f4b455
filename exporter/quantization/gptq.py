"""GPTQ: 4 or 8 bits; codes in words along K, zero points along N, and the group of each column in `g_idx`.

In format "gptq" each zero point is stored minus one, within its own bits; in "gptq_v2" as it is. With act-order the
columns of a group are anywhere. Codes are then sorted by group, and the activations gathered in that order.
Source: GPTQModel, gptqmodel/quantization/config.py and gptqmodel/nn_modules/qlinear; AutoGPTQ before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.quantization.quantization import LINEAR, ROUTERS, Group, Quantization
from qwenport.exporter.quantization.settings import Settings, check_pattern, refused
from qwenport.exporter.quantization.storage import (
    CODES,
    SCALES,
    ZEROS,
    Middle,
    Order,
    Part,
    Repacked,
    Shape,
    Storage,
)
from qwenport.exporter.quantization.words import (
    WORD,
    halves,
    packed,
    transposed,
    transposed_scales,
    unpacked,
    words_of,
)
from qwenport.exporter.safetensors_file import TensorEntry, chunks
from qwenport.wording import cut

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"
QWEIGHT, QZEROS, QSCALES, G_IDX = "qweight", "qzeros", "scales", "g_idx"
ROWS_AT_ONCE = 256  # of a weight whose columns are put into another order

# What a tool notes for itself or for a kernel; the stored numbers mean the same.
NEUTRAL = (
    "act_group_aware",
    "backend",
    "batch_size",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "device",
    "disable_exllama",
    "exllama_config",
    "gptaq",
    "hyb_act",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "mse",
    "offload_to_disk",
    "offload_to_disk_path",
    "pack_impl",
    "pad_token_id",
    "parallel_packing",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
    "v2",
    "v2_alpha",
)


@dataclass(frozen=True)
class Gptq(Storage):
    """See the module.

    Attributes:
        act_order: whether the columns of a group may be anywhere.
    """

    format: str = V1
    act_order: bool = False
    integers: ClassVar[Mapping[str, str]] = {QWEIGHT: "I32", QZEROS: "I32", G_IDX: "I32"}

    @property
    def per_word(self) -> int:
        """Codes in a word."""
        return WORD // self.bits

    @property
    def stored_middle(self) -> int:
        """A word of zero points of a symmetric weight."""
        code = self.middle - (self.format == V1)
        return sum(code << (self.bits * place) for place in range(self.per_word))

    def objection(self, shape: Shape) -> str | None:
        n, k = shape
        for count, what in ((n, "rows"), (k, "columns")):
            if count % self.per_word:
                return f"{count} {what} are no whole number of words of {self.per_word} codes"
        if k % self.block(k):
            return f"{k} columns are no whole number of groups of {self.group}"
        return None

    def stored(self, shape: Shape) -> dict[str, Shape]:
        n, k = shape
        blocks = k // self.block(k)
        found: dict[str, Shape] = {
            QWEIGHT: (k // self.per_word, n),
            QZEROS: (blocks, n // self.per_word),
            QSCALES: (blocks, n),
        }
        return found | self._groups(shape) if self.act_order else found

    def optional(self, shape: Shape) -> dict[str, Shape]:
        return {} if self.act_order else self._groups(shape)

    def _groups(self, shape: Shape) -> dict[str, Shape]:
        return {G_IDX: (shape[1],)}

    def check(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> frozenset[str]:
        entry, middle = tensors[f"{linear}.{QZEROS}"], self.stored_middle
        if self.symmetric and any(
            (np.frombuffer(c, "<u4") != middle).any() for c in chunks(checkpoint, entry)
        ):
            raise CheckpointError(
                f"tensor {cut(entry.name)} has zero points other than those of sym true in format {self.format}; "
                "config.json says one or the other wrongly"
            )
        self.order(linear, shape, checkpoint, tensors)
        return frozenset()

    def order(
        self, linear: str, shape: Shape, checkpoint: Path, tensors: Mapping[str, TensorEntry]
    ) -> Order | None:
        entry = tensors.get(f"{linear}.{G_IDX}")
        if entry is None:
            return None
        groups = _integers(b"".join(chunks(checkpoint, entry)))
        block = self.block(shape[1])
        if not self.act_order and not np.array_equal(groups, np.arange(len(groups)) // block):
            raise CheckpointError(
                f"tensor {cut(entry.name)} puts columns in an order of its own, and config.json says desc_act false"
            )
        count = shape[1] // block
        if (
            groups.min() < 0
            or groups.max() >= count
            or (np.bincount(groups, minlength=count) != block).any()
        ):
            raise CheckpointError(
                f"tensor {cut(entry.name)} does not put the columns in {count} groups of {block}; groups of several "
                "sizes are not supported"
            )
        return _order(groups)

    def parts(
        self, linear: str, shape: Shape, tensors: Mapping[str, TensorEntry], dtype: str
    ) -> dict[str, Part]:
        codes, scales = tensors[f"{linear}.{QWEIGHT}"], tensors[f"{linear}.{QSCALES}"]
        small = shape[0], scales.shape[0]
        zeros: Part = Middle(self.code_dtype, small)
        if not self.symmetric:
            stored = tensors[f"{linear}.{QZEROS}"]
            zeros = Repacked(
                self.code_dtype, small, (stored,), lambda read: self.zero_points(read[0], small)
            )
        sources = (codes, tensors[f"{linear}.{G_IDX}"]) if self.act_order else (codes,)
        return {
            CODES: Repacked(self.code_dtype, shape, sources, lambda read: self.codes(read, shape)),
            SCALES: Repacked(
                scales.dtype, small, (scales,), lambda read: transposed_scales(read[0], small)
            ),
            ZEROS: zeros,
        }

    def codes(self, read: Sequence[bytes], shape: Shape) -> bytes:
        """Those of ONNX, [N, K] with the columns sorted by group, of the bytes of `qweight` and `g_idx`."""
        n, k = shape
        octets = transposed(words_of(read[0], n)).view(np.uint8).reshape(n, k * self.bits // 8)
        order = _order(_integers(read[1])) if self.act_order else None
        if order is None:
            return octets.tobytes()
        for start in range(0, n, ROWS_AT_ONCE):
            some = octets[start : start + ROWS_AT_ONCE]
            codes = some if self.bits == 8 else halves(some)
            sorted_ = np.take(codes, order, axis=1)
            some[:] = np.frombuffer(packed(sorted_, self.bits), np.uint8).reshape(some.shape)
        return octets.tobytes()

    def zero_points(self, data: bytes, shape: Shape) -> bytes:
        """Those of ONNX, [N, blocks], of `qzeros`' bytes."""
        codes = unpacked(words_of(data, shape[0] // self.per_word), self.bits)
        if self.format == V1:
            codes = (codes + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        return packed(transposed(codes), self.bits)


def _integers(data: bytes) -> Order:
    return np.frombuffer(data, np.dtype("<i4")).astype(np.int64)


def _order(groups: Order) -> Order | None:
    """The columns sorted by group, in each group in their own order; None if they are so already."""
    order = np.argsort(groups, kind="stable").astype(np.int64)
    return None if (np.diff(order) == 1).all() else order


def parse_gptq(raw: Mapping[str, Any]) -> Quantization:
    """Read a `quantization_config` whose method is "gptq".

    Raises:
        ConfigError: it asks for what is not supported; says which key.
    """
    settings = Settings("", raw)
    settings.only("quant_method", METHOD)
    settings.only("method", METHOD, None)
    bits = settings.required("bits", 4, 8)
    size = settings.required("group_size", 16, 32, 64, 128, 256, 512, 1024, -1)
    symmetric = settings.only("sym", True, False)
    act_order = settings.only("desc_act", False, True)
    named = settings.only("checkpoint_format", None, V1, V2)
    other = settings.only("format", None, V1, V2)
    if None not in (named, other) and named != other:
        raise refused("format", other)
    settings.only("is_marlin_format", False, None)
    settings.only("pack_dtype", "int32", None)
    settings.only("block_name_to_quantize", None, "model.layers")
    for key in ("adapter", "rotation"):
        settings.only(key, None)
    head = settings.only("lm_head", False, True)
    ignore = _ignored(settings.take("dynamic"))
    targets = _targets(settings.take("modules_in_block_to_quantize"))
    settings.neutral(*NEUTRAL)
    settings.finish()
    storage = Gptq(
        bits, None if size == -1 else size, symmetric, named or other or V1, act_order=act_order
    )
    if not head:
        ignore += ("lm_head",)
    elif targets != (LINEAR,):
        targets += ("lm_head",)
    return Quantization((Group(targets, storage),), (ROUTERS, *ignore))


def _ignored(dynamic: Any) -> tuple[str, ...]:
    """What GPTQModel's rules for single modules leave out, "-:" and a pattern; other rules change how they are stored.

    Raises:
        ConfigError: a rule that is not one of those.
    """
    if dynamic is not None and not isinstance(dynamic, dict):
        raise refused("dynamic", dynamic)
    found = []
    for rule in dynamic or {}:
        pattern = rule.removeprefix("-:")
        check_pattern("dynamic", pattern)
        if pattern == rule:
            raise refused("dynamic", rule)
        found.append(f"re:{pattern}")
    return tuple(found)


def _targets(modules: Any) -> tuple[str, ...]:
    """The modules of a decoder layer that are quantized, lists of names in lists; all linears if it is null.

    Raises:
        ConfigError: it is something else.
    """
    if modules is None:
        return (LINEAR,)
    flat = (
        [name for part in modules for name in (part if isinstance(part, list) else [part])]
        if isinstance(modules, list)
        else []
    )
    if not flat or not all(isinstance(name, str) for name in flat):
        raise refused("modules_in_block_to_quantize", modules)
    return (rf"re:.*\.layers\.\d+\.(.*\.)?({'|'.join(map(re.escape, flat))})$",)
