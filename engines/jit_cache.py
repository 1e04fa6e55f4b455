"""The kernels that TensorRT-RTX compiles while an engine runs, kept in the cache for the next session.

An entry belongs to one plan, GPU, driver and TensorRT-RTX. It is replaced when a session ends that has compiled more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenport.contract import JIT_CACHE, PLAN
from qwenport.engines.cache import CacheError, cache_key, cached, keep
from qwenport.engines.engine import Engine
from qwenport.exporter import ExportError


class JitCache:
    """What one session reads at its start and writes at its end.

    Attributes:
        runtime_cache: the IRuntimeCache that holds the kernels.
    """

    def __init__(
        self, engine: Engine, version: str, gpu: Sequence[str], runtime_cache: Any
    ) -> None:
        """Fill `runtime_cache` from the entry, if there is one and TensorRT-RTX accepts it.

        Args:
            engine: the engine that runs.
            version: of TensorRT-RTX.
            gpu: as `Gpu.identity`.
            runtime_cache: an empty IRuntimeCache.
        """
        plan = engine.manifest["files"][PLAN]["sha256"]
        self.runtime_cache = runtime_cache
        self._key = cache_key("kernels", plan, version, *gpu, code=())
        self._of = str(engine.path.absolute())
        kept = cached(self._key, lambda folder: (folder / JIT_CACHE).read_bytes())
        self._kept = kept if kept is not None and runtime_cache.deserialize(kept) else b""

    def save(self) -> None:
        """Keep what `runtime_cache` holds, if that has changed. What cannot be kept is compiled again next time."""
        kernels = bytes(self.runtime_cache.serialize())
        if kernels == self._kept:
            return

        def fill(folder: Path) -> None:
            (folder / JIT_CACHE).write_bytes(kernels)

        with contextlib.suppress(CacheError, ExportError, OSError):
            keep(
                self._key,
                fill,
                of=self._of,
                size_bytes=len(kernels) + 4096,
                replace=True,
            )
