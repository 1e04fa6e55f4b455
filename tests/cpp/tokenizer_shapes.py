"""Tokenizers with the settings of published ones and with every rule, trained on local text; and difficult strings."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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
from qwenport.engines.tokenizer_file import tokenizer_bytes
from qwenport.engines.tokenizer_json import REGEXES, Split, read_tokenizer

from .builds import ROOT
from .runtime import Library
from .toy import toy_manifest

REGEX = {split: regex for regex, split in REGEXES.items()}
VOCAB = 2000
WORDS = (
    "naïve café ångström größe Привет мир γειά σου שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี 你好世界 今天天气很好 "
    "こんにちは カタカナ 안녕하세요 각난 ١٢٣ १२३ 123 4567 é e\u0301 \u1e69 👩‍👩‍👧 🇩🇪 "
    "don't I'LL we've they're 'tis x\u017f "
).split(" ")


@cache
def corpus() -> list[str]:
    """Prose, code and words in many scripts."""
    files = [ROOT / "examples" / "tiny_tales.txt", *sorted((ROOT / "engines").glob("*.py"))[:12]]
    files += sorted((ROOT / "docs").glob("*.md"))[:8]
    return [*(file.read_text(encoding="utf-8") for file in files), " ".join(WORDS * 20)]


@dataclass(frozen=True)
class Training:
    """What vocabularies are made of."""

    texts: Sequence[str]
    size: int


def usual() -> Training:
    return Training(corpus(), VOCAB)


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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole_alphabet else []
    trainer = BpeTrainer(vocab_size=training.size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training.texts, trainer)
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
    vocab = model["vocab"] | {word: len(model["vocab"]) + n for n, word in enumerate(UNMERGED)}
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
    tokenizer = trained(training, [digits, split_by(Split.BY_ONE_DIGIT)])
    special(tokenizer, "<s>", "</s>")
    rules = [
        dict(zip(("lstrip", "rstrip", "single_word", "normalized"), map(bool, bits), strict=True))
        for bits in ([n >> i & 1 for i in range(4)] for n in range(16))
    ]
    tokenizer.add_tokens([AddedToken(f"<t{n}>", **rule) for n, rule in enumerate(rules)])
    tokenizer.add_special_tokens([AddedToken(f"w{n}w", **rule) for n, rule in enumerate(rules)])
    odd = [
        "cafe\u0301",
        "é",
        "é!",
        "12",
        "ab",
        "abc",
        "abcde",
        "\u2003",
        " \n ",
        "<t",
        "的",
        "\u0307",
        "\u0301a",
    ]
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


# --- strings

CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]
MARKS = [
    chr(c) for c in (*range(0x300, 0x370), *range(0x5B0, 0x5C8), *range(0x64B, 0x653), 0x93C, 0x94D)
]
MARKS += [
    chr(c)
    for c in (
        0x9BE,
        0x9D7,
        0xE38,
        0x3099,
        0x309A,
        0x20D0,
        0x1D165,
        0x1D16D,
        0x110BA,
        0x16FF0,
        0x1DFA,
    )
]
BASES = [
    *"aeiouAEIOUns<>=",
    "\u0226",
    "\u1100",
    "\u1161",
    "\u11a8",
    "\uac00",
    "\uac01",
    "\u0915",
    "か",
    "\u212b",
]
BASES += [
    "\u0958",
    "\u0344",
    "\u1e9b",
    "\u2126",
    "\ufb1d",
    "\uf900",
    "\U0002f800",
    "\u0f73",
    "\u0cca",
]
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\t",
    " \n",
    "\n ",
    "\u0085",
    "\u00a0",
    "\u180e",
    "\u2028",
]
SPACES += ["\u3000", "\u200b", "\ufeff", "\x0b", "\x0c", "\x1c", "\u1680", "\x00"]
APOSTROPHES = [
    "'s",
    "'S",
    "'t",
    "'re",
    "'RE",
    "'Ve",
    "'ll",
    "'lL",
    "'d",
    "'m",
    "'x",
    "'",
    "''",
    "\u2019s",
    "'\u017f",
]
APOSTROPHES += ["'r", "'v", "'\u212a", "'ﬆ", "'r\u0301e", "'l", "'s's", " 's", "'ſt"]
DIGITS = [
    *"0123456789",
    "12",
    "123",
    "1234",
    "١",
    "٣",
    "१",
    "๓",
    "Ⅷ",
    "²",
    "½",
    "\U0001d7d8",
    "①",
    "〇",
    "\U00011de0",
]
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<s>",
]
SPECIALS += [
    "</s>",
    "<|reserved_special_token_7|>",
    "<|reserved_special_token_77|>",
    "<|im_",
    "<|",
    "|>",
    "<t",
    "<t1>",
]
SPECIALS += (
    [f"<t{n}>" for n in range(16)]
    + [f"w{n}w" for n in range(16)]
    + [" x", "ab", "abc", "abcd", "abcde", "é"]
)
SYMBOLS = [
    *'!"#$%&()*+,-./:;<=>?@[]^_`{|}~',
    "->",
    "//",
    "...",
    "€",
    "—",
    "👍🏽",
    "🇩🇪",
    "\ufe0f",
    "\u200d",
    "^^",
]
PARTS = [MARKS, BASES, SPACES, APOSTROPHES, DIGITS, SPECIALS, SYMBOLS, WORDS, [*"abcdefgXYZ"]]


def pool(generator: random.Random) -> list[str]:
    """Pieces that strings are made of, among them code points of all blocks and long runs."""
    found = [piece for part in PARTS for piece in part]
    found += [chr(c) for c in generator.choices(CODE_POINTS, k=200)]
    low = generator.choices(CODE_POINTS[:0x3000], k=150)
    found += [chr(c) for c in low]
    for _ in range(12):
        found.append(generator.choice(found) * generator.randrange(2, 60))
    for _ in range(60):  # marks in any order after a base
        found.append(
            generator.choice(BASES) + "".join(generator.choices(MARKS, k=generator.randrange(1, 6)))
        )
    for _ in range(60):
        text = generator.choice(corpus())
        start = generator.randrange(len(text))
        found.append(text[start : start + generator.randrange(1, 40)])
    return found


def strings(seed: int, count: int) -> Iterator[str]:
    """Random strings; the same for the same seed."""
    generator = random.Random(seed)
    pieces: list[str] = []
    for number in range(count):
        if number % 2000 == 0:
            pieces = pool(generator)
        size = generator.choice((1, 2, 3, 5, 8, 12))
        yield "".join(generator.choices(pieces, k=size))


def broken(seed: int, count: int) -> Iterator[bytes]:
    """Random bytes, and UTF-8 with bytes changed, inserted and removed."""
    generator = random.Random(seed)
    for text in strings(seed, count):
        data = bytearray(text.encode())
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(data) + 1)
            put = generator.choice(
                (b"", b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\x80")
            )
            data[at : at + generator.randrange(3)] = put or generator.randbytes(2)
        yield bytes(data)
