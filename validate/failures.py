"""What other libraries raise, as one line for the user.

A checkpoint that transformers, torch, safetensors or tokenizers refuse is a senseless question, not a bug of this
program: whatever they raise becomes a ValidationError that says which file it was about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qwenport import QwenportError
from qwenport.validate.errors import ValidationError

MOST = 300  # characters of a message
MOST_OF_A_NAME = 80
MOST_OF_A_PATH = 120
CUT = " ... "


def one_line(text: object, most: int = MOST) -> str:
    """The text on one line of at most `most` characters; what is too much is cut out, most of it near the end."""
    return _cut(text, most, most // 6)


def cut(name: object) -> str:
    """A tensor's or file's name, or a path, short enough for a message: its beginning and its end."""
    most = MOST_OF_A_PATH if isinstance(name, Path) else MOST_OF_A_NAME
    return _cut(name, most, most // 2)


def _cut(text: object, most: int, of_the_end: int) -> str:
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    if len(line) <= most:
        return line
    end = line[len(line) - of_the_end :]
    return f"{line[: most - len(CUT) - of_the_end]}{CUT}{end}"


@contextlib.contextmanager
def reported(
    subject: Path | str, what: str, aliases: dict[str, str] | None = None
) -> Iterator[None]:
    """Turn what is raised in the context into a ValidationError of one line, at most 300 characters.

    Args:
        subject: the file or directory at fault.
        what: the sentence about it, such as "transformers does not accept it".
        aliases: names that only we know, and what the user calls them.

    Raises:
        ValidationError: something was raised. Errors of Qwenport stay what they are, shortened if they are
            ValidationErrors; KeyboardInterrupt, SystemExit and MemoryError pass.
    """
    try:
        yield
    except ValidationError as error:
        line = one_line(error)
        if line == str(error):
            raise
        raise type(error)(line) from error
    except (QwenportError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        said = one_line(error, 10_000)
        for alias, known in (aliases or {}).items():
            said = said.replace(alias, known)
        begin = (
            f"{_cut(subject, MOST_OF_A_PATH, MOST_OF_A_PATH // 2)}: {what}: {type(error).__name__}"
        )
        line = f"{begin}: {said}" if said else begin
        raise ValidationError(one_line(line)) from error


def _is_panic(error: BaseException) -> bool:
    """Whether it is what the Rust libraries safetensors and tokenizers raise on a bug; no Exception."""
    return type(error).__name__ == "PanicException"
