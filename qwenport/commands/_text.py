"""Prompt -> token ids -> text, with the tokenizer in a package or engine directory.

Nothing is downloaded, and no code from the directory is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenport import QwenportError


class Tokenizer:
    """A directory's tokenizer, loaded with transformers; the part that generation needs."""

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer.

        Raises:
            QwenportError: the directory has no tokenizer, or one that cannot be loaded.
        """
        from transformers import AutoConfig, AutoTokenizer

        from qwenport.exporter import check_companions

        if not any(
            (directory / name).is_file()
            for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
        ):
            raise QwenportError(
                f"{directory} has no tokenizer: the checkpoint it was made from had none"
            )
        check_companions(directory)
        local = {"local_files_only": True, "trust_remote_code": False}
        try:  # config.json determines the tokenizer's class
            config = AutoConfig.from_pretrained(directory, **local)
        except Exception as error:
            raise QwenportError(
                f"{directory / 'config.json'}: transformers does not accept it: {error}"
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, config=config, **local)
        except Exception as error:  # the tokenizers library raises bare Exception for damaged files
            raise QwenportError(f"{directory}: its tokenizer cannot be loaded: {error}") from error

    def encode(self, prompt: str) -> list[int]:
        """Ids of a text to continue, including what the tokenizer prepends (Llama's BOS)."""
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Ids of a conversation in which the user says `prompt`, up to where the answer begins.

        Raises:
            QwenportError: there is no chat template, or it fails.
        """
        if not self._tokenizer.chat_template:
            raise QwenportError("the tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        try:
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program and can raise anything
            raise QwenportError(f"the chat template fails: {error}") from error
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return [int(token) for token in ids]

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        """The exact text of ids, without the clean-up of spaces that Llama 3 asks for, which is not reversible."""
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text


def check_ids(ids: list[int], vocabulary: int, what: str) -> None:
    """Compare a text's ids with the model's embedding.

    Raises:
        QwenportError: the model has no such token.
    """
    if ids and max(ids) >= vocabulary:
        raise QwenportError(
            f"{what} has token {max(ids)}, and the model's embedding ends at {vocabulary - 1}: "
            "the tokenizer belongs to another model"
        )
