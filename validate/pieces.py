"""Pieces of a target run alone: the embedding on every id, and one decoder layer over the whole context.

Running the whole model to 8,192 positions costs too much for a check. One layer of each kind does not, and attention
limited to a window, a cache that ends early or a table that is wrong at large positions show in one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenport.contract import LOGITS_INDICES, Progress
from qwenport.validate.candidate import Candidate
from qwenport.validate.reference import Choices, Reference
from qwenport.validate.reference.rounded_inputs import moving_experts, taking_over
from qwenport.validate.report import Check
from qwenport.validate.streaming import Feeds, Rehearsal
from qwenport.validate.thresholds import EXPERTS_TIMES_OWN, FP32_REL_L2, FP32_REL_L2_MOST

Float32 = NDArray[np.float32]

IDS_AT_ONCE = 512


def check_embedding(
    candidate: Candidate, reference: Reference, vocab_size: int, progress: Progress
) -> tuple[Check, ...]:
    """Run every id of the vocabulary through the target's embedding: rows must equal the checkpoint's, bit for bit."""
    wrong: list[int] = []
    with candidate.parts().prologue([]) as run:
        for start in range(0, vocab_size, IDS_AT_ONCE):
            ids = list(range(start, min(start + IDS_AT_ONCE, vocab_size)))
            session = Rehearsal(candidate.geometry(1, len(ids)))
            session.max_step_tokens = session.max_positions = len(ids)
            session.prefill([ids])
            hidden, _ = run(0, session.steps[0], None)
            made = as_array(hidden)[0]
            expected = reference.embed(ids)
            same = (made == expected) | (np.isnan(made) & np.isnan(expected))
            wrong += [ids[i] for i in np.flatnonzero(~same.all(axis=1))]
            progress("embedding every id", ids[-1] + 1, vocab_size)
    where = f"of {vocab_size}"
    if wrong:
        where += f", first id {wrong[0]}"
    return (Check("ids with another embedding", len(wrong), "==", 0, where),)


@dataclass(frozen=True)
class LayerRun:
    """A decoder layer's hidden states over a text.

    Attributes:
        entry, end: the layer's input and output, fp32 [S, hidden].
        experts: int64 [S, k]; None for a dense layer.
        rounded: path of a linear -> its input rounded to FP8, fp32 [S, K].
    """

    entry: Float32
    end: Float32
    experts: NDArray[np.int64] | None
    rounded: Mapping[str, Float32] = field(default_factory=dict)


def run_layer_alone(
    candidate: Candidate, layer: int, tokens: Sequence[int], router: str | None, capacity: int
) -> LayerRun:
    """Run the target's embedding and one layer on a text, in the widest steps that a session takes.

    Args:
        router: the value that holds each token's experts; None for a dense layer.
        capacity: cache slots.
    """
    geometry = candidate.geometry(1, capacity)
    session = Rehearsal(geometry)
    session.prefill([list(tokens)])
    steps: list[Feeds] = list(session.steps)
    parts = candidate.parts()
    with parts.prologue([]) as run:
        entries = [run(0, feeds, None)[0] for feeds in steps]
    names = candidate.rounded_inputs(layer + 1).get(layer, {})
    observe = [*([] if router is None else [router]), *dict.fromkeys(names.values())]
    ends, experts = [], []
    rounded: dict[str, list[Float32]] = {path: [] for path in names}
    with parts.layer(layer, [geometry], observe) as run:
        for feeds, entry in zip(steps, entries, strict=True):
            end, seen = run(0, feeds, entry)
            ends.append(as_array(end)[0])
            if router is not None:
                experts.append(np.array(seen[router][0], dtype=np.int64))
            for path, name in names.items():
                rounded[path].append(as_array(seen[name])[0].copy())
    return LayerRun(
        np.concatenate([as_array(entry)[0] for entry in entries]),
        np.concatenate(ends),
        np.concatenate(experts) if experts else None,
        {path: np.concatenate(values) for path, values in rounded.items()},
    )


def check_distance(run: LayerRun, reference: Reference, layer: int, margin: float) -> list[Check]:
    """Compare one layer over a long text with transformers' own, given the same hidden states, at every position.

    Codes that experts round to inside their operator cannot be taken over: what they do is measured, as for logits.

    Args:
        margin: experts chosen in a router near-tie, within this margin, are taken over, and so are FP8 codes.
    """
    experts = {} if run.experts is None else {layer: run.experts}
    choices = Choices(experts, margin, {layer: run.rounded})
    most, most_of_one = FP32_REL_L2, FP32_REL_L2_MOST
    with reference.opened_layer(layer, "fp32") as opened:
        expected = opened.run(run.entry, attention="sdpa", choices=choices)
        with moving_experts(opened.module) as rounded:
            if rounded:
                moved = opened.run(run.entry, attention="sdpa", choices=choices)
                own, own_by_position = _distances(moved, expected)
                most = max(most, EXPERTS_TIMES_OWN * own)
                most_of_one = max(most_of_one, EXPERTS_TIMES_OWN * float(own_by_position.max()))
    return _checks("hidden states", run.end, expected, most, most_of_one)


@dataclass(frozen=True)
class HeadRun:
    """The final norm and the head over some positions.

    Attributes:
        entry: the input, fp32 [S, hidden].
        logits: fp32 [S, vocab].
        rounded: the head's input rounded to FP8, fp32 [S, hidden]; None if it is not.
    """

    entry: Float32
    logits: Float32
    rounded: Float32 | None


def run_head_alone(candidate: Candidate, tokens: Sequence[int]) -> HeadRun:
    """Run the target's embedding of a text, final norm and head, in one step."""
    session = Rehearsal(candidate.geometry(1, len(tokens)))
    session.max_step_tokens = session.max_positions = len(tokens)
    session.prefill([list(tokens)])
    parts, rounded = candidate.parts(), candidate.rounded_head
    with parts.prologue([]) as run:
        entry, _ = run(0, session.steps[0], None)
    everywhere = {LOGITS_INDICES: np.arange(len(tokens), dtype=np.int64)[None]}
    with parts.epilogue([] if rounded is None else [rounded]) as run:
        logits, seen = run(0, {**session.steps[0], **everywhere}, entry)
    return HeadRun(
        as_array(entry)[0],
        as_array(logits)[0],
        None if rounded is None else as_array(seen[rounded])[0],
    )


def check_head(run: HeadRun, reference: Reference) -> list[Check]:
    """Compare final norm and head with transformers' own, given the same hidden states.

    FP8 codes that are as near as transformers' own are taken over.
    """
    given = {} if run.rounded is None else {"": run.rounded}
    with (
        reference.final_norm("fp32") as norm,
        reference.head("fp32") as head,
        torch.inference_mode(),
        taking_over(head, given, lambda count: None),
    ):
        expected = as_array(head(norm(torch.from_numpy(run.entry)[None])))[0]
    return _checks("logits", run.logits, expected, FP32_REL_L2, FP32_REL_L2_MOST)


def _checks(
    what: str, made: Float32, expected: Float32, most: float, most_of_one: float
) -> list[Check]:
    whole, by_position = _distances(made, expected)
    worst = int(by_position.argmax())
    return [
        Check(
            f"NaN and infinite {what}",
            int((~np.isfinite(made)).any(axis=1).sum()),
            "==",
            0,
        ),
        Check("rel-L2", whole, "<=", most, f"{len(expected)} positions"),
        Check(
            "rel-L2 of one position",
            float(by_position[worst]),
            "<=",
            most_of_one,
            f"position {worst}",
        ),
    ]


def _distances(made: Float32, expected: Float32) -> tuple[float, NDArray[np.float64]]:
    """rel-L2 of [S, hidden] as a whole, and of each position: infinite where it is not finite."""
    with np.errstate(all="ignore"):
        errors = np.linalg.norm(made.astype(np.float64) - expected, axis=1)
        sizes = np.linalg.norm(expected.astype(np.float64), axis=1)
        by_position = errors / np.where(sizes, sizes, 1.0)
        whole = float(np.sqrt(np.sum(errors**2) / np.sum(sizes**2)))
    return whole, np.where(np.isfinite(made).all(axis=1), by_position, np.inf)


def as_array(hidden: Any) -> Float32:
    """Hidden states, as the parts pass them, in fp32."""
    if isinstance(hidden, np.ndarray):
        return hidden.astype(np.float32, copy=False)
    values: Float32 = hidden.float().numpy()
    return values
