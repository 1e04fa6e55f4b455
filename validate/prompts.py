"""The prompts: a built-in text in several languages, or seeded random token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.wording import cut

SEED = 20240919
PIECE = 32  # tokens of text, then of random ids
RANDOM_IDS = 2048
MOST_SPECIAL = 64
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

# Several scripts, digits, code and punctuation, so that ids from the whole vocabulary occur.
TEXT = """Once upon a time, in a village by the sea, there lived a clockmaker who repaired every clock but her own.
Il était une fois, dans un village au bord de la mer, une horlogère qui réparait toutes les horloges.
Es war einmal eine Uhrmacherin; sie hörte 1.024 Zahnräder zugleich ticken.
从前有一个钟表匠，她住在海边的小村庄里，每天早上六点钟起床。
昔々、海辺の村に時計職人が住んでいました。
옛날 옛적에 바닷가 마을에 시계 장인이 살고 있었습니다.
Жила-была часовщица, и звали её Анна.
كان يا ما كان في قديم الزمان، قرية صغيرة على شاطئ البحر.
एक समय की बात है, समुद्र के किनारे एक गाँव था।
def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # 3.14159 + 2.71828 = 5.85987
The quick brown fox jumps over the lazy dog 🦊; "why?", it asked, and nobody (not even the dog) knew.
"""


@dataclass(frozen=True)
class Prompts:
    """Token ids to take prompts from, and their description."""

    ids: tuple[int, ...]
    description: str

    def take(self, count: int, *, start: int = 0) -> list[int]:
        """`count` ids beginning at `start`; the text repeats at its end."""
        return [self.ids[(start + i) % len(self.ids)] for i in range(count)]


def make_prompts(checkpoint_path: Path, vocab_size: int, file: Path | None = None) -> Prompts:
    """Encode a text with the checkpoint's tokenizer; random ids if it has none that fits the built-in text.

    Args:
        checkpoint_path: directory with the tokenizer.
        vocab_size: the model's.
        file: UTF-8 text to use in place of the built-in one.

    Raises:
        ValidationError: the file cannot be read, or no tokenizer can encode it.
    """
    if file is not None:
        return _from_file(checkpoint_path, vocab_size, file)
    found = [name for name in TOKENIZER_FILES if (checkpoint_path / name).is_file()]
    if not found:
        return _random(vocab_size, "the checkpoint has no tokenizer")
    try:
        ids = _encode(checkpoint_path, TEXT, str(checkpoint_path))
    except ValidationError as error:  # validation also works without a tokenizer
        return _random(vocab_size, f"the tokenizer does not load: {type(error.__cause__).__name__}")
    if not ids or max(ids) >= vocab_size:
        return _random(vocab_size, "the tokenizer does not fit the vocabulary")
    return Prompts(
        _interleaved(ids, vocab_size),
        f"a built-in text in nine languages and some code, and random token ids of seed {SEED}",
    )


def _interleaved(ids: list[int], vocab_size: int) -> tuple[int, ...]:
    """The text in pieces, each followed by ids drawn from the whole vocabulary without repetition."""
    generator = np.random.default_rng(SEED)
    drawn = generator.permutation(vocab_size)[:RANDOM_IDS].tolist()
    found: list[int] = []
    for start in range(0, max(len(ids), len(drawn)), PIECE):
        text = [ids[i % len(ids)] for i in range(start, start + PIECE)]
        found += [*text, *drawn[start : start + PIECE]]
    return tuple(found)


def special_ids(checkpoint_path: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that text rarely contains: first and last, special and added ones, at most MOST_SPECIAL.

    Args:
        checkpoint_path: directory whose config.json and tokenizer.json are read, as far as possible.
        vocab_size: the model's; larger ids do not count.
    """
    found = [vocab_size - 1, 0]
    for name, pick in (
        (
            "config.json",
            lambda data: [data.get(f"{key}_token_id") for key in ("bos", "eos", "pad")],
        ),
        ("tokenizer.json", lambda data: [token["id"] for token in data["added_tokens"]]),
    ):
        try:
            picked = pick(json.loads((checkpoint_path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a tokenizer need not have any of this
        for value in picked:
            found += value if isinstance(value, list) else [value]
    known = [i for i in found if isinstance(i, int) and 0 <= i < vocab_size]
    return tuple(dict.fromkeys(known))[:MOST_SPECIAL]


def _from_file(checkpoint_path: Path, vocab_size: int, file: Path) -> Prompts:
    with reported(f"prompts {file}", "cannot be read"):
        text = file.read_text(encoding="utf-8")
    if not any((checkpoint_path / name).is_file() for name in TOKENIZER_FILES):
        raise ValidationError(
            f"prompts {cut(file)}: {cut(checkpoint_path)} has no tokenizer to encode them with"
        )
    ids = _encode(checkpoint_path, text, f"prompts {file}")
    if not ids or max(ids) >= vocab_size:
        raise ValidationError(
            f"prompts {cut(file)}: empty, or the tokenizer does not fit the vocabulary of {vocab_size}"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Prompts(tuple(ids), f"{file.name}, {len(ids)} tokens, SHA-256 {digest}")


def _encode(checkpoint_path: Path, text: str, subject: str) -> list[int]:
    from transformers import AutoTokenizer

    from qwenport.validate.quiet import quiet_transformers

    with quiet_transformers(), reported(subject, "the tokenizer does not take it"):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint_path, local_files_only=True, trust_remote_code=False
        )
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _random(vocab_size: int, why: str) -> Prompts:
    ids = np.random.default_rng(SEED).integers(0, vocab_size, 1024).tolist()
    return Prompts(tuple(ids), f"random token ids of seed {SEED} ({why})")
