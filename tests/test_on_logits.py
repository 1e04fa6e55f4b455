"""The hook that edits logits before a token is drawn, and log-probabilities of what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
from fake_session import VOCAB, FakeSession, model
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport import engines, exporter
from qwenport.engines import (
    GenerateOptions,
    Generation,
    GenerationError,
    Sampler,
    SamplingError,
    SamplingParams,
    generate,
)

torch = pytest.importorskip("torch")

token = st.integers(0, VOCAB - 1)
prompts = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    given_prompts=prompts,
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.8]),
        top_k=st.sampled_from([0, 4]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
    ),
    top=st.integers(0, VOCAB),
    banned=st.sets(token, max_size=VOCAB - 1),
)
def test_tokens_are_drawn_from_the_edited_logits(given_prompts, params, top, banned) -> None:
    """Also: the hook gets the model's logits and all tokens before, in order; log-probabilities are torch's."""
    calls: list[Any] = []
    session = FakeSession(3, 40)

    def on_logits(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        np.testing.assert_array_equal(logits, model(session.held[row]))
        calls.append((row, "logits", drawn))
        logits[list(banned)] = -np.inf
        logits[len(drawn) % VOCAB] += 1

    options = GenerateOptions(
        8,
        temperature=params.temperature,
        top_k=params.top_k,
        repetition_penalty=params.repetition_penalty,
        on_logits=on_logits,
        logprobs=top,
    )
    results = generate(session, given_prompts, options, lambda *call: calls.append((*call,)))
    for b, (prompt, result) in enumerate(zip(given_prompts, results, strict=True)):
        sampler, expected, history = Sampler(params, row=b), [], []
        for i in range(8):
            edited = model([*prompt, *expected]).copy()
            edited[list(banned)] = -np.inf
            edited[i % VOCAB] += 1
            history.append((b, "logits", tuple(expected)))
            expected.append(sampler.sample(edited, [*prompt, *expected]))
            history.append((b, expected[-1]))
            wanted = torch.log_softmax(torch.from_numpy(edited), dim=0).numpy()
            np.testing.assert_allclose(result.logprobs[i], wanted[expected[-1]], atol=2e-6)
            if top:
                likely = result.top_logprobs[i]
                ids = sorted(range(VOCAB), key=lambda t: (-edited[t], t))[:top]
                assert [pair.token for pair in likely] == ids
                np.testing.assert_allclose([p.logprob for p in likely], wanted[ids], atol=2e-6)
        assert result.tokens == expected
        assert len(result.logprobs) == 8
        assert len(result.top_logprobs) == (8 if top else 0)
        assert [call for call in calls if call[0] == b] == history


def test_without_the_option_there_are_no_log_probabilities() -> None:
    (result,) = generate(FakeSession(1, 20), [[1]], GenerateOptions(4))
    assert (result.logprobs, result.top_logprobs) == ([], [])


def test_log_probabilities_are_those_of_the_tokens_alone() -> None:
    """Not of a stop token, and not of a stop sequence."""
    (whole,) = generate(FakeSession(1, 40), [[1]], GenerateOptions(12, logprobs=1))
    stop = whole.tokens[5:7]
    (by_sequence,) = generate(
        FakeSession(1, 40), [[1]], GenerateOptions(12, logprobs=1, stop_sequences=[stop])
    )
    assert by_sequence.reason == "stop"
    count = len(by_sequence.tokens)
    assert by_sequence.logprobs == whole.logprobs[:count]
    assert by_sequence.top_logprobs == whole.top_logprobs[:count]


def edit(change: Any) -> GenerateOptions:
    return GenerateOptions(8, on_logits=lambda row, logits, drawn: change(row, logits, drawn))


def test_a_hook_that_leaves_nothing_to_draw_is_blamed() -> None:
    def ban(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        if row == 1 and len(drawn) == 2:
            logits[:] = -np.inf

    with pytest.raises(SamplingError) as error:
        generate(FakeSession(2, 30), [[1], [2]], edit(ban))
    assert str(error.value) == (
        "row 1, new token 2: no token can be chosen: on_logits banned every token"
    )
    for bad in (np.nan, np.inf):
        with pytest.raises(SamplingError, match=f"highest of the logits after on_logits is {bad}"):
            generate(FakeSession(1, 30), [[1]], edit(lambda _, logits, __, b=bad: logits.fill(b)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_hook_is_not_blamed_for_what_the_model_gave(monkeypatch, bad: float) -> None:
    decode = FakeSession.decode
    monkeypatch.setattr(FakeSession, "decode", lambda *a: decode(*a) * np.float32(0) + bad)
    seen: list[int] = []
    with pytest.raises(SamplingError, match=f"new token 1: .*highest of the logits is {bad}"):
        generate(FakeSession(1, 9), [[1]], edit(lambda row, *_: seen.append(row)))
    assert seen == [0]  # nor called with it


def test_what_a_hook_raises_ends_the_generation() -> None:
    def fail(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        if row == 0 and len(drawn) == 3:
            raise ZeroDivisionError("enough")

    session, streamed = FakeSession(2, 30), []
    generation = Generation(session, [[1], [2]], edit(fail))
    with pytest.raises(ZeroDivisionError, match="enough"):
        streamed.extend(generation)
    assert [len(result.tokens) for result in generation.results] == [3, 4]
    assert [result.pending for result in generation.results] == [[], [streamed[-1].token]]
    assert generate(session, [[1]], GenerateOptions(2))[0].reason == "length"


def test_a_hook_that_returns_logits_is_refused() -> None:
    with pytest.raises(GenerationError, match="edit the logits in place and return None"):
        generate(FakeSession(1, 9), [[1]], edit(lambda _, logits, __: logits - 1))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"on_logits": 3}, "on_logits must be a function, got 3"),
        ({"logprobs": -1}, "logprobs must be at least 0, got -1"),
        ({"logprobs": 1.5}, "logprobs must be an integer"),
        ({"logprobs": True}, "logprobs must be an integer"),
    ],
)
def test_an_option_of_another_kind_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GenerationError, match=complaint):
        GenerateOptions(**options)


def test_more_log_probabilities_than_tokens_are_refused() -> None:
    session = FakeSession(1, 9)
    with pytest.raises(GenerationError, match=rf"logprobs must be in \[0, {VOCAB + 1}\), got 12"):
        generate(session, [[1]], GenerateOptions(logprobs=VOCAB + 1))
    assert not session.clean


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}])
def test_a_grammar_of_digits_writes_what_transformers_writes(
    tmp_path: Path, sampling: dict[str, Any]
) -> None:
    name = "tiny-qwen2.5"
    exporter.export(digits.EXAMPLES / name, tmp_path / "package", dtype="fp32")
    allowed = list(digits.digit_tokens(name))

    def digits_only(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        kept = logits[allowed]
        logits[:] = -np.inf
        logits[allowed] = kept

    session = engines.open_session(tmp_path / "package", max_batch=3, capacity=128)
    options = GenerateOptions(30, on_logits=digits_only, **sampling)
    results = generate(session, digits.PROMPTS, options)
    for b, (prompt, result) in enumerate(zip(digits.PROMPTS, results, strict=True)):
        assert result.tokens == digits.by_transformers(name, prompt, 30, b, **sampling)
        assert digits.tokenizer(name).decode(result.tokens).isdecimal()
