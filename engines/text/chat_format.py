"""A conversation as text, put together from the fixed pieces of a chat template; C++ has the same in src/chat/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

from qwenport import QwenportError
from qwenport.contract import ENGINE_FORMAT, ENGINE_VERSION, MANIFEST
from qwenport.exporter import Maybe, check_shape, damaged, kind_of, read_manifest

THINKING_ENDS = "</think>"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


class ChatError(QwenportError, ValueError):
    """A conversation that a chat format does not write, or an engine or package without a chat format."""


@dataclass(frozen=True)
class Message:
    """What somebody said.

    Attributes:
        role: "system", "user" or "assistant".
        content: the text.
    """

    role: str
    content: str


def _after_thinking(trim: Callable[[str], str]) -> Callable[[str], str]:
    def rule(content: str) -> str:
        return trim(content.split(THINKING_ENDS)[-1]) if THINKING_ENDS in content else content

    return rule


RULES: Mapping[str, Callable[[str], str]] = {
    "verbatim": str,
    "strip": str.strip,
    "after_thinking": _after_thinking(str),
    "after_thinking_lines": _after_thinking(lambda rest: rest.lstrip("\n")),
    "after_thinking_strip": _after_thinking(str.strip),
}
"""What a template does to a content, by name: nothing, or it leaves out white space around it or a reply's thinking."""
THINKING_RULES = tuple(name for name in RULES if name.startswith("after"))

CONDITIONS: Mapping[str, Callable[[str, str], bool]] = {
    "starts_with": str.startswith,
    "ends_with": str.endswith,
    "contains": str.__contains__,
}
"""What a template may ask of a content, by name: (content, text) -> answer."""


@dataclass(frozen=True)
class Contents:
    """What a template does with the contents of one role.

    Attributes:
        rule: one of RULES.
        refused: (one of CONDITIONS, a text): contents that the template treats otherwise.
    """

    rule: str = "verbatim"
    refused: tuple[tuple[str, str], ...] = ()

    def written(self, role: str, content: str) -> str:
        """A content as it stands in the conversation's text.

        Raises:
            ChatError: the template treats it otherwise.
        """
        if not isinstance(content, str):
            raise ChatError(f"a message must be a text, got {content!r:.60}")
        written = RULES[self.rule](content)
        for condition, text in self.refused:
            # the template may have asked before the rule or after it
            if CONDITIONS[condition](content, text) or CONDITIONS[condition](written, text):
                words = condition.replace("_", " ")
                raise ChatError(
                    f"a message of the {role} that {words} {text!r}: the chat template treats it in a way of its own"
                )
        return written


@dataclass(frozen=True)
class ChatFormat:
    """The pieces of text between the contents of a conversation.

    That is: a system message or none, then messages of user and assistant in turn, the last of them the user's. The
    text ends where the reply begins.

    Attributes:
        start_to_system, system_to_user: before and after a system message; None if the template takes none.
        start_to_user: before the first message of a conversation without a system message.
        user_to_assistant, assistant_to_user: between messages.
        user_to_reply: after the last message.
        contents: by role.
    """

    start_to_system: str | None
    system_to_user: str | None
    start_to_user: str
    user_to_assistant: str
    assistant_to_user: str
    user_to_reply: str
    contents: Mapping[str, Contents]

    @classmethod
    def load(cls, directory: Path | str) -> ChatFormat:
        """The chat format of a package or an engine directory.

        Raises:
            ChatError: it has no chat template, or one that is not put together from fixed pieces.
            QwenportError: its tokenizer cannot be loaded, or the engine's manifest is damaged.
        """
        from qwenport.engines.text.chat_template import derive_format
        from qwenport.engines.text.tokenizer import Tokenizer
        from qwenport.engines.text.tokenizer_json import UnrecognisedError

        if (text := engine_text(directory)) is not None:
            if text["chat"] is None:
                raise ChatError(f"{directory}: {text['no_chat']}")
            return cls.from_json(text["chat"])
        try:
            return derive_format(Tokenizer(directory))
        except UnrecognisedError as error:
            raise ChatError(f"{directory}: {error}") from error

    @classmethod
    def from_json(cls, chat: dict[str, Any]) -> ChatFormat:
        """The format that an engine's manifest has, checked before by `check_text`."""
        contents = {
            role: Contents(what["rule"], tuple((how, text) for how, text in what["refused"]))
            for role, what in chat["contents"].items()
        }
        return cls(**{**chat, "contents": contents})

    def as_json(self) -> dict[str, Any]:
        """The object in an engine's manifest."""
        return asdict(self)

    def text(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the reply begins.

        It is what transformers' ``apply_chat_template(messages, add_generation_prompt=True)`` gives; its ids are
        those of `Tokenizer.encode` with ``add_special_tokens=False``.

        Raises:
            ChatError: the messages do not come in that order, or a content is one that the template treats otherwise.
        """
        roles = [message.role for message in messages]
        has_system = roles[:1] == [SYSTEM]
        turns = roles[has_system:]
        if not turns or turns != [(USER, ASSISTANT)[i % 2] for i in range(len(turns))]:
            raise ChatError(
                "a conversation is a system message or none, then messages of user and assistant in turn, "
                f"found {', '.join(map(repr, roles)) or 'no message'}"
            )
        if turns[-1] != USER:
            raise ChatError("the last message of a conversation must be the user's")
        if has_system and self.system_to_user is None:
            raise ChatError("the chat template takes no system message")
        before = {USER: self.assistant_to_user, ASSISTANT: self.user_to_assistant}
        pieces = [
            self.start_to_system if has_system else self.start_to_user,
            *([self.system_to_user] if has_system else []),
            *(before[role] for role in turns[1:]),
        ]
        contents = [self.written(message.role, message.content) for message in messages]
        return "".join(map(str, chain(*zip(pieces, contents, strict=True)))) + self.user_to_reply

    def written(self, role: str, content: str) -> str:
        """A content as it stands in the text. Raises ChatError: see `text`."""
        return self.contents[role].written(role, content)


_CONTENTS_SHAPE = {"rule": str, "refused": [[str]]}
_PIECES = ("start_to_user", "user_to_assistant", "assistant_to_user", "user_to_reply")
_SYSTEM_PIECES = ("start_to_system", "system_to_user")
TEXT_SHAPE = {
    "stop_tokens": [int],
    "chat": Maybe(
        {
            **dict.fromkeys(_PIECES, str),
            **dict.fromkeys(_SYSTEM_PIECES, (str, NoneType)),
            "contents": dict.fromkeys((SYSTEM, USER, ASSISTANT), _CONTENTS_SHAPE),
        }
    ),
    "no_chat": (str, NoneType),
}
"""Of "text" in an engine's manifest."""


def check_text(text: dict[str, Any], vocab_size: int) -> None:
    """Check "text" of an engine's manifest, which has TEXT_SHAPE.

    Raises:
        ValueError: something in it contradicts itself, or is not known.
    """
    chat = text["chat"]
    if not all(0 <= token < vocab_size for token in text["stop_tokens"]):
        raise ValueError(f"text.stop_tokens has ids beyond the vocabulary of {vocab_size}")
    if (chat is None) == (text["no_chat"] is None):
        raise ValueError("text has both or neither of chat and no_chat")
    if chat is None:
        return
    if (chat["start_to_system"] is None) != (chat["system_to_user"] is None):
        raise ValueError("text.chat has one of start_to_system and system_to_user")
    for role, what in chat["contents"].items():
        if role not in (SYSTEM, USER, ASSISTANT) or what["rule"] not in RULES:
            raise ValueError(f"text.chat.contents.{role}: {what['rule']!r} is no rule")
        for refused in what["refused"]:
            if len(refused) != 2 or refused[0] not in CONDITIONS:
                raise ValueError(f"text.chat.contents.{role}.refused has {refused!r}")


def engine_text(directory: Path | str) -> dict[str, Any] | None:
    """ "text" of an engine's manifest; None for a directory that is no engine.

    Raises:
        QwenportError: no such directory, or the manifest is damaged.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file() or kind_of(directory) != "engine":
        return None
    manifest = read_manifest(directory, ENGINE_FORMAT, ENGINE_VERSION, "build the engine again")
    with damaged(directory / MANIFEST):
        check_shape(manifest, {"text": TEXT_SHAPE, "model": {"vocab_size": int}})
        check_text(manifest["text"], manifest["model"]["vocab_size"])
    text: dict[str, Any] = manifest["text"]
    return text
