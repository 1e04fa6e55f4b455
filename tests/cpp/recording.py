"""Recording what an onnxruntime session was given and computed, for the stand-in to play back.

recording.cpp says what the file holds.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from qwenport.engines.onnxruntime_session import OnnxRuntimeSession


class Recorder:
    """Takes down every step of a session."""

    def __init__(self, session: OnnxRuntimeSession) -> None:
        self._session, self._inner = session, session._step
        self._parts: list[bytes] = []
        self.steps: list[tuple[int, int, int]] = []
        session._step = self._step  # type: ignore[method-assign]
        package = session.cache_addresses()
        names = sorted(name for name in package if name.startswith("present."))
        shape = (session.max_batch, *session._row_shape)
        self._caches = [
            np.ctypeslib.as_array(
                ctypes.cast(package[name][0], ctypes.POINTER(ctypes.c_float)), shape
            )
            for name in names
        ]

    def _step(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        logits = self._inner(feeds)
        rows, width = feeds["input_ids"].shape
        sizes = (rows, width, len(feeds["key_positions"]))
        self.steps.append(sizes)
        order = "input_ids position_ids write_indices key_positions logits_indices".split()
        for array in (np.array(sizes), *(feeds[name] for name in order)):
            self._parts.append(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        for cache in self._caches:
            starts = feeds["write_indices"]
            new = [cache[b, :, starts[b] : starts[b] + width] for b in range(rows)]
            self._parts.append(np.stack(new).tobytes())
        self._parts.append(np.ascontiguousarray(logits, dtype=np.float32).tobytes())
        return logits

    def write(self, path: Path) -> None:
        path.write_bytes(b"".join([np.int64(len(self.steps)).tobytes(), *self._parts]))
