"""Dual chunk attention (Qwen2.5-1M; ChunkLlama, arXiv 2402.17463): its settings, and what they mean for a package.

With c = chunk_size - local_size, a key is rotated by its position in its chunk, j mod c, and a query at p by one of
three positions, for keys in its own chunk, in the one before, and in older ones. docs/architecture.md has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenport.contract import MOST_POSITIONS
from qwenport.exporter.errors import ConfigError
from qwenport.exporter.keys import Keys, short

CONFIG = "dual_chunk_attention_config"
SPARSE = "sparse_attention_config"
ENABLED = "sparse_attention_enabled"
SPARSE_SETTINGS = (SPARSE, ENABLED, "sparse_attention_threshold", "sparse_attention_last_q")
"""Settings of vLLM's approximation of it; the first may also stand beside them. The last two matter only with it."""
SPARSE_FILE = "sparse_attention_config.json"
"""vLLM reads it beside config.json, if that has dual chunk attention."""
LEAST_ROPE_ROWS = 512
"""onnxruntime rotates no more tokens at once than its tables have rows, and a step takes so many."""


@dataclass(frozen=True)
class DualChunk:
    """The settings of dual chunk attention.

    Attributes:
        chunk_size, local_size: config.json's.
        original_max_position_embeddings: queries and keys of longer requests are scaled; None: none are.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int | None

    @property
    def chunk(self) -> int:
        """Positions per chunk, c."""
        return self.chunk_size - self.local_size

    @property
    def farthest(self) -> int:
        """The position by which a query is rotated for keys older than the chunk before: no query has a larger one."""
        return min(2 * self.chunk - 1, self.chunk_size)

    @property
    def rope_rows(self) -> int:
        """Rows that rope tables need."""
        return max(self.farthest + 1, LEAST_ROPE_ROWS)

    @property
    def plain_context(self) -> int:
        """Positions up to which it is plain attention with plain rope, exactly."""
        plain = min(self.chunk_size, 2 * self.chunk)
        return min(plain, self.original_max_position_embeddings or plain)


def parse_dual_chunk(keys: Keys) -> tuple[DualChunk | None, str | None]:
    """Read config.json's settings of dual chunk attention.

    Returns:
        The settings, None if it has none; and the key that asks for sparse attention, None if none does.

    Raises:
        ConfigError: a setting is not a number that it can be, or is not known.
    """
    beside = keys.take(SPARSE, object, default=None, null=None)
    found = keys.take(CONFIG, dict, default=None, null=None)
    settings = found or {}
    config, enabled = settings.get(SPARSE), settings.get(ENABLED)
    asking = []
    if enabled is not False:  # which switches it off, as in vLLM
        asking += [SPARSE] if beside is not None else []
        asking += [f"{CONFIG}.{SPARSE}"] if config is not None else []
        asking += [f"{CONFIG}.{ENABLED}"] if enabled is not None else []
    return None if found is None else _parse(found), next(iter(asking), None)


def as_dual_chunk(settings: dict[str, Any]) -> DualChunk:
    """The settings as a manifest has them.

    Raises:
        ConfigError: they are not such settings.
    """
    return _parse(settings)


def _parse(found: dict[str, Any]) -> DualChunk:
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    if unknown := sorted(found.keys() - known - set(SPARSE_SETTINGS)):
        raise ConfigError(f"{CONFIG} has the unknown setting {short(unknown[0])}")
    size, local = found.get("chunk_size"), found.get("local_size")
    original = found.get("original_max_position_embeddings") or None
    for name, value, least in (
        ("chunk_size", size, 1),
        ("local_size", local, 0),
        ("original_max_position_embeddings", original or 1, 1),
    ):
        if type(value) is not int or not least <= value <= MOST_POSITIONS:
            raise ConfigError(
                f"{CONFIG}: {name} must be an integer from {least} to {MOST_POSITIONS}, found {short(value)}"
            )
    assert isinstance(size, int) and isinstance(local, int)
    if size <= local:
        raise ConfigError(f"{CONFIG}: chunk_size must exceed local_size")
    return DualChunk(size, local, original)
