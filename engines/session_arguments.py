"""What a session's callers give it: whole numbers and rows of token ids, of Python's types and numpy's."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.engines.errors import SessionError

Int64 = NDArray[np.int64]


def whole(value: int, what: str) -> int:
    """`value` as an integer.

    Raises:
        SessionError: it would have to be rounded, or is no number.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise SessionError(f"{what} must be an integer, not {value!r:.60}") from None


def sequence(value: Any, what: str) -> list[Any]:
    """The items of a list, tuple, array or another sequence; refuses text, bytes, sets and what has no length."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    raise SessionError(f"{what} must be a list, not {value!r:.60}")


def token_rows(rows: Sequence[Sequence[int]], what: str = "token ids") -> list[Int64]:
    """Each row as int64 [n].

    Raises:
        SessionError: a row is no flat list of integers.
    """
    return [_token_ids(row, b, what) for b, row in enumerate(sequence(rows, f"rows of {what}"))]


def _token_ids(row: Sequence[int], number: int, what: str = "token ids") -> Int64:
    """One row as int64 [n]: a flat list or array of integers; refuses anything that would be rounded or flattened."""
    try:
        found = np.asarray(sequence(row, what) if not isinstance(row, np.ndarray) else row)
    except (SessionError, ValueError):  # no list, or lists of different lengths
        found = np.zeros((1, 1))
    if found.ndim == 1 and not len(found):
        return np.zeros(0, dtype=np.int64)
    mixed = (
        not isinstance(row, np.ndarray)
        and found.ndim == 1
        and any(isinstance(t, bool | np.bool_) for t in row)
    )
    if found.dtype == object and all(type(t) is int for t in row):
        raise SessionError(f"row {number}: {what} has a number of more than 64 bits")
    if found.ndim != 1 or found.dtype.kind not in "iu" or mixed:
        raise SessionError(
            f"row {number}: {what} must be a flat list of integers, not {repr(row)[:60]}"
        )
    if found.dtype.kind == "u" and found.max() > np.iinfo(np.int64).max:
        raise SessionError(f"row {number}: {what} has {found.max()}, which is not a token id")
    return found.astype(np.int64)
