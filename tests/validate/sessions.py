"""Sessions that stand for a target, and what a run on them is made with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import checkpoints
import numpy as np
from hypothesis import strategies as st

from qwenport.contract import SPAN_MULTIPLE
from qwenport.engines import CachedSession
from qwenport.exporter import ModelConfig, parse_config
from qwenport.validate.budget import BUDGETS, Plan, make_plan
from qwenport.validate.prompts import Prompts
from qwenport.validate.run import Run
from qwenport.validate.scenarios import Scenario, greedy_prompt
from qwenport.validate.text import Text

VOCABULARY = 50
PROMPTS = Prompts(
    tuple(int(i) for i in np.random.default_rng(5).permutation(1000) % VOCABULARY), ""
)

Array = Any


def signature(tokens: Sequence[int]) -> float:
    """A number that tells any two texts apart, and that fp32 holds."""
    return float(zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes()) & 0xFFFFFF)


class Diary(CachedSession):
    """A cache of token ids, written as a real one is. Logits say what attention would see of it.

    The first logit of a token is its position, the second the signature of the slots up to its own.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        positions: int | None = None,
        *,
        max_step_tokens: int = 512,
        max_step_logits: int = 512,
    ) -> None:
        super().__init__(
            max_batch=rows,
            capacity=capacity,
            vocab_size=VOCABULARY,
            max_step_tokens=max_step_tokens,
            max_step_logits=max_step_logits,
            max_positions=capacity if positions is None else positions,
        )
        self.cache = np.full((rows, capacity), -1, dtype=np.int64)

    def _step(self, feeds: Mapping[str, Array]) -> Array:
        ids, starts, wanted = (feeds[n] for n in ("input_ids", "write_indices", "logits_indices"))
        rows, width = ids.shape
        assert 1 <= width <= self.max_step_tokens and 1 <= wanted.shape[1] <= self.max_step_logits
        assert starts.min() >= 0 and starts.max() + width <= self.capacity
        assert wanted.min() >= 0 and wanted.max() < width
        positions = feeds["position_ids"]
        assert (np.diff(positions, axis=1) == 1).all() and positions.max() < self.max_positions
        span = feeds["key_positions"]
        assert len(span) in self.spans and (
            len(span) % SPAN_MULTIPLE == 0 or len(span) == self.capacity
        )
        assert (positions[:, 0] - starts == span[0]).all() and positions.max() <= span[-1]
        logits = np.zeros((rows, wanted.shape[1], VOCABULARY), np.float32)
        for row, start in enumerate(starts.tolist()):
            self.cache[row, start : start + width] = ids[row]
            logits[row, :, 0] = positions[row, wanted[row]]
            for column, index in enumerate(wanted[row].tolist()):
                logits[row, column, 1] = signature(self.cache[row, : start + index + 1])
        # values as a graph shows them: of each token, and by head
        self.observed = {"ids": ids.copy(), "heads": np.stack([ids, -ids], axis=1)}
        return logits


def said(texts: Sequence[Text]) -> list[list[float]]:
    """The first two logits that a diary owes for what the oracle is asked about."""
    return [
        [text.first_position + index, signature(text.tokens[: index + 1])]
        for text in texts
        for index in text.positions
    ]


def mini_config(**changes: Any) -> ModelConfig:
    """A small model's config; `changes` to its config.json."""
    return parse_config(checkpoints.mini("llama", vocab_size=VOCABULARY, **changes))


# from 12 thousand parameters a token to 70 thousand million
CONFIGS = (
    mini_config(),
    *(
        parse_config(checkpoints.PUBLISHED[name])
        for name in ("qwen2.5-0.5b-instruct", "qwen3-30b-a3b", "llama-3.1-70b-instruct")
    ),
)


@st.composite
def plans(draw: st.DrawFn, most: int = 300) -> Plan:
    """A plan of any budget for any model, of at most that many slots."""
    capacity = draw(st.sampled_from((1, 2, 3)) | st.integers(1, most))
    return make_plan(
        draw(st.sampled_from(CONFIGS)),
        budget=draw(st.sampled_from(sorted(BUDGETS))),
        seed=draw(st.integers(0, 3)),
        rows=draw(st.integers(1, 5)),
        capacity=capacity,
        max_positions=capacity + draw(st.just(0) | st.integers(0, most)),
        max_step_tokens=draw(st.sampled_from((1, 2)) | st.integers(1, 2 * most)),
        streamed=draw(st.booleans()),
    )


def make_run(session: CachedSession, plan: Plan, **keywords: Any) -> Run:
    """A run whose greedy text is made of prompts."""
    _, count = greedy_prompt(plan)
    return Run(session, PROMPTS, plan, greedy=PROMPTS.take(count, start=500), **keywords)


def capacity_of(scenario: Scenario, plan: Plan) -> int:
    """Slots of a scenario's session."""
    return min(plan.capacity, scenario.capacity or plan.capacity)
