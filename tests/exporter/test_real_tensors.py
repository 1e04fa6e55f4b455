"""Dtypes, names and leftovers of real checkpoints: what transformers makes of them, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_index
from oddities import Tensors, assert_as_transformers, logits_of, with_buffers
from safetensors.torch import load_file, save_file

from qwenport.exporter import (
    CheckpointError,
    ConfigError,
    ExportError,
    export,
    open_checkpoint,
)

# --- dtypes


def norms_in(dtype: torch.dtype, exactly: bool) -> Callable[[Tensors], Tensors]:
    """The norms in another dtype, with values that bf16 holds or does not."""

    def change(tensors: Tensors) -> Tensors:
        return {
            name: (t.to(dtype) if exactly else t.to(dtype) + 1e-4) if "norm" in name else t
            for name, t in tensors.items()
        }

    return change


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_fp32_norms_that_bf16_holds_are_converted_and_counted(
    weights: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(change=norms_in(torch.float32, True))
    package = export(checkpoint, tmp_path / "package", weights=weights)
    assert package.dtype == "bf16"
    assert package.manifest["source"]["converted"] == {"fp32 to bf16": 5}
    assert package.manifest["weights"]["mode"] == weights
    assert_as_transformers(package.path, checkpoint)


def test_fp32_norms_that_bf16_would_round_need_a_word(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(change=norms_in(torch.float32, False))
    with pytest.raises(ExportError, match=r"norm\.weight is fp32.*--dtype bf16.*--dtype fp32"):
        export(checkpoint, tmp_path / "package")
    assert not (tmp_path / "package").exists()
    whole = export(checkpoint, tmp_path / "whole", dtype="fp32")
    assert whole.manifest["source"]["converted"] == {"bf16 to fp32": 16}
    assert_as_transformers(whole.path, checkpoint)
    rounded = export(checkpoint, tmp_path / "rounded", dtype="bf16")
    assert rounded.manifest["source"]["converted"] == {"fp32 to bf16": 5}


def test_a_file_of_another_dtype_than_config_json_says(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(change=lambda tensors: {n: t.half() for n, t in tensors.items()})
    # drawn in bf16, so fp16 holds them, and bf16 again
    package = export(checkpoint, tmp_path / "package")
    assert package.dtype == "bf16" and package.manifest["weights"]["mode"] == "convert"
    assert_as_transformers(package.path, checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_named_wherever_it_is_read(
    value: float, made: Callable[..., Path], tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        return tensors

    checkpoint = made(change=spoil)
    export(checkpoint, tmp_path / "unread")  # by reference: no value is read
    for number, asked in enumerate(({"check_values": True}, {"dtype": "fp32"})):
        with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds"):
            export(checkpoint, tmp_path / str(number), **asked)


# --- names


@pytest.mark.parametrize(
    ("prefix", "outer"),
    [
        ("", ""),
        ("model.model.", "model."),
        ("language_model.model.", "language_model."),
        ("base_model.model.model.", "base_model.model."),
        ("module.model.", "module."),
        ("_orig_mod.model.", "_orig_mod."),
        ("_orig_mod.module.model.", "_orig_mod.module."),
        ("module.language_model.", "module."),
        ("model.language_model.", ""),  # as multimodal models have it
        ("model.model.", ""),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_prefix_that_the_whole_checkpoint_has_is_understood(
    prefix: str, outer: str, tied: bool, made: Callable[..., Path], tmp_path: Path
) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {
            outer + name if name.startswith("lm_head") else prefix + name.removeprefix("model."): t
            for name, t in tensors.items()
        }

    plain = export(made(tie_word_embeddings=tied), tmp_path / "plain", weights="copy")
    right = logits_of(plain.path)
    checkpoint = made(change=rename, tie_word_embeddings=tied)
    assert open_checkpoint(checkpoint).prefix == prefix
    package = export(checkpoint, tmp_path / "package")
    assert np.array_equal(logits_of(package.path), right)
    assert any("tensor names begin with" in note for note in package.manifest["source"]["notes"])


def test_a_prefix_that_only_some_tensors_have_is_refused_with_both_names(
    made: Callable[..., Path],
) -> None:
    def rename(tensors: Tensors) -> Tensors:
        tensors["embed_tokens.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    with pytest.raises(
        CheckpointError, match=r"model\.embed_tokens\.weight.*it has.* embed_tokens"
    ):
        open_checkpoint(made(change=rename))


def test_an_unknown_prefix_is_refused_with_the_names_that_are_there(
    made: Callable[..., Path],
) -> None:
    with pytest.raises(CheckpointError, match=r"lacks.*it has.*thinker\."):
        open_checkpoint(
            made(change=lambda tensors: {f"thinker.{n}": t for n, t in tensors.items()})
        )


# --- leftovers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_buffers_of_the_right_frequencies_are_passed_over(
    dtype: torch.dtype, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(change=with_buffers(1.0, dtype))
    package = export(checkpoint, tmp_path / "package")
    assert any("2 buffers" in note for note in package.manifest["source"]["notes"])
    assert_as_transformers(package.path, checkpoint)


@pytest.mark.parametrize("factor", [0.5, 1.02, 4.0])
def test_buffers_of_other_frequencies_are_refused(factor: float, made: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="other rotary frequencies"):
        open_checkpoint(made(change=with_buffers(factor, torch.float32)))


def two_shards(checkpoint: Path, extra: Tensors, listed: bool) -> Path:
    """The same weights in two shards, the second with `extra` beside its own."""
    file = checkpoint / "model.safetensors"
    tensors = list(load_file(file).items())
    parts = dict(tensors[::2]), dict(tensors[1::2])
    file.unlink()
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        weight_map |= dict.fromkeys(part, name)
        save_file(part | extra if number else part, checkpoint / name, {"format": "pt"})
    if listed:
        weight_map |= {
            name: "model-00002-of-00002.safetensors" for name in extra if name not in weight_map
        }
    write_index(checkpoint, weight_map)
    return checkpoint


def test_the_index_decides_what_is_meant(made: Callable[..., Path], tmp_path: Path) -> None:
    plain = made()
    head = load_file(plain / "model.safetensors")["lm_head.weight"]
    kept = Path(shutil.copytree(plain, tmp_path / "kept"))
    twice = two_shards(plain, {"lm_head.weight": head}, listed=True)
    package = export(twice, tmp_path / "package")
    assert any(
        "twice in the shards, the same bytes" in note
        for note in package.manifest["source"]["notes"]
    )
    assert_as_transformers(package.path, kept)


def test_two_tensors_of_one_name_that_differ_are_refused(made: Callable[..., Path]) -> None:
    plain = made()
    head = load_file(plain / "model.safetensors")["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in two shards, and differs"):
        open_checkpoint(two_shards(plain, {"lm_head.weight": head + 1}, True))


def test_a_stray_in_a_shard_is_noted(made: Callable[..., Path]) -> None:
    stray = {"model.layers.9.mlp.up_proj.weight": torch.zeros(3, 3)}
    notes = open_checkpoint(two_shards(made(), stray, listed=False)).notes
    assert any("model.layers.9.mlp.up_proj.weight in the shards but not" in note for note in notes)


def test_an_adapter_beside_the_weights_needs_a_word(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made()
    plain = export(checkpoint, tmp_path / "plain")
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"adapter.*--adapter ignore"):
        export(checkpoint, tmp_path / "package")
    package = export(checkpoint, tmp_path / "package", adapter="ignore")
    assert np.array_equal(logits_of(package.path), logits_of(plain.path))


def test_keys_that_nobody_reads_are_in_the_manifest_and_strict_refuses_them(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(unsloth_fixed=True, pruned_heads={})
    package = export(checkpoint, tmp_path / "package")
    assert package.manifest["model"]["unread_keys"] == ["pruned_heads", "unsloth_fixed"]
    with pytest.raises(ConfigError, match=r"pruned_heads, unsloth_fixed.*--strict"):
        export(checkpoint, tmp_path / "strict", strict=True)


def test_ids_beyond_the_embedding_are_noted(made: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = made()
    told: list[str] = []
    for highest, expected in ((47, 0), (48, 1)):
        content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": highest}]}
        (checkpoint / "tokenizer.json").write_text(json.dumps(content))
        export(checkpoint, tmp_path / str(highest), note=told.append)
        assert len(told) == expected
    assert "48" in told[0]
