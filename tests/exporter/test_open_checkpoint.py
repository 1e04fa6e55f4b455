"""What is read of a checkpoint, and tensors that are not what config.json promises."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    library_bytes,
    mini,
    random_tensors,
    tensor_shapes,
    write_checkpoint,
    write_sparse_checkpoint,
)
from opened import A_TENSOR, UNTIED, weights
from safetensors.torch import load_file, save_file

from qwenport.exporter import CheckpointError, ConfigError, open_checkpoint

TIED = mini("qwen2", num_hidden_layers=1)


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
