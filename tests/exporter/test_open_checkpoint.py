"""Checkpoint directories: opened by headers only; every damage is refused, and named."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    edit_header,
    library_bytes,
    mini,
    random_tensors,
    read_header,
    tensor_shapes,
    write_checkpoint,
    write_index,
    write_sparse_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenport.exporter import CheckpointError, ConfigError, open_checkpoint

UNTIED = mini("qwen2", tie_word_embeddings=False, num_hidden_layers=1)
TIED = mini("qwen2", num_hidden_layers=1)
A_TENSOR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", UNTIED, dtype=torch.bfloat16)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", UNTIED, dtype=torch.bfloat16, shards=3)


def weights(checkpoint: Path) -> Path:
    return checkpoint / "model.safetensors"


def rewrite(checkpoint: Path, **changes: Any) -> None:
    """Save the weights again with tensors replaced, or removed where the change is None."""
    tensors = load_file(weights(checkpoint)) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, weights(checkpoint))


# --- what is read


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")]
)
def test_every_tensor_is_where_the_library_finds_it(
    tmp_path: Path, shards: int, dtype: torch.dtype, name: str
) -> None:
    raw = {**UNTIED, "torch_dtype": str(dtype).removeprefix("torch.")}
    folder = write_checkpoint(tmp_path / "c", raw, dtype=dtype, shards=shards)
    opened = open_checkpoint(folder)
    assert opened.dtype == name
    assert {key: entry.shape for key, entry in opened.tensors.items()} == tensor_shapes(UNTIED)
    files = {entry.name: entry.path for entry in opened.files}
    assert len(files) == shards
    for path in files.values():
        for key, expected in library_bytes(path).items():
            entry = opened.tensors[key]
            assert files[entry.file] == path
            assert path.read_bytes()[entry.offset : entry.offset + entry.length] == expected
    assert opened.weight_bytes == sum(
        len(b) for p in files.values() for b in library_bytes(p).values()
    )


def bytes_read() -> int:
    """Bytes that this process has asked read calls for, from files or page cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_a_checkpoint_of_a_terabyte_opens_without_a_weight_being_read(
    tmp_path: Path, checkpoint: Path
) -> None:
    raw = mini("qwen2", vocab_size=16_000_000, hidden_size=32_768, num_attention_heads=256)
    size = write_sparse_checkpoint(tmp_path / "huge", raw)
    assert size > 2**39
    open_checkpoint(checkpoint)  # whatever is imported late is imported now
    read, start = bytes_read(), time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = open_checkpoint(tmp_path / "huge")
    assert bytes_read() - read < 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # KiB
    assert time.perf_counter() - start < 5
    assert opened.weight_bytes == size
    (tmp_path / "huge" / "model.safetensors").unlink()  # nothing should back up a terabyte


def test_symbolic_links_of_a_hugging_face_cache_are_followed(tmp_path: Path, sharded: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b2c"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    opened = open_checkpoint(snapshot)
    assert opened.tensors.keys() == tensor_shapes(UNTIED).keys()
    for file in opened.files:
        assert file.name.startswith("model-0000")
        assert not file.path.is_symlink() and file.path.parent.samefile(blobs)


# --- tensors that are not what config.json promises


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, **{A_TENSOR: None})
    with pytest.raises(CheckpointError, match=A_TENSOR):
        open_checkpoint(checkpoint)


def test_an_extra_tensor_is_named(checkpoint: Path) -> None:
    extra = "model.layers.0.self_attn.q_norm.weight"
    rewrite(checkpoint, **{extra: torch.ones(8, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=extra):
        open_checkpoint(checkpoint)


def test_a_layer_too_many_is_not_ignored(tmp_path: Path) -> None:
    raw = {**UNTIED, "num_hidden_layers": 2}
    folder = write_checkpoint(tmp_path / "c", raw, dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(UNTIED))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\."):
        open_checkpoint(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint: Path) -> None:
    tensor = load_file(weights(checkpoint))[A_TENSOR]
    rewrite(checkpoint, **{A_TENSOR: tensor.t().contiguous()})
    with pytest.raises(CheckpointError, match=A_TENSOR) as error:
        open_checkpoint(checkpoint)
    numbers = str(error.value).replace(A_TENSOR, "")
    assert numbers.count("40") == numbers.count("32") == 2


def test_a_tensor_of_another_rank_with_as_many_elements_is_refused(checkpoint: Path) -> None:
    tensor = load_file(weights(checkpoint))[A_TENSOR]
    rewrite(checkpoint, **{A_TENSOR: tensor.reshape(40, 8, 4)})
    with pytest.raises(CheckpointError, match=A_TENSOR):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.int64]
)
def test_a_dtype_that_no_model_has_is_named_with_its_tensor(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    rewrite(checkpoint, **{A_TENSOR: torch.zeros(40, 32).to(dtype)})
    with pytest.raises(CheckpointError, match=A_TENSOR):
        open_checkpoint(checkpoint)


# --- a tied model that stores its head as well


def tied_with_head(folder: Path, difference: float, shards: int = 1) -> Path:
    tensors = random_tensors(tensor_shapes(TIED), torch.bfloat16)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += difference
    return write_checkpoint(folder, TIED, {**tensors, "lm_head.weight": head}, shards=shards)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_spare_head_equal_to_the_embedding_is_left_out(tmp_path: Path, shards: int) -> None:
    opened = open_checkpoint(tied_with_head(tmp_path / "c", 0.0, shards))
    assert opened.tensors.keys() == tensor_shapes(TIED).keys()


@pytest.mark.parametrize("shards", [1, 4])
def test_a_spare_head_that_differs_from_the_embedding_is_refused(
    tmp_path: Path, shards: int
) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        open_checkpoint(tied_with_head(tmp_path / "c", 1.0, shards))


def test_an_untied_model_without_head_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(tensor_shapes(TIED), torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        open_checkpoint(write_checkpoint(tmp_path / "c", UNTIED, tensors))


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


# --- directories that are no checkpoint


def test_pickled_weights_are_refused_and_what_to_do_is_said(checkpoint: Path) -> None:
    torch.save(load_file(weights(checkpoint)), checkpoint / "pytorch_model.bin")
    weights(checkpoint).unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        open_checkpoint(checkpoint)


def test_a_checkpoint_without_weights_is_refused(checkpoint: Path) -> None:
    weights(checkpoint).unlink()
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


def test_a_directory_that_is_not_there_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises((ConfigError, CheckpointError), match=path.name):
            open_checkpoint(path)


def test_opening_changes_nothing(checkpoint: Path) -> None:
    def state() -> list[tuple[Any, ...]]:
        return [
            (f.name, f.stat().st_mtime_ns, f.stat().st_size, f.stat().st_mode, f.read_bytes())
            for f in sorted(checkpoint.iterdir())
        ]

    before = state()
    open_checkpoint(checkpoint)
    assert state() == before
