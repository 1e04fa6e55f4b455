"""Packages that several test files look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    mini,
    random_tensors,
    tensor_shapes,
    transformers_config,
    write_checkpoint,
)
from oddities import Tensors
from opened import UNTIED
from packaged import Exported
from transformers import LlamaForCausalLM, Qwen2MoeForCausalLM

from qwenport.exporter import export

LLAMA = mini("llama", attention_bias=True, mlp_bias=True)  # untied, head_dim 16 of hidden 24


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A fp32 Llama in three shards as transformers saves it, with every bias; weights linked."""
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(transformers_config(LLAMA))
    model.load_state_dict(random_tensors(tensor_shapes(LLAMA), torch.float32))
    model.save_pretrained(folder / "checkpoint", max_shard_size="20KB")
    assert len(list((folder / "checkpoint").glob("*.safetensors"))) > 2
    export(folder / "checkpoint", folder / "package", max_batch=3)
    return Exported(folder / "checkpoint", folder / "package")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tied bf16 Qwen2 that lies in a Hugging Face cache, as links to blobs; weights linked."""
    folder = tmp_path_factory.mktemp("qwen2")
    raw = mini("qwen2", rope_scaling={"type": "yarn", "factor": 4.0})
    plain = write_checkpoint(folder / "plain", raw, dtype=torch.bfloat16)
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    export(snapshot, folder / "package")
    return Exported(snapshot, folder / "package")


@pytest.fixture(scope="session")
def qwen2_moe(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A fp32 mixture in shards as transformers saves it, a tensor an expert; weights linked."""
    folder, raw = tmp_path_factory.mktemp("qwen2_moe"), mini("qwen2_moe")
    model = Qwen2MoeForCausalLM(transformers_config(raw))
    model.load_state_dict(random_tensors(tensor_shapes(raw, stacked=True), torch.float32))
    model.save_pretrained(folder / "checkpoint", max_shard_size="40KB")
    assert len(list((folder / "checkpoint").glob("*.safetensors"))) > 2
    export(folder / "checkpoint", folder / "package")
    return Exported(folder / "checkpoint", folder / "package")


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bf16 mixture in one file that has the experts stacked; weights linked."""
    folder, raw = tmp_path_factory.mktemp("qwen3_moe"), mini("qwen3_moe", torch_dtype="bfloat16")
    tensors = random_tensors(tensor_shapes(raw, stacked=True), torch.bfloat16)
    checkpoint = write_checkpoint(folder / "checkpoint", raw, tensors)
    export(checkpoint, folder / "package")
    return Exported(checkpoint, folder / "package")


@pytest.fixture(params=["llama", "qwen2", "qwen2_moe", "qwen3_moe", "tiny"])
def exported(request: pytest.FixtureRequest) -> Exported:
    """Each of the packages."""
    if request.param == "tiny":
        return Exported(
            request.getfixturevalue("tiny_checkpoint"), request.getfixturevalue("tiny_package")
        )
    return request.getfixturevalue(request.param)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of one layer that a test may change."""
    raw = mini("qwen2", num_hidden_layers=1)
    return write_checkpoint(tmp_path / "in" / "checkpoint", raw, dtype=torch.bfloat16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A place for a package, in an empty folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "package"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", UNTIED, dtype=torch.bfloat16)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", UNTIED, dtype=torch.bfloat16, shards=3)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of a family after a change to its tensors."""

    def make(
        family: str = "llama", change: Callable[[Tensors], Tensors] = dict, **changes: Any
    ) -> Path:
        raw = mini(family, **{"torch_dtype": "bfloat16", **changes})
        tensors = random_tensors(tensor_shapes(raw), torch.bfloat16)
        return write_checkpoint(tmp_path / "checkpoint", raw, change(tensors))

    return make
