"""Prompt -> token ids -> text, with the tokenizer that a package or engine directory carries.

Nothing is fetched from anywhere, and no code that a directory brings is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenport import QwenportError


class Tokenizer:
    """transformers' tokenizer of a directory, as far as generation needs it."""

    def __init__(self, directory: Path) -> None:
        """Load it.

        Raises:
            QwenportError: the directory has no tokenizer, or one that cannot be loaded.
        """
        from transformers import AutoTokenizer

        if not any(
            (directory / name).is_file()
            for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
        ):
            raise QwenportError(
                f"{directory} has no tokenizer: the checkpoint it was made from had none"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # damaged files make the tokenizers library raise bare Exception
            raise QwenportError(f"{directory}: its tokenizer cannot be loaded: {error}") from error

    def encode(self, prompt: str) -> list[int]:
        """Ids of a text to continue, with what the tokenizer puts before a text (Llama's BOS)."""
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Ids of a conversation whose user has said `prompt`, up to where the answer begins.

        Raises:
            QwenportError: there is no chat template, or it fails.
        """
        if not self._tokenizer.chat_template:
            raise QwenportError("the tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        try:
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it raises what it likes
            raise QwenportError(f"the chat template fails: {error}") from error
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return [int(token) for token in ids]

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        """Text of ids, exactly: the clean-up of spaces that Llama 3 asks for is not reversible."""
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text


def stop_ids(directory: Path) -> list[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json.

    Raises:
        QwenportError: a file is not JSON, or its eos_token_id is not an id or a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise QwenportError(f"{file}: not a JSON object ({error})") from error
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(token) is int for token in ids):
            raise QwenportError(
                f"{file}: eos_token_id must be an id or a list of ids, found {found!r}"
            )
        return ids
    return []
