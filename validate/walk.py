"""A random walk: operations that a program could perform on a session, drawn from a seed, judged at every logit.

The operations are drawn before anything runs and do not depend on what the target returns. An operation is
self-contained: it carries its tokens, and is cut to what fits when it is performed, so any part of a walk is a walk.
That is how a failing one is shrunk to a script of a few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qwenport.engines import CachedSession
from qwenport.validate.budget import Plan
from qwenport.validate.prompts import Prompts
from qwenport.validate.run import Run
from qwenport.validate.target import Target

Kind = Literal["prefill", "decode", "truncate", "reset"]

MOST_TRIALS = 80  # runs of shorter walks while one is shrunk
LONG_RUN = 12  # the most consecutive single tokens of one row
NARROW = 4  # tokens per row of a prefill, once the walk's token budget is spent

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Operation:
    """One call of a session's method.

    Attributes:
        kind: the method.
        rows: prefill: each row's tokens; decode: one token per row, or none.
        all_logits: argument of prefill.
        row, length: arguments of truncate.
    """

    kind: Kind
    rows: Rows = ()
    all_logits: bool = False
    row: int = 0
    length: int = 0

    def __str__(self) -> str:
        """A line of the Python program that `script` writes."""
        if self.kind == "reset":
            return "session.reset(); texts = [[] for _ in texts]"
        if self.kind == "truncate":
            return f"session.truncate({self.length}, row={self.row}); del texts[{self.row}][{self.length}:]"
        rows = [list(row) for row in self.rows]
        if self.kind == "decode":
            tokens = [row[0] if row else None for row in self.rows]
            return f"compare({rows}, session.decode({tokens}))"
        option = ", all_logits=True" if self.all_logits else ""
        return f"compare({rows}, session.prefill({rows}{option}))"


def draw_walk(plan: Plan, prompts: Prompts, session: CachedSession) -> list[Operation]:
    """Draw the walk of `plan.seed`.

    Args:
        plan: the limits on its steps and tokens.
        prompts: the source of its tokens.
        session: a session, for its rows and slots.
    """
    return _Walk(plan, prompts, session).draw()


class _Walk:
    def __init__(self, plan: Plan, prompts: Prompts, session: CachedSession) -> None:
        self._random = np.random.default_rng((plan.seed, 3))
        self._prompts = prompts
        self._rows = min(session.max_batch, 4)
        self._held = [0] * self._rows
        self._slots = min(session.capacity, session.max_positions, 384 if plan.small else 96)
        self._widest = min(plan.widest, 256 if plan.small else 48)
        self._steps, self._tokens = (
            plan.share(0.15, 12),
            plan.context * 2 if plan.small else plan.context // 6,
        )

    def draw(self) -> list[Operation]:
        found: list[Operation] = []
        while self._steps > 0:
            choice = self._random.random()
            if choice < 0.35 or not any(self._held):
                found.append(self._prefill())
            elif choice < 0.65:
                found += [self._decode()]
            elif choice < 0.75:
                row = int(self._random.integers(self._rows))
                found += [self._decode(row) for _ in range(self._random.integers(2, LONG_RUN))]
            elif choice < 0.95:
                found.append(self._truncate())
            else:
                self._held = [0] * self._rows
                found.append(Operation("reset"))
        return found

    def _take(self, count: int) -> tuple[int, ...]:
        start = int(self._random.integers(len(self._prompts.ids)))
        self._tokens -= count
        return tuple(self._prompts.take(count, start=start))

    def _prefill(self) -> Operation:
        used = int(self._random.integers(1, self._rows + 1))
        widest = self._widest if self._tokens > 0 else min(self._widest, NARROW)
        rows = []
        for row in range(used):
            room = min(self._slots - self._held[row], widest)
            count = 0
            if room > 0 and (self._random.random() < 0.7 or used == 1):
                count = int(np.exp(self._random.uniform(0, np.log(room + 1))))
            count = min(count, room)
            self._held[row] += count
            rows.append(self._take(count))
        self._steps -= 1
        return Operation("prefill", tuple(rows), all_logits=bool(self._random.random() < 0.3))

    def _decode(self, only: int | None = None) -> Operation:
        rows = []
        for row in range(self._rows):
            wanted = row == only if only is not None else self._random.random() < 0.7
            fits = wanted and 0 < self._held[row] < self._slots
            self._held[row] += int(fits)
            rows.append(self._take(1) if fits else ())
        self._steps -= 1
        return Operation("decode", tuple(rows))

    def _truncate(self) -> Operation:
        row = int(self._random.integers(self._rows))
        length = int(self._random.integers(self._held[row] + 1)) if self._held[row] else 0
        self._held[row] = length
        return Operation("truncate", row=row, length=length)


def perform(run: Run, operations: Sequence[Operation]) -> list[Operation]:
    """Perform a walk from an empty session; return what was performed."""
    run.start()
    return [done for operation in operations for done in _perform(run, operation)]


def _perform(run: Run, operation: Operation) -> list[Operation]:
    """Perform one operation, cut to what fits; return what was performed.

    A row that cannot go on, since its keys are scaled for another length, is emptied first.
    """
    if operation.kind == "reset":
        run.start()
        return [operation]
    if operation.kind == "truncate":
        length = min(operation.length, run.length(operation.row))
        run.truncate(length, operation.row)
        return [replace(operation, length=length)]
    emptied: list[Operation] = []
    if operation.kind == "decode":
        rows = tuple(
            row if row and 0 < run.length(index) < run.capacity else ()
            for index, row in enumerate(operation.rows)
        )
        for index, row in enumerate(rows):
            if row and run.scaled_beyond(index, run.length(index) + 1):
                emptied += _perform(run, Operation("truncate", row=index, length=0))
        if any(rows):
            run.decode([row[0] if row else None for row in rows])
    else:
        rows = tuple(
            row[: run.capacity - run.length(index)] for index, row in enumerate(operation.rows)
        )
        for index, row in enumerate(rows):
            if row and run.scaled_otherwise(index, run.length(index) + len(row)):
                emptied += _perform(run, Operation("truncate", row=index, length=0))
        if any(rows):
            run.prefill([list(row) for row in rows], all_logits=operation.all_logits)
    return [*emptied, replace(operation, rows=rows)] if any(rows) else []


def shrink(
    operations: Sequence[Operation],
    fails: Callable[[Sequence[Operation]], bool],
    trials: int = MOST_TRIALS,
) -> list[Operation]:
    """Shorten a walk that still fails: leave out parts, then cut prefills, as long as it fails.

    Args:
        operations: a walk that fails.
        fails: whether a walk fails.
        trials: how often `fails` may be called.
    """
    best = list(operations)

    def better(candidate: list[Operation]) -> bool:
        nonlocal best, trials
        if trials <= 0 or not candidate:
            return False
        trials -= 1
        if not fails(candidate):
            return False
        best = candidate
        return True

    size = len(best)
    while size >= 1 and trials > 0:
        start = 0
        while start < len(best) and trials > 0:
            if not better(best[:start] + best[start + size :]):
                start += size
        size //= 2
    for index in range(len(best)):
        while trials > 0 and (shorter := _cut(best[index])) is not None:
            if not better([*best[:index], shorter, *best[index + 1 :]]):
                break
    return best


def _cut(operation: Operation) -> Operation | None:
    """The same prefill with half its tokens; None if it cannot be cut."""
    if operation.kind != "prefill" or max(map(len, operation.rows), default=0) < 2:
        return None
    rows = tuple(row[: (len(row) + 1) // 2] for row in operation.rows)
    return Operation("prefill", rows, operation.all_logits)


def script(operations: Sequence[Operation], rows: int, capacity: int, target: Target) -> str:
    """Write a walk that fits as a Python program that compares every row's last logits with transformers.

    transformers ignores dual chunk attention; then the program asks the oracle.

    Args:
        operations: the result of `perform`.
        rows, capacity: the session's.
        target: what was judged.
    """
    judged = f"judged_as={target.judged_as!r}"
    if target.attention is not None:
        judged += f", gpus={','.join(target.gpus)!r}, attention={target.attention!r}"
    chunked = target.config.dual_chunk is not None
    begin = (_REPLAY_CHUNKED if chunked else _REPLAY).format(
        rows=rows, capacity=capacity, judged=judged
    )
    return "\n".join([begin, *map(str, operations)])


# TARGET and CHECKPOINT stand for the two paths. Each step prints the largest difference of a logit.
_REPLAY = """\
import numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from qwenport.validate import open_candidate

session = open_candidate(Path(TARGET), {judged}, max_batch={rows}, capacity={capacity})
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
texts = [[] for _ in range({rows})]

def compare(given, logits):
    for row, tokens in enumerate(given):
        texts[row] += tokens
        if tokens:
            right = model(torch.tensor([texts[row]])).logits[0, -1].detach().numpy()
            made = np.asarray(logits[row]).reshape(-1, len(right))[-1]
            print(f"row {{row}}, {{len(texts[row])}} tokens: {{np.abs(made - right).max():.3g}}")
"""

# A token's key is scaled by the length that its request had.
_REPLAY_CHUNKED = """\
import numpy as np
from pathlib import Path
from qwenport.validate import open_candidate, open_target
from qwenport.validate.reference import Reference, Text

session = open_candidate(Path(TARGET), {judged}, max_batch={rows}, capacity={capacity})
reference = Reference(open_target(Path(TARGET), {judged}), Path(CHECKPOINT))
texts = [[] for _ in range({rows})]

def compare(given, logits):
    for row, tokens in enumerate(given):
        request = len(texts[row]) + len(tokens)
        texts[row] += [(token, request) for token in tokens]
        if tokens:
            ids, requests = zip(*texts[row])
            right = reference.logits([Text(ids, (request - 1,), 0, requests)])[0][0]
            made = np.asarray(logits[row]).reshape(-1, len(right))[-1]
            print(f"row {{row}}, {{request}} tokens: {{np.abs(made - right).max():.3g}}")
"""
