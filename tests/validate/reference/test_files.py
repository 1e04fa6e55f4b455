"""What lies beside config.json and the weights does not reach the oracle, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Reference
from qwenport.validate.reference.files import visible_to_transformers

from .pairs import TEXTS, Pair, same


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this process, for the test alone."""
    import_module("torch._dynamo")  # makes a cache folder when it is first imported
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _with_adapter(pair: Pair, folder: Path) -> Path:
    """The checkpoint with a LoRA adapter, a generation config and other weights beside it."""
    shutil.copytree(pair.path, folder)
    generator = torch.Generator().manual_seed(1)
    width = pair.case.raw["hidden_size"]
    rows = pair.case.tensors()["model.layers.0.self_attn.q_proj.weight"].shape[0]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {
            f"{name}A.weight": torch.randn(4, width, generator=generator),
            f"{name}B.weight": torch.randn(rows, 4, generator=generator),
        },
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "generation_config.json").write_text('{"num_beams": 3, "repetition_penalty": 1.5}')
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize("name", ["llama fp32", "qwen2 fp16 sharded", "qwen3_moe bf16 stacked"])
def test_an_adapter_beside_the_weights_changes_nothing(
    name: str,
    pair_of: Callable[[str], Pair],
    tmp_path: Path,
    scratch: Path,
) -> None:
    pair = pair_of(name)
    path = _with_adapter(pair, tmp_path / "checkpoint")
    # transformers itself finds the adapter and adds it
    adapted = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    assert any("lora_A" in parameter for parameter, _ in adapted.named_parameters())
    expected = pair.whole.logits(TEXTS)
    for streamed in (False, True):
        reference = Reference(pair.target, path, streamed=streamed)
        assert list(scratch.iterdir()) == []
        assert all(map(same, reference.logits(TEXTS), expected))
        assert same(reference.greedy([1, 2, 3], 4)[1], pair.whole.greedy([1, 2, 3], 4)[1])
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("name", ["llama fp32", "qwen2 fp16 sharded"])
def test_only_config_and_weights_are_shown(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _with_adapter(pair_of(name), tmp_path / "checkpoint")
    weights = {"model.safetensors"}
    if "sharded" in name:
        weights = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
        weights.add("model.safetensors.index.json")
    monkeypatch.chdir(tmp_path)
    for given in (path, Path("checkpoint")):
        with visible_to_transformers(given) as folder:
            assert {file.name for file in folder.iterdir()} == {"config.json", *weights}
            for file in folder.iterdir():
                assert file.is_symlink() and file.readlink().is_absolute()
                assert file.read_bytes() == (path / file.name).read_bytes()
        assert not folder.exists()
    assert {"adapter_config.json", "config.json"} < {file.name for file in path.iterdir()}


def test_single_file_beside_an_index_is_not_read(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    """transformers would prefer it; the exporter and the streamed oracle go by the index."""
    pair = pair_of("qwen2 fp16 sharded")
    shutil.copytree(pair.path, tmp_path / "checkpoint")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in pair.case.tensors().items()}
    save_file(zeros, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    reference = Reference(pair.target, tmp_path / "checkpoint")
    assert all(map(same, reference.logits(TEXTS), pair.whole.logits(TEXTS)))


@pytest.mark.parametrize("failure", [None, ValidationError("no"), KeyboardInterrupt()])
def test_nothing_is_left_when_loading_fails(
    failure: BaseException | None,
    pair_of: Callable[[str], Pair],
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = pair_of("llama fp32")
    shutil.copytree(pair.path, tmp_path / "checkpoint")
    if failure is None:
        (tmp_path / "checkpoint" / "config.json").write_text("{")
    else:

        def fail(*_: object, **__: object) -> None:
            raise failure

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(KeyboardInterrupt if failure and failure.args == () else ValidationError):
        Reference(pair.target, tmp_path / "checkpoint")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/model.safetensors", "adapter_config.json", 3, None, ["a"]]
)
def test_what_is_no_shard_is_refused(
    shard: object, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("llama fp32")
    shutil.copytree(pair.path, tmp_path / "checkpoint")
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "checkpoint" / "model.safetensors.index.json").write_text(json.dumps(index))
    for streamed in (False, True):
        with pytest.raises(ValidationError, match=r"index\.json"):
            Reference(pair.target, tmp_path / "checkpoint", streamed=streamed)
