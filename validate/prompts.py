"""What the models are asked: a built-in text in several languages, or seeded random token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenport.validate.errors import ValidationError

SEED = 20240919
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

# Scripts, digits, code and punctuation, so that ids from all over a vocabulary occur.
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
    """Token ids to take prompts from, and what they are."""

    ids: tuple[int, ...]
    description: str

    def take(self, count: int, *, start: int = 0) -> list[int]:
        """`count` ids beginning at `start`; the text begins again where it ends."""
        return [self.ids[(start + i) % len(self.ids)] for i in range(count)]


def make_prompts(checkpoint_path: Path, vocab_size: int, file: Path | None = None) -> Prompts:
    """Encode a text with the checkpoint's tokenizer; random ids where it has none that fits the built-in text.

    Args:
        checkpoint_path: where the tokenizer is.
        vocab_size: of the model.
        file: UTF-8 text to take in place of the built-in one.

    Raises:
        ValidationError: the file cannot be read, or there is no tokenizer that encodes it.
    """
    if file is not None:
        return _from_file(checkpoint_path, vocab_size, file)
    found = [name for name in TOKENIZER_FILES if (checkpoint_path / name).is_file()]
    if not found:
        return _random(vocab_size, "the checkpoint has no tokenizer")
    try:
        ids = _encode(checkpoint_path, TEXT)
    except (
        Exception
    ) as error:  # tokenizers raise anything; without one the question still makes sense
        return _random(vocab_size, f"the tokenizer does not load: {type(error).__name__}")
    if not ids or max(ids) >= vocab_size:
        return _random(vocab_size, "the tokenizer does not fit the vocabulary")
    return Prompts(tuple(ids), "a built-in text in nine languages and some code")


def _from_file(checkpoint_path: Path, vocab_size: int, file: Path) -> Prompts:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"prompts {file}: {error}") from error
    if not any((checkpoint_path / name).is_file() for name in TOKENIZER_FILES):
        raise ValidationError(
            f"prompts {file}: {checkpoint_path} has no tokenizer to encode them with"
        )
    try:
        ids = _encode(checkpoint_path, text)
    except Exception as error:  # tokenizers raise anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValidationError(
            f"prompts {file}: the tokenizer does not take them ({why})"
        ) from error
    if not ids or max(ids) >= vocab_size:
        raise ValidationError(
            f"prompts {file}: empty, or the tokenizer does not fit the vocabulary of {vocab_size}"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Prompts(tuple(ids), f"{file.name}, {len(ids)} tokens, SHA-256 {digest}")


def _encode(checkpoint_path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    from qwenport.validate.quiet import quiet_transformers

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint_path, local_files_only=True, trust_remote_code=False
        )
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _random(vocab_size: int, why: str) -> Prompts:
    ids = np.random.default_rng(SEED).integers(0, vocab_size, 1024).tolist()
    return Prompts(tuple(ids), f"random token ids of seed {SEED} ({why})")
