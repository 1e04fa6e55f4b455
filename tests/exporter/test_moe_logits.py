"""Mixtures of experts on onnxruntime: transformers' logits, the same however the experts are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import mini, random_tensors, stack_experts, tensor_shapes, write_checkpoint
from packaged import assert_close, assert_logits_are_transformers, transformers_logits

from qwenport.engines import open_session
from qwenport.exporter import export

CASES: dict[str, dict[str, Any]] = {
    "qwen2_moe": mini("qwen2_moe"),
    "qwen2_moe, weights that sum to 1": mini("qwen2_moe", norm_topk_prob=True),
    "qwen2_moe, every second layer": mini(
        "qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[], num_hidden_layers=4
    ),
    "qwen2_moe, no dense layer": mini("qwen2_moe", mlp_only_layers=[]),
    "qwen2_moe, dense layers in front and behind": mini("qwen2_moe", mlp_only_layers=[0, 2]),
    "qwen2_moe, without biases": mini("qwen2_moe", qkv_bias=False),
    "qwen2_moe, tied": mini("qwen2_moe", tie_word_embeddings=True),
    "qwen2_moe, one expert a token": mini("qwen2_moe", num_experts_per_tok=1, norm_topk_prob=True),
    "qwen2_moe, every expert a token": mini("qwen2_moe", num_experts_per_tok=6),
    "qwen2_moe, one expert": mini("qwen2_moe", num_experts=1, num_experts_per_tok=1),
    "qwen2_moe, no experts": mini("qwen2_moe", num_experts=0),
    "qwen3_moe": mini("qwen3_moe"),
    "qwen3_moe, probabilities as weights": mini("qwen3_moe", norm_topk_prob=False),
    "qwen3_moe, with biases": mini("qwen3_moe", attention_bias=True),
    "qwen3_moe, head_dim of the hidden size": mini("qwen3_moe", head_dim=...),
    "qwen3_moe, every second layer": mini("qwen3_moe", decoder_sparse_step=2),
    "qwen3_moe, yarn": mini("qwen3_moe", rope_scaling={"type": "yarn", "factor": 4.0}),
}
TOKENS = torch.randint(0, 48, (1, 23), generator=torch.Generator().manual_seed(3))


def logits(package: Path) -> np.ndarray:
    """Of TOKENS [1, 23, vocab], from one prefill."""
    (found,) = open_session(package).prefill(TOKENS.tolist(), all_logits=True)
    return found[None]


def test_cases_have_a_head_dim_of_their_own_and_one_derived() -> None:
    own, derived = CASES["qwen3_moe"], CASES["qwen3_moe, head_dim of the hidden size"]
    assert own["head_dim"] != own["hidden_size"] // own["num_attention_heads"]
    assert "head_dim" not in derived


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers_and_the_same_in_every_form_of_the_package(
    name: str, tmp_path: Path
) -> None:
    raw = CASES[name]
    tensors = random_tensors(tensor_shapes(raw), torch.float32)
    single = write_checkpoint(tmp_path / "single", raw, tensors, shards=2)
    export(single, tmp_path / "linked")
    found = logits(tmp_path / "linked")
    assert_close(found, transformers_logits(single, TOKENS).numpy())
    export(single, tmp_path / "copied", weights="copy")
    assert np.array_equal(found, logits(tmp_path / "copied"))
    if not raw["num_experts"]:
        return
    stacked = write_checkpoint(tmp_path / "stacked", raw, stack_experts(tensors))
    assert_close(found, transformers_logits(stacked, TOKENS).numpy())
    for package, checkpoint, mode in (
        ("packed", single, "pack"),
        ("stacked, linked", stacked, "link"),
        ("stacked, copied", stacked, "copy"),
    ):
        export(checkpoint, tmp_path / package, weights=mode)
        assert np.array_equal(found, logits(tmp_path / package)), package


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, config in CASES.items()
        for mode in ("link", "pack")
        if mode == "link" or config["num_experts"]  # without experts there is nothing to pack
    ],
)
def test_onnxruntime_alone_computes_transformers_logits_in_steps(
    name: str, mode: str, tmp_path: Path
) -> None:
    """From the graph as it is exported: the operators' own bodies, no lowering."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", CASES[name])
    export(checkpoint, tmp_path / "package", weights=mode)
    assert_logits_are_transformers(checkpoint, tmp_path / "package")


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_prefill_in_pieces_and_decoding_agree_with_one_prefill(
    family: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", mini(family))
    export(checkpoint, tmp_path / "package", weights="pack")
    expected = logits(tmp_path / "package")[0]
    session = open_session(tmp_path / "package")
    ids = TOKENS[0].tolist()
    found = [session.prefill([ids[:9]], all_logits=True)[0]]
    found += [session.prefill([ids[9:14]], all_logits=True)[0]]
    found += [session.decode([token]) for token in ids[14:]]
    assert_close(np.concatenate(found), expected)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_mixture_converted_from_bf16_computes_transformers_fp32_logits(
    family: str, tmp_path: Path
) -> None:
    raw = mini(family, torch_dtype="bfloat16")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, dtype=torch.bfloat16)
    export(checkpoint, tmp_path / "package", dtype="fp32")
    assert_close(logits(tmp_path / "package"), transformers_logits(checkpoint, TOKENS).numpy())
