"""The C++ tokenizer gives the ids and the texts of the `tokenizers` package, for any string."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers

from . import unicode_tables
from .runtime import Error, Library, Tokenizer
from .tokenizer_shapes import (
    BUNDLED,
    SHAPES,
    broken,
    engine_with,
    strings,
    tokenizer_json,
)

NAMES = (*SHAPES, *BUNDLED)
STRINGS = 50_000


@dataclass(frozen=True)
class Pair:
    theirs: tokenizers.Tokenizer
    ours: Tokenizer


@pytest.fixture(scope="session")
def pair_of(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Name -> a tokenizer in `tokenizers` and in C++."""
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = tokenizer_json(name, folder)
            engine = engine_with(library, folder / "engine", source)
            theirs = tokenizers.Tokenizer.from_file(str(source))
            made[name] = Pair(theirs, library.tokenizer(engine))
        return made[name]

    return make


def agree(pair: Pair, texts: list[str], *, add: bool = True, split: bool = False) -> None:
    pair.theirs.encode_special_tokens = split
    expected = pair.theirs.encode_batch(texts, add_special_tokens=add)
    pair.theirs.encode_special_tokens = False
    for text, wanted in zip(texts, expected, strict=True):
        found = pair.ours.encode(text, add_special_tokens=add, split_special_tokens=split)
        assert found == wanted.ids, (text, found, wanted.ids)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_ids_are_those_of_tokenizers(number: int, pair_of: Callable[[str], Pair]) -> None:
    texts = [*strings(number, STRINGS // len(NAMES))]
    half = len(texts) // 2
    agree(pair_of(NAMES[number]), texts[:half])
    agree(pair_of(NAMES[number]), texts[half:], add=False, split=True)
