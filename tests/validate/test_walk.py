"""The random walk: drawn by a seed, any part of it a walk, shrunk to a script that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwenport.validate.budget import Plan, make_plan
from qwenport.validate.run import NotApplicable, Observation
from qwenport.validate.walk import (
    LONG_RUN,
    MOST_TRIALS,
    Operation,
    draw_walk,
    perform,
    script,
    shrink,
)

from .sessions import PROMPTS, VOCABULARY, Diary, make_run, mini_config, plans, said, signature


def planned(seed: int, budget: str, capacity: int) -> Plan:
    return make_plan(
        mini_config(),
        budget=budget,
        seed=seed,
        rows=4,
        capacity=capacity,
        max_positions=capacity,
        max_step_tokens=512,
        streamed=False,
    )


def session_of(plan: Plan) -> Diary:
    return Diary(plan.rows, plan.capacity, plan.max_positions, max_step_tokens=plan.widest)


def drawn(plan: Plan) -> list[Operation]:
    return draw_walk(plan, PROMPTS, session_of(plan))


def walk(plan: Plan, operations: Sequence[Operation], session: Diary | None = None) -> Observation:
    run = make_run(session_of(plan) if session is None else session, plan)
    perform(run, operations)
    return run.observation()


@given(plans())
@settings(max_examples=60)
def test_a_walk_is_drawn_by_its_seed_alone(plan: Plan) -> None:
    assert drawn(plan) == drawn(plan)
    if plan.capacity > 8:
        others = [drawn(replace(plan, seed=seed)) for seed in range(4, 10)]
        assert any(other != drawn(plan) for other in others)


@given(plans())
@settings(max_examples=100)
def test_a_walk_stays_within_rows_and_slots_and_what_it_may_cost(plan: Plan) -> None:
    operations = drawn(plan)
    held = [0] * plan.rows
    slots = min(plan.capacity, plan.max_positions)
    for operation in operations:
        if operation.kind == "reset":
            held = [0] * plan.rows
        elif operation.kind == "truncate":
            assert 0 <= operation.length <= held[operation.row]
            held[operation.row] = operation.length
        else:
            assert len(operation.rows) <= plan.rows
            for row, tokens in enumerate(operation.rows):
                assert len(tokens) <= (1 if operation.kind == "decode" else plan.widest)
                assert operation.kind == "prefill" or not tokens or held[row]
                held[row] += len(tokens)
                assert held[row] <= slots
                assert all(0 <= token < VOCABULARY for token in tokens)
    steps = sum(operation.kind in ("prefill", "decode") for operation in operations)
    assert steps <= plan.share(0.15, 12) + LONG_RUN


@given(plans(most=100), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_any_part_of_a_walk_is_a_walk(plan: Plan, random: Any) -> None:
    operations = [o for o in drawn(plan) if random.random() < 0.6]
    try:
        observation = walk(plan, operations)
    except NotApplicable:
        return
    assert observation.candidate[:, :2].tolist() == said(observation.texts)


def test_walks_of_a_usual_target_do_everything() -> None:
    operations = [o for seed in range(5) for o in drawn(planned(seed, "standard", 512))]
    assert {o.kind for o in operations} == {"prefill", "decode", "truncate", "reset"}
    prefills = [o for o in operations if o.kind == "prefill"]
    assert {len(o.rows) for o in prefills} == {1, 2, 3, 4}
    assert {o.all_logits for o in prefills} == {True, False}
    assert any(not row for o in prefills for row in o.rows), "a row idles"
    assert max(len(row) for o in prefills for row in o.rows) > 128


# ---- shrinking


class Faulty(Diary):
    """Single tokens are wrong from a slot on, in rows that were cut short before."""

    def __init__(self, *arguments: Any, slot: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.slot, self.cut = slot, set[int]()

    def reset(self, *, first_position: int = 0) -> None:
        super().reset(first_position=first_position)
        self.cut.clear()

    def truncate(self, length: int, row: int = 0) -> None:
        super().truncate(length, row)
        self.cut.add(row)

    def _step(self, feeds: Any) -> Any:
        logits = super()._step(feeds)
        if feeds["input_ids"].shape[1] == 1:
            for row in self.cut & set(range(len(logits))):
                if feeds["write_indices"][row] >= self.slot:
                    logits[row] += 1
        return logits


def wrong(plan: Plan, operations: Sequence[Operation], slot: int) -> bool:
    session = Faulty(
        plan.rows, plan.capacity, plan.max_positions, max_step_tokens=plan.widest, slot=slot
    )
    try:
        observation = walk(plan, operations, session)
    except NotApplicable:
        return False
    return bool((observation.candidate[:, :2] != np.array(said(observation.texts))).any())


@given(plans(most=100), st.integers(0, 30))
@settings(max_examples=25)
def test_a_failing_walk_shrinks_to_a_short_one_that_fails(plan: Plan, slot: int) -> None:
    operations = drawn(plan)
    assume(wrong(plan, operations, slot))
    asked = 0

    def fails(candidate: Sequence[Operation]) -> bool:
        nonlocal asked
        asked += 1
        return wrong(plan, candidate, slot)

    found = shrink(operations, fails)
    assert wrong(plan, found, slot) and asked <= MOST_TRIALS
    assert len(found) <= len(operations)
    tokens, before = (sum(len(r) for o in ops for r in o.rows) for ops in (found, operations))
    assert tokens <= before


def test_one_mistake_leaves_a_few_lines() -> None:
    """What it needs: text, a truncation, and a single token behind it."""
    lengths = []
    for seed in range(8):
        plan = planned(seed, "quick", 128)
        operations = drawn(plan)
        if wrong(plan, operations, 10):
            found = shrink(operations, lambda candidate, plan=plan: wrong(plan, candidate, 10))
            lengths.append(len(found))
    assert len(lengths) >= 5 and max(lengths) <= 10 and sorted(lengths)[len(lengths) // 2] == 3


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(0, 200))
def test_shrinking_asks_no_more_often_than_it_may(numbers: list[int], trials: int) -> None:
    """Whatever fails: here, any list with the first number in it."""
    operations = [Operation("prefill", ((number,),)) for number in numbers]
    asked = 0

    def fails(candidate: Sequence[Operation]) -> bool:
        nonlocal asked
        asked += 1
        return operations[0] in candidate

    found = shrink(operations, fails, trials)
    assert asked <= trials and operations[0] in found
    if trials >= 150:
        assert found == [operations[0]]


# ---- the script


class SignsTexts:
    """transformers' model, as far as the script uses it, whose logits are a diary's."""

    @classmethod
    def from_pretrained(cls, checkpoint: str, dtype: torch.dtype) -> SignsTexts:
        assert (checkpoint, dtype) == ("the checkpoint", torch.float32)
        return cls()

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(1, ids.shape[1], VOCABULARY)
        logits[0, -1, 0], logits[0, -1, 1] = ids.shape[1] - 1, signature(ids[0].tolist())
        return SimpleNamespace(logits=logits)


@given(plans(most=60).filter(lambda plan: plan.capacity > 3), st.data())
@settings(max_examples=40)
def test_a_script_performs_the_walk_and_prints_how_far_its_logits_are_off(
    plan: Plan, data: st.DataObject
) -> None:
    every = drawn(plan)
    kept = data.draw(st.sets(st.sampled_from(range(len(every))), min_size=1))
    part = [every[index] for index in sorted(kept)]  # as shrinking leaves it
    judged, replayed = session_of(plan), session_of(plan)
    operations = perform(make_run(judged, plan), part)
    target: Any = SimpleNamespace(
        judged_as="package", attention=None, config=SimpleNamespace(dual_chunk=None)
    )
    text = script(operations, plan.rows, plan.capacity, target)

    def opened(path: Path, **options: Any) -> Diary:
        wanted = {"judged_as": "package", "max_batch": plan.rows, "capacity": plan.capacity}
        assert path == Path("the target") and options == wanted
        return replayed  # refuses what does not fit

    with (
        patch("transformers.AutoModelForCausalLM", SignsTexts),
        patch("qwenport.validate.open_candidate", opened),
        redirect_stdout(StringIO()) as printed,
    ):
        exec(text, {"TARGET": "the target", "CHECKPOINT": "the checkpoint"})
    lines = printed.getvalue().splitlines()
    given_rows = [
        row for o in operations if o.kind in ("prefill", "decode") for row in o.rows if row
    ]
    assert len(lines) == len(given_rows) and all(line.endswith(" tokens: 0") for line in lines)
    assert (replayed.cache == judged.cache).all()
    assert (replayed.lengths == judged.lengths).all()
