"""What the models are asked: a built-in text in several languages, or seeded random token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

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


def make_prompts(checkpoint_path: Path, vocab_size: int) -> Prompts:
    """Encode the built-in text with the checkpoint's tokenizer; random ids where it has none that fits."""
    found = [name for name in TOKENIZER_FILES if (checkpoint_path / name).is_file()]
    if not found:
        return _random(vocab_size, "the checkpoint has no tokenizer")
    from transformers import AutoTokenizer

    from qwenport.validate.quiet import quiet_transformers

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint_path, local_files_only=True, trust_remote_code=False
            )
            ids = tokenizer.encode(TEXT, add_special_tokens=False)
    except (
        Exception
    ) as error:  # tokenizers raise anything; without one the question still makes sense
        return _random(vocab_size, f"the tokenizer does not load: {type(error).__name__}")
    if not ids or max(ids) >= vocab_size:
        return _random(vocab_size, "the tokenizer does not fit the vocabulary")
    return Prompts(tuple(ids), "a built-in text in nine languages and some code")


def _random(vocab_size: int, why: str) -> Prompts:
    ids = np.random.default_rng(SEED).integers(0, vocab_size, 1024).tolist()
    return Prompts(tuple(ids), f"random token ids of seed {SEED} ({why})")
