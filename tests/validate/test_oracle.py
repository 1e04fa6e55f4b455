"""The oracle asks transformers about each position once, and gives what it would give alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.exporter import export
from qwenport.validate.metrics import compare
from qwenport.validate.oracle import ATTENTIONS, Oracle
from qwenport.validate.reference import Reference
from qwenport.validate.target import open_target
from qwenport.validate.text import Choices, Text

from .sessions import signature


class Counting:
    """Stands for the reference: its logits are what they depend on, and it notes what it is asked."""

    replayed = 0

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Text]] = []
        self.calls = 0

    def own_rounding(self, tokens: Sequence[int]) -> float:
        assert len(tokens) > 1
        return 3e-7

    def logits(
        self,
        texts: Sequence[Text],
        dtype: str = "fp32",
        choices: Any = None,
        attention: str = "eager",
    ) -> list[np.ndarray]:
        self.calls += 1
        self.asked += [(dtype, attention, text) for text in texts]
        if choices is not None:
            self.replayed += 2
        return [
            np.stack([row(text, i, dtype, attention) for i in text.positions]) for text in texts
        ]


def row(text: Text, index: int, dtype: str = "fp32", attention: str = "eager") -> np.ndarray:
    """What a position's logits may depend on: all up to it, and nothing behind."""
    assert 0 <= index < len(text.tokens)
    kind = signature([ord(letter) for letter in dtype + attention])
    return np.float32([signature(text.tokens[: index + 1]), text.first_position + index, kind])


@st.composite
def texts(draw: st.DrawFn) -> Text:
    """Many begin alike: of two tokens, from one of two positions; the last logit is wanted, as in a run."""
    tokens = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=6)))
    picked = draw(st.sets(st.integers(0, len(tokens) - 1))) | {len(tokens) - 1}
    return Text(tokens, tuple(sorted(picked)), draw(st.sampled_from((0, 7))))


questions = st.lists(
    st.tuples(
        st.lists(texts(), min_size=1, max_size=6),
        st.sampled_from(("fp32", "bf16")),
        st.sampled_from(ATTENTIONS),
    ),
    min_size=1,
    max_size=4,
)


@given(questions)
@settings(max_examples=100)
def test_whatever_is_asked_is_computed_and_nothing_else(asked: list[Any]) -> None:
    reference = Counting()
    oracle = Oracle(reference, [1, 2])  # type: ignore[arg-type]
    assert oracle.own_rounding == 3e-7
    for number, (some, dtype, attention) in enumerate(asked):
        made = oracle.logits(some, dtype, attention)
        assert reference.calls <= number + 1, "one pass over the weights a question, at most"
        for text, logits in zip(some, made, strict=True):
            assert logits.dtype == np.float32
            expected = [row(text, i, dtype, attention) for i in text.positions]
            assert np.array_equal(logits, np.stack(expected))
    computed = [
        (dtype, attention, text.first_position, text.tokens[: i + 1])
        for dtype, attention, text in reference.asked
        for i in text.positions
    ]
    wanted = {
        (dtype, attention, text.first_position, text.tokens[: i + 1])
        for some, dtype, attention in asked
        for text in some
        for i in text.positions
    }
    assert set(computed) == wanted


@given(st.lists(texts(), min_size=1, max_size=6))
@settings(max_examples=100)
def test_what_was_asked_once_is_not_asked_again(some: list[Text]) -> None:
    reference = Counting()
    oracle = Oracle(reference, [1, 2])  # type: ignore[arg-type]
    first = oracle.logits(some)
    assert not any(
        a is not b and (a.first_position, a.tokens) == (b.first_position, b.tokens[: len(a.tokens)])
        for _, _, a in reference.asked
        for _, _, b in reference.asked
    ), "a text that begins another is computed with it"
    again = oracle.logits(some[::-1])[::-1]
    assert reference.calls == 1
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_beginnings_of_one_text_are_one_question() -> None:
    reference = Counting()
    oracle = Oracle(reference, [1, 2])  # type: ignore[arg-type]
    tokens = tuple(range(100))
    oracle.logits([Text(tokens[: n + 1], (n,)) for n in (5, 99, 64, 7)])
    ((_, _, text),) = reference.asked
    assert text == Text(tokens, (5, 7, 64, 99))
    oracle.logits([Text(tokens[:9], (7, 8))])  # only what is new, and no longer than it
    assert reference.asked[1:] == [("fp32", "eager", Text(tokens[:9], (8,)))]


def test_a_reference_that_fails_is_asked_again() -> None:
    class Failing(Counting):
        def logits(self, *arguments: Any, **keywords: Any) -> Any:
            if self.calls == 0:
                self.calls = 1
                raise ValueError
            return super().logits(*arguments, **keywords)

    oracle = Oracle(Failing(), [1])  # type: ignore[arg-type]
    assert oracle.own_rounding == 0.0, "one token is in one piece anyway"
    text = Text((1, 2), (1,))
    with pytest.raises(ValueError):
        oracle.logits([text])
    assert np.array_equal(oracle.logits([text])[0], [row(text, 1)])


def test_choices_are_asked_afresh_and_counted() -> None:
    reference = Counting()
    oracle = Oracle(reference, [1, 2])  # type: ignore[arg-type]
    text = Text((1, 2, 3), (2,))
    oracle.logits([text])
    logits, taken = oracle.with_choices([text], [Choices({}, 0.1)])
    assert taken == 2 and reference.calls == 2
    assert np.array_equal(logits[0], [row(text, 2)])


# ---- transformers


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("oracle")
    raw = checkpoints.mini("qwen2", torch_dtype="float32")
    path: Path = checkpoints.write_checkpoint(folder / "checkpoint", raw)
    return Reference(open_target(export(path, folder / "package").path), path)


@given(st.lists(texts(), min_size=1, max_size=6))
@settings(max_examples=20)
def test_shared_beginnings_have_the_logits_of_each_text_alone(
    reference: Reference, some: list[Text]
) -> None:
    made = Oracle(reference, [1, 2]).logits(some)
    for text, logits in zip(some, made, strict=True):
        (alone,) = reference.logits([text])
        assert np.linalg.norm(logits - alone) <= 3e-6 * np.linalg.norm(alone)


def test_own_errors_are_those_of_either_attention(reference: Reference) -> None:
    oracle = Oracle(reference, range(40))
    assert 0 < oracle.own_rounding < 1e-5
    some = [Text(tuple(range(40)), (3, 39)), Text(tuple(range(10)), (9,))]
    right = np.concatenate(reference.logits(some))
    found = oracle.own_errors(some, "bf16")
    assert len(found) == len(ATTENTIONS)
    for own, attention in zip(found, ATTENTIONS, strict=True):
        made = np.concatenate(reference.logits(some, "bf16", attention=attention))
        assert own.rel_l2 == pytest.approx(compare(made, right).rel_l2, rel=0.15)
