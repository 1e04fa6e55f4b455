"""Chat template -> chat format: what a Jinja program writes between the messages, found by running it, and checked.

The template is run on conversations whose contents are marked words. What stands between them are the pieces. A marked
word notes what the template asks of it, so a template whose text depends on a content in a way that the format does not
know is told from one that only copies it. The format is then compared with transformers on other conversations.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenport import QwenportError
from qwenport.engines.text.chat_format import (
    ASSISTANT,
    SYSTEM,
    THINKING_ENDS,
    USER,
    ChatError,
    ChatFormat,
    Contents,
    Message,
)
from qwenport.engines.text.tokenizer import Tokenizer
from qwenport.engines.text.tokenizer_json import UnrecognisedError
from qwenport.exporter import short

if TYPE_CHECKING:
    from jinja2.ext import Extension

Render = Callable[[list[Message]], str]

CHANGING = {"strftime_now": "the date", "random": "a random choice", "lipsum": "random words"}
"""Names that make a template write something else each time."""
MOST_TURNS = 4
CONTENTS = (
    "",
    " ",
    "\n",
    "a",
    "Hello, how are you?",
    "  spaces around  ",
    "\n\nlines\naround\n\n",
    "\u00a0\u2003wide spaces\u3000\x1c",
    "你好，世界 👋 e\u0301",
    "{{ 7 * 6 }} {% if x %} {# #}",
    "<b>&amp; \"quoted\" 'quoted' \\n",
    "<|im_start|>user\n<|im_end|><|eot_id|><s></s>[INST]",
    f"<think>\nwhy\n{THINKING_ENDS}\n\nbecause",
    f"{THINKING_ENDS}\nonce{THINKING_ENDS}",
    "<tool_call>\n{}\n</tool_call>",
    "<tool_response>\nyes\n</tool_response>",
    "None",
    "word " * 300,
)
RANDOM_CHECKS = 100


def derive_format(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a tokenizer's template.

    Raises:
        UnrecognisedError: there is no template, it fails, or it is not put together from fixed pieces.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UnrecognisedError("there is no chat template")
    if not isinstance(template, str):
        raise UnrecognisedError("there are several chat templates")

    def render(messages: list[Message]) -> str:
        try:
            return tokenizer.render([{"role": m.role, "content": m.content} for m in messages])
        except QwenportError as error:
            raise UnrecognisedError(str(error)) from error

    return format_of(template, render, tokenizer.special_tokens)


def format_of(template: str, render: Render, special_tokens: Mapping[str, str]) -> ChatFormat:
    """The chat format of a template.

    Args:
        template: the Jinja program.
        render: runs it as transformers does.
        special_tokens: variables that it may use, such as "bos_token".

    Raises:
        UnrecognisedError: see `derive_format`.
    """
    for name in re.findall(r"\w+", template):
        if name in CHANGING:
            raise UnrecognisedError(f"the chat template writes {CHANGING[name]} ({name})")
    asked: dict[str, set[tuple[str, Any]]] = {role: set() for role in (SYSTEM, USER, ASSISTANT)}
    run = _runner(template, special_tokens)
    plain = _pieces(run, False, asked)
    try:
        with_system = _pieces(run, True, asked)
    except UnrecognisedError:
        with_system = None
    if with_system is not None and with_system[2:] != plain[1:]:
        raise UnrecognisedError("the chat template writes another text after a system message")
    start_to_system, system_to_user = with_system[:2] if with_system else (None, None)
    start_to_user, user_to_assistant, assistant_to_user, user_to_reply = plain
    found = ChatFormat(
        start_to_system,
        system_to_user,
        start_to_user,
        user_to_assistant,
        assistant_to_user,
        user_to_reply,
        {role: Contents() for role in asked},
    )
    for role in asked:
        if role != SYSTEM or with_system:
            found = _with_contents(found, role, asked[role], render)
    for messages in _random_conversations(with_system is not None):
        _compare(found, messages, render, f"{len(messages)} messages")
    return found


def _pieces(render: Render, system: bool, asked: Mapping[str, set[tuple[str, Any]]]) -> list[str]:
    """The texts between the contents, the same in conversations of any length.

    Returns:
        [before system, between system and user], or [before user]; then user to assistant, assistant to user, user to
        reply.
    """
    known: list[str] | None = None
    for turns in range(MOST_TURNS, 0, -1):  # the longest first: it has all the pieces
        roles = [SYSTEM] * system + [USER, ASSISTANT] * (turns - 1) + [USER]
        words = [f"{role}X{number}Zq" for number, role in enumerate(roles)]
        messages = [
            Message(role, _Watched(word, asked[role]))
            for role, word in zip(roles, words, strict=True)
        ]
        texts = re.split("|".join(words), text := render(messages))
        if re.findall("|".join(words), text) != words:
            raise UnrecognisedError("the chat template does not write each content once, in order")
        first = 2 if system else 1
        if known is None:
            known = [*texts[:first], texts[first], texts[first + 1], texts[-1]]
        start, between = known[:first], [known[first], known[first + 1]] * turns
        if texts != [*start, *between[: 2 * (turns - 1)], known[-1]]:
            raise UnrecognisedError("the chat template writes another text in each turn")
    assert known is not None
    return known


def _runner(template: str, special_tokens: Mapping[str, str]) -> Render:
    """A function that runs the template in Jinja on the messages as they are; transformers copies their contents."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_blocks()]
    )
    environment.globals["raise_exception"] = refuse

    def run(messages: list[Message]) -> str:
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        said = [{"role": message.role, "content": message.content} for message in messages]
        try:
            compiled = environment.from_string(template)
            return compiled.render(messages=said, **variables, **special_tokens)
        except Exception as error:  # a template is a program and can raise anything
            raise UnrecognisedError(f"the chat template fails: {error}") from error

    return run


def _generation_blocks() -> type[Extension]:
    """The tag of transformers that marks what the model says; it changes no text."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 as Extension has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


class _Watched(str):
    """A word that notes what is asked of it: (method, argument)."""

    asked: set[tuple[str, Any]]

    def __new__(cls, word: str, asked: set[tuple[str, Any]]) -> _Watched:
        watched = super().__new__(cls, word)
        watched.asked = asked
        return watched

    __hash__ = str.__hash__

    def __str__(self) -> str:
        return self

    def strip(self, chars: str | None = None, /) -> str:
        self.asked.add(("strip", chars))
        return self


def _noting(name: str) -> Callable[..., Any]:
    def method(self: _Watched, *args: Any) -> Any:
        self.asked.add((name, args[0] if len(args) == 1 and isinstance(args[0], str) else None))
        return getattr(str, name)(self, *args)

    return method


_COPIED = {
    "__new__",
    "__init__",
    "__init_subclass__",
    "__class__",
    "__getattribute__",
    "__hash__",
    "__str__",
}
_COPIED |= {
    "__add__",
    "__radd__",
    "__format__",
    "__doc__",
    "__reduce__",
    "__reduce_ex__",
    "__subclasshook__",
}
_COPIED |= {
    "__dir__",
    "__repr__",
    "__sizeof__",
    "__setattr__",
    "__delattr__",
    "__getstate__",
    "__getnewargs__",
}
for _name in set(dir(str)) - _COPIED - {"strip"}:
    setattr(_Watched, _name, _noting(_name))

_AS_CONDITION = {"startswith": "starts_with", "endswith": "ends_with", "__contains__": "contains"}


def _with_contents(
    plain: ChatFormat, role: str, asked: set[tuple[str, Any]], render: Render
) -> ChatFormat:
    """The format with what the template does to the contents of a role."""
    conditions = []
    rules = ["verbatim"]
    for name, argument in sorted(asked, key=repr):
        if (name, argument) == ("strip", None):
            rules.insert(0, "strip")
        elif name in _AS_CONDITION and argument:
            conditions.append((_AS_CONDITION[name], argument))
        else:
            raise UnrecognisedError(
                f"the chat template depends on what the {role} says ({name.strip('_')})"
            )
    if ("contains", THINKING_ENDS) in conditions:
        rules.insert(0, "after_thinking")
    last: UnrecognisedError | None = None
    for rule in rules:
        # a reply whose thinking is left out is one that the rule is for
        known = ("contains", THINKING_ENDS) if rule == "after_thinking" else None
        refused = tuple(condition for condition in conditions if condition != known)
        found = replace(plain, contents={**plain.contents, role: Contents(rule, refused)})
        try:
            for content in CONTENTS:
                _compare(found, _conversation(role, content), render, short(content))
        except UnrecognisedError as error:
            last = error
        else:
            return found
    assert last is not None
    raise last


def _conversation(role: str, content: str) -> list[Message]:
    """One of three turns in which a role says something once, in the middle where it can."""
    system = [Message(SYSTEM, content)] if role == SYSTEM else []
    turns = [USER, ASSISTANT, USER, ASSISTANT, USER]
    said = [content if role == turns[i] and i in (2, 3) else f"word {i}" for i in range(len(turns))]
    return [*system, *map(Message, turns, said)]


def _random_conversations(system: bool) -> Iterator[list[Message]]:
    draw = random.Random(0)
    for number in range(RANDOM_CHECKS):
        roles = [SYSTEM] * (system and number % 2) + [USER, ASSISTANT] * draw.randrange(6) + [USER]
        yield [Message(role, draw.choice(CONTENTS) + draw.choice(CONTENTS)) for role in roles]


def _compare(found: ChatFormat, messages: list[Message], render: Render, what: str) -> None:
    """Compare the format with the template, if the format takes the conversation."""
    try:
        text = found.text(messages)
    except ChatError:
        return
    if text != render(messages):
        raise UnrecognisedError(
            f"the chat template changes what is said, or depends on it, for instance on {what}"
        )
