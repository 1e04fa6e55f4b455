"""tokenizer.qwenport: the tokenizer as the C++ library loads it. docs/tokenizer.md has the format."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, chain

import numpy as np

from qwenport.contract import TOKENIZER_FORMAT, TOKENIZER_VERSION
from qwenport.engines.text.tokenizer_json import (
    MOST_SPLITS,
    TokenizerParts,
)

FORMAT_BYTES = 20
NO_TOKEN = 0xFFFFFFFF
SKIPPED, IS_WORD = 1, 2


def tokenizer_bytes(parts: TokenizerParts) -> bytes:
    """The content of the file."""
    contents = [token.content.encode() for token in parts.added]
    text = b"".join([*parts.tokens, *contents])
    ends = list(accumulate(map(len, chain(parts.tokens, contents)), initial=0))
    starts, starts_of_added = ends[: len(parts.tokens) + 1], ends[len(parts.tokens) :]
    added = (
        (token.id, token.kind, start, len(content))
        for token, content, start in zip(parts.added, contents, starts_of_added, strict=False)
    )
    counts = [len(parts.tokens), len(parts.merges), len(parts.added)]
    counts += [len(parts.before), len(parts.after), len(text)]
    flags = bytes(
        SKIPPED * (number in parts.skipped) + IS_WORD * (number in parts.words)
        for number in range(len(parts.tokens))
    )
    return b"".join(
        [
            TOKENIZER_FORMAT.encode().ljust(FORMAT_BYTES, b"\0"),
            _numbers([TOKENIZER_VERSION, parts.nfc]),
            bytes(parts.splits).ljust(MOST_SPLITS, b"\0"),
            _numbers(counts),
            _numbers(NO_TOKEN if number is None else number for number in parts.of_byte),
            _numbers(starts),
            _numbers(chain.from_iterable(parts.merges)),
            _numbers(chain.from_iterable(added)),
            _numbers(parts.before),
            _numbers(parts.after),
            flags,
            text,
        ]
    )


def _numbers(values: Iterable[int]) -> bytes:
    return np.array([*values], dtype="<u4").tobytes()
