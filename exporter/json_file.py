"""Third-party JSON files: read completely, or refused with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 23  # an index of 36,000 tensors takes 4 MB
MOST_DIGITS = 400  # more than the largest fp64 number has
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(file: Path, most_bytes: int = MOST_BYTES, *, unique: bool = False) -> Any:
    """The value that a JSON file holds.

    Args:
        file: UTF-8, without a byte-order mark.
        most_bytes: the largest size accepted.
        unique: refuse an object with a repeated key; otherwise the last one counts, as in the json module.

    Raises:
        ValueError: it is not a regular file, too large, not UTF-8, not JSON, nested too deeply, or has text that is
            not valid Unicode or a number with too many digits; says which.
        OSError: it cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError("not a regular file")
    size = file.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{size} bytes, more than any such file needs")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte-order mark")
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_unique if unique else None)
        if _SURROGATE.search(data):  # half a character, which UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise ValueError("text that is no Unicode") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:  # Python's own message explains how to lift its limit
        raise ValueError("a number of too many digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
