"""Bad input: exit code 2, one line that names what is wrong, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import MINI, mini, random_tensors, stack_experts, tensor_shapes, write_checkpoint
from command_line import Capture, refused

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIAS = "model.layers.3.self_attn.k_proj.bias"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint to be damaged."""
    path = tmp_path / "checkpoint"
    shutil.copytree(TINY, path)
    return path


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """A mixture of six experts, of which a token has two, to be damaged."""
    return write_checkpoint(tmp_path / "checkpoint", mini("qwen2_moe"))


def refused_export(capsys: Capture, checkpoint: Path, *options: object) -> str:
    """`refused` for an export, which must leave its folder and the checkpoint as they were."""
    before = snapshot(checkpoint.parent)
    line = refused(capsys, "export", checkpoint, checkpoint.parent / "package", *options)
    assert snapshot(checkpoint.parent) == before
    return line


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every path under a folder, files with size and time of change."""
    return {
        p: (p.lstat().st_size, p.lstat().st_mtime_ns) if p.is_file() else (0, 0)
        for p in folder.rglob("*")
    }


# damage: a name, what it does to a checkpoint, and what the message must name


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = safetensors.torch.load_file(path / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, path / WEIGHTS)

    return damage


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))

    return damage


def shards(**moved: str) -> Callable[[Path], None]:
    """An index for the one file, with some tensors said to be in another."""

    def damage(path: Path) -> None:
        with safetensors.safe_open(path / WEIGHTS, "pt") as file:
            weight_map = dict.fromkeys(file.keys(), WEIGHTS)
        weight_map |= {name.replace("__", "."): shard for name, shard in moved.items()}
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def swap_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BIAS] = tensors[BIAS].float() * 1.001  # which bf16 would round


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BIAS] = torch.zeros(65, dtype=torch.bfloat16)


def only_pickle(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")


def second_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no such path": (shutil.rmtree, ("checkpoint", "no such directory")),
    "a file": (as_file, ("a file; a checkpoint is a directory",)),
    "no config": (lambda p: (p / "config.json").unlink(), ("no config.json",)),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), ("not valid JSON",)),
    "model_type": (
        edit_config(model_type="gpt2"),
        ("gpt2", ", ".join(sorted(MINI))),
    ),
    "auto_map": (edit_config(auto_map={"AutoModel": "evil.Model"}), ("auto_map",)),
    "a key that matters": (edit_config(is_causal=False), ("is_causal",)),
    "missing tensor": (edit_tensors(lambda t: t.pop(BIAS)), (BIAS, "lacks")),
    "extra tensor": (edit_tensors(lambda t: t.update(odd=torch.zeros(1))), ("tensor odd",)),
    "misshapen tensor": (edit_tensors(misshape), (BIAS, "[65]", "[64]")),
    "wrong dtype": (edit_tensors(swap_dtype), (BIAS, "fp32", "--dtype bf16")),
    "second head": (edit_tensors(second_head), ("lm_head.weight", "tie_word_embeddings")),
    "truncated weights": (edit_bytes(lambda b: b[: len(b) // 2]), ("truncated", WEIGHTS)),
    "truncated header": (edit_bytes(lambda b: b[:100]), ("truncated", WEIGHTS)),
    "empty weights": (edit_bytes(lambda b: b""), ("not a safetensors file", WEIGHTS)),
    "corrupt header": (edit_bytes(lambda b: b[:8] + b"!" + b[9:]), ("corrupt", WEIGHTS)),
    "huge header": (edit_bytes(lambda b: b"\xff" * 8 + b[8:]), ("truncated", WEIGHTS)),
    "more bytes": (edit_bytes(lambda b: b + b"more"), ("corrupt", WEIGHTS)),
    "missing shard": (shards(model__norm__weight="2.safetensors"), ("2.safetensors", "missing")),
    "shard above": (shards(model__norm__weight="../x.safetensors"), ("outside", "../x")),
    "shard at root": (shards(model__norm__weight="/etc/x.safetensors"), ("outside", "/etc/x")),
    "shard is a pickle": (shards(model__norm__weight="x.bin"), ("x.bin", "not a safetensors")),
    "index of more": (shards(odd=WEIGHTS), ("tensor odd", WEIGHTS)),
    "index is no index": (lambda p: (p / INDEX).write_text("[]"), (INDEX, "not a safetensors")),
    "only pickle": (only_pickle, ("pytorch_model.bin", "can run code")),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), ("no model.safetensors",)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_refused(name: str, checkpoint: Path, capsys: Capture) -> None:
    damage, words = DAMAGE[name]
    damage(checkpoint)
    line = refused_export(capsys, checkpoint)
    assert all(word in line for word in words), line


def without_half(tensors: dict[str, torch.Tensor]) -> None:
    whole = stack_experts(tensors)
    tensors.clear()
    tensors.update({name: t for name, t in whole.items() if not name.endswith("down_proj")})


MOE_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "more than there are": (
        edit_config(num_experts_per_tok=7),
        ("num_experts_per_tok 7", "num_experts 6"),
    ),
    "unknown routing": (edit_config(router_type="noaux"), ("router_type",)),
    "sliding window": (edit_config(use_sliding_window=True), ("use_sliding_window",)),
    "missing expert": (edit_tensors(lambda t: t.pop(EXPERT)), (EXPERT, "lacks")),
    "unequal experts": (
        edit_tensors(lambda t: t.update({EXPERT: t[EXPERT][1:].clone()})),
        (EXPERT, "[23, 32]", "[24, 32]"),
    ),
    "expert too many": (
        edit_tensors(lambda t: t.update({EXPERT.replace("3.up", "6.up"): t[EXPERT].clone()})),
        (EXPERT.replace("3.up", "6.up"), "does not account for"),
    ),
    "half a stack": (edit_tensors(without_half), ("experts.down_proj", "lacks")),
}


@pytest.mark.parametrize("mode", ["link", "pack"])
@pytest.mark.parametrize("name", MOE_DAMAGE)
def test_damaged_mixture_of_experts_is_refused(
    name: str, mode: str, moe: Path, capsys: Capture
) -> None:
    damage, words = MOE_DAMAGE[name]
    damage(moe)
    line = refused_export(capsys, moe, "--weights", mode)
    assert all(word in line for word in words), line


def test_experts_that_are_stacked_are_not_packed_again(tmp_path: Path, capsys: Capture) -> None:
    raw = mini("qwen3_moe")
    tensors = stack_experts(random_tensors(tensor_shapes(raw), torch.float32))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    line = refused_export(capsys, checkpoint, "--weights", "pack")
    assert "--weights pack" in line and "--weights link" in line


def test_stacks_that_do_not_fit_the_disk_are_refused_before_they_are_written(
    moe: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(moe)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "disk space" in refused_export(capsys, moe, "--weights", "pack")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-seq-len", "513"], ("513", "512", "--rope-scaling")),
        (["--rope-scaling", "yarn:4", "--max-seq-len", "2049"], ("2049", "2048", "yarn")),
        (["--max-seq-len", "0"], ("--max-seq-len",)),
        (["--rope-scaling", "spiral:4"], ("spiral", "yarn")),
        (["--rope-scaling", "yarn:four"], ("four",)),
        (["--rope-scaling", "yarn"], ("KIND:FACTOR",)),
        (["--dtype", "int8"], ("--dtype", "bf16")),
        (["--weights", "symlink"], ("--weights", "link")),
        (["--weights", "pack"], ("--weights pack", "--weights link")),
        (["--weights", "pack", "--dtype", "fp16"], ("--weights pack", "--weights link")),
        (["--max-batch", "0"], ("--max-batch",)),
    ],
)
def test_option_out_of_range_is_refused(
    options: list[str], words: tuple[str, ...], checkpoint: Path, capsys: Capture
) -> None:
    line = refused_export(capsys, checkpoint, *options)
    assert all(word in line for word in words), line


def test_value_beyond_fp16_is_refused_half_way_and_names_the_tensor(
    checkpoint: Path, capsys: Capture
) -> None:
    edit_tensors(lambda tensors: tensors[BIAS].fill_(1e5))(checkpoint)
    assert BIAS in refused_export(capsys, checkpoint, "--dtype", "fp16")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_output_that_exists_is_refused_and_kept(
    make: Callable[[Path], None], checkpoint: Path, capsys: Capture
) -> None:
    make(checkpoint.parent / "package")
    assert "exists already" in refused_export(capsys, checkpoint)
    assert os.path.lexists(checkpoint.parent / "package")


def test_output_in_no_directory_is_refused(checkpoint: Path, capsys: Capture) -> None:
    line = refused(capsys, "export", checkpoint, checkpoint.parent / "no" / "package")
    assert "no such directory" in line


# disk full


def test_a_copy_that_does_not_fit_is_refused_before_it_starts(
    checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(checkpoint)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "disk space" in refused_export(capsys, checkpoint, "--weights", "copy")


def test_a_disk_that_fills_during_the_copy_leaves_nothing(
    checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a full disk."""

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    real = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        inside = path.parent.name == "weights" and "w" in mode
        return Full() if inside else real(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)
    assert "the disk is full" in refused_export(capsys, checkpoint, "--weights", "copy")


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[None]:
    """A file system of that size, where mounting one is allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs root; the tests above fake one")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("room", [1000, 5400])
def test_a_real_disk_that_is_too_small_is_left_empty(
    room: int, checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", room):
        arguments = ["export", checkpoint, tmp_path / "disk" / "package", "--weights", "copy"]
        assert "disk" in refused(capsys, *arguments)
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_link_to_another_disk_is_refused_with_the_remedy(
    checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 5000):
        line = refused(capsys, "export", checkpoint, tmp_path / "disk" / "package")
        assert "another file system" in line and "--weights copy" in line
        assert list((tmp_path / "disk").iterdir()) == []
