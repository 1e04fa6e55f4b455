"""`perplexity` is transformers' loss on the same windows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qwenport.contract import LOGITS_INDICES
from qwenport.engines import (
    MeasuringError,
    SavedSession,
    SessionError,
    Step,
    open_session,
    perplexity,
)
from qwenport.exporter import Package

from .conftest import CHECKPOINT

LONGEST = 96
TEXT = np.random.default_rng(5).integers(0, 2048, LONGEST).tolist()
# Both sides compute in fp32; their logits differ by about 5e-7 (rel-L2), transformers also sums the loss in fp32.
CLOSE = 1e-5


@functools.cache
def oracle() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@torch.inference_mode()
def transformers_loss(ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' documentation: the mean loss, and how many labels it is of."""
    total, count, reached = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - reached)] = -100
        scored = int((labels[:, 1:] != -100).sum())  # the model shifts labels
        if scored:
            total += oracle()(inputs, labels=labels).loss.item() * scored
            count += scored
        reached = end
        if end == len(ids):
            break
    return total / count, count


@pytest.fixture(scope="module")
def session(package_of: Callable[[str], Package]) -> SavedSession:
    return open_session(package_of("fp32").path, capacity=LONGEST)


@st.composite
def settings_(draw: st.DrawFn) -> tuple[int, int, int]:
    """Length, window and stride; the length often lies at a window's border."""
    window = draw(st.integers(2, 40))
    stride = draw(st.integers(max(1, window // 4), window))
    border = window + stride * draw(st.integers(0, 3)) + draw(st.integers(-1, 1))
    length = draw(st.integers(2, LONGEST) | st.just(min(max(border, 2), LONGEST)))
    return length, window, stride


@given(settings_(), st.integers(1, 50), st.integers(1, 50))
def test_it_is_transformers_loss_in_steps_of_any_size(
    session: SavedSession, drawn: tuple[int, int, int], tokens: int, logits: int
) -> None:
    length, window, stride = drawn
    ids, steps = TEXT[:length], list[Step]()
    session.max_step_tokens, session.max_step_logits = tokens, logits
    session.on_step = steps.append
    found = perplexity(session, ids, window=window, stride=stride)
    loss, scored = transformers_loss(ids, window, stride)
    assert found.mean_nll == pytest.approx(loss, rel=CLOSE)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=CLOSE * loss)
    assert (found.tokens, found.scored) == (length, scored)
    assert (found.window, found.stride) == (window, stride)
    assert max(step.feeds[LOGITS_INDICES].shape[1] for step in steps) <= min(tokens, logits)


def test_each_token_but_the_first_is_scored_once_if_windows_overlap(session: SavedSession) -> None:
    session.max_step_tokens = session.max_step_logits = 64
    for stride in (1, 7, 15):
        assert perplexity(session, TEXT, window=16, stride=stride).scored == LONGEST - 1
    left_out = LONGEST // 16  # the first token of every window
    assert perplexity(session, TEXT, window=16, stride=16).scored == LONGEST - left_out


@pytest.mark.parametrize(
    ("count", "window", "stride", "words"),
    [
        (0, 16, 8, "text of 0 tokens"),
        (1, 16, 8, "text of 1 tokens"),
        (50, 1, 1, "window of 1 tokens"),
        (50, LONGEST + 1, 8, f"2 to {LONGEST}"),
        (50, 16, 17, "stride of 17"),
        (50, 16, 0, "stride of 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    session: SavedSession, count: int, window: int, stride: int, words: str
) -> None:
    with pytest.raises(MeasuringError, match=words):
        perplexity(session, TEXT[:count], window=window, stride=stride)


@pytest.mark.parametrize("token", [-1, 2048, 2**70, 1.5, "a"])
@pytest.mark.parametrize("place", [0, -1])
def test_an_id_outside_the_vocabulary_is_refused_wherever_it_is(
    session: SavedSession, token: object, place: int
) -> None:
    ids: list[object] = [1, 2, 3]
    ids[place] = token
    with pytest.raises(SessionError, match="token id"):
        perplexity(session, ids, window=8, stride=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(
    session: SavedSession, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = session._step

    def broken(feeds: Any) -> Any:
        logits = step(feeds)
        logits[:, 0, TEXT[1]] = value
        return logits

    monkeypatch.setattr(session, "_step", broken)
    with pytest.raises(MeasuringError, match="no perplexity"):
        perplexity(session, TEXT[:5], window=4, stride=2)
