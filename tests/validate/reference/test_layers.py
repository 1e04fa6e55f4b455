"""One decoder layer on given hidden states, in pieces through transformers' cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Choices, Text
from qwenport.validate.reference.stored import StoredWeights

from .pairs import TEXTS, Pair, rel_l2, same

FAMILIES = ["qwen2 fp32 tied", "llama fp32", "qwen2_moe fp32", "qwen3_moe fp32 sharded"]
ROUNDING = {"fp32": 1e-5, "fp64": 1e-6, "bf16": 0.03, "fp16": 3e-3}  # fp64: returned in fp32


def _hidden(pair: Pair, size: int, seed: int = 0) -> Any:
    width = pair.case.raw["hidden_size"]
    return np.random.default_rng(seed).standard_normal((size, width)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layer_after_layer_is_the_model(pair: Pair, dtype: str, attention: str) -> None:
    for text in TEXTS:
        states = pair.whole.hidden_states([text], dtype, attention=attention)[0]
        for reference in pair.both():
            for index in range(reference.num_layers):
                made = reference.run_layer(
                    index, dtype, states[index], text.first_position, attention
                )
                assert same(made, states[index + 1])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15)
@given(
    size=st.integers(1, 40),
    pieces=st.integers(1, 45),
    first=st.integers(0, 1000),
    attention=st.sampled_from(["eager", "sdpa"]),
    dtype=st.sampled_from(["fp32", "fp64"]),
    seed=st.integers(0, 100),
)
def test_pieces_make_no_difference_but_rounding(
    name: str,
    pair_of: Callable[[str], Pair],
    size: int,
    pieces: int,
    first: int,
    attention: str,
    dtype: str,
    seed: int,
) -> None:
    pair = pair_of(name)
    hidden = _hidden(pair, size, seed)
    for index in range(pair.whole.num_layers):
        (whole, one_piece), (streamed, _) = (
            (
                reference.run_layer(index, dtype, hidden, first, attention, pieces),
                reference.run_layer(index, dtype, hidden, first, attention, size),
            )
            for reference in pair.both()
        )
        assert whole.shape == hidden.shape and whole.dtype == np.float32
        assert same(whole, streamed)
        assert rel_l2(whole, one_piece) < ROUNDING[dtype]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_pieces_in_half_precision_round_a_little_differently(
    name: str, dtype: str, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(name)
    hidden = _hidden(pair, 30)
    for reference in pair.both():
        whole, pieces = (reference.run_layer(0, dtype, hidden, 5, "eager", n) for n in (30, 7))
        # a token that another rounding sends to other experts is no matter of attention
        differ = np.linalg.norm(whole - pieces, axis=1) > ROUNDING[dtype] * np.linalg.norm(
            whole, axis=1
        )
        assert differ.sum() <= (2 if pair.target.config.moe else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_see_what_came_before_and_nothing_after(
    name: str, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(name)
    hidden = _hidden(pair, 24)
    changed = hidden.copy()
    changed[13] += 1
    for attention in ("eager", "sdpa"):
        one, other = (
            pair.streamed.run_layer(0, "fp64", state, 3, attention, 5)
            for state in (hidden, changed)
        )
        distance = np.abs(one - other).max(axis=1)
        assert distance[:13].max() < 1e-6
        assert distance[13:].min() > 1e-4


def test_positions_matter_by_their_distance_only(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("llama fp32")
    hidden = _hidden(pair, 20)
    near, far = (pair.whole.run_layer(1, "fp32", hidden, first, "eager", 6) for first in (0, 40))
    assert not same(near, far)
    assert rel_l2(far, near) < 1e-5


def test_dynamic_rope_stays_pinned(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("llama fp32 dynamic")
    text = Text.ending(tuple(range(48)) * 3, 1)  # longer than what the frequencies are for
    states = pair.whole.hidden_states([text])[0]
    for reference in pair.both():
        assert rel_l2(reference.run_layer(0, "fp32", states[0], 0, "eager", 50), states[1]) < 1e-5


def test_several_inputs_use_one_load_of_the_layer(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("qwen3_moe fp32 sharded")
    loaded: list[str] = []
    original = StoredWeights.loaded

    @contextlib.contextmanager
    def watched(self: StoredWeights, prefix: str, *arguments: Any) -> Iterator[Any]:
        loaded.append(prefix)
        with original(self, prefix, *arguments) as module:
            yield module

    monkeypatch.setattr(StoredWeights, "loaded", watched)
    inputs = [_hidden(pair, size, size) for size in (3, 17, 9)]
    with pair.streamed.opened_layer(1, "fp32") as layer:
        assert type(layer.module).__name__ == "Qwen3MoeDecoderLayer"
        made = [layer.run(hidden, 4, queries_at_once=8) for hidden in inputs]
    assert loaded == ["model.layers.1."]
    for hidden, found in zip(inputs, made, strict=True):
        assert same(found, pair.whole.run_layer(1, "fp32", hidden, 4, queries_at_once=8))
    assert all(parameter.is_meta for parameter in layer.module.parameters())


def test_choices_are_taken_over_in_every_piece(mixture: Pair) -> None:
    moe = mixture.target.config.moe
    assert moe is not None
    index, k = moe.layers[-1], moe.experts_per_token
    text = TEXTS[0]
    logits, chosen = mixture.whole.routing([text])[0][index]
    experts = np.argsort(logits, axis=1)[:, :k].copy()  # the worst
    choices = Choices({index: experts}, np.inf)
    states = mixture.whole.hidden_states([text])[0]
    expected = mixture.whole.hidden_states([text], choices=[choices])[0][index + 1]
    moved = sum(set(a) != set(b) for a, b in zip(experts, chosen, strict=True))
    for reference in mixture.both():
        before = reference.replayed
        made = reference.run_layer(index, "fp32", states[index], 0, "eager", 4, choices)
        assert reference.replayed - before == moved > 0
        assert rel_l2(made, expected) < 1e-5
        free = reference.run_layer(index, "fp32", states[index], 0, "eager", 4)
        assert rel_l2(free, expected) > 1e-3
        short = Choices({index: experts[:20]}, np.inf)  # of another text
        assert same(reference.run_layer(index, "fp32", states[index], 0, "eager", 4, short), free)


def test_a_long_text_needs_the_scores_of_one_piece(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("llama fp32")
    shapes: list[tuple[int, ...]] = []
    original = torch.nn.functional.softmax

    def watched(scores: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        shapes.append(tuple(scores.shape))
        return original(scores, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "softmax", watched)
    size = 3000
    hidden = _hidden(pair, size)
    made = pair.streamed.run_layer(0, "fp32", hidden)
    assert made.shape == hidden.shape
    assert shapes == [
        (1, 4, min(512, size - start), min(start + 512, size)) for start in range(0, size, 512)
    ]


@pytest.mark.parametrize(
    ("hidden", "first", "pieces"),
    [
        (np.zeros((3, 23), dtype=np.float32), 0, 4),
        (np.zeros((0, 24), dtype=np.float32), 0, 4),
        (np.zeros((1, 3, 24), dtype=np.float32), 0, 4),
        (np.zeros((3, 24), dtype=np.float32), -1, 4),
        (np.zeros((3, 24), dtype=np.float32), 0, 0),
    ],
)
def test_what_a_layer_cannot_run_is_refused(
    hidden: Any, first: int, pieces: int, pair_of: Callable[[str], Pair]
) -> None:
    for reference in pair_of("llama fp32").both():
        with pytest.raises(ValidationError, match="a layer"):
            reference.run_layer(0, "fp32", hidden, first, queries_at_once=pieces)
        with pytest.raises(ValidationError, match="2 layers"):
            reference.run_layer(2, "fp32", hidden)
        with pytest.raises(ValidationError, match="'int4'"):
            reference.run_layer(0, "int4", hidden)


# --- how far the model's own rounding goes


def _through_the_cache(model: Any, tokens: list[int], size: int) -> Any:
    """transformers' own logits [S, vocab], `size` tokens a forward."""
    cache, logits = None, []
    for start in range(0, len(tokens), size):
        with torch.inference_mode():
            made = model(
                torch.tensor([tokens[start : start + size]]), past_key_values=cache, use_cache=True
            )
        cache = made.past_key_values
        logits.append(made.logits[0])
    return torch.cat(logits).double().numpy()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("length", "pieces", "size"), [(23, 4, 6), (40, 2, 20), (40, 16, 3), (5, 9, 1)]
)
def test_own_rounding_is_the_larger_of_what_its_cache_and_what_fp64_make_of_it(
    name: str, length: int, pieces: int, size: int, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(name)
    tokens = [(7 * i + 3) % 48 for i in range(length)]
    plain = AutoModelForCausalLM.from_pretrained(
        pair.path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    whole, cached = (_through_the_cache(plain, tokens, n)[length // 2 :] for n in (length, size))
    exact = copy.deepcopy(plain).double()
    right = _through_the_cache(exact, tokens, length)[length // 2 :]
    expected = max(rel_l2(cached, whole), rel_l2(whole, right))
    found = pair.whole.own_rounding(tokens, pieces)
    assert found == pytest.approx(expected, rel=0.5, abs=2e-8)
    assert found < 1e-5
    assert found > 1e-8
    assert pair.streamed.own_rounding(tokens, pieces) == found


def test_own_rounding_reads_all_weights_once_in_each_dtype(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("qwen2_moe fp32")
    loaded: list[str] = []
    original = StoredWeights.loaded

    def watched(self: StoredWeights, prefix: str, *arguments: Any) -> Any:
        loaded.append(prefix)
        return original(self, prefix, *arguments)

    monkeypatch.setattr(StoredWeights, "loaded", watched)
    pair.streamed.own_rounding(range(20))
    assert loaded == [
        *(f"model.layers.{index}." for index in (0, 0, 1, 1, 2, 2)),
        "model.norm.",
        "model.norm.",
        "lm_head.",
    ]


def test_own_rounding_needs_pieces_and_tokens(pair_of: Callable[[str], Pair]) -> None:
    for reference in pair_of("llama fp32").both():
        assert reference.own_rounding([5]) < 1e-6  # one token has no pieces
        with pytest.raises(ValidationError, match="pieces"):
            reference.own_rounding([1, 2, 3], 1)
        with pytest.raises(ValidationError, match="text"):
            reference.own_rounding([])
        with pytest.raises(ValidationError, match="vocabulary"):
            reference.own_rounding([1, 48])
