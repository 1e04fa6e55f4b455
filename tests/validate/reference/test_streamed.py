"""Streamed and whole, the oracle gives the same to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from qwenport.validate.reference import Reference, Text
from qwenport.validate.reference.stored import StoredWeights

from .pairs import DTYPES, TEXTS, Pair, same


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_same_to_the_last_bit(pair: Pair, dtype: str) -> None:
    whole, streamed = (reference.logits(TEXTS, dtype) for reference in pair.both())
    for text, one, other in zip(TEXTS, whole, streamed, strict=True):
        assert one.shape == (len(text.positions), pair.target.config.vocab_size)
        assert np.isfinite(one).all()
        assert one.dtype == np.float32
        assert same(one, other)


def test_greedy_is_the_same_to_the_last_bit_and_takes_the_most_likely_token(pair: Pair) -> None:
    prompt, count = list(range(4, 15)), 7
    tokens, logits = pair.whole.greedy(prompt, count)
    streamed_tokens, streamed_logits = pair.streamed.greedy(prompt, count)
    assert tokens == streamed_tokens
    assert same(logits, streamed_logits)
    assert pair.streamed.greedy(prompt, count)[1] is streamed_logits  # kept, not computed again
    sequence = list(prompt)
    for token in tokens:
        (last,) = pair.whole.logits([Text.ending(sequence, 1)])
        assert token == int(last[0].argmax())
        sequence.append(token)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hidden_states_are_the_same_and_lead_to_the_logits(pair: Pair, dtype: str) -> None:
    whole, streamed = (reference.hidden_states(TEXTS, dtype) for reference in pair.both())
    logits = pair.whole.logits(TEXTS, dtype)
    for reference in pair.both():
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        with reference.final_norm(dtype) as norm, reference.head(dtype) as head, torch.no_grad():
            for text, states, expected in zip(TEXTS, whole, logits, strict=True):
                rows = norm(torch.from_numpy(states[-1]).to(kind)[None])[:, list(text.positions)]
                assert same(head(rows)[0].float().numpy(), expected)
    for text, one, other in zip(TEXTS, whole, streamed, strict=True):
        assert len(one) == len(other) == pair.target.config.num_hidden_layers + 1
        assert all(s.shape == (len(text.tokens), pair.case.raw["hidden_size"]) for s in one)
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
        if dtype == "fp32":
            assert same(one[0], pair.whole.embed(text.tokens))
            assert same(one[0], pair.streamed.embed(text.tokens))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_routing_is_the_same_and_what_the_softmax_says(mixture: Pair, dtype: str) -> None:
    whole, streamed = (reference.routing(TEXTS, dtype) for reference in mixture.both())
    moe = mixture.target.config.moe
    assert moe is not None
    for text, one, other in zip(TEXTS, whole, streamed, strict=True):
        assert tuple(one) == tuple(other) == moe.layers
        for layer, (logits, chosen) in one.items():
            assert logits.shape == (len(text.tokens), moe.num_experts)
            assert chosen.shape == (len(text.tokens), moe.experts_per_token)
            assert same(logits, other[layer][0])
            assert same(chosen, other[layer][1])
            probabilities = torch.softmax(torch.from_numpy(logits), dim=-1)
            assert torch.equal(
                probabilities.gather(1, torch.from_numpy(chosen)),
                probabilities.topk(moe.experts_per_token).values,
            )


def test_a_dense_model_routes_nothing(pair_of: Callable[[str], Pair]) -> None:
    assert pair_of("llama fp32").streamed.routing(TEXTS) == [{}, {}, {}]


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_are_the_same_and_streamed_weights_are_dropped(pair: Pair, dtype: str) -> None:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, arguments in (
        *(("layer", (index,)) for index in range(pair.whole.num_layers)),
        ("final_norm", ()),
        ("head", ()),
    ):
        with (
            getattr(pair.whole, name)(*arguments, dtype) as one,
            getattr(pair.streamed, name)(*arguments, dtype) as other,
        ):
            assert type(one) is type(other)
            theirs, ours = one.state_dict(), other.state_dict()
            assert theirs.keys() == ours.keys()
            for key, weight in theirs.items():
                assert weight.dtype == kinds.get(dtype, torch.float64)
                assert ours[key].dtype == weight.dtype
                assert torch.equal(weight, ours[key])
            for module in (one, other):
                assert not any(part.training for part in module.modules())
                assert not any(parameter.requires_grad for parameter in module.parameters())
        assert all(parameter.is_meta for parameter in other.parameters())
    with pair.whole.layer(0, "fp32") as first, pair.whole.layer(0, "fp32") as second:
        assert first is second


def test_layers_and_position_embeddings_by_hand_are_the_model(pair: Pair) -> None:
    text = TEXTS[1]
    positions = text.first_position + torch.arange(len(text.tokens))[None]
    mask = torch.full((1, 1, 7, 7), torch.finfo(torch.float32).min).triu(1)
    states = pair.whole.hidden_states([text])[0]
    for reference in pair.both():
        cos_and_sin = reference.position_embeddings(positions, torch.float32)
        for index in range(reference.num_layers):
            with reference.layer(index, "fp32") as layer:
                made = layer(
                    torch.from_numpy(states[index])[None],
                    attention_mask=mask,
                    position_ids=positions,
                    position_embeddings=cos_and_sin,
                )
            assert same(made[0].numpy(), states[index + 1])


@pytest.mark.parametrize("name", ["qwen2 bf16 tied", "qwen2_moe fp32", "llama fp32 dynamic"])
def test_the_first_layers_only(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    cut = [Reference(pair.target, pair.path, layers=1, streamed=s) for s in (False, True)]
    assert [reference.num_layers for reference in cut] == [1, 1]
    states = pair.whole.hidden_states(TEXTS)
    with pair.whole.final_norm("fp32") as norm, pair.whole.head("fp32") as head, torch.no_grad():
        expected = [
            head(norm(torch.from_numpy(of_text[1]))[None, list(text.positions)])[0].numpy()
            for text, of_text in zip(TEXTS, states, strict=True)
        ]
    for reference in cut:
        assert all(map(same, reference.logits(TEXTS), expected))
        assert [len(of_text) for of_text in reference.hidden_states(TEXTS)] == [2, 2, 2]
    assert all(map(same, *(reference.logits(TEXTS, "bf16") for reference in cut)))
    prompt = list(range(9))
    assert same(cut[0].greedy(prompt, 4)[1], cut[1].greedy(prompt, 4)[1])
    assert not same(cut[0].greedy(prompt, 4)[1], pair.whole.greedy(prompt, 4)[1])


def test_a_batch_is_one_pass_with_one_module_s_weights_at_a_time(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("qwen2_moe fp32")
    loaded: list[str] = []
    now: list[str] = []
    original = StoredWeights.loaded

    @contextlib.contextmanager
    def watched(self: StoredWeights, prefix: str, *arguments: Any) -> Iterator[Any]:
        assert not now, f"{prefix} while {now} is in memory"
        loaded.append(prefix)
        now.append(prefix)
        with original(self, prefix, *arguments) as module:
            yield module
        now.pop()

    monkeypatch.setattr(StoredWeights, "loaded", watched)
    calls: list[tuple[str, int, int]] = []
    streamed = Reference(
        pair.target, pair.path, streamed=True, progress=lambda *call: calls.append(call)
    )
    assert loaded == []
    streamed.logits(TEXTS)
    layers = [f"model.layers.{index}." for index in range(3)]
    assert loaded == [*layers, "model.norm.", "lm_head."]
    assert calls == [("logits", done, 9) for done in range(1, 10)]
    calls.clear()
    streamed.greedy([1, 2, 3], 2)
    assert calls == [("greedy", done, 6) for done in range(1, 7)]


def test_progress_of_the_whole_model_counts_the_same(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("qwen2_moe fp32")
    calls: list[tuple[str, int, int]] = []
    whole = Reference(pair.target, pair.path, progress=lambda *call: calls.append(call))
    whole.hidden_states(TEXTS)
    assert calls == [("hidden states", done, 9) for done in range(1, 10)]
    calls.clear()
    whole.greedy([1, 2, 3], 2)
    assert calls == [("greedy", done, 6) for done in range(1, 7)]
    whole.greedy([1, 2, 3], 2)
    assert len(calls) == 6
