"""Damaged weight files and indices, named."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    edit_header,
    library_bytes,
    random_tensors,
    read_header,
    tensor_shapes,
    write_checkpoint,
    write_index,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import A_TENSOR, UNTIED, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenport.exporter import CheckpointError, open_checkpoint

# --- damaged files


def truncated_header(header: dict[str, Any]) -> None:
    header[A_TENSOR]["data_offsets"][1] -= 2


def overlapping(header: dict[str, Any]) -> None:
    """Give one tensor the bytes of another of its size; the file's end stays accounted for."""
    header[A_TENSOR]["data_offsets"] = header["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]


def shifted(header: dict[str, Any]) -> None:
    header[A_TENSOR]["data_offsets"] = [n + 2 for n in header[A_TENSOR]["data_offsets"]]


def past_the_end(header: dict[str, Any]) -> None:
    header[A_TENSOR]["data_offsets"] = [n + 2**40 for n in header[A_TENSOR]["data_offsets"]]


def negative(header: dict[str, Any]) -> None:
    begin, end = header[A_TENSOR]["data_offsets"]
    header[A_TENSOR]["data_offsets"] = [begin - 2**20, end - 2**20]


def backwards(header: dict[str, Any]) -> None:
    header[A_TENSOR]["data_offsets"].reverse()


def without_offsets(header: dict[str, Any]) -> None:
    del header[A_TENSOR]["data_offsets"]


def with_negative_shape(header: dict[str, Any]) -> None:
    header[A_TENSOR]["shape"] = [-40, -32]


def with_fractional_shape(header: dict[str, Any]) -> None:
    header[A_TENSOR]["shape"] = [40.0, 32.0]


def with_null_entry(header: dict[str, Any]) -> None:
    header[A_TENSOR] = None


def with_a_list_for_dtype(header: dict[str, Any]) -> None:
    header[A_TENSOR]["dtype"] = ["BF16"]


def with_words_for_offsets(header: dict[str, Any]) -> None:
    header[A_TENSOR]["data_offsets"] = [str(n) for n in header[A_TENSOR]["data_offsets"]]


@pytest.mark.parametrize(
    "damage",
    [
        truncated_header,
        overlapping,
        shifted,
        past_the_end,
        negative,
        backwards,
        without_offsets,
        with_negative_shape,
        with_fractional_shape,
        with_null_entry,
        with_a_list_for_dtype,
        with_words_for_offsets,
        lambda header: [],
        lambda header: "header",
        lambda header: {},
    ],
)
def test_a_damaged_header_is_refused_and_its_file_named(
    checkpoint: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    edit_header(weights(checkpoint), damage)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors|{A_TENSOR}|tensor"):
        open_checkpoint(checkpoint)


def header_bytes(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header_bytes(0, b""),
        header_bytes(2, b"{}"),
        header_bytes(3, b"{]}"),
        header_bytes(2**63, b"{}"),
        header_bytes(2**64 - 1, b"{}"),
        header_bytes(200_000_000, b"{}"),
        header_bytes(4, b'"\xff\xff"'),
        header_bytes(100_000, b"[" * 100_000),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"PK\x03\x04" + b"\0" * 100,
    ],
    ids=[
        "empty", "no length", "no header", "no tensors", "not JSON", "header of 8 EiB",
        "header of 16 EiB", "header past the end", "not UTF-8", "nested deep", "LFS pointer", "zip",
    ],
)  # fmt: skip
def test_a_file_that_is_not_safetensors_is_refused_by_name(
    checkpoint: Path, content: bytes
) -> None:
    weights(checkpoint).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors|tensor"):
        open_checkpoint(checkpoint)


@settings(max_examples=60)
@given(data=st.data())
def test_what_opens_after_random_damage_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write_checkpoint(folder, UNTIED, dtype=torch.bfloat16)
    content = bytearray(weights(folder).read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), label="truncate or extend"):
        size = data.draw(
            st.integers(0, len(content) + 16)
            | st.sampled_from([len(content) - 1, len(content) + 1, header_end]),
            label="size",
        )
        content = content[:size].ljust(size, b"\0")
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, header_end - 1), label="place")
            content[place] = data.draw(st.sampled_from(b'0123456789,[]{}":BF x\0'), label="byte")
    weights(folder).write_bytes(content)
    try:
        with safe_open(weights(folder), framework="pt") as library:
            names = set(library.keys())
    except Exception:  # whatever the library finds wrong
        names = None
    try:
        opened = open_checkpoint(folder)
    except CheckpointError:
        return
    assert names is not None, "the safetensors library refuses this file"
    assert names == opened.tensors.keys()
    for key, expected in library_bytes(weights(folder)).items():
        entry = opened.tensors[key]
        assert bytes(content[entry.offset : entry.offset + entry.length]) == expected


def test_a_tensor_stated_twice_in_a_header_is_refused(checkpoint: Path) -> None:
    file = weights(checkpoint)
    header, data = read_header(file), file.read_bytes()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    other = {**header[A_TENSOR]}
    other["data_offsets"] = header["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]
    text = json.dumps(header)[:-1] + f', "{A_TENSOR}": {json.dumps(other)}}}'
    file.write_bytes(header_bytes(len(text), text.encode()) + rest)
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


def test_a_directory_in_place_of_the_weights_is_a_checkpoint_error(checkpoint: Path) -> None:
    weights(checkpoint).unlink()
    weights(checkpoint).mkdir()
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


def test_a_dangling_link_in_place_of_the_weights_is_a_checkpoint_error(checkpoint: Path) -> None:
    weights(checkpoint).unlink()
    weights(checkpoint).symlink_to(checkpoint / "blobs" / "gone")
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


# --- the index of a sharded checkpoint


def shard(number: int, of: int = 3) -> str:
    return f"model-{number:05}-of-{of:05}.safetensors"


def weight_map(sharded: Path) -> dict[str, Any]:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    return index["weight_map"]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / shard(2)).unlink()
    with pytest.raises(CheckpointError, match=shard(2)):
        open_checkpoint(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    os.truncate(sharded / shard(3), (sharded / shard(3)).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=shard(3)):
        open_checkpoint(sharded)


@pytest.mark.parametrize("place", ["..", "absolute", "sub/.."])
def test_an_index_that_leads_out_of_the_checkpoint_is_refused(
    sharded: Path, tmp_path: Path, place: str
) -> None:
    (sharded / shard(1)).rename(tmp_path / shard(1))
    (sharded / "sub").mkdir()
    outside = {
        "..": f"../{shard(1)}",
        "absolute": str(tmp_path / shard(1)),
        "sub/..": f"sub/../../{shard(1)}",
    }[place]
    entries = weight_map(sharded)
    write_index(sharded, {k: outside if v == shard(1) else v for k, v in entries.items()})
    with pytest.raises(CheckpointError, match="index"):
        open_checkpoint(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    entries = weight_map(sharded)
    entries[A_TENSOR] = next(s for s in sorted(set(entries.values())) if s != entries[A_TENSOR])
    write_index(sharded, entries)
    with pytest.raises(CheckpointError, match=A_TENSOR):
        open_checkpoint(sharded)


def test_an_index_that_lacks_a_tensor_is_refused(sharded: Path) -> None:
    entries = weight_map(sharded)
    del entries[A_TENSOR]
    write_index(sharded, entries)
    with pytest.raises(CheckpointError, match=A_TENSOR):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"lm_head.weight": 3}}',
        '{"weight_map": {"lm_head.weight": null}}',
        '{"weight_map": {"lm_head.weight": ""}}',
        '{"weight_map": {"lm_head.weight": "."}}',
        '{"weight_map": {"lm_head.weight": "\\u0000"}}',
    ],
)
def test_a_broken_index_is_a_checkpoint_error(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)


def test_of_one_file_and_shards_side_by_side_transformers_choice_is_read_or_none(
    sharded: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    other = random_tensors(tensor_shapes(UNTIED), torch.bfloat16, seed=1)
    save_file(other, weights(sharded), metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.bfloat16)
    expected = model.state_dict()[A_TENSOR]
    try:
        opened = open_checkpoint(sharded)
    except CheckpointError:
        return
    assert torch.equal(load_file(sharded / opened.tensors[A_TENSOR].file)[A_TENSOR], expected)
