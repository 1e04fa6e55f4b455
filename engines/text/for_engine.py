"""What an engine carries for text: the tokenizer for C++, and in its manifest the chat format and the stop tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenport import QwenportError
from qwenport.contract import TOKENIZER
from qwenport.engines.text.chat_template import derive_format
from qwenport.engines.text.tokenizer import Tokenizer, has_tokenizer
from qwenport.engines.text.tokenizer_file import tokenizer_bytes
from qwenport.engines.text.tokenizer_json import UnrecognisedError, read_tokenizer
from qwenport.exporter import CheckpointError, stop_ids
from qwenport.wording import one_line


def write_text(
    source: Path, folder: Path, vocab_size: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Write the tokenizer's file, or say in one line why there is none.

    Args:
        source: a directory with the companion files of a model.
        folder: the engine's.
        vocab_size: rows of the model's embedding.
        note: called with what is left out.

    Returns:
        The object "text" of the engine's manifest.
    """
    found: dict[str, Any] = {"stop_tokens": [], "chat": None, "no_chat": None}
    try:
        found["stop_tokens"] = stop_ids(source, vocab_size)
        if not has_tokenizer(source):
            raise UnrecognisedError("the checkpoint has no tokenizer")
        tokenizer = _tokenizer(source, folder, note)
        if tokenizer.chat_template is None:
            raise UnrecognisedError(tokenizer.no_template)
        try:
            found["chat"] = derive_format(tokenizer).as_json()
        except UnrecognisedError as error:
            note(f"without a chat format, so C++ programs get no Chat: {error}")
            raise
    except (UnrecognisedError, CheckpointError) as error:
        found["no_chat"] = one_line(str(error))
    return found


def _tokenizer(source: Path, folder: Path, note: Callable[[str], None]) -> Tokenizer:
    """Load the tokenizer and write its file, as transformers builds it.

    Raises:
        UnrecognisedError: it cannot be loaded, or the C++ library does not compute what it does.
    """
    try:
        tokenizer = Tokenizer(source, keep_built=False)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "tokenizer.json"
            file.write_text(tokenizer.backend_json(), encoding="utf-8")
            parts = read_tokenizer(file)
    except (UnrecognisedError, QwenportError) as error:
        note(f"without {TOKENIZER}, so C++ programs get no tokenizer: {error}")
        raise UnrecognisedError(f"the tokenizer is not known to C++: {error}") from error
    (folder / TOKENIZER).write_bytes(tokenizer_bytes(parts))
    return tokenizer
