"""A conversation as text, put together from the fixed pieces of a chat template; C++ has the same in src/chat/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qwenport import QwenportError

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


def _after_thinking(content: str) -> str:
    return content.split(THINKING_ENDS)[-1].lstrip("\n") if THINKING_ENDS in content else content


RULES: Mapping[str, Callable[[str], str]] = {
    "verbatim": str,
    "strip": str.strip,
    "after_thinking": _after_thinking,
}
"""What a template does to a content, by name: nothing, or it leaves out white space around it or a reply's thinking."""

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
        for condition, text in self.refused:
            if CONDITIONS[condition](content, text):
                words = condition.replace("_", " ")
                raise ChatError(
                    f"a message of the {role} that {words} {text!r}: the chat template treats it in a way of its own"
                )
        return RULES[self.rule](content)


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
            QwenportError: its tokenizer cannot be loaded.
        """
        from qwenport.engines.text.chat_template import derive_format
        from qwenport.engines.text.tokenizer import Tokenizer
        from qwenport.engines.text.tokenizer_json import UnrecognisedError

        try:
            return derive_format(Tokenizer(directory))
        except UnrecognisedError as error:
            raise ChatError(f"{directory}: {error}") from error

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
