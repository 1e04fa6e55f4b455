"""What a session lets one see while it runs: values of the graph, put together text by text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.engines import CachedSession, Step

Array = NDArray[Any]
Seen = dict[str, Array]
"""Name -> the value at every token of one text, [S, ...]."""


class Taps:
    """Collects observed values while a scenario runs on `session`; use as a context.

    A row's text begins where its slot 0 is written; of several texts in a row the last one stays.
    """

    def __init__(self, session: CachedSession, heads: Collection[str] = ()) -> None:
        """Watch a session.

        Args:
            session: observes the values that are wanted.
            heads: names of values [B, heads, S, ...]; all others are [B, S, ...].
        """
        self._session, self._heads = session, frozenset(heads)
        self._rows: dict[int, dict[str, list[Array]]] = {}

    def __enter__(self) -> Taps:
        self._session.on_step = self._keep
        return self

    def __exit__(self, *_: object) -> None:
        self._session.on_step = None

    def _keep(self, step: Step) -> None:
        for row, (start, taken) in enumerate(zip(step.starts, step.taken, strict=True)):
            if not taken:
                continue
            if start == 0:
                self._rows[row] = {name: [] for name in step.observed}
            for name, value in step.observed.items():
                of_row = value[row].swapaxes(0, 1) if name in self._heads else value[row]
                self._rows[row][name].append(np.array(of_row[:taken]))

    def texts(self) -> list[Seen]:
        """What was seen of each row's text, in the order of rows."""
        return [
            {name: np.concatenate(parts) for name, parts in self._rows[row].items()}
            for row in sorted(self._rows)
        ]
