"""A session whose cache can be saved and restored: those on packages and engines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import REQUEST_LENGTHS
from qwenport.engines import snapshot as snapshot_
from qwenport.engines.errors import CapacityError, SnapshotError
from qwenport.engines.session import Bytes, CachedSession


class SavedSession(CachedSession):
    """`CachedSession` with `save` and `restore`; subclasses name their caches and read and write their slots."""

    def save(self) -> bytes:
        """See `Session.save`."""
        facts = {
            "of": self._identity(),
            "first_position": self._first_position,
            "lengths": self._lengths.tolist(),
        }
        arrays = {}
        for row, count in enumerate(map(int, self._lengths)):
            if count:
                arrays[f"{row}.tokens"] = self._tokens[row, :count]
                if self._scale is not None:
                    arrays[f"{row}.{REQUEST_LENGTHS}"] = self._scale.held[row, :count]
                for name in self._cache_names():
                    arrays[f"{row}.{name}"] = self._read_slots(name, row, count)
        return snapshot_.pack(facts, arrays)

    def restore(self, snapshot: bytes) -> None:
        """See `Session.restore`."""
        facts, arrays = snapshot_.unpack(snapshot)
        first, lengths = self._facts(facts)
        for row, count in enumerate(lengths):
            self._check_arrays(arrays, row, count)
        for row, count in enumerate(lengths):
            for name in self._cache_names() if count else ():
                self._write_slots(name, row, arrays[f"{row}.{name}"])
            if count:
                self._tokens[row, :count] = arrays[f"{row}.tokens"]
                if self._scale is not None:
                    self._scale.held[row, :count] = arrays[f"{row}.{REQUEST_LENGTHS}"]
        self._first_position = first
        self._lengths[:] = lengths

    def poison(self) -> None:
        """Fill every cache slot that holds no token with huge finite values, so that a step that reads one shows it.

        Even slots get +P, odd slots -P: of two neighbours one has a positive score, whatever the query. NaN would
        spread through correct kernels too, as 0 x NaN.
        """
        for row, length in enumerate(map(int, self._lengths)):
            for name in self._cache_names():
                self._poison_slots(name, row, length)

    def _facts(self, facts: Mapping[str, Any]) -> tuple[int, list[int]]:
        """The first position and the rows' lengths of a snapshot.

        Raises:
            SnapshotError, CapacityError: see `Session.restore`.
        """
        if facts.get("of") != self._identity():
            raise SnapshotError("snapshot: of another package or engine, or of another dtype")
        first, lengths = facts.get("first_position"), facts.get("lengths")
        if not (_is_count(first) and isinstance(lengths, list) and all(map(_is_count, lengths))):
            raise SnapshotError("snapshot: damaged (no lengths)")
        if first >= self.max_positions:
            raise SnapshotError(f"snapshot: damaged (there is no position {first})")
        if len(lengths) != self.max_batch:
            raise SnapshotError(
                f"snapshot: of {len(lengths)} rows, this session has {self.max_batch}"
            )
        slots = min(self.capacity, self.max_positions - first)
        for row, count in enumerate(lengths):
            if count > slots:
                raise CapacityError(
                    f"snapshot: row {row} holds {count} tokens; there are {slots} slots"
                )
        return first, lengths

    def _check_arrays(self, arrays: Mapping[str, NDArray[Any]], row: int, count: int) -> None:
        """Raises SnapshotError: an array of a row is missing or not of the row's size."""
        if not count:
            return
        expected: dict[str, tuple[tuple[int, ...], Any]] = {"tokens": ((count,), np.int64)}
        if self._scale is not None:
            expected[REQUEST_LENGTHS] = ((count,), np.int64)
        for name in self._cache_names():
            heads, _, size = self._read_slots(name, row, 1).shape
            expected[name] = ((heads, count, size), np.uint8)
        for name, (shape, dtype) in expected.items():
            found = arrays.get(f"{row}.{name}")
            if found is None or found.shape != shape or found.dtype != dtype:
                raise SnapshotError(f"snapshot: damaged (the {name} of row {row})")
        tokens = arrays[f"{row}.tokens"]
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise SnapshotError(f"snapshot: damaged (the tokens of row {row})")
        if self._scale is not None:
            lengths = arrays[f"{row}.{REQUEST_LENGTHS}"]
            if (
                not self._scale.unscaled
                <= lengths.min()
                <= lengths.max()
                <= max(self.max_positions, self._scale.unscaled)
            ):
                raise SnapshotError(f"snapshot: damaged (the request lengths of row {row})")

    @abstractmethod
    def _identity(self) -> str:
        """What a snapshot must match: the model and the cache's dtype."""

    @abstractmethod
    def _cache_names(self) -> Sequence[str]:
        """The names of the caches."""

    @abstractmethod
    def _read_slots(self, name: str, row: int, count: int) -> Bytes:
        """The first `count` slots of one row of a cache, uint8 [heads, count, bytes per slot]."""

    @abstractmethod
    def _write_slots(self, name: str, row: int, data: Bytes) -> None:
        """The inverse of `_read_slots`."""

    @abstractmethod
    def _poison_slots(self, name: str, row: int, start: int) -> None:
        """Fill a row's slots of a cache from `start` on with +P in even slots and -P in odd ones; see `poison`."""


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0
