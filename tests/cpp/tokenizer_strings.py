"""Strings that are difficult to tokenize, and text to train vocabularies on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache

from .builds import ROOT

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


def around_every_code_point(points: Sequence[int]) -> Iterator[str]:
    """Strings with each beside letters, digits, spaces, an apostrophe and marks."""
    for at in range(0, len(points), 500):
        some = map(chr, points[at : at + 500])
        yield "".join(f"a{c}1 {c}'{c}\u0301\u0323{c} " for c in some)


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
    + [" x", "ab", "abc", "abcd", "abcde", "é", "的"]
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
