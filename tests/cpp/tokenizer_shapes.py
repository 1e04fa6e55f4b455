"""Tokenizers with the settings of published ones, and with every rule, trained on local text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from qwenport.contract import MANIFEST, TOKENIZER
from qwenport.engines.text.tokenizer_file import tokenizer_bytes
from qwenport.engines.text.tokenizer_json import REGEXES, Split, read_tokenizer

from .builds import ROOT
from .runtime import Library
from .tokenizer_strings import corpus
from .toy import toy_manifest

REGEX = {split: regex for regex, split in REGEXES.items()}
VOCAB = 2000


@dataclass(frozen=True)
class Training:
    """What vocabularies are made of.

    Attributes:
        across: tokens go across the places where the pre-tokenizer splits, so that ids show where it does.
    """

    texts: Sequence[str]
    size: int
    across: bool


def usual() -> Training:
    return Training(corpus(), VOCAB, across=True)


def trained(
    training: Training,
    before: list[pre_tokenizers.PreTokenizer],
    *,
    use_regex: bool = False,
    nfc: bool = True,
    whole_alphabet: bool = True,
    **model: object,
) -> Tokenizer:
    tokenizer = Tokenizer(BPE(**model))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole_alphabet else []
    trainer = BpeTrainer(vocab_size=training.size, initial_alphabet=alphabet, show_progress=False)
    splits = [*before, byte_level]
    if training.across:
        by_place = pre_tokenizers.Split(Regex(r"[\s\S]{1,13}"), "isolated")
        splits = [by_place, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.train_from_iterator(training.texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    return tokenizer


def split_by(split: Split) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(REGEX[split]), "isolated")


def special(tokenizer: Tokenizer, *contents: str) -> None:
    tokenizer.add_special_tokens([AddedToken(content, normalized=False) for content in contents])


def qwen25(training: Training) -> Tokenizer:
    tokenizer = trained(training, [split_by(Split.BY_ONE_DIGIT)])
    special(tokenizer, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>")
    tokenizer.add_tokens([AddedToken(f"<{t}tool_call>", normalized=False) for t in ("", "/")])
    return tokenizer


def bos(tokenizer: Tokenizer, template: str) -> None:
    specials = [(name, tokenizer.token_to_id(name)) for name in template.split() if name[0] != "$"]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(template, f"{template} $B", specials),
        ]
    )


UNMERGED = ("Ġunmerged", "Ã©tonnant", "zzq")
"""Words that no merge makes, in the characters of byte-level BPE."""


def llama3(training: Training) -> Tokenizer:
    tokenizer = trained(training, [split_by(Split.BY_THREE_DIGITS)], nfc=False, ignore_merges=True)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(model["vocab"])
    for word in UNMERGED:
        vocab.setdefault(word, len(vocab))
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer.model = BPE(vocab, merges, ignore_merges=True)
    special(tokenizer, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    special(tokenizer, *(f"<|reserved_special_token_{n}|>" for n in range(200)))
    bos(tokenizer, "<|begin_of_text|> $A")
    return tokenizer


def smollm(training: Training) -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = trained(training, [digits], use_regex=True, nfc=False, whole_alphabet=False)
    special(tokenizer, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return tokenizer


def gpt2(training: Training) -> Tokenizer:
    tokenizer = trained(training, [], use_regex=True, nfc=False)
    special(tokenizer, "<|endoftext|>")
    return tokenizer


def every_rule(training: Training) -> Tokenizer:
    """Added tokens with all combinations of rules, runs of digits, and tokens on both sides of a text."""
    digits = pre_tokenizers.Digits(individual_digits=False)
    tokenizer = trained(training, [digits, split_by(Split.BY_THREE_DIGITS)])
    special(tokenizer, "<s>", "</s>")
    rules = [
        dict(zip(("lstrip", "rstrip", "single_word", "normalized"), map(bool, bits), strict=True))
        for bits in ([n >> i & 1 for i in range(4)] for n in range(16))
    ]
    tokenizer.add_tokens([AddedToken(f"<t{n}>", **rule) for n, rule in enumerate(rules)])
    tokenizer.add_special_tokens([AddedToken(f"w{n}w", **rule) for n, rule in enumerate(rules)])
    odd = "cafe\u0301|é!|é|ab|12|abc|的|abcde|<t|\u2003|\u0301a| \n |\u0307".split("|")
    tokenizer.add_tokens([AddedToken(text, normalized=n % 2 == 0) for n, text in enumerate(odd)])
    tokenizer.add_tokens([AddedToken(" x", rstrip=True, normalized=False)])
    bos(tokenizer, "<s> $A </s> </s>")
    return tokenizer


def unknown_bytes(training: Training) -> Tokenizer:
    """A vocabulary without all bytes, and a token for those that it lacks."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = trained(training, [digits], use_regex=True, whole_alphabet=False, unk_token="a")
    special(tokenizer, "<s>")
    return tokenizer


SHAPES: dict[str, Callable[[Training], Tokenizer]] = {
    made.__name__: made for made in (qwen25, llama3, smollm, gpt2, every_rule, unknown_bytes)
}
BUNDLED = ("tiny-qwen2.5", "tiny-qwen2-moe")


def tokenizer_json(name: str, folder: Path) -> Path:
    """The tokenizer.json of one of SHAPES or BUNDLED."""
    if name in BUNDLED:
        return ROOT / "examples" / name / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    SHAPES[name](usual()).save(str(file))
    return file


def toy_with_tokenizer(library: Library, folder: Path, content: bytes) -> Path:
    """A toy engine directory with this tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = json.loads(toy_manifest(library))
    (folder / TOKENIZER).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][TOKENIZER] = {"bytes": len(content), "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def engine_with(library: Library, folder: Path, source: Path) -> Path:
    """A toy engine directory with the tokenizer of a tokenizer.json."""
    return toy_with_tokenizer(library, folder, tokenizer_bytes(read_tokenizer(source)))
