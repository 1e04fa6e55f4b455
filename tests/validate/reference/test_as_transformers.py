"""What the oracle adds to transformers is what it says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwenport.validate.reference import Reference, Text

from .pairs import TEXTS, Pair, same


@pytest.mark.parametrize("name", ["qwen2 bf16 tied", "llama bf16 llama3", "qwen3_moe fp32 sharded"])
def test_positions_do_not_start_at_zero(name: str, pair_of: Callable[[str], Pair]) -> None:
    """The same model with positions from zero, whose rotary module adds the distance itself."""
    pair = pair_of(name)
    plain = AutoModelForCausalLM.from_pretrained(
        pair.path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    rotary = plain.model.rotary_emb
    original = rotary.forward
    text = TEXTS[0]
    for first in (0, 1, 37):
        rotary.forward = lambda x, position_ids, first=first: original(x, position_ids + first)
        with torch.inference_mode():
            expected = plain(torch.tensor([text.tokens]), use_cache=False).logits[0].numpy()
        for reference in pair.both():
            (logits,) = reference.logits([replace(text, first_position=first)])
            assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    (zero,) = pair.whole.logits([text])
    assert not same(zero, logits)  # of 37: another rounding
    # Rotary embeddings know distances only, so that a mask other than causal would show here.
    assert np.abs(zero - logits).max() <= 1e-4 * np.abs(zero).max()


@pytest.mark.parametrize("name", ["llama fp32", "qwen2 fp32 tied", "qwen2_moe fp32"])
def test_a_later_token_changes_nothing_before_it(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    text = Text.ending(range(3, 24), 21, first_position=9)
    other = replace(text, tokens=(*text.tokens[:12], 40, *text.tokens[13:]))
    for reference in pair.both():
        one, changed = reference.hidden_states([text, other])
        for a, b in zip(one[1:], changed[1:], strict=True):
            assert same(a[:12], b[:12])
            assert not np.isclose(a[12:], b[12:]).all(axis=1).any()


def test_rounding_to_the_target_s_dtype_comes_first(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("qwen2 fp32 to fp16")
    table = pair.case.tensors()["model.embed_tokens.weight"][[7, 7, 0]]
    for reference in pair.both():
        assert reference.weights_note == "fp32, weights rounded to fp16 first"
        assert same(reference.embed([7, 7, 0]), table.half().float().numpy())
        assert not same(reference.embed([7, 7, 0]), table.numpy())
    assert pair_of("qwen2 fp32 tied").whole.weights_note == "fp32"


@pytest.mark.parametrize(
    "name", ["llama fp32 dynamic", "qwen2 fp32 yarn", "llama bf16 llama3", "qwen2 bf16 tied"]
)
def test_rope_tables_are_the_same(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    whole, streamed = (reference.rope_tables(3, 60) for reference in pair.both())
    assert all(map(same, whole, streamed))
    assert whole[0].shape == (57, pair.target.config.head_dim // 2)


def test_dynamic_rope_is_for_the_target_s_length_and_no_other(
    pair_of: Callable[[str], Pair],
) -> None:
    pair = pair_of("llama fp32 dynamic")
    for streamed in (False, True):
        shorter = Reference(replace(pair.target, rope_length=70), pair.path, streamed=streamed)
        before = shorter.rope_tables(0, 20)
        assert not same(before[0], pair.whole.rope_tables(0, 20)[0])
        shorter.logits([Text.ending(tuple(range(48)) * 2, 1)])  # longer than what it is for
        assert all(map(same, before, shorter.rope_tables(0, 20)))
