"""Whatever a file holds, a command ends in time with what it says of it in one line, or does what was asked.

HYPOTHESIS_PROFILE=search tries 500 of each kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import resource
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import mini, write_checkpoint
from hostile import changed, damaged
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwenport import cli

LONGEST, MOST_SECONDS, MOST_BYTES = 300, 5.0, 500e6
TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and their index, an adapter beside them."""
    raw = mini("qwen3", torch_dtype="bfloat16")
    folder = tmp_path_factory.mktemp("hostile") / "checkpoint"
    path = write_checkpoint(folder, raw, dtype=torch.bfloat16, shards=2)
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    lora = {}
    for layer in range(2):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        lora[f"{module}.lora_A.weight"] = torch.ones(2, 24)
        lora[f"{module}.lora_B.weight"] = torch.ones(64, 2)
    save_file(lora, path / "adapter_model.safetensors")
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a bundled checkpoint, tokenizer and all."""
    path = tmp_path_factory.mktemp("hostile") / "package"
    assert cli.main(["export", str(TINY), str(path), "--weights", "copy", "-q", "--json"]) == 0
    return path


def with_file(whole: Path, name: str, data: bytes, folder: Path) -> Path:
    """A copy of a directory with one file replaced, and the manifest, if any, put right."""
    copy = Path(shutil.copytree(whole, folder / "copy"))
    (copy / name).write_bytes(data)
    manifest = copy / "qwenport.json"
    if manifest.is_file() and name != manifest.name:
        content = json.loads(manifest.read_text())
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(content))
    return copy


def run(*arguments: object, is_verdict: bool = False) -> tuple[int, str]:
    """The exit code and stderr. Time, memory and the form of errors are checked here for every case.

    `is_verdict`: a wrong number in a file is for `validate` to judge, which takes its time; 1 is its answer.
    """
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    assert is_verdict or time.perf_counter() - begun < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    said = err.getvalue()
    assert code in ((0, 1, 2) if is_verdict else (0, 2)), (code, said)
    assert all(line.startswith(("error: ", "note: ")) for line in said.splitlines()), said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2) and all(len(line) <= LONGEST for line in errors), said
    return code, said


def exported(path: Path, folder: Path, *options: str) -> int:
    """Export; a failure leaves nothing."""
    before = sorted(folder.iterdir())
    code, _ = run("export", path, folder / "package", "-q", *options)
    assert (folder / "package").is_dir() == (code == 0)
    if code:
        assert sorted(folder.iterdir()) == before
    return code


@given(st.data())
def test_config_json(checkpoint: Path, data: st.DataObject) -> None:
    document = json.loads((checkpoint / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        content = data.draw(damaged(document))
        path = with_file(checkpoint, "config.json", content, Path(folder))
        exported(path, Path(folder), "--adapter", "ignore")


@given(st.data())
def test_rope_settings(checkpoint: Path, data: st.DataObject) -> None:
    kind = data.draw(
        st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope", "default"])
    )
    settings: dict[str, Any] = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    document = json.loads((checkpoint / "config.json").read_text())
    document["rope_scaling"] = data.draw(changed(settings))
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps(document).encode("utf-8", "surrogatepass")
        path = with_file(checkpoint, "config.json", content, Path(folder))
        exported(path, Path(folder), "--adapter", "ignore")


@given(st.data())
def test_index(checkpoint: Path, data: st.DataObject) -> None:
    document = json.loads((checkpoint / INDEX).read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = with_file(checkpoint, INDEX, data.draw(damaged(document)), Path(folder))
        exported(path, Path(folder), "--adapter", "ignore")


@given(st.data())
def test_header(checkpoint: Path, data: st.DataObject) -> None:
    """What the safetensors library refuses is refused."""
    name = data.draw(
        st.sampled_from(["model-00001-of-00002.safetensors", "adapter_model.safetensors"])
    )
    whole = (checkpoint / name).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = data.draw(damaged(json.loads(whole[8 : 8 + length])))
    stated = data.draw(
        st.one_of(st.just(len(header)), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))
    )
    with tempfile.TemporaryDirectory() as folder:
        content = struct.pack("<Q", stated) + header + whole[8 + length :]
        path = with_file(checkpoint, name, content, Path(folder))
        try:
            with safe_open(path / name, framework="pt") as opened:
                opened.keys()
            refused = False
        except (SafetensorError, OSError):
            refused = True
        code = exported(path, Path(folder), "--adapter", "merge")
        assert not (refused and code == 0)


@given(st.data())
def test_adapter_config(checkpoint: Path, data: st.DataObject) -> None:
    name = "adapter_config.json"
    document = json.loads((checkpoint / name).read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = with_file(checkpoint, name, data.draw(damaged(document)), Path(folder))
        exported(path, Path(folder), "--adapter", "merge")


@given(st.data())
def test_manifest(package: Path, data: st.DataObject) -> None:
    document = json.loads((package / "qwenport.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        content = data.draw(damaged(document))
        assume(json.dumps(document).encode() != content)
        path = with_file(package, "qwenport.json", content, Path(folder))
        shown = run("inspect", path)
        made = run("generate", path, "--prompt", "Hello", "--max-new-tokens", "2", "-q")
        assert shown[0] == made[0]  # every command says the same of it


@pytest.mark.parametrize("name", ["model.onnx", "rope.safetensors"])
@given(st.data())
def test_a_damaged_file_whose_hash_was_put_right(
    package: Path, name: str, data: st.DataObject
) -> None:
    """One line in every command alike."""
    whole = (package / name).read_bytes()
    how = data.draw(st.sampled_from(["cut", "zeroed", "noise", "empty", "swapped"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    size = data.draw(st.integers(1, 200))
    content = {
        "cut": whole[:place],
        "zeroed": whole[:place] + bytes(size) + whole[place + size :],
        "noise": whole[:place]
        + data.draw(st.binary(min_size=1, max_size=50))
        + whole[place + 50 :],
        "empty": b"",
        "swapped": whole[place:] + whole[:place],
    }[how]
    with tempfile.TemporaryDirectory() as folder:
        path = with_file(package, name, content, Path(folder))
        shown = run("inspect", path)
        made = run("generate", path, "--prompt", "Hello", "--max-new-tokens", "2", "-q")
        target = ("--target", "tensorrt-rtx", "--gpu", "sm86", "-q")
        if made[0] == 2 and data.draw(st.integers(0, 3)) == 0:
            run("build", path, Path(folder) / "engine", *target)
            options = ("--reference", TINY, "--budget", "quick", "--layers", "1", "-q")
            assert run("validate", path, *options, is_verdict=True)[0] != 0
        if shown[0] == 2:
            assert made[0] == 2


TEXTS = ["generation_config.json", "tokenizer_config.json", "config.json"]


@given(st.data())
def test_what_generate_reads(package: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(TEXTS))
    document = json.loads((package / name).read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = with_file(package, name, data.draw(damaged(document)), Path(folder))
        run("generate", path, "--prompt", "Hello", "--max-new-tokens", "2", "--chat", "-q")
