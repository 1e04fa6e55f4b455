"""A run writes down what any program did: rows of tokens, as plain Python lists would hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.validate.budget import make_plan
from qwenport.validate.run import CandidateError, NotApplicable, Observation, Observing, Run

from .sessions import PROMPTS, VOCABULARY, Diary, mini_config, said, signature

ROWS, CAPACITY, POSITIONS = 3, 40, 60
HEADS = frozenset({"heads"})

tokens = st.integers(0, VOCABULARY - 1)
row = st.lists(tokens, max_size=12)
index = st.integers(0, 10**6)
rows = st.integers(1, ROWS)
operation = st.one_of(
    st.tuples(st.just("prefill"), rows.flatmap(lambda n: st.lists(row, min_size=n, max_size=n)), st.booleans()),
    st.tuples(st.just("decode"), rows.flatmap(lambda n: st.lists(st.none() | tokens, min_size=n, max_size=n))),
    st.tuples(st.just("truncate"), st.integers(0, ROWS - 1), index),
    st.tuples(st.just("reset"), st.integers(0, POSITIONS - 1)),
    st.tuples(st.just("choose"), rows, st.integers(1, 12), st.lists(index, min_size=1, max_size=4), index),
)  # fmt: skip


class Model:
    """Rows of tokens, and what is owed: (label, position, tokens up to it) of each logit in the order of asking."""

    def __init__(self) -> None:
        self.first, self.rows = 0, [[] for _ in range(ROWS)]
        self.owed: list[tuple[str, int, float]] = []

    @property
    def slots(self) -> int:
        return min(CAPACITY, POSITIONS - self.first)

    def reset(self, first: int) -> None:
        self.first, self.rows = first, [[] for _ in range(ROWS)]

    def give(self, number: int, new: list[int], judged: list[int]) -> None:
        held = self.rows[number]
        before = len(held)
        held += new
        for place in judged:
            end = before + place
            label = f"row {number} position {self.first + end} (step of {len(new)})"
            self.owed.append((label, self.first + end, signature(held[: end + 1])))


def play(operations: list[Any], run: Run) -> Model:
    """Do the same to a run and to the model of it; what does not fit is cut."""
    model = Model()
    run.start()
    for kind, *arguments in operations:
        if kind == "reset":
            run.start(arguments[0])
            model.reset(arguments[0])
        elif kind == "truncate":
            number, length = arguments
            length %= len(model.rows[number]) + 1
            run.truncate(length, number)
            del model.rows[number][length:]
        elif kind == "prefill":
            given, every = arguments
            given = [new[: model.slots - len(model.rows[r])] for r, new in enumerate(given)]
            run.prefill(given, all_logits=every)
            for number, new in enumerate(given):
                judged = list(range(len(new)))
                model.give(number, new, judged if every else judged[-1:])
        elif kind == "decode":
            given = [
                None if token is None or len(model.rows[r]) == model.slots else token
                for r, token in enumerate(arguments[0])
            ]
            run.decode(given)
            for number, token in enumerate(given):
                if token is not None:
                    model.give(number, [token], [0])
        else:
            count, width, wanted, start = arguments
            width = min(
                [
                    width,
                    run.session.max_step_tokens,
                    *(model.slots - len(held) for held in model.rows[:count]),
                ]
            )
            if width < 1:
                continue
            given = [PROMPTS.take(width, start=start + 7 * r) for r in range(count)]
            chosen = sorted({w % width for w in wanted})
            run.prefill_choosing(given, [chosen] * count)
            for number, new in enumerate(given):
                model.give(number, new, chosen)
    return model


def new_run(session: Diary, **keywords: Any) -> Run:
    plan = make_plan(
        mini_config(),
        budget="quick",
        seed=0,
        rows=ROWS,
        capacity=CAPACITY,
        max_positions=POSITIONS,
        max_step_tokens=session.max_step_tokens,
        streamed=False,
    )
    return Run(session, PROMPTS, plan, **keywords)


def observed(run: Run) -> Observation | None:
    try:
        return run.observation()
    except NotApplicable:
        return None


@given(st.lists(operation, max_size=25))
@settings(max_examples=150)
def test_histories_are_those_of_plain_lists(operations: list[Any]) -> None:
    run = new_run(Diary(ROWS, CAPACITY, POSITIONS, max_step_tokens=12, max_step_logits=5))
    model = play(operations, run)
    for number, held in enumerate(model.rows):
        assert run.tokens(number) == tuple(held) and run.length(number) == len(held)
    assert run.capacity == model.slots
    observation = observed(run)
    if observation is None:
        assert not model.owed
        return
    made = [
        (label, *logits[:2].tolist())
        for label, logits in zip(observation.labels, observation.candidate, strict=True)
    ]
    assert sorted(made) == sorted(model.owed)
    assert observation.candidate[:, :2].tolist() == said(observation.texts)


@given(st.lists(operation, max_size=25))
@settings(max_examples=80)
def test_what_is_seen_inside_belongs_to_the_tokens_of_the_text(operations: list[Any]) -> None:
    """Of padded steps in which rows idle, join and are cut short; whatever the chunks."""
    run = new_run(
        Diary(ROWS, CAPACITY, POSITIONS, max_step_tokens=5),
        observing=Observing(HEADS),
    )
    play(operations, run)
    observation = observed(run)
    if observation is None:
        return
    for text, seen in zip(observation.texts, observation.seen, strict=True):
        assert seen["ids"].tolist() == list(text.tokens)
        assert seen["heads"].tolist() == [[token, -token] for token in text.tokens]


@given(st.lists(operation, max_size=25), index)
@settings(max_examples=80)
def test_a_lineage_is_enough_to_see_one_text(operations: list[Any], pick: int) -> None:
    """The second time only the histories are kept that the text in question came from."""
    first = new_run(Diary(ROWS, CAPACITY, POSITIONS))
    play(operations, first)
    before = observed(first)
    if before is None:
        return
    chosen = pick % len(before.texts)
    observing = Observing(HEADS, before.lineage[chosen])
    second = new_run(Diary(ROWS, CAPACITY, POSITIONS), observing=observing)
    play(operations, second)
    after = second.observation()
    assert after.texts == before.texts and after.lineage == before.lineage
    assert after.seen[chosen]["ids"].tolist() == list(before.texts[chosen].tokens)
    for text, seen, lineage in zip(after.texts, after.seen, after.lineage, strict=True):
        if not lineage & before.lineage[chosen]:
            assert not seen, text


@pytest.mark.parametrize("all_logits", [True, False])
def test_a_session_that_reuses_its_memory_is_no_trouble(all_logits: bool) -> None:
    class Reusing(Diary):
        memory = np.zeros((1, 1, VOCABULARY), np.float32)

        def _step(self, feeds: Any) -> Any:
            made = super()._step(feeds)
            self.memory.resize(made.shape, refcheck=False)
            self.memory[:] = made
            return self.memory

    run = new_run(Reusing(ROWS, CAPACITY, POSITIONS, max_step_tokens=1))
    run.start()
    for token in (1, 2, 3):
        run.prefill([[token]], all_logits=all_logits)
    observation = run.observation()
    assert observation.candidate[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda made: made[:, :, :-1], r"gave logits of shape \(1, 49\), expected \(1, 50\)"),
        (lambda made: np.repeat(made, 2, axis=1)[:, :1, None], "expected"),
    ],
)
def test_logits_of_another_shape_are_the_target_s_failure(spoil: Any, words: str) -> None:
    class Spoiled(Diary):
        def _step(self, feeds: Any) -> Any:
            return spoil(super()._step(feeds))

    run = new_run(Spoiled(1, CAPACITY))
    run.start()
    for act in (lambda: run.prefill([[1, 2]]), lambda: run.decode([3])):
        with pytest.raises(CandidateError, match=words):
            act()


def test_logits_of_another_number_of_rows_are_the_target_s_failure() -> None:
    class Generous(Diary):
        def _append(self, *arguments: Any, **options: Any) -> Any:
            return super()._append(*arguments, **options) * 2

    run = new_run(Generous(1, CAPACITY))
    run.start()
    with pytest.raises(CandidateError, match="logits of 2 rows, not 1"):
        run.prefill([[1, 2]])
    with pytest.raises(CandidateError, match=r"logits of shape \(2, 50\), expected \(1, 50\)"):
        run.decode([1])


def test_whatever_a_session_raises_is_the_target_s_failure() -> None:
    run = new_run(Diary(1, 4))
    run.start()
    with pytest.raises(CandidateError, match="the target raised CapacityError: row 0 holds 0"):
        run.prefill([[1] * 5])
    with pytest.raises(CandidateError, match="the target raised SessionError"):
        run.truncate(3)


def test_a_rehearsal_keeps_no_logits() -> None:
    run = new_run(Diary(1, 4), keep=False)
    run.start()
    run.prefill([[1, 2]], all_logits=True)
    observation = run.observation()
    assert observation.candidate.size == 0 and observation.texts[0].positions == (0, 1)
