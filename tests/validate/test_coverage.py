"""What was judged is counted from the steps that ran."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.engines import Step
from qwenport.validate.budget import Plan
from qwenport.validate.coverage import Counter, Coverage
from qwenport.validate.run import NotApplicable
from qwenport.validate.scenarios import SCENARIOS

from .sessions import VOCABULARY, Diary, capacity_of, make_run, plans


def counted(plan: Plan, chosen: list[Any]) -> tuple[Counter, dict[str, set[int]]]:
    """A counter after some scenarios, and the same by brute force from what a diary was given."""
    counter = Counter(plan, VOCABULARY)
    seen: dict[str, set[int]] = {
        name: set()
        for name in (
            "widths",
            "batches",
            "rows",
            "spans",
            "capacities",
            "positions",
            "ids",
            "reach",
        )
    }
    steps = dict.fromkeys(("last", "all", "single"), 0)

    def note(step: Step) -> None:
        counter.step(step)
        ids, wanted = step.feeds["input_ids"], step.feeds["logits_indices"]
        seen["widths"].add(ids.shape[1])
        seen["batches"].add(len(ids))
        seen["spans"].add(len(step.feeds["key_positions"]))
        seen["capacities"].add(step.capacity)
        for row, taken in enumerate(step.taken.tolist()):
            for index in range(taken):
                seen["rows"].add(row)
                seen["ids"].add(int(ids[row, index]))
                seen["reach"].add(int(step.starts[row]) + index)
        if ids.shape[1] == 1:
            steps["single"] += 1
        else:
            steps["all" if wanted.shape[1] == ids.shape[1] else "last"] += 1

    for scenario in chosen:
        session = Diary(
            plan.rows,
            capacity_of(scenario, plan),
            plan.max_positions,
            max_step_tokens=plan.widest,
            max_step_logits=plan.widest,
        )
        run = make_run(session, plan, on_step=note, original_context=100, special_ids=(49, 0, 7))
        try:
            scenario.run(run)
            observation = run.observation()
        except NotApplicable:
            continue
        counter.judged(observation)
        seen["positions"].update(observation.candidate[:, 0].astype(int).tolist())
    assert counter.steps == steps
    return counter, seen


def spread(ranges: Any) -> set[int]:
    return {n for first, last in ranges for n in range(first, last + 1)}


@given(plans(), st.lists(st.sampled_from(SCENARIOS), max_size=3, unique=True))
@settings(max_examples=80)
def test_what_is_told_is_what_ran(plan: Plan, chosen: list[Any]) -> None:
    counter, seen = counted(plan, chosen)
    found = counter.coverage()
    assert (found.budget, found.seed) == (plan.budget, plan.seed)
    assert found.step_widths == tuple(sorted(seen["widths"]))
    assert found.batches == tuple(sorted(seen["batches"]))
    assert found.rows == tuple(sorted(seen["rows"]))
    assert found.spans == tuple(sorted(seen["spans"]))
    assert found.capacities == tuple(sorted(seen["capacities"]))
    assert spread(found.positions) == seen["positions"]
    assert all(a[1] + 1 < b[0] for a, b in zip(found.positions, found.positions[1:], strict=False))
    assert found.distance == max(seen["reach"], default=0)
    assert found.token_ids == len(seen["ids"])
    assert (found.widest_step, found.max_batch) == (plan.widest, plan.rows)
    assert (found.max_seq_len, found.vocab_size) == (plan.max_positions, VOCABULARY)
    if not chosen:
        assert str(found) == "nothing"
    steps = (found.last_logits_steps, found.all_logits_steps, found.single_steps)
    assert steps == tuple(counter.steps.values())


@given(plans(), st.lists(st.sampled_from(SCENARIOS), max_size=3, unique=True))
@settings(max_examples=60)
def test_what_was_not_reached_is_said(plan: Plan, chosen: list[Any]) -> None:
    counter, seen = counted(plan, chosen)
    found = counter.coverage()
    said = " | ".join(found.left_out)
    missing = plan.max_positions - len(seen["positions"])
    assert (f"{missing} of {plan.max_positions} positions by the whole model" in said) == (
        missing > 0
    )
    every = len(list(plan.spans))
    few = 0 < len(seen["spans"]) < every
    assert (f"{every - len(seen['spans'])} of {every} spans of the cache" in said) == few
    reach = max(seen["reach"], default=0) + 1
    assert (f"attention over more than {reach} positions" in said) == (reach < plan.capacity)
    counter.layer_distance["layer 0"] = plan.capacity - 1
    assert "attention over more than" not in " | ".join(counter.coverage().left_out)


def usual(**changes: Any) -> Counter:
    from .test_scenarios import planned

    counter, _ = counted(planned(), list(SCENARIOS))
    for name, value in changes.items():
        setattr(counter, name, value)
    return counter


def test_experts_without_tokens_are_named_by_layer() -> None:
    counter = usual(num_experts=6)
    counter.routed(3, np.array([0, 1, 1, 5]).tolist())
    counter.routed(1, range(6))
    counter.routed(3, [1])
    found = counter.coverage()
    assert [(e.layer, e.experts, e.without_tokens) for e in found.experts] == [
        (1, 6, ()),
        (3, 6, (2, 3, 4)),
    ]
    assert "experts 2 to 4 of layer 3, which received no token" in found.left_out
    assert not any("layer 1" in sentence for sentence in found.left_out)
    assert ", 9 of 12 experts" in str(found)


def test_sentences_are_said_once_and_in_order() -> None:
    counter = usual()
    for sentence in ("first", "second", "first"):
        counter.leave_out(sentence)
    assert counter.coverage().left_out[:2] == ("first", "second")
    assert counter.coverage().left_out.count("first") == 1


def test_a_line_says_how_much_of_each_there_was() -> None:
    counter = usual(rounding=512, embedded_ids=VOCABULARY)
    counter.layer_distance["layer 0"] = 511
    text = str(counter.coverage())
    assert text.startswith("steps of 1 to 512 of 512 tokens (")
    assert ", batches of 1, 2, 3 of 3, rows 0 to 2, " in text
    assert " of 8 spans, " in text and " of 512 positions, " in text
    assert "attention over 512, 50 of 50 token ids, rounding at 512 positions" in text
    assert "experts" not in text


def test_every_field_of_a_coverage_is_described() -> None:
    assert Coverage.__doc__ is not None
    for field in fields(Coverage):
        assert field.name in Coverage.__doc__
