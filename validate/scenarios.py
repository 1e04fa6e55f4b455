"""Ways to use a session, each a short list of operations on a `Run`.

All scenarios with the same cache size share one session, so each finds the cache as the previous one left it. No
scenario depends on what the target returns, so it can be rehearsed on a session that returns nothing (`streaming`).

Most of them feed the beginning of one long text, so that transformers computes that text only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwenport.validate.budget import Plan
from qwenport.validate.run import NotApplicable, Run
from qwenport.validate.walk import draw_walk, perform

PREFILL_TOKENS = 64
LAST_LOGITS_OF = (1, 2, 7, 63, 64, 65, 100)
CHUNKS = (1, 7, 30, 26, 1, 2, 33)  # end exactly at slot 64, pass it by one, then by more
DECODE_PROMPT = 5
GREEDY_PROMPT = 12
CONTEXT_TOKENS = 48  # at the end of the context, and across the original one
CONTEXT_DECODES = 8
RESET_FIRST, RESET_PROMPT = 40, 9
DENSE_PIECE = 64  # tokens of a step in which every logit is judged, if not all steps can be
BATCH_LENGTHS = (20, 33, 9, 25, 1, 27, 18, 14)
BATCH_CHUNK = 17


@dataclass(frozen=True)
class Scenario:
    """One way to use a session.

    Attributes:
        name, summary: shown to the user.
        run: the scenario's operations.
        greedy: whether it is judged as text, not only as logits.
        capacity: cache slots of its session; None for all of the target's.
    """

    name: str
    summary: str
    run: Callable[[Run], None]
    greedy: bool = False
    capacity: int | None = None


def prefill(run: Run) -> None:
    """One prompt in one step, all logits."""
    run.start()
    run.prefill([run.take(PREFILL_TOKENS)], all_logits=True)


def last_logits(run: Run) -> None:
    """Prompts of several lengths as `generate` and C++ run them, and the next token."""
    lengths = [n for n in LAST_LOGITS_OF if n <= run.capacity] or [run.capacity]
    for length in lengths:
        run.start()
        run.prefill([run.take(length)])
        if follows := run.take(1, start=length):
            run.decode(follows)


def chosen_logits(run: Run) -> None:
    """Several logits of a step, but not all: the bindings allow it, and a custom program may request it."""
    rows = min(2, run.session.max_batch)
    run.start()
    width = min(PREFILL_TOKENS, run.plan.widest, run.capacity)
    for start, most in ((0, 2), (width, 5)):
        count = min(most, run.session.max_step_logits)
        tokens = [run.take(width, stream=row + 1, start=start) for row in range(rows)]
        if len(tokens[0]) <= count + rows:
            break
        # different ones in each row, the last only in the first row
        last = len(tokens[0]) - 1
        wanted = [
            np.linspace(row, last - 2 * row, count).astype(int).tolist() for row in range(rows)
        ]
        run.prefill_choosing(tokens, wanted)


def step_widths(run: Run) -> None:
    """Single steps of many widths, the widest first; some from the start, some after text that stays."""
    generator = np.random.default_rng((run.plan.seed, 2))
    followed = run.plan.share(0.1, 4)
    for number, width in enumerate(run.plan.widths):
        width = min(width, run.capacity)
        room = min(run.length(), run.plan.context - width)
        behind = int(generator.integers(0, room + 1)) if number % 2 and room > 0 else 0
        if behind:
            run.truncate(behind)
        else:
            run.start()
        run.prefill([run.take(width, start=behind)])
        follows = run.take(1, start=behind + width)
        if follows and number < followed:
            run.decode(follows)


def whole_context(run: Run) -> None:
    """The long text: each stretch with all logits or the last, its end token by token.

    Then backwards, from the last span's edge to the first's: three single tokens at the edge, and one step across it.
    """
    plan = run.plan
    end = min(plan.context, run.capacity)
    tail = min(plan.share(0.15, 8), end - 1)
    run.start()
    for start, stop, dense in _pieces(end - tail, min(plan.dense_logits, end - tail), run):
        tokens = run.take(stop - start, start=start)
        run.prefill([tokens], all_logits=dense, prompt_lengths=[end - tail])
    for position in range(end - tail, end):
        run.decode(run.take(1, start=position))
    for edge in reversed(plan.edges):
        if edge + 2 > end:
            continue
        _back_to(run, edge - 1)
        for position in range(edge - 1, edge + 2):
            run.decode(run.take(1, start=position))
    middle = end // 2
    if run.length() < middle + 8:  # the edges went back before it
        return
    _back_to(run, middle)
    for position in range(middle, min(middle + 8, end)):
        run.decode(run.take(1, start=position))


def _pieces(end: int, dense: int, run: Run) -> list[tuple[int, int, bool]]:
    """0..end in steps; at about `dense` positions, spread over the range, every logit is judged."""
    widest = run.plan.widest
    if dense >= end:
        return [(a, min(a + widest, end), True) for a in range(0, end, widest)]
    count = max(1, dense // DENSE_PIECE)
    starts = np.linspace(0, max(0, end - DENSE_PIECE), count).astype(int).tolist()
    found: list[tuple[int, int, bool]] = []
    done = 0
    for start in starts:
        start = max(start, done)
        for a in range(done, start, widest):
            found.append((a, min(a + widest, start), False))
        done = min(start + DENSE_PIECE, end)
        found.append((start, done, True))
    for a in range(done, end, widest):
        found.append((a, min(a + widest, end), False))
    return found


def decode(run: Run) -> None:
    """A short prompt, then one token at a time through the cache."""
    run.start()
    run.prefill([run.take(DECODE_PROMPT)])
    for position in range(DECODE_PROMPT, run.plan.decoded):
        if follows := run.take(1, start=position):
            run.decode(follows)


def chunked_prefill(run: Run) -> None:
    """One prompt in chunks of several sizes, alternately with the last logits and with all."""
    run.start()
    done, whole = 0, min(sum(CHUNKS), run.capacity)
    for number, size in enumerate(CHUNKS):
        tokens = run.take(size, start=done)
        run.prefill([tokens], all_logits=number % 2 == 0, prompt_lengths=[whole])
        done += size


def batches(run: Run) -> None:
    """Two rows, three, and all rows: of different lengths, in chunks, then single tokens.

    A row that has ended idles; with all rows, one is empty at first and joins when others already decode.
    """
    most = run.session.max_batch
    if most == 1:
        raise NotApplicable("the target was made for one row")
    for rows in run.plan.batches:
        _batch(run, rows, decodes=3 if rows < most else 8)


def _batch(run: Run, rows: int, decodes: int) -> None:
    late = rows - 2 if rows > 3 else None  # the row that joins late
    lengths = [
        min(BATCH_LENGTHS[row % len(BATCH_LENGTHS)], max(1, run.capacity - decodes))
        for row in range(rows)
    ]
    run.start()
    for start in range(0, max(lengths), BATCH_CHUNK):
        given = [
            []
            if row == late
            else run.take(
                min(BATCH_CHUNK, max(0, lengths[row] - start)), stream=row + 1, start=start
            )
            for row in range(rows)
        ]
        run.prefill(given, all_logits=start == BATCH_CHUNK and rows <= 3)
    for step in range(decodes):
        if step == decodes // 2 and late is not None:
            joining = run.take(lengths[late], stream=late + 1)
            run.prefill([joining if row == late else [] for row in range(rows)])
        idle = step % rows if step % 3 != 2 else None
        tokens: list[int | None] = [None] * rows
        for row in range(rows):
            ended = row == 0 and step > decodes // 2  # finishes early
            if row != idle and not ended and run.length(row):
                follows = run.take(1, stream=row + 1, start=run.length(row))
                tokens[row] = follows[0] if follows else None
        if any(token is not None for token in tokens):
            run.decode(tokens)


def wide_batch(run: Run) -> None:
    """All rows in one wide step, each a little shorter than the previous one, then one token each."""
    rows = run.session.max_batch
    if rows == 1:
        raise NotApplicable("the target was made for one row")
    widest = min(run.plan.wide_batch, run.capacity)
    run.start()
    run.prefill([run.take(max(1, widest - 3 * row), stream=row + 1) for row in range(rows)])
    follows = [run.take(1, stream=row + 1, start=run.length(row)) for row in range(rows)]
    if any(follows):
        run.decode([token[0] if token else None for token in follows])


def small_cache(run: Run) -> None:
    """A cache of a size that `generate` allocates, filled to its last slot; a large one gets only a short text."""
    if run.session.capacity >= run.plan.capacity:
        raise NotApplicable("the target's whole cache is not larger")
    end = run.capacity if run.capacity <= run.plan.context else PREFILL_TOKENS
    single = min(run.plan.share(0.05, 2), 6, end - 1)
    run.start()
    run.prefill([run.take(end - single)])
    for position in range(end - single, end):
        run.decode(run.take(1, start=position))


def end_of_context(run: Run) -> None:
    """A text that ends at the last position the model supports, wherever that is."""
    _at(run, run.session.max_positions - CONTEXT_TOKENS, stream=1)


def middle_of_context(run: Run) -> None:
    """A text that begins in the middle of the positions that whole-model runs do not reach."""
    if run.plan.context >= run.session.max_positions:
        raise NotApplicable("the whole context is run")
    _at(run, (run.plan.context + run.session.max_positions) // 2, stream=2)


def past_original_context(run: Run) -> None:
    """A text that crosses the end of the original context, into what the rope settings add."""
    if run.original_context is None:
        raise NotApplicable("the rope settings do not extend the context")
    if run.original_context + CONTEXT_TOKENS // 2 > run.session.max_positions:
        raise NotApplicable("the package stops before the original context ends")
    _at(run, run.original_context - CONTEXT_TOKENS // 2, stream=3)


def chunk_borders(run: Run) -> None:
    """Short texts across borders of chunks: the first, the second, and the last that the model supports."""
    assert run.chunk is not None
    before = min(CONTEXT_TOKENS // 2, run.chunk)
    last = (run.session.max_positions - 1) // run.chunk
    if not last:
        raise NotApplicable("all positions are in one chunk")
    for stream, border in enumerate(sorted({1, min(2, last), last}), 4):
        _at(run, border * run.chunk - before, stream)


def _at(run: Run, first_position: int, stream: int) -> None:
    """A short text that begins at any position: its first token gets slot 0, and sees nothing before it."""
    run.start(max(0, first_position))
    tokens = run.take(CONTEXT_TOKENS, stream=stream)
    prompt = max(1, len(tokens) - min(CONTEXT_DECODES, run.plan.share(0.1, 4)))
    run.prefill([tokens[:prompt]], all_logits=True)
    for token in tokens[prompt:]:
        run.decode([token])


def after_reset(run: Run) -> None:
    """A text, a reset, and a shorter text that must not see the first."""
    run.start()
    run.prefill([run.take(RESET_FIRST, stream=4)])
    run.start()
    run.prefill([run.take(RESET_PROMPT)])
    for position in range(RESET_PROMPT, RESET_PROMPT + 6):
        if follows := run.take(1, start=position):
            run.decode(follows)


def _back_to(run: Run, length: int) -> None:
    """The text's first `length` tokens: those that are there, or read again if they are scaled for a longer prompt."""
    if run.scaled_beyond(0, length + 1):
        run.start()
        run.prefill([run.take(length, start=0)])
    else:
        run.truncate(length)


def truncation(run: Run) -> None:
    """Truncated rows that continue with other tokens, and one that leaves while the other stays."""
    rows = min(2, run.session.max_batch)
    run.start()
    run.prefill([run.take(60, stream=row + 1) for row in range(rows)])
    run.truncate(min(20, run.length()))
    other = run.take(7, stream=5, start=run.length())
    run.prefill([other, *[[]] * (rows - 1)])
    if rows == 2:
        run.truncate(0, row=1)
        run.prefill([[], run.take(15, stream=6)])
    for _ in range(4):
        follows = [run.take(1, stream=5 + row, start=run.length(row)) for row in range(rows)]
        if all(follows):
            run.decode([token[0] for token in follows])


def token_ids(run: Run) -> None:
    """The ids that prompts rarely contain: the highest, the lowest, special and added ones; all of a small model's."""
    ids = list(run.special_ids)
    if run.plan.every_id:
        ids += [token for token in range(run.session.vocab_size) if token not in run.special_ids]
    for start in range(0, len(ids), max(1, run.capacity)):
        run.start()
        run.prefill([ids[start : start + run.capacity]], all_logits=True)


def random_walk(run: Run) -> None:
    """Operations that a program could perform, drawn at random (`--seed`)."""
    perform(run, draw_walk(run.plan, run.prompts, run.session))


def greedy_prompt(plan: Plan) -> tuple[int, int]:
    """The number of prompt tokens of `greedy`, and the number of new tokens requested."""
    prompt = min(GREEDY_PROMPT, plan.capacity)
    return prompt, min(plan.greedy, plan.capacity - prompt + 1)


def greedy(run: Run) -> None:
    """transformers' greedy continuation of a prompt, token for token.

    The target is fed transformers' tokens and must choose each next one itself. It does so at every step if and only if
    it would write the same text by itself; and after a first wrong token the rest is still informative.
    """
    prompt, _ = greedy_prompt(run.plan)
    run.start()
    run.prefill([run.take(prompt)])
    for token in run.greedy[:-1]:
        run.decode([token])


def looked_into(run: Run) -> None:
    """The text by which errors are followed from layer to layer: a prompt, then single tokens."""
    run.start()
    run.prefill([run.take(PREFILL_TOKENS)], all_logits=True)
    for position in range(PREFILL_TOKENS, PREFILL_TOKENS + 8):
        if follows := run.take(1, start=position):
            run.decode(follows)


# In this order, then the small caches of the plan: the first finds an unused cache, and all those after the long text
# one that is full of old values, which show if a mask lets anything through.
SCENARIOS = (
    Scenario("prefill", "One prompt in one step, all logits", prefill),
    Scenario("last logits", "Prompts as generate and C++ run them: one logit a row", last_logits),
    Scenario("chosen logits", "Steps that are asked for some of their logits", chosen_logits),
    Scenario("step widths", "Single steps of many widths, the widest first", step_widths),
    Scenario("whole context", "A long text, its end, and every edge of a span", whole_context),
    Scenario("decode", "A prompt, then token by token through the cache", decode),
    Scenario("chunked prefill", "One prompt in chunks of several sizes", chunked_prefill),
    Scenario("batches", "2, 3 and all rows: ragged, idle, joining, finishing early", batches),
    Scenario("wide batch", "All rows in one wide step", wide_batch),
    Scenario("end of context", "A text that ends at the last position", end_of_context),
    Scenario(
        "middle of context",
        "A text at positions between the two ends that are run",
        middle_of_context,
    ),
    Scenario(
        "past original context",
        "A text that crosses into what rope scaling adds",
        past_original_context,
    ),
    Scenario("after reset", "A session used, reset, and used again", after_reset),
    Scenario("truncation", "Rows cut short that go on with other tokens", truncation),
    Scenario("token ids", "The highest, special and added ids", token_ids),
    Scenario("random walk", "Operations drawn at random", random_walk),
    Scenario("greedy", "transformers' greedy continuation, token for token", greedy, greedy=True),
)


CHUNK_BORDERS = Scenario("chunk borders", "Texts across borders of chunks", chunk_borders)


def scenarios(plan: Plan) -> tuple[Scenario, ...]:
    """All scenarios to run: SCENARIOS, with dual chunk attention CHUNK_BORDERS, and one per cache size of the plan."""
    caches = (
        Scenario(
            f"cache of {n}", f"A cache of {n} slots, as generate allocates", small_cache, False, n
        )
        for n in plan.caches
    )
    return (*SCENARIOS, *[CHUNK_BORDERS] * plan.chunked, *caches)


LOOKED_INTO = Scenario("layers", "Hidden states from layer to layer", looked_into)
