"""The tables of engines/cpp/src/tokenizer/unicode_tables.cpp, asked from the `tokenizers` package.

The C++ tokenizer has to agree with that package about every code point, whichever Unicode version it was compiled with.
So its own regular expressions, digit splitter, added tokens and normalizers say what each code point is.

    python -m tests.cpp.unicode_tables      writes the file
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from .builds import ROOT

FILE = ROOT / "engines" / "cpp" / "src" / "tokenizer" / "unicode_tables.cpp"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
HANGUL = range(0xAC00, 0xD7A4)
LETTERS_OF_CONTRACTIONS = "delmrstv"


def chunks(points: Sequence[int], size: int = 8192) -> Iterator[Sequence[int]]:
    for start in range(0, len(points), size):
        yield points[start : start + size]


def by_splitting(splitter: pre_tokenizers.PreTokenizer) -> set[int]:
    """The code points that a pre-tokenizer removes."""
    left: set[int] = set()
    for points in chunks(CODE_POINTS):
        text = "".join(map(chr, points))
        left.update(ord(c) for piece, _ in splitter.pre_tokenize_str(text) for c in piece)
    return set(CODE_POINTS) - left


def by_regex(pattern: str) -> set[int]:
    return by_splitting(pre_tokenizers.Split(Regex(pattern), "removed"))


def numeric() -> set[int]:
    """What Digits splits off: the pieces after a letter that are alone."""
    digits, found = pre_tokenizers.Digits(individual_digits=False), set()
    for points in chunks(CODE_POINTS):
        text = "".join(f"a{chr(c)}" for c in points)
        for _, (start, end) in digits.pre_tokenize_str(text):
            if end - start == 1 and start % 2:
                found.add(ord(text[start]))
    return found


MARK = "\x01"


def by_added_token(token: AddedToken, form: str, hit: Callable[[int, int], bool]) -> set[int]:
    """The code points beside which an added token, MARK, is found so that `hit` says yes to its place.

    Args:
        form: three characters, among them the code point as "c" and MARK.
        hit: called with the start and end of the token from the beginning of the form.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.add_tokens([token])
    found = set()
    for points in chunks([c for c in CODE_POINTS if chr(c) != MARK]):
        text = "".join(form.replace("c", chr(c)) for c in points)
        for start, end in tokenizer.encode(text).offsets:
            place = (end - 1) // 3
            if hit(start - 3 * place, end - 3 * place):
                found.add(points[place])
    return found


def spaces() -> set[int]:
    """What `lstrip` takes."""
    token = AddedToken(MARK, lstrip=True, normalized=False)
    return by_added_token(token, f".c{MARK}", lambda start, end: start == 1)


def words() -> set[int]:
    """What `single_word` does not accept as a neighbour."""
    token = AddedToken(MARK, single_word=True, normalized=False)
    beside = by_added_token(token, f".c{MARK}", lambda start, end: end == 3)
    # the next form begins with "."
    return set(CODE_POINTS) - beside - {ord(MARK)}


def folds() -> list[tuple[int, int]]:
    """(code point, ASCII letter): what (?i:...) takes for a letter of a contraction."""
    return sorted(
        (point, ord(letter))
        for letter in LETTERS_OF_CONTRACTIONS
        for point in by_regex(f"(?i:{letter})")
    )


NFD, NFC = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str


def decompositions() -> dict[int, str]:
    """Code point -> its whole canonical decomposition, where it has one; Hangul, which is arithmetic, is left out."""
    return {c: NFD(chr(c)) for c in CODE_POINTS if c not in HANGUL and NFD(chr(c)) != chr(c)}


def combining_ranks(decomposed: dict[int, str]) -> dict[int, int]:
    """Code point -> the rank of its canonical combining class among the classes, from 1; starters are left out.

    NFD brings two marks into the order of their classes. Which class each mark is compared with comes from Python's own
    tables, which know more marks than `tokenizers` does.
    """

    def swaps(a: str, b: str) -> bool:
        return a != b and NFD(a + b) == b + a

    first, last = "\u0334", "\u0345"  # of the lowest and of the highest class
    marks = [
        mark
        for mark in map(chr, CODE_POINTS)
        if ord(mark) not in decomposed
        and (mark in (first, last) or swaps(last, mark) or swaps(mark, first))
    ]
    known: dict[int, str] = {}
    for mark in marks:
        if number := unicodedata.combining(mark):
            known.setdefault(number, mark)
    classes = [known[number] for number in sorted(known)]
    found = {}
    for mark in marks:
        lower = sum(swaps(mark, other) for other in classes)
        same = [n for n, o in enumerate(classes) if not swaps(mark, o) and not swaps(o, mark)]
        assert same == [lower], f"U+{ord(mark):04X} has a combining class that Python does not know"
        found[ord(mark)] = 1 + lower
    return found


def decomposition_rows(decomposed: dict[int, str]) -> Iterator[int]:
    """The numbers of `decompositions` in tokenizer/unicode.hpp.

    What NFC puts together again has two parts, of which the first may decompose further; others have all their parts.
    """
    after = 0
    for c, parts in sorted(decomposed.items()):
        composes = NFC(chr(c)) == chr(c)
        if composes:
            parts = NFC(parts[:-1]) + parts[-1]
            assert len(parts) == 2 and NFC(parts) == chr(c), f"U+{c:04X}"
        yield from (c - after, 2 * len(parts) + composes, *map(ord, parts))
        after = c + 1


def run_rows(classes: dict[int, int]) -> Iterator[int]:
    """For neighbours with the same class: the gap before them, their number, their class."""
    start = after = 0
    for c in sorted(classes):
        if c == after and after > start and classes[c] == classes[start]:
            after = c + 1
            continue
        if after > start:
            yield from (after - start, classes[start])
        yield c - after
        start, after = c, c + 1
    yield from (after - start, classes[start])


def written(name: str, numbers: Iterable[int]) -> str:
    """A C++ array, in lines of up to 118 characters."""
    lines = [""]
    for cell in (f"{number}," for number in numbers):
        if len(lines[-1]) + len(cell) > 118:
            lines.append("")
        lines[-1] += cell
    body = "\n".join(lines)
    return (
        f"constexpr std::uint32_t {name}_data[] = {{\n{body}\n}};\n"
        f"const Numbers {name}{{{name}_data, std::size({name}_data)}};\n"
    )


def text() -> str:
    """The content of the file."""
    bits = [
        by_regex(r"\p{L}"),
        by_regex(r"\p{N}"),
        by_regex(r"\s"),
        numeric(),
        words(),
        spaces(),
    ]
    classes = {c: sum((c in points) << n for n, points in enumerate(bits)) for c in CODE_POINTS}
    decomposed = decompositions()
    tables = {
        "class_runs": run_rows({c: n for c, n in classes.items() if n}),
        "contraction_letters": (number for pair in folds() for number in pair),
        "combining_runs": run_rows(combining_ranks(decomposed)),
        "decompositions": decomposition_rows(decomposed),
    }
    head = (
        f"// Generated by tests/cpp/unicode_tables.py from tokenizers {tokenizers.__version__}.\n"
        '#include <iterator>\n\n#include "tokenizer/unicode.hpp"\n\n'
        "namespace qwenport::detail {\n\n// clang-format off\n"
    )
    body = "\n".join(written(*table) for table in tables.items())
    return f"{head}\n{body}\n// clang-format on\n\n}}  // namespace qwenport::detail\n"


if __name__ == "__main__":
    Path(FILE).write_text(text(), encoding="utf-8")
