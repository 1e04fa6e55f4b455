"""What is no checkpoint, what is no token, and what readers of this code found."""

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
from checkpoints import mini, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from oddities import Tensors, assert_as_transformers

from qwenport.engines import SessionError, open_session
from qwenport.exporter import (
    CheckpointError,
    ConfigError,
    export,
    open_checkpoint,
    parse_config,
)

# --- what is no checkpoint


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


# --- sessions take integers


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
    with pytest.raises(SessionError, match=r"flat list of integers|more than 64 bits"):
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


# --- what a reader of this code found


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
