"""Faults of a session or of its kernels, injected around the steps of a healthy onnxruntime session.

Each is a function that makes a step: it is given the session, the healthy step and the step's inputs, and returns the
logits. What it keeps between steps it keeps on the session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qwenport.contract import (
    INPUT_IDS,
    KEY_POSITIONS,
    LOGITS_INDICES,
    POSITION_IDS,
    WRITE_INDICES,
)
from qwenport.engines import OnnxRuntimeSession

Feeds = dict[str, Any]
Step = Callable[[Feeds], Any]
Fault = Callable[[Any, Step, Feeds], Any]


def inject(session: OnnxRuntimeSession, fault: Fault) -> None:
    """Make every step of a session with a fault."""
    healthy = session._step
    session.__dict__["_step"] = lambda feeds: fault(session, healthy, feeds)


def reads_past_the_length(session: Any, step: Step, feeds: Feeds) -> Any:
    """The mask is open for every slot of the span."""
    keys = np.minimum(feeds[KEY_POSITIONS], feeds[POSITION_IDS].min())
    return step({**feeds, KEY_POSITIONS: keys})


def reads_one_slot_past_the_length(session: Any, step: Step, feeds: Feeds) -> Any:
    return step({**feeds, KEY_POSITIONS: np.maximum(feeds[KEY_POSITIONS] - 1, 0)})


def bucket_one_too_small(session: Any, step: Step, feeds: Feeds) -> Any:
    """A graph for the next smaller span."""
    span = len(feeds[KEY_POSITIONS])
    return step({**feeds, KEY_POSITIONS: feeds[KEY_POSITIONS][: max(64, span - 64)]})


def bucket_of_the_start(session: Any, step: Step, feeds: Feeds) -> Any:
    """The span is chosen by the slots before the step, which is enough unless the step crosses an edge."""
    needed = -(-int(max(feeds[WRITE_INDICES].max(), 1)) // 64) * 64
    return step({**feeds, KEY_POSITIONS: feeds[KEY_POSITIONS][:needed]})


def bucket_of_the_first_row(session: Any, step: Step, feeds: Feeds) -> Any:
    needed = -(-int(feeds[WRITE_INDICES][0] + feeds[INPUT_IDS].shape[1]) // 64) * 64
    return step({**feeds, KEY_POSITIONS: feeds[KEY_POSITIONS][:needed]})


def stale_graph(session: Any, step: Step, feeds: Feeds) -> Any:
    """A replay of a captured step of one token reads the inputs of the capture."""
    if feeds[INPUT_IDS].shape[1] > 1:
        return step(feeds)
    shape = (len(feeds[INPUT_IDS]), len(feeds[KEY_POSITIONS]))
    graphs = session.__dict__.setdefault("graphs", {})
    return step(graphs.setdefault(shape, {name: a.copy() for name, a in feeds.items()}))


def stale_slot(session: Any, step: Step, feeds: Feeds) -> Any:
    """Of a replay, only the slot to write to is that of the capture."""
    if feeds[INPUT_IDS].shape[1] > 1:
        return step(feeds)
    shape = (len(feeds[INPUT_IDS]), len(feeds[KEY_POSITIONS]))
    slots = session.__dict__.setdefault("slots", {})
    return step({**feeds, WRITE_INDICES: slots.setdefault(shape, feeds[WRITE_INDICES].copy())})


def stale_logits(session: Any, step: Step, feeds: Feeds) -> Any:
    """The logits are read before the step has finished."""
    now = step(feeds)
    before = session.__dict__.get("before")
    session.before = now
    return before if before is not None and before.shape == now.shape else now


def stale_positions(session: Any, step: Step, feeds: Feeds) -> Any:
    """The second of two steps of one token rotates as the first did."""
    before = session.__dict__.get("positions")
    session.positions = feeds[POSITION_IDS]
    if before is None or before.shape != feeds[POSITION_IDS].shape or before.shape[1] > 1:
        return step(feeds)
    keys = feeds[KEY_POSITIONS] + (before - feeds[POSITION_IDS]).min()
    return step({**feeds, POSITION_IDS: before, KEY_POSITIONS: keys})


def lost_write(session: Any, step: Step, feeds: Feeds) -> Any:
    """One layer's keys of the last token never reach the cache."""
    logits = step(feeds)
    values = session._values("1.key")
    for row, start in enumerate(feeds[WRITE_INDICES]):
        values[row, :, start + feeds[INPUT_IDS].shape[1] - 1] = 0
    return logits


def write_to_the_next_row(session: Any, step: Step, feeds: Feeds) -> Any:
    """One layer's values of the last row are those of the row before."""
    logits = step(feeds)
    values, rows = session._values("0.value"), len(feeds[INPUT_IDS])
    if rows > 1:
        values[rows - 1] = values[rows - 2]
    return logits


def write_a_slot_late(session: Any, step: Step, feeds: Feeds) -> Any:
    late = feeds[WRITE_INDICES] + 1
    fits = late.max() + feeds[INPUT_IDS].shape[1] <= session.capacity
    return step({**feeds, WRITE_INDICES: late} if fits else feeds)


def idle_rows_lose_a_slot(session: Any, step: Step, feeds: Feeds) -> Any:
    """A row that is idle beside others is written to one slot before its end."""
    idle = (feeds[INPUT_IDS] == 0).all(axis=1) & (feeds[WRITE_INDICES] > 0)
    return step({**feeds, WRITE_INDICES: feeds[WRITE_INDICES] - idle})


def rows_exchanged(session: Any, step: Step, feeds: Feeds) -> Any:
    return np.roll(step(feeds), 1, axis=0)


def last_of_eight_rows_reads_the_first(session: Any, step: Step, feeds: Feeds) -> Any:
    logits = step(feeds)
    if len(logits) == 8:
        logits[7] = logits[0]
    return logits


def logits_of_the_first_token(session: Any, step: Step, feeds: Feeds) -> Any:
    return step({**feeds, LOGITS_INDICES: np.zeros_like(feeds[LOGITS_INDICES])})


def shorter_row_gets_the_last_column(session: Any, step: Step, feeds: Feeds) -> Any:
    """The logits of a padded row are those of its padding."""
    last = np.full_like(feeds[LOGITS_INDICES], feeds[INPUT_IDS].shape[1] - 1)
    return step({**feeds, LOGITS_INDICES: last})


def keys_of_bf16(session: Any, step: Step, feeds: Feeds) -> Any:
    """The cache of one layer is written in bf16 where it should be fp32."""
    logits = step(feeds)
    session._values("2.key")[...] &= np.uint32(0xFFFF0000)
    return logits


def one_infinite_logit(session: Any, step: Step, feeds: Feeds) -> Any:
    logits = step(feeds)
    logits[..., -1] = np.inf
    return logits


def one_wrong_logit(session: Any, step: Step, feeds: Feeds) -> Any:
    """One column of the head, which is rarely among the largest."""
    logits = step(feeds)
    logits[..., 7] *= 1.01
    return logits


FAULTS: tuple[Fault, ...] = (
    reads_past_the_length,
    reads_one_slot_past_the_length,
    bucket_one_too_small,
    bucket_of_the_start,
    bucket_of_the_first_row,
    stale_graph,
    stale_slot,
    stale_logits,
    stale_positions,
    lost_write,
    write_to_the_next_row,
    write_a_slot_late,
    idle_rows_lose_a_slot,
    rows_exchanged,
    last_of_eight_rows_reads_the_first,
    logits_of_the_first_token,
    shorter_row_gets_the_last_column,
    keys_of_bf16,
    one_infinite_logit,
    one_wrong_logit,
)
