"""Models with dual chunk attention: a small random one, of chunks of 16 positions, each query at most 24 from a key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from random_model import make_checkpoint

from qwenport.engines import CachedSession

CHUNK, CHUNK_SIZE, ORIGINAL, POSITIONS = 16, 24, 40, 256
SETTINGS = {
    "chunk_size": CHUNK_SIZE,
    "local_size": CHUNK_SIZE - CHUNK,
    "original_max_position_embeddings": ORIGINAL,
}


def chunk(checkpoint: Path, chunk_size: int, local_size: int, original: int) -> Path:
    """Give a checkpoint dual chunk attention."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": chunk_size,
        "local_size": local_size,
        "original_max_position_embeddings": original,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def make_chunked(folder: Path, *, positions: int = POSITIONS, **settings: Any) -> Path:
    """Write the checkpoint; `settings` replace those of dual chunk attention."""
    return make_checkpoint(
        folder, positions=positions, dual_chunk_attention_config={**SETTINGS, **settings}
    )


def pieces(
    texts: Sequence[list[int]], lengths: Sequence[int], piece: int
) -> Iterator[list[list[int]]]:
    """What to give `prefill` in each call, for prompts of `lengths` tokens in pieces."""
    for start in range(0, max(lengths), piece):
        yield [text[start : min(start + piece, n)] for text, n in zip(texts, lengths, strict=True)]


def run_in_pieces(
    session: CachedSession,
    texts: Sequence[list[int]],
    lengths: Sequence[int],
    piece: int,
) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """Give each row its prompt in pieces, then the rest of its text token by token.

    Returns:
        For each row all logits, and each token's request length.
    """
    made: list[list[np.ndarray]] = [[] for _ in texts]
    for fed in pieces(texts, lengths, piece):
        for row, found in enumerate(session.prefill(fed, all_logits=True, prompt_lengths=lengths)):
            made[row].append(found)
    decodes = len(texts[0]) - lengths[0]
    for step in range(decodes):
        given = [text[n + step] for text, n in zip(texts, lengths, strict=True)]
        for row, found in enumerate(session.decode(given)):
            made[row].append(found[None])
    return [
        (np.concatenate(found), (n,) * n + tuple(range(n + 1, n + decodes + 1)))
        for found, n in zip(made, lengths, strict=True)
    ]
