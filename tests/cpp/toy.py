"""The toy network's engine directories and its definition, from the library of the tests."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .runtime import Library

VOCAB = 97


def toy_manifest(
    library: Library, *, capacity: int = 160, max_batch: int = 4, max_step_tokens: int = 24
) -> str:
    """The text of the toy network's manifest."""
    library.c.test_toy_manifest.restype = c.c_char_p
    return library.c.test_toy_manifest(capacity, max_batch, max_step_tokens, VOCAB).decode()


def toy_directory(library: Library, folder: Path, **sizes: int) -> Path:
    """An engine directory of the toy network."""
    folder.mkdir(exist_ok=True)
    (folder / "qwenport.json").write_text(toy_manifest(library, **sizes))
    return folder


def toy_logits(library: Library, manifest: str, tokens: Sequence[int]) -> np.ndarray:
    """fp32 [VOCAB] after these tokens, from the network's definition; no session is involved."""
    logits = np.empty(VOCAB, dtype=np.float32)
    given = (c.c_int64 * max(len(tokens), 1))(*tokens)
    library.c.test_toy_logits(
        manifest.encode(), given, c.c_size_t(len(tokens)), c.c_void_p(logits.ctypes.data)
    )
    return logits
