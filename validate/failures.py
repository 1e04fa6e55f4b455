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
from qwenport.wording import cut, one_line


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
        begin = f"{cut(Path(subject))}: {what}: {type(error).__name__}"
        line = f"{begin}: {said}" if said else begin
        raise ValidationError(one_line(line)) from error


def _is_panic(error: BaseException) -> bool:
    """Whether it is what the Rust libraries safetensors and tokenizers raise on a bug; no Exception."""
    return type(error).__name__ == "PanicException"
