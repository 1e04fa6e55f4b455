"""How much `validate` runs: three budgets, and what each means for a model of a given size.

A scenario's cost is counted in tokens and in steps: a token costs arithmetic, a step reads every weight once. So a
small model gets more single-token steps than a large one under the same budget. The sizes depend on the model and
its sessions, never on the clock: the same question is always judged by the same runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenport.contract import QUICK, SPAN_MULTIPLE, STANDARD, THOROUGH
from qwenport.engines.spans import Spans
from qwenport.exporter import ModelConfig
from qwenport.validate.errors import ValidationError


@dataclass(frozen=True)
class Budget:
    """One budget.

    Attributes:
        context: positions to which the whole model is run, if it has that many. Its widest step may reach further.
        distance: positions to which one decoder layer of each kind is run alone.
        weight_reads: parameters read by all single-token steps; divided by the model's size it gives steps.
        steps: the minimum and maximum of single-token steps, whatever the size.
        rounding: positions at which half precision is judged, layer by layer.
        width_share: tokens that steps of randomly drawn widths may take, in units of `context`.
    """

    context: int
    distance: int
    weight_reads: float
    steps: tuple[int, int]
    rounding: int
    width_share: float


BUDGETS = {
    QUICK: Budget(256, 1024, 1e10, (24, 240), 512, 0.5),
    STANDARD: Budget(1024, 8192, 1.4e10, (48, 720), 512, 0.5),
    THOROUGH: Budget(4096, 1 << 20, 1e11, (200, 2400), 2048, 4.0),
}

# Logits are kept until they are judged, on both sides: at most this many numbers.
MOST_LOGITS = 1.2e8
# A batch's rows run side by side, padding included: at most this many tokens for one wide step of all rows.
WIDE_BATCH_TOKENS = {QUICK: 256, STANDARD: 512, THOROUGH: 16384}
SMALL_MODEL = 2e7  # parameters: below it, a whole batch of widest steps costs less than startup
NARROW = 16  # tokens: a step this narrow costs hardly more than a single-token step
CACHES = {
    QUICK: (2, 4),
    STANDARD: (4, 12),
    THOROUGH: (8, 64),
}  # number of sizes for a large model and for a small one
DECODED_SHARE, DECODED_LEAST = 0.2, 17  # single-token steps of "decode": share, minimum
SMALL_VOCABULARY = 8192  # ids: a small model computes the logits of each of them in seconds
SMALL_MODEL_STEPS = 240  # steps that only a model below about that size gets


@dataclass(frozen=True)
class Plan:
    """The runs for one target under one budget.

    Attributes:
        budget: the budget's name.
        seed: seed of everything that is drawn at random.
        rows: rows of the session, the target's maximum.
        capacity: cache slots per row, the target's maximum.
        max_positions: positions that the model supports.
        widest: tokens of the widest step.
        context: tokens of the longest text, at most `capacity`.
        distance: positions to which single layers are run.
        steps: approximate number of single-token steps in the whole validation.
        rounding: positions at which half precision is judged.
        dense_logits: positions of the long text at which every logit is judged.
        widths: widths of single steps to try, the widest first.
        spans: active spans of the cache of the target's sessions.
        edges: spans below `context`, at whose ends single-token steps are judged.
        wide_batch: width of one step of all rows.
        greedy: new tokens of `greedy`.
        caches: slots of the caches of "cache of N"; those beyond `context` get a short text only.
        cache_sizes: how many sizes of cache `generate` may allocate.
        batches: rows of the steps of "batches".
        decoded: positions up to which "decode" goes token by token.
        every_id: whether every id of the vocabulary goes through the model.
        chunked: whether attention is dual chunk attention.
    """

    budget: str
    seed: int
    rows: int
    capacity: int
    max_positions: int
    widest: int
    context: int
    distance: int
    steps: int
    rounding: int
    dense_logits: int
    widths: tuple[int, ...]
    spans: Spans
    edges: tuple[int, ...]
    wide_batch: int
    greedy: int
    caches: tuple[int, ...]
    cache_sizes: int
    batches: tuple[int, ...]
    decoded: int
    every_id: bool
    chunked: bool = False

    @property
    def small(self) -> bool:
        """Whether the model is so small that another read of its weights costs next to nothing."""
        return self.steps >= SMALL_MODEL_STEPS

    def share(self, part: float, least: int = 1) -> int:
        """A share of the single-token steps."""
        return max(least, int(self.steps * part))


def find_budget(name: str) -> Budget:
    """The budget of that name.

    Raises:
        ValidationError: no such budget.
    """
    if name not in BUDGETS:
        raise ValidationError(f"budget {name!r} is not one of {', '.join(BUDGETS)}")
    return BUDGETS[name]


def make_plan(
    config: ModelConfig,
    *,
    budget: str,
    seed: int,
    rows: int,
    capacity: int,
    max_positions: int,
    max_step_tokens: int,
    streamed: bool,
    spans: Spans | None = None,
    one_cache: bool = False,
) -> Plan:
    """Compute the sizes of all runs.

    Args:
        config: the model.
        budget: "quick", "standard" or "thorough".
        seed: seed of everything that is drawn at random.
        rows, capacity, max_positions, max_step_tokens: sizes of the target's sessions.
        streamed: weights are read from disk in every pass.
        spans: as for `CachedSession`.
        one_cache: sessions have one capacity only, like an engine's.

    Raises:
        ValidationError: no such budget.
    """
    sizes, parameters = find_budget(budget), parameters_per_token(config)
    widest = min(max_step_tokens, capacity)
    context = min(capacity, sizes.context)
    steps = int(np.clip(sizes.weight_reads / parameters, *sizes.steps))
    small = parameters < SMALL_MODEL
    wide = widest if small else min(widest, WIDE_BATCH_TOKENS[budget] // rows)
    spans = Spans(SPAN_MULTIPLE, capacity) if spans is None else spans
    all_small = small and budget != QUICK  # what is cheap is judged completely
    some = max(DECODED_LEAST, int(steps * DECODED_SHARE))
    return Plan(
        budget=budget,
        seed=seed,
        rows=rows,
        capacity=capacity,
        max_positions=max_positions,
        widest=widest,
        context=context,
        distance=min(max_positions, capacity, sizes.distance),
        steps=steps,
        rounding=sizes.rounding,
        dense_logits=int(min(context, MOST_LOGITS / 4 / config.vocab_size)),
        widths=_widths(widest, sizes.width_share * context, seed, small),
        spans=spans,
        edges=_edges(spans, context, max(2, steps // 16)),
        wide_batch=max(1, wide),
        greedy=2 if streamed else 32 if small else 16,
        caches=() if one_cache else _caches(capacity, CACHES[budget][small], seed),
        cache_sizes=1 if one_cache else len(Spans(SPAN_MULTIPLE, capacity)),
        batches=tuple(n for n in range(2, rows + 1) if all_small or n in (2, 3, rows)),
        decoded=context if all_small else min(context, some),
        every_id=all_small and config.vocab_size <= SMALL_VOCABULARY,
        chunked=config.dual_chunk is not None,
    )


def parameters_per_token(config: ModelConfig) -> int:
    """Approximate number of weights per token: all of a dense model's, the chosen experts' of a mixture."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    total = config.vocab_size * hidden + layers * heads * hidden
    for layer in range(layers):
        moe = config.moe_of(layer)
        inner = config.intermediate_size
        if moe is not None:
            inner = moe.experts_per_token * moe.expert_size + (moe.shared_expert_size or 0)
        total += 3 * inner * hidden
    return int(total)


def _widths(widest: int, tokens: float, seed: int, small: bool) -> tuple[int, ...]:
    """The widest step, then widths drawn on a log scale until `tokens` are spent, at least six."""
    generator = np.random.default_rng((seed, 1))
    found, spent = [widest], 0
    for width in [*([widest - 1] if small else []), *_spread_widths(widest, generator)]:
        fits = width <= NARROW or spent + width <= tokens
        if width >= 2 and width not in found and (fits or (len(found) < 6 and width < tokens / 4)):
            found.append(width)
            spent += width
    return tuple(found)


def _spread_widths(widest: int, generator: np.random.Generator) -> Sequence[int]:
    """One width from each part of 2..widest, each part larger by half than the last, largest first; then all again."""
    bounds = [2]
    while bounds[-1] < widest:
        bounds.append(max(bounds[-1] + 1, bounds[-1] * 3 // 2))
    drawn = []
    for _ in range(3):
        for low, high in zip(bounds[-2::-1], bounds[:0:-1], strict=False):
            drawn.append(int(generator.integers(low, min(high, widest + 1))))
    return drawn


def _caches(capacity: int, most: int, seed: int) -> tuple[int, ...]:
    """Sizes below the capacity that `generate` allocates: 64, 192, then others at random, `most` in total."""
    every = list(Spans(SPAN_MULTIPLE, capacity))[:-1]
    first = [slots for slots in (SPAN_MULTIPLE, 3 * SPAN_MULTIPLE) if slots in every]
    left = [slots for slots in every if slots not in first]
    drawn = np.random.default_rng((seed, 3)).permutation(left)[: max(0, most - len(first))]
    return tuple(sorted([*first, *(int(slots) for slots in drawn)]))


def _edges(spans: Spans, context: int, most: int) -> tuple[int, ...]:
    """Spans that the cache passes, `most` of them, evenly spread and including both ends."""
    every = [span for span in spans if span < context]
    if len(every) <= most:
        return tuple(every)
    chosen = np.unique(np.linspace(0, len(every) - 1, most).round().astype(int))
    return tuple(every[index] for index in chosen)
