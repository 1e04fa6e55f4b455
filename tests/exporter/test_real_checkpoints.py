"""Checkpoints as they really come: other names, several dtypes, leftovers. What is right, transformers says."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import mini, random_tensors, tensor_shapes, write_checkpoint, write_index
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenport.engines import SessionError, open_session
from qwenport.exporter import (
    CheckpointError,
    ConfigError,
    ExportError,
    export,
    open_checkpoint,
    parse_config,
)

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
Tensors = dict[str, torch.Tensor]


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


def logits_of(package: Path) -> np.ndarray:
    (logits,) = open_session(package).prefill([TOKENS], all_logits=True)
    return logits


def theirs(checkpoint: Path, **arguments: Any) -> np.ndarray:
    """transformers' logits in fp32, whatever the files hold."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", **arguments
    )
    return model(torch.tensor([TOKENS])).logits[0].detach().numpy()


def assert_as_transformers(package: Path, checkpoint: Path, **arguments: Any) -> None:
    right = theirs(checkpoint, **arguments)
    assert np.linalg.norm(logits_of(package) - right) <= 1e-5 * np.linalg.norm(right)


# ---- dtypes


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


# ---- names


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


# ---- leftovers


def with_buffers(factor: float, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        frequencies = 500000.0 ** -(torch.arange(0, 16, 2) / 16) * factor
        return tensors | {
            f"model.layers.{n}.self_attn.rotary_emb.inv_freq": frequencies.to(dtype, copy=True)
            for n in range(2)
        }

    return change


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


# ---- what is no checkpoint


def test_what_is_no_checkpoint_says_what_it_is_and_what_to_do(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made()
    package = export(checkpoint, tmp_path / "package").path
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path, said in {
        "Qwen/Qwen2.5-0.5B": "hf download Qwen/Qwen2.5-0.5B",
        "https://huggingface.co/Qwen/Qwen2.5-0.5B": "hf download Qwen/Qwen2.5-0.5B",
        "pipe": "a file",
        "model.gguf": "GGUF",
        "gguf": "GGUF",
        str(checkpoint / "model.safetensors"): "single weight file",
        str(checkpoint / "config.json"): "a checkpoint is a directory",
        str(package): "a package or engine",
        "adapter": "an adapter without its model",
        "nowhere": "no such directory",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)


# ---- sessions take integers


@settings(max_examples=60)
@given(
    row=st.one_of(
        st.lists(st.floats(0, 40), min_size=1, max_size=3),
        st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=2), min_size=1, max_size=2),
        st.lists(st.booleans(), min_size=1, max_size=3),
        st.lists(st.text(max_size=2), min_size=1, max_size=2),
        st.integers(0, 40),
        st.just([1, True]),
        st.just([2**70]),
        st.just([None]),
        st.just("abc"),
    )
)
def test_a_session_refuses_what_is_no_list_of_integers(row: Any, session: Any) -> None:
    with pytest.raises(SessionError, match="flat list of integers"):
        session.prefill([row])
    assert session.lengths.tolist() == [0]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("session")
    raw = mini("llama", torch_dtype="bfloat16")
    checkpoint = write_checkpoint(folder / "c", raw, dtype=torch.bfloat16)
    return open_session(str(export(str(checkpoint), str(folder / "p")).path))


def test_paths_may_be_text_and_integers_must_be_whole(session: Any) -> None:
    for call in (
        lambda: session.truncate(0.0),
        lambda: session.truncate(0, row=False),
        lambda: session.reset(first_position=1.5),
    ):
        with pytest.raises(SessionError, match="must be an integer"):
            call()
    assert session.prefill([np.array([1, 2], dtype=np.uint8)])[0].shape == (1, 48)
    session.reset()


def test_every_family_has_parity_with_transformers(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    from qwenport.exporter.families import FAMILIES

    for family in FAMILIES:
        checkpoint = made(family)
        assert (
            parse_config(json.loads((checkpoint / "config.json").read_text())).model_type == family
        )
        package = export(checkpoint, tmp_path / family, weights="copy")
        assert_as_transformers(package.path, checkpoint, experts_implementation="eager")
        shutil.rmtree(checkpoint)


# ---- what a reader of this code found


@pytest.mark.parametrize(
    ("dtype", "head_dim", "theta", "scaling"),
    [
        (torch.float16, 128, 1e6, None),  # subnormal in fp16
        (torch.float32, 16, 1e4, "yarn:4"),
        (torch.float32, 16, 1e4, "dynamic:2"),
        (torch.bfloat16, 16, 1e4, None),
    ],
)
def test_buffers_of_the_config_s_own_frequencies_are_passed_over(
    dtype: torch.dtype, head_dim: int, theta: float, scaling: str | None, made: Callable[..., Path]
) -> None:
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def with_buffers(tensors: Tensors) -> Tensors:
        name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
        return tensors | {name.format(i): frequencies.to(dtype).clone() for i in range(2)}

    checkpoint = made("llama", with_buffers, head_dim=head_dim, rope_theta=theta)
    assert any("rotary" in note for note in open_checkpoint(checkpoint, scaling).notes)


@pytest.mark.parametrize(
    "prefix", ["language_model.", "base_model.model.", "module.", "model.model."]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_oracle_finds_a_head_behind_any_prefix(
    prefix: str, streamed: bool, made: Callable[..., Path], tmp_path: Path
) -> None:
    from qwenport.validate import validate

    outer = prefix if prefix != "model.model." else "model."

    def renamed(tensors: Tensors) -> Tensors:
        return {
            outer + name if name == "lm_head.weight" else prefix + name.removeprefix("model."): t
            for name, t in tensors.items()
        }

    checkpoint = made("llama", renamed)
    package = export(checkpoint, tmp_path / "package").path
    report = validate(package, checkpoint, budget="quick", streamed=streamed)
    assert report.passed, report.failures


def test_a_tied_head_of_another_dtype_is_the_embedding_if_its_values_are(
    made: Callable[..., Path],
) -> None:
    def with_head(difference: float) -> Callable[[Tensors], Tensors]:
        def change(tensors: Tensors) -> Tensors:
            head = tensors["model.embed_tokens.weight"].float()
            head[-1, -1] += difference
            return tensors | {"lm_head.weight": head}

        return change

    notes = open_checkpoint(made("qwen2", with_head(0.0))).notes
    assert any("lm_head.weight repeats the embedding" in note for note in notes)
    with pytest.raises(CheckpointError, match="differs"):
        open_checkpoint(made("qwen2", with_head(1e-3)))


@pytest.mark.parametrize("row", [[1, np.True_], np.array([2**63], np.uint64), [2**64]])
def test_tokens_that_numpy_would_turn_into_others_are_refused(
    row: Any, made: Callable[..., Path], tmp_path: Path
) -> None:
    session = open_session(export(made(), tmp_path / "package").path)
    with pytest.raises(SessionError):
        session.prefill([row])


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_slow": 1e-320}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 10**400,
            }
        },
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "head_dim": 2},
        {"max_position_embeddings": 10**9},
    ],
    ids=str,
)
def test_numbers_that_no_model_has_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(mini("llama", **changes))


def test_a_key_that_is_half_a_character_is_refused(made: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="no Unicode"):
        open_checkpoint(made(**{"\ud800": 1}))


def test_a_long_list_of_dense_layers_is_read_in_no_time() -> None:
    raw = mini("qwen3_moe", num_hidden_layers=1000, mlp_only_layers=[0] * 1_000_000)
    begun = time.perf_counter()
    assert 0 not in parse_config(raw).moe.layers
    assert time.perf_counter() - begun < 2


def test_no_family_keeps_tensors_in_fp32_in_transformers() -> None:
    """Else those would have to keep their dtype in the graph."""
    import transformers

    from qwenport.exporter.families import FAMILIES

    for family in FAMILIES:
        kind = transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[family]]
        assert not kind._keep_in_fp32_modules and not kind._keep_in_fp32_modules_strict
