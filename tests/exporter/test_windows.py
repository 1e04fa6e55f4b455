"""Sliding windows: exported where they cut nothing off, refused with the way out where they would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MINI, has_no_window, mini, write_checkpoint

from qwenport.engines import open_session
from qwenport.exporter import ConfigError, export, load_package, parse_config
from qwenport.validate import validate

WINDOW = 16
SLIDING = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0},
}


def made(folder: Path, family: str, **changes: Any) -> Path:
    raw = mini(family, torch_dtype="float32", max_position_embeddings=64, **changes)
    return write_checkpoint(folder / "checkpoint", raw, dtype=torch.float32)


def theirs(checkpoint: Path, length: int) -> torch.Tensor:
    """transformers' logits for ids 0 to length - 1."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    return model(torch.arange(length)[None]).logits[0].detach()


def ours(package: Path, length: int) -> torch.Tensor:
    (logits,) = open_session(package).prefill([list(range(length))], all_logits=True)
    return torch.from_numpy(logits)


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_that_holds_the_positions_asked_for_is_exported(
    family: str, tmp_path: Path
) -> None:
    checkpoint = made(tmp_path, family, **SLIDING[family])
    with pytest.raises(ConfigError, match=rf"sliding_window {WINDOW} .*--max-seq-len {WINDOW}"):
        export(checkpoint, tmp_path / "package")
    with pytest.raises(ConfigError, match="sliding_window"):
        export(checkpoint, tmp_path / "package", max_seq_len=WINDOW + 1)
    package = export(checkpoint, tmp_path / "package", max_seq_len=WINDOW)
    assert load_package(package.path).max_seq_len == WINDOW
    right = theirs(checkpoint, WINDOW)
    assert (ours(package.path, WINDOW) - right).norm() <= 1e-5 * right.norm()
    assert validate(package.path, checkpoint, budget="quick").passed


@pytest.mark.parametrize("family", filter(has_no_window, MINI))
def test_a_window_in_a_family_without_windows_changes_nothing(family: str, tmp_path: Path) -> None:
    """transformers' model does not know the key: it is named as unread."""
    with_window = made(tmp_path / "a", family, sliding_window=4)
    without = made(tmp_path / "b", family)
    right = theirs(without, 32)
    assert torch.equal(theirs(with_window, 32), right)
    package = export(with_window, tmp_path / "package")
    assert package.config.unread_keys == ("sliding_window",)
    assert (ours(package.path, 32) - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layer_types_decide_over_the_older_keys(family: str, tmp_path: Path) -> None:
    full = {"layer_types": ["full_attention"] * mini(family)["num_hidden_layers"]}
    checkpoint = made(tmp_path / "a", family, **SLIDING[family], **full)
    right = theirs(made(tmp_path / "b", family), 32)
    assert torch.equal(theirs(checkpoint, 32), right)
    package = export(checkpoint, tmp_path / "package")
    assert (ours(package.path, 32) - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("spelled", [{}, None])
def test_a_map_of_no_code_asks_for_none(spelled: Any) -> None:
    assert parse_config(mini("qwen2", auto_map=spelled)) == parse_config(mini("qwen2"))


def test_dtype_auto_is_the_file_s(tmp_path: Path) -> None:
    raw = mini("llama", torch_dtype="bfloat16")
    checkpoint = write_checkpoint(tmp_path / "c", raw, dtype=torch.bfloat16)
    (checkpoint / "config.json").write_text(json.dumps({**raw, "torch_dtype": "auto"}))
    assert export(checkpoint, tmp_path / "package").dtype == "bf16"


def test_dtypes_that_disagree_are_named_each_with_its_key() -> None:
    with pytest.raises(ConfigError, match="torch_dtype 'float16' and dtype 'bfloat16' disagree"):
        parse_config(mini("llama", torch_dtype="float16", dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"dtype 'float8'.*supported: bfloat16"):
        parse_config(mini("llama", torch_dtype=..., dtype="float8"))
