"""What was judged of what the target allows: counted from the steps that ran, not from those planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwenport.contract import INPUT_IDS, KEY_POSITIONS, LOGITS_INDICES, POSITION_IDS, THOROUGH
from qwenport.engines import Step
from qwenport.exporter import DualChunk
from qwenport.validate.budget import Plan
from qwenport.validate.run import Observation

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Experts:
    """A sparse layer's experts: their number, and which of them received no token."""

    layer: int
    experts: int
    without_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """What was judged. Ranges are (first, last), both inclusive.

    Attributes:
        budget, seed: the runs' budget and seed.
        step_widths, widest_step: tokens per row of the steps that ran; the widest that a session takes.
        last_logits_steps, all_logits_steps: steps of more than one token that returned one position's logits per row,
            as generation does, and those that returned all.
        single_steps: steps of one token.
        single_positions: positions of single-token steps.
        batches, max_batch: rows of the steps; the target's maximum.
        rows: rows that were given tokens and judged.
        spans, all_spans: active cache spans of the steps; how many there are.
        capacities, all_capacities: slots of the caches; how many sizes `generate` may allocate.
        positions, max_seq_len: positions at which the whole model's logits were judged; how many there are.
        distance: how far back attention reached in the whole model.
        layer_distance: the same for decoder layers run alone, by name; empty if none was.
        token_ids, embedded_ids, vocab_size: ids that went through the model; through the embedding; in total.
        experts: each sparse layer's; empty for a dense model, and if the target's inside cannot be observed.
        rounding: positions at which half precision was judged layer by layer; 0 if it was not.
        left_out: what was not judged, one sentence each.
    """

    budget: str
    seed: int
    step_widths: tuple[int, ...]
    widest_step: int
    last_logits_steps: int
    all_logits_steps: int
    single_steps: int
    single_positions: Ranges
    batches: tuple[int, ...]
    max_batch: int
    rows: tuple[int, ...]
    spans: tuple[int, ...]
    all_spans: int
    capacities: tuple[int, ...]
    all_capacities: int
    positions: Ranges
    max_seq_len: int
    distance: int
    layer_distance: dict[str, int]
    token_ids: int
    embedded_ids: int
    vocab_size: int
    experts: tuple[Experts, ...]
    rounding: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """For example "steps of 1 to 512 tokens (14 widths), 1, 2, 3 and 8 rows, ..."."""
        if not self.step_widths:
            return "nothing"
        judged, single = map(_count, (self.positions, self.single_positions))
        widths = f"{len(self.step_widths)} width{'s' * (len(self.step_widths) > 1)}"
        ids = f"{self.token_ids} of {self.vocab_size} token ids"
        if self.embedded_ids > self.token_ids:
            ids += f" ({self.embedded_ids} in the embedding)"
        distance = max([self.distance, *self.layer_distance.values()])
        parts = [
            f"steps of {self.step_widths[0]} to {self.step_widths[-1]} of {self.widest_step} tokens "
            f"({widths})",
            f"batches of {_listed(self.batches)} of {self.max_batch}",
            f"rows {_ranges(_spans_of(self.rows))}",
            f"{len(self.spans)} of {self.all_spans} spans",
            f"caches of {len(self.capacities)} of {self.all_capacities} sizes",
            f"{judged} of {self.max_seq_len} positions, {single} of them token by token",
            f"attention over {distance + 1}",
            ids,
        ]
        if self.experts:
            there = sum(layer.experts for layer in self.experts)
            missing = sum(len(layer.without_tokens) for layer in self.experts)
            parts.append(f"{there - missing} of {there} experts")
        if self.rounding:
            parts.append(f"rounding at {self.rounding} positions")
        return ", ".join(parts)


@dataclass
class Counter:
    """Counts during a validation; `coverage` may be called at any time."""

    plan: Plan
    vocab_size: int
    chunks: DualChunk | None = None
    widths: set[int] = field(default_factory=set)
    steps: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("last", "all", "single"), 0)
    )
    batches: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    spans: set[int] = field(default_factory=set)
    capacities: set[int] = field(default_factory=set)
    positions: set[int] = field(default_factory=set)
    single_positions: set[int] = field(default_factory=set)
    borders: set[int] = field(default_factory=set)
    chunks_apart: int = 0
    ids: set[int] = field(default_factory=set)
    embedded_ids: int = 0
    distance: int = 0
    layer_distance: dict[str, int] = field(default_factory=dict)
    experts: dict[int, set[int]] = field(default_factory=dict)
    num_experts: int = 0
    rounding: int = 0
    left_out: dict[str, None] = field(default_factory=dict)

    def step(self, step: Step) -> None:
        """Record one step of a session."""
        rows, width = step.feeds[INPUT_IDS].shape
        self.widths.add(width)
        self.batches.add(rows)
        self.spans.add(len(step.feeds[KEY_POSITIONS]))
        self.capacities.add(step.capacity)
        every = step.feeds[LOGITS_INDICES].shape[1] == width
        self.steps["single" if width == 1 else "all" if every else "last"] += 1
        active = step.taken > 0
        if width == 1:
            self.single_positions.update(step.feeds[POSITION_IDS][active, 0].tolist())
        self.rows.update(np.flatnonzero(active).tolist())
        reach = (step.starts + step.taken)[active]
        self.distance = max(self.distance, int(reach.max()) - 1)
        for row in np.flatnonzero(active):
            self.ids.update(step.feeds[INPUT_IDS][row, : step.taken[row]].tolist())

    def judged(self, observation: Observation) -> None:
        """Record that an observation's logits were compared."""
        for text in observation.texts:
            self.positions.update(text.first_position + index for index in text.positions)
            if self.chunks is not None:
                first = text.first_position // self.chunks.chunk
                last = (text.first_position + max(text.positions)) // self.chunks.chunk
                self.borders.update(range(first + 1, last + 1))
                self.chunks_apart = max(self.chunks_apart, last - first)

    def routed(self, layer: int, experts: Iterable[int]) -> None:
        """Record the experts of a sparse layer that received a token."""
        self.experts.setdefault(layer, set()).update(experts)

    def leave_out(self, sentence: str) -> None:
        """Record something that was not judged."""
        self.left_out[sentence] = None

    def coverage(self) -> Coverage:
        """What has been judged so far."""
        plan = self.plan
        every = len(plan.spans)
        experts = tuple(
            Experts(
                layer, self.num_experts, tuple(e for e in range(self.num_experts) if e not in found)
            )
            for layer, found in sorted(self.experts.items())
        )
        return Coverage(
            budget=plan.budget,
            seed=plan.seed,
            step_widths=tuple(sorted(self.widths)),
            widest_step=plan.widest,
            last_logits_steps=self.steps["last"],
            all_logits_steps=self.steps["all"],
            single_steps=self.steps["single"],
            single_positions=_spans_of(sorted(self.single_positions)),
            batches=tuple(sorted(self.batches)),
            max_batch=plan.rows,
            rows=tuple(sorted(self.rows)),
            spans=tuple(sorted(self.spans)),
            all_spans=every,
            capacities=tuple(sorted(self.capacities)),
            all_capacities=plan.cache_sizes,
            positions=_spans_of(sorted(self.positions)),
            max_seq_len=plan.max_positions,
            distance=self.distance,
            layer_distance=dict(self.layer_distance),
            token_ids=len(self.ids),
            embedded_ids=self.embedded_ids,
            vocab_size=self.vocab_size,
            experts=experts,
            rounding=self.rounding,
            left_out=(*self.left_out, *self._not_reached(every, experts)),
        )

    def _not_reached(self, every: int, experts: Sequence[Experts]) -> list[str]:
        plan, found = self.plan, self._of_chunks()
        judged, reach = len(self.positions), self.distance + 1
        if judged < plan.max_positions:
            beyond = f", and its attention beyond {reach}" if reach < plan.max_positions else ""
            further = " (--budget thorough reaches further)" if plan.budget != THOROUGH else ""
            found.append(
                f"{plan.max_positions - judged} of {plan.max_positions} positions by the whole model{beyond}{further}"
            )
        if (single := len(self.single_positions)) < plan.max_positions:
            found.append(
                f"single-token steps at {plan.max_positions - single} of {plan.max_positions} positions"
            )
        if 0 < len(self.capacities) < plan.cache_sizes:
            left = plan.cache_sizes - len(self.capacities)
            found.append(f"{left} of {plan.cache_sizes} sizes of the cache")
        if len(self.ids) < self.vocab_size:
            rest = self.vocab_size - len(self.ids)
            where = ", which were compared in the embedding" if self.embedded_ids else ""
            found.append(f"{rest} of {self.vocab_size} token ids by the whole model{where}")
        if 0 < len(self.spans) < every:
            found.append(f"{every - len(self.spans)} of {every} spans of the cache")
        deepest = max(self.layer_distance.values(), default=self.distance) + 1
        if max(deepest, self.distance + 1) < plan.capacity:
            found.append(f"attention over more than {max(deepest, self.distance + 1)} positions")
        for layer in experts:
            if layer.without_tokens:
                found.append(
                    f"experts {_ranges(_spans_of(layer.without_tokens))} of layer {layer.layer}, which "
                    "received no token"
                )
        return found

    def _of_chunks(self) -> list[str]:
        """What of dual chunk attention no text reached."""
        if self.chunks is None:
            return []
        chunk, most = self.chunks.chunk, (self.plan.max_positions - 1) // self.chunks.chunk
        alone = max(self.layer_distance.values(), default=0) // chunk  # from position 0 on
        crossed = self.borders | set(range(1, alone + 1))
        kinds = [("first", {1}), ("second", {2}), ("later", range(3, most + 1))]
        missing = [
            f"the {name} border of chunks"
            for name, borders in kinds
            if any(border <= most for border in borders) and crossed.isdisjoint(borders)
        ]
        if max(self.chunks_apart, alone) < 2 <= most:
            missing.append("keys two chunks or more before their query")
        if not missing:
            return []
        return [
            f"dual chunk attention, in chunks of {chunk}, of which no text reached {', '.join(missing)}; in texts "
            "within the first chunk the oracle is transformers' own attention"
        ]


def _spans_of(values: Sequence[int]) -> Ranges:
    """Turn ascending numbers into ranges."""
    found: list[tuple[int, int]] = []
    for value in values:
        if found and value == found[-1][1] + 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return tuple(found)


def _count(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)


def _ranges(ranges: Ranges) -> str:
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ranges)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
