"""Writes the quantized checkpoint of a checkpoint, in compressed-tensors' pack-quantized layout.

Tensors that are not quantized are copied byte for byte. Memory holds CHUNK_BYTES of one tensor, what rounding makes of
them, and the tensor's scales.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwenport.contract import BY_SAFETENSORS, DTYPES, GROUPS, Progress
from qwenport.exporter.checkpoint import SINGLE_FILE, Checkpoint
from qwenport.exporter.companions import copy_companions
from qwenport.exporter.config import read_config_json
from qwenport.exporter.directory import require_space
from qwenport.exporter.errors import ExportError
from qwenport.exporter.expected import DOWN, GATE_UP, expert_parts, quantized_weights
from qwenport.exporter.manifest import write_json
from qwenport.exporter.quantization import WEIGHT, Storage, parse_quantization
from qwenport.exporter.quantization.pack_quantized import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO_POINT,
)
from qwenport.exporter.quantization.words import WORD
from qwenport.exporter.quantizing.recipe import Recipe
from qwenport.exporter.quantizing.rounding import round_weight
from qwenport.exporter.safetensors_file import (
    CHUNK_BYTES,
    TensorEntry,
    chunks,
    plan_safetensors,
    safetensors_header,
)

CONFIG = "config.json"


@dataclass(frozen=True)
class _Weight:
    """A weight to quantize: how, and where its values are, [N, K]."""

    storage: Storage
    source: TensorEntry


def write_quantized(
    checkpoint: Checkpoint, folder: Path, recipe: Recipe, dtype: str, progress: Progress
) -> None:
    """Write `folder`, a checkpoint of one file: the same model, quantized.

    Args:
        checkpoint: the original; only read.
        folder: the directory to create.
        recipe: how to quantize.
        dtype: of the scales, and of the new config.json: "bf16", "fp16" or "fp32".
        progress: called with (what, bytes of the original done, bytes in all).

    Raises:
        ExportError: a weight cannot be stored so, or has NaN, infinity or a value beyond `dtype`; or the disk is too
            small.
    """
    settings = recipe.settings(checkpoint.config)
    weights = _weights(checkpoint, recipe)
    quantized = {weight.source.name for weight in weights.values()}
    kept = {name: entry for name, entry in checkpoint.tensors.items() if name not in quantized}
    scales = DTYPES[dtype].safetensors
    dtypes = {name: entry.dtype for name, entry in kept.items()}
    shapes = {name: entry.shape for name, entry in kept.items()}
    for name, weight in weights.items():
        for suffix, shape in weight.storage.stored(weight.source.shape).items():
            tensor = f"{name.removesuffix(WEIGHT)}.{suffix}"
            dtypes[tensor] = weight.storage.integers.get(suffix, scales)
            shapes[tensor] = shape
    entries = plan_safetensors(SINGLE_FILE, dtypes, shapes)
    folder.mkdir()
    require_space(folder, sum(entry.length for entry in entries.values()))
    total, done = checkpoint.weight_bytes, 0

    def count(data: int) -> None:
        nonlocal done
        done += data
        progress("quantizing weights", done, total)

    with (folder / SINGLE_FILE).open("xb") as writer:
        writer.write(safetensors_header(entries.values()))
        for entry in kept.values():
            for chunk in chunks(checkpoint.path, entry):
                writer.write(chunk)
                count(len(chunk))
        for weight in weights.values():
            for size in _write_weight(writer, checkpoint.path, weight, dtype):
                count(size)
        writer.flush()
        os.fsync(writer.fileno())
    copy_companions(checkpoint.path, folder)
    write_json(folder / CONFIG, _config(checkpoint.path, settings, dtype))


def _weights(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, _Weight]:
    """Every weight to quantize, in the order in which it is written; experts are single linears.

    Raises:
        ExportError: one cannot be stored as the recipe says.
    """
    quantization = parse_quantization(recipe.settings(checkpoint.config))
    config, tensors = replace(checkpoint.config, quantization=quantization), checkpoint.tensors
    parts: dict[str, TensorEntry] = {}
    for stack, entry in tensors.items():
        if config.moe is not None and stack.endswith((GATE_UP, DOWN)):
            names = expert_parts(stack, config.moe.num_experts)
            parts |= dict(zip(names, _cut(entry, len(names)), strict=True))
    weights = {}
    for name, (storage, shape) in quantized_weights(config).items():
        if (objection := storage.objection(shape)) is not None:
            fitting = [group for group in GROUPS if not shape[1] % group]
            told = f"; --group {fitting[-1]} does" if storage.group and fitting else ""
            raise ExportError(f"{name.removesuffix(WEIGHT)}: {objection}{told}")
        source = parts[name] if name in parts else tensors[name]
        assert source.shape == shape, name
        weights[name] = _Weight(storage, source)
    return weights


def _cut(entry: TensorEntry, count: int) -> list[TensorEntry]:
    """A stack of matrices as `count` matrices of equal size, one after the other."""
    *rows, columns = entry.shape
    shape, length = (math.prod(rows) // count, columns), entry.length // count
    return [
        replace(entry, shape=shape, offset=entry.offset + index * length, length=length)
        for index in range(count)
    ]


def _write_weight(writer: BinaryIO, checkpoint: Path, weight: _Weight, dtype: str) -> Iterator[int]:
    """Write the tensors of a weight, and count the bytes read for it."""
    storage, bits = weight.storage, weight.storage.bits
    scales, zeros = [], []
    for values in _rows(checkpoint, weight.source, dtype):
        rounded = round_weight(values, storage, DTYPES[dtype].torch)
        writer.write(packed(rounded.codes, bits).numpy().data)
        scales.append(rounded.scales)
        zeros.append(rounded.zeros)
        yield values.nbytes
    along_rows = packed(torch.cat(zeros).T, bits).view(torch.int32).T
    tensors = {
        SCALE: torch.cat(scales),
        SHAPE: torch.tensor(weight.source.shape),
        ZERO_POINT: along_rows,
    }
    for suffix in storage.stored(weight.source.shape):
        if suffix != PACKED:
            writer.write(tensors[suffix].flatten().view(torch.uint8).numpy().data)


def _rows(checkpoint: Path, source: TensorEntry, dtype: str) -> Iterator[torch.Tensor]:
    """The values of a matrix, some rows at a time.

    Raises:
        ExportError: a value is NaN, infinite or beyond `dtype`.
    """
    stored, rows = BY_SAFETENSORS[source.dtype].torch, source.shape[0]
    size = source.length // rows
    at_once = max(1, CHUNK_BYTES // size)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        part = replace(source, offset=source.offset + start * size, length=count * size)
        data = bytearray(b"".join(chunks(checkpoint, part)))
        values = torch.frombuffer(data, dtype=stored).view(count, -1)
        if not torch.isfinite(values).all():
            kind = "NaN" if values.isnan().any() else "infinity"
            raise ExportError(f"tensor {source.name} holds {kind}; the checkpoint is damaged")
        if not torch.isfinite(values.to(DTYPES[dtype].torch)).all():
            raise ExportError(
                f"tensor {source.name} has values beyond {dtype}'s largest number; choose another --dtype"
            )
        yield values


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [N, K] as the bytes of pack-quantized's words, uint8 [N, bytes]; zeros fill the last word of a row."""
    per_word = WORD // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    octets = filled if bits == 8 else filled[:, 0::2] | filled[:, 1::2] << 4
    return octets.clone(memory_format=torch.contiguous_format)


def _config(checkpoint: Path, settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The new config.json; its dtype is the scales', which dequantized weights have."""
    raw = read_config_json(checkpoint)
    keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]
    for key in keys:
        raw[key] = DTYPES[dtype].torch_name
    return {**raw, "quantization_config": settings}
