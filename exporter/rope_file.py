"""rope.safetensors of a package: cos and sin tables, fp32 [positions, head_dim / 2], written and checked."""

from __future__ import annotations

from pathlib import Path

from qwenport.contract import COS_TABLE, MANIFEST, ROPE, SIN_TABLE
from qwenport.exporter.config import ModelConfig
from qwenport.exporter.directory import require_space
from qwenport.exporter.errors import PackageError
from qwenport.exporter.rope import ROWS_AT_ONCE, rope_tables
from qwenport.exporter.safetensors_file import (
    TensorEntry,
    plan_safetensors,
    read_safetensors_header,
    safetensors_header,
)

TABLE_ERROR = 1e-6  # of cos and sin per radian of angle: how far fp32 may differ between machines


def rope_entries(config: ModelConfig, length: int) -> dict[str, TensorEntry]:
    """Where the tables of `length` positions lie in their file."""
    shape = (config.rope_rows(length), config.rope.head_dim // 2)
    return plan_safetensors(ROPE, "F32", {COS_TABLE: shape, SIN_TABLE: shape})


def write_tables(config: ModelConfig, folder: Path, length: int) -> None:
    """Write the tables of `length` positions, some rows in memory at a time."""
    import torch

    entries, count = rope_entries(config, length), config.rope_rows(length)
    require_space(folder, sum(entry.length for entry in entries.values()))
    with (folder / ROPE).open("wb") as writer:
        writer.write(safetensors_header(entries.values()))
        for table in range(2):  # cos, then sin
            for start in range(0, count, ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, count)
                rows = rope_tables(config.rope, length, start, stop)[table]
                writer.write(rows.contiguous().view(torch.uint8).numpy().data)


def check_tables(folder: Path, config: ModelConfig, length: int) -> None:
    """Raises PackageError: the rope tables are not for so many positions, or not of this model."""
    file = folder / ROPE
    if length > config.max_context:
        raise PackageError(f"{folder}: max_seq_len {length} is more than its rope settings allow")
    _, found = read_safetensors_header(file)
    if {entry.name: entry for entry in found} != rope_entries(config, length):
        raise PackageError(f"{file}: not the tables of {length} positions that {MANIFEST} states")


def check_table_values(folder: Path, config: ModelConfig, length: int) -> None:
    """Raises PackageError: a value of the rope tables is not what the settings give, or NaN."""
    import torch

    file, rope, count = folder / ROPE, config.rope, config.rope_rows(length)
    entries = {entry.name: entry for entry in read_safetensors_header(file)[1]}
    frequencies = rope.inverse_frequencies(length).abs()
    with file.open("rb") as stream:
        for start in range(0, count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, count)
            angles = torch.arange(start, stop)[:, None] * frequencies
            allowed = TABLE_ERROR * (1 + angles) * (1 + abs(rope.attention_scaling()))
            for entry, right in zip(
                rope_entries(config, length).values(),
                rope_tables(rope, length, start, stop),
                strict=True,
            ):
                size = 4 * right[0].numel()
                stream.seek(entries[entry.name].offset + start * size)
                data = bytearray(stream.read((stop - start) * size))
                found = torch.frombuffer(data, dtype=torch.float32).view_as(right)
                if not ((found - right).abs() <= allowed).all():
                    raise PackageError(
                        f"{file}: {entry.name} is not what the rope settings give; it was changed"
                    )
