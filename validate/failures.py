"""Exceptions from other libraries, as one line for the user.

If transformers, torch, safetensors or tokenizers refuse a checkpoint, the question is meaningless, and it is not a
bug in this program: whatever they raise becomes a ValidationError that names the file concerned.
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
    """Turn any exception raised in the context into a one-line ValidationError of at most 300 characters.

    Args:
        subject: the file or directory at fault.
        what: a sentence about it, such as "transformers does not accept it".
        aliases: our internal names -> the user's.

    Raises:
        ValidationError: an exception was raised. Qwenport's own errors pass unchanged, shortened if they are
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
    """Whether it is a panic of the Rust libraries safetensors and tokenizers, which is not an Exception."""
    return type(error).__name__ == "PanicException"
