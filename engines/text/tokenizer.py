"""Prompt -> token ids -> text, with the tokenizer in a package or engine directory.

Nothing is downloaded, and no code from the directory is run. transformers decides what a directory's tokenizer is: for
some classes that is tokenizer.json, others are built anew from parts of it. This takes seconds, so what transformers
built is kept in the cache, and the `tokenizers` library runs it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport import QwenportError

if TYPE_CHECKING:
    import tokenizers

Messages = list[dict[str, str]]

_BACKEND, _SETTINGS = "backend.json", "settings.json"  # the files of an entry of the cache


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has the files of a tokenizer."""
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    return any((directory / name).is_file() for name in names)


class Tokenizer:
    """A directory's tokenizer, as transformers loads it; the part that generation needs."""

    def __init__(self, directory: Path | str, *, keep_built: bool = True) -> None:
        """Load the tokenizer of a package, an engine directory or a checkpoint.

        Args:
            directory: where its files are.
            keep_built: whether what transformers builds may be kept in the cache.

        Raises:
            QwenportError: the directory has no tokenizer, or one that cannot be loaded.
        """
        from qwenport.engines.cache import cache_key, cached, keep
        from qwenport.exporter import COMPANIONS, check_companions, sha256

        directory = Path(directory)
        if not directory.is_dir():
            raise QwenportError(f"{directory}: no such directory")
        if not has_tokenizer(directory):
            raise QwenportError(
                f"{directory} has no tokenizer: the checkpoint it was made from had none"
            )
        check_companions(directory)
        files = [(n, sha256(directory / n)) for n in COMPANIONS if (directory / n).is_file()]
        libraries = [version(name) for name in ("transformers", "tokenizers")]
        # transformers knows some models by their directory's name
        key = cache_key("tokenizer", str(directory), files, libraries, code=(Path(__file__),))
        kept = cached(key, _Backend.read)
        self._tokenizer: _Backend | _Transformers = kept or _load(directory)
        if kept is None and keep_built and isinstance(self._tokenizer, _Backend):
            most = 2 * sum((directory / name).stat().st_size for name, _ in files)
            with suppress(QwenportError, OSError):  # it only takes as long again
                keep(key, self._tokenizer.write, of=str(directory.absolute()), size_bytes=most)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with what the tokenizer puts around one (Llama's BOS) unless `add_special_tokens` is False."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @property
    def chat_template(self) -> str | None:
        """The Jinja program that writes a conversation; None if there is none."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # transformers takes this one where there are no tools
            template = template.get("default")
        return template if isinstance(template, str) and template else None

    @property
    def no_template(self) -> str:
        """Why there is no chat template."""
        if isinstance(self._tokenizer.chat_template, dict):
            return "there are several chat templates, and none is the default"
        given = self._tokenizer.chat_template
        return f"the chat template is {given!r:.40}" if given else "there is no chat template"

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of special tokens by their names, such as "bos_token", which a chat template may use."""
        return self._tokenizer.special_tokens

    def render(self, messages: Messages) -> str:
        """A conversation as the chat template writes it, up to where the answer begins.

        Args:
            messages: objects with "role" and "content".

        Raises:
            QwenportError: there is no chat template, or it fails.
        """
        template = self.chat_template
        if template is None:
            raise QwenportError(self.no_template)
        try:
            return self._tokenizer.render(messages, template)
        except Exception as error:  # a template is a program and can raise anything
            raise QwenportError(f"the chat template fails: {error}") from error

    def backend_json(self) -> str:
        """The tokenizer that is run, as a tokenizer.json.

        Raises:
            QwenportError: part of it is Python code of transformers, or special tokens in a text are text.
        """
        if not isinstance(self._tokenizer, _Backend):
            raise QwenportError("transformers has Python code for this tokenizer")
        if self._tokenizer.settings.split_special_tokens:
            raise QwenportError("split_special_tokens is set")
        return self._tokenizer.backend.to_str()

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        """The exact text of ids, without the clean-up of spaces that Llama 3 asks for, which is not reversible."""
        try:
            return self._tokenizer.decode(token_ids, skip_special_tokens)
        except (
            OverflowError
        ):  # an id without a token has no text, but the package takes 32 bits only
            if min(token_ids) < 0:
                raise QwenportError(f"token {min(token_ids)} is negative") from None
            known = [token for token in token_ids if token < 1 << 32]
            return self._tokenizer.decode(known, skip_special_tokens)


@dataclass(frozen=True)
class _Settings:
    """What transformers' tokenizer has beside its backend; of several chat templates, by name, all."""

    chat_template: Any
    special_tokens: dict[str, str]
    split_special_tokens: bool


class _Backend:
    """The Rust tokenizer that transformers built, called as transformers calls it."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: _Settings) -> None:
        self.backend, self.settings = backend, settings
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = settings.split_special_tokens

    @classmethod
    def read(cls, entry: Path) -> _Backend:
        """Read what `write` wrote."""
        from tokenizers import Tokenizer

        settings = json.loads((entry / _SETTINGS).read_text(encoding="utf-8"))
        return cls(Tokenizer.from_file(str(entry / _BACKEND)), _Settings(**settings))

    def write(self, entry: Path) -> None:
        """Write the files of an entry."""
        self.backend.save(str(entry / _BACKEND), pretty=False)
        settings = json.dumps(asdict(self.settings))
        (entry / _SETTINGS).write_text(settings, encoding="utf-8")

    @property
    def chat_template(self) -> Any:
        return self.settings.chat_template

    @property
    def special_tokens(self) -> dict[str, str]:
        return self.settings.special_tokens

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render(self, messages: Messages, template: str) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            **self.settings.special_tokens,
        )
        return str(text)

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


class _Transformers:
    """A tokenizer that is more than a Rust backend, so that only transformers can run it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    @property
    def special_tokens(self) -> dict[str, str]:
        found: dict[str, str] = self.tokenizer.special_tokens_map
        return found

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def render(self, messages: Messages, template: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def _load(directory: Path) -> _Backend | _Transformers:
    """Load a directory's tokenizer with transformers.

    Raises:
        QwenportError: transformers does not load it.
    """
    from transformers import AutoConfig, AutoTokenizer, TokenizersBackend

    local = {"local_files_only": True, "trust_remote_code": False}
    try:  # config.json determines the tokenizer's class
        config = AutoConfig.from_pretrained(directory, **local)
    except Exception as error:
        raise QwenportError(
            f"{directory / 'config.json'}: transformers does not accept it: {error}"
        ) from error
    try:
        loaded: Any = AutoTokenizer.from_pretrained(directory, config=config, **local)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise QwenportError(f"{directory}: its tokenizer cannot be loaded: {error}") from error
    called = ("__call__", "_encode_plus", "decode", "_decode", "apply_chat_template")
    if isinstance(loaded, TokenizersBackend) and all(
        getattr(type(loaded), n) is getattr(TokenizersBackend, n) for n in called
    ):
        settings = _Settings(
            loaded.chat_template, loaded.special_tokens_map, loaded.split_special_tokens
        )
        return _Backend(loaded.backend_tokenizer, settings)
    return _Transformers(loaded)


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
