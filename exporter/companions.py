"""The files copied unchanged with a model: text generation needs them, the graph does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.json_file import read_json
from qwenport.exporter.keys import short

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files copied unchanged with a model, where the checkpoint has them."""
MOST_OF_A_TOKENIZER = 1 << 26
"""Bytes of a tokenizer file that is read; published ones reach 20 million."""


def companions_of(path: Path) -> list[Path]:
    """The companion files that a directory has.

    Raises:
        CheckpointError: one is not a regular file but a directory, a device or a pipe.
    """
    found = [path / name for name in COMPANIONS if os.path.lexists(path / name)]
    for file in found:
        if not file.is_file():
            raise CheckpointError(f"{file}: not a file")
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Copy all companion files.

    Raises:
        CheckpointError: see `companions_of`.
    """
    for file in companions_of(source):
        shutil.copyfile(file, target / file.name)


def read_companion(file: Path) -> dict[str, Any]:
    """The object in a companion JSON file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        content = read_json(file, MOST_OF_A_TOKENIZER)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {short(content)}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a JSON object ({error})") from error
    return content


def check_companions(path: Path) -> None:
    """Read every companion JSON file.

    Raises:
        CheckpointError: one is damaged, or not a regular file.
    """
    for file in companions_of(path):
        if file.suffix == ".json":
            read_companion(file)


def doubts(path: Path, vocab_size: int) -> Iterator[str]:
    """Warnings about what `generate` will refuse; the graph does not depend on it."""
    try:
        check_companions(path)
        stop_ids(path, vocab_size)
    except CheckpointError as error:
        yield f"{error}: generate will refuse it"
    if (path / "tokenizer.json").is_file() and (beyond := ids_beyond(path, vocab_size)):
        yield beyond


def stop_ids(path: Path, vocab_size: int) -> list[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json.

    Raises:
        CheckpointError: a file is damaged, or its eos_token_id is neither an id of the vocabulary nor a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not os.path.lexists(file):
            continue
        found = read_companion(file).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise CheckpointError(
                    f"{file}: eos_token_id must be an id from 0 to {vocab_size - 1} or a list of such, "
                    f"found {short(token)}"
                )
        return ids
    return []


def ids_beyond(path: Path, vocab_size: int) -> str | None:
    """A warning about tokenizer.json ids without an embedding row; None if there are none."""
    try:
        content = read_companion(path / "tokenizer.json")
        vocabulary = content["model"]["vocab"]
        added = [token["id"] for token in content.get("added_tokens") or []]
        size = len(vocabulary)
        highest = max(
            [*added, max(vocabulary.values()) if isinstance(vocabulary, dict) else size - 1]
        )
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        return None  # `generate` reports what is wrong with it
    if highest < vocab_size:
        return None
    return (
        f"tokenizer.json has ids up to {highest}, and the embedding {vocab_size} rows: texts with such tokens "
        "cannot be run"
    )
