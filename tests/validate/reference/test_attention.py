"""transformers' two attention implementations: the same mathematics, each with its own rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwenport.validate.errors import ValidationError

from .pairs import TEXTS, Pair, rel_l2, same

NAMES = ["qwen2 bf16 tied", "llama fp32", "qwen2_moe fp32", "qwen3_moe bf16 stacked"]


@pytest.fixture
def calls(pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of torch's attention, whether it was given a mask."""
    for name in NAMES:
        pair_of(name)  # whose export calls it as well
    made: list[bool] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        made.append(keywords.get("attn_mask") is not None)
        return original(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_both_agree_in_fp32_to_rounding(
    name: str, pair_of: Callable[[str], Pair], calls: list[bool]
) -> None:
    pair = pair_of(name)
    for reference in pair.both():
        eager = reference.logits(TEXTS)
        assert not calls
        sdpa = reference.logits(TEXTS, attention="sdpa")
        assert len(calls) == len(TEXTS) * reference.num_layers
        assert not any(calls)  # torch's own causal mask: transformers left it out
        for one, other in zip(eager, sdpa, strict=True):
            assert rel_l2(other, one) < 1e-5
        calls.clear()
        assert all(map(same, eager, reference.logits(TEXTS)))  # eager again
        assert not calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sdpa_streamed_and_whole_are_transformers_own(
    name: str, dtype: str, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(name)
    plain = AutoModelForCausalLM.from_pretrained(
        pair.path,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        attn_implementation="sdpa",
        experts_implementation="eager",
    ).eval()
    whole, streamed = (r.logits(TEXTS, dtype, attention="sdpa") for r in pair.both())
    assert all(map(same, whole, streamed))
    text = TEXTS[0]
    with torch.inference_mode():
        expected = plain(torch.tensor([text.tokens]), use_cache=False).logits[0].float().numpy()
    assert rel_l2(whole[0], expected) < (1e-6 if dtype == "fp32" else 1e-2)
    states = [r.hidden_states(TEXTS, dtype, attention="sdpa") for r in pair.both()]
    for one, other in zip(*states, strict=True):
        assert all(map(same, one, other))
    routes = [r.routing(TEXTS, dtype, attention="sdpa") for r in pair.both()]
    for first, second in zip(*routes, strict=True):
        assert first.keys() == second.keys()
        assert all(same(first[layer][0], second[layer][0]) for layer in first)


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_they_round_differently(name: str, pair_of: Callable[[str], Pair]) -> None:
    for reference in pair_of(name).both():
        eager = reference.hidden_states(TEXTS[:1], "bf16")[0]
        sdpa = reference.hidden_states(TEXTS[:1], "bf16", attention="sdpa")[0]
        assert same(eager[0], sdpa[0])  # the embedding
        assert not same(eager[1], sdpa[1])
        assert rel_l2(sdpa[1], eager[1]) < 0.1


def test_a_failed_run_leaves_eager_behind(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, calls: list[bool]
) -> None:
    for reference in pair_of("llama fp32").both():

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(reference, "_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            reference.logits(TEXTS, attention="sdpa")
        monkeypatch.setattr(reference, "_progress", lambda *_: None)
        assert calls
        calls.clear()
        reference.logits(TEXTS)
        assert not calls


def test_other_attention_is_refused(pair_of: Callable[[str], Pair]) -> None:
    hidden = np.zeros((2, 24), dtype=np.float32)
    for reference in pair_of("llama fp32").both():
        for run in (reference.logits, reference.hidden_states, reference.routing):
            with pytest.raises(ValidationError, match="'flash_attention_2'; it has eager, sdpa"):
                run(TEXTS, attention="flash_attention_2")
        with pytest.raises(ValidationError, match="'flex'"):
            reference.first_nonfinite(TEXTS[0], "fp32", attention="flex")
        with pytest.raises(ValidationError, match="'flex'"):
            reference.run_layer(0, "fp32", hidden, attention="flex")
