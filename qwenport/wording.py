"""Numbers and errors for people: readable sizes, and messages cut to one readable line."""

from __future__ import annotations

from pathlib import Path

MOST = 300  # characters in a message
MOST_OF_A_NAME = 80
MOST_OF_A_PATH = 120
CUT = " ... "


def size(count: float) -> str:
    """Bytes in decimal units: "5.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, what: str) -> str:
    """For example "1 row", "2 rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def one_line(text: object, most: int = MOST) -> str:
    """The text on one line of at most `most` characters; the excess is cut out, mostly near the end."""
    return _cut(text, most, most // 6)


def cut(name: object) -> str:
    """A tensor's or file's name, or a path, short enough for a message: its beginning and its end."""
    most = MOST_OF_A_PATH if isinstance(name, Path) else MOST_OF_A_NAME
    return _cut(name, most, most // 2)


def cut_words(text: str) -> str:
    """The text with each word short enough for a message; a word may be a path."""
    return " ".join(_cut(word, MOST_OF_A_PATH, MOST_OF_A_PATH // 2) for word in text.split())


def _cut(text: object, most: int, of_the_end: int) -> str:
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    if len(line) <= most:
        return line
    end = line[len(line) - of_the_end :]
    return f"{line[: most - len(CUT) - of_the_end]}{CUT}{end}"
