"""Chat template -> chat format: what a Jinja program writes between the messages, found by running it, and checked.

The template is run on conversations whose contents are marked words. What stands between them are the pieces. The words
note what the template asks of them (`watched_jinja.py`), so a template whose text depends on a content in a way that
the format does not know is told from one that only copies it. The format is then compared with transformers on other
conversations, whose contents, lengths and numbers of messages are also those that the template names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jinja2 import nodes

from qwenport import QwenportError
from qwenport.engines.text.chat_format import (
    ASSISTANT,
    SYSTEM,
    THINKING_ENDS,
    THINKING_RULES,
    USER,
    ChatError,
    ChatFormat,
    Contents,
    Message,
)
from qwenport.engines.text.tokenizer import Tokenizer
from qwenport.engines.text.tokenizer_json import UnrecognisedError
from qwenport.engines.text.watched_jinja import Content, Question, WatchedEnvironment
from qwenport.exporter import short
from qwenport.wording import one_line

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
    f"why{THINKING_ENDS} \n so ",
    "<tool_call>\n{}\n</tool_call>",
    "<tool_response>\nyes\n</tool_response>",
    "None",
    "word " * 300,
)
RANDOM_CHECKS = 100
MOST_WORDS, LONGEST_WORD = 80, 200
"""Texts that are taken from a template to check it, and the characters of one."""
MOST_MESSAGES, MOST_CHARACTERS = 300, 20_000
"""Of the conversations that a template is checked with."""
LONG = 61
"""Messages of one that every template is checked with."""


def derive_format(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a tokenizer's template.

    Raises:
        UnrecognisedError: there is no template, it fails, or it is not put together from fixed pieces.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UnrecognisedError(tokenizer.no_template)

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
    asked: set[Question] = set()
    run, named = _runner(template, special_tokens)
    plain = _pieces(run, False, asked)
    try:
        with_system = _pieces(run, True, asked)
    except UnrecognisedError:
        with_system = None
    if with_system is not None and with_system[2:] != plain[1:]:
        raise UnrecognisedError("the chat template writes another text after a system message")
    start_to_system, system_to_user = with_system[:2] if with_system else (None, None)
    start_to_user, user_to_assistant, assistant_to_user, user_to_reply = plain
    roles = (SYSTEM, USER, ASSISTANT)
    found = ChatFormat(
        start_to_system,
        system_to_user,
        start_to_user,
        user_to_assistant,
        assistant_to_user,
        user_to_reply,
        {role: Contents() for role in roles},
    )
    if any(question.role is None for question in asked):
        raise UnrecognisedError("the chat template depends on a text that is made of what is said")
    contents = [*CONTENTS, *named.contents()]
    for role in roles:
        if role != SYSTEM or with_system:
            questions = [question for question in asked if question.role == role]
            found = _with_contents(found, role, questions, contents, render)
    for messages in _conversations(with_system is not None, contents, named.numbers):
        _compare(found, messages, render, f"{len(messages)} messages")
    return found


@dataclass(frozen=True)
class _Named:
    """The constants of a template."""

    words: Sequence[str]
    numbers: Sequence[int]

    def contents(self) -> Iterator[str]:
        """Contents that a condition on one of them would tell from others."""
        for word in self.words:
            yield from (word, f"a{word}b", f" {word} ", f"{word} b", f"a {word}")
        for number in self.numbers:
            yield from (str(number), *("x" * (number + more) for more in (-1, 0, 1)))


def _pieces(render: Render, system: bool, asked: set[Question]) -> list[str]:
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
            Message(role, Content(word, role, asked))
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


def _runner(template: str, special_tokens: Mapping[str, str]) -> tuple[Render, _Named]:
    """A function that runs the template on the messages as they are, of which transformers copies the contents; and the
    template's constants. Raises UnrecognisedError: it is no template."""
    environment = WatchedEnvironment()
    variables = {"tools": None, "documents": None, "add_generation_prompt": True}

    def run(messages: list[Message]) -> str:
        said = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str.__str__(compiled.render(messages=said, **variables, **special_tokens))
        except Exception as error:  # a template is a program and can raise anything
            raise UnrecognisedError(f"the chat template fails: {one_line(str(error))}") from error

    try:
        parsed = environment.parse(template)
        compiled = environment.from_string(template)
    except Exception as error:  # also what its constants give: 1 / 0
        raise UnrecognisedError(f"the chat template fails: {one_line(str(error))}") from error
    constants = [node.value for node in parsed.find_all(nodes.Const)]
    words = {word for word in constants if isinstance(word, str) and 0 < len(word) <= LONGEST_WORD}
    digits = {int(found) for word in words for found in re.findall(r"(?<!\d)\d{1,5}(?!\d)", word)}
    numbers = digits | {abs(number) for number in constants if type(number) is int}
    return run, _Named(
        sorted(words)[:MOST_WORDS],
        sorted(number for number in numbers if 1 < number < MOST_CHARACTERS),
    )


_AS_CONDITION = {"startswith": "starts_with", "endswith": "ends_with", "__contains__": "contains"}


_WHAT = {
    "__len__": "its length",
    "__eq__": "what it equals",
    "__ne__": "what it equals",
    "__getitem__": "a part of it",
}
_WHAT |= {
    "__hash__": "what it equals",
    "__iter__": "its characters",
    "__contains__": "what it contains",
}
_WHAT |= {"startswith": "its beginning", "endswith": "its end"}


def _with_contents(
    plain: ChatFormat,
    role: str,
    asked: Collection[Question],
    contents: Sequence[str],
    render: Render,
) -> ChatFormat:
    """The format with what the template does to the contents of a role."""
    conditions = []
    rules = ["verbatim"]
    for question in sorted(asked, key=repr):
        if (question.name, question.argument) == ("strip", None):
            rules.insert(0, "strip")
        elif question.name in _AS_CONDITION and question.argument:
            conditions.append((_AS_CONDITION[question.name], question.argument))
        else:
            raise _dependence(role, question)
    if ("contains", THINKING_ENDS) in conditions:
        rules = [*THINKING_RULES, *rules]
    last: UnrecognisedError | None = None
    for rule in rules:
        # a reply whose thinking is left out is one that the rule is for
        known = ("contains", THINKING_ENDS) if rule in THINKING_RULES else None
        refused = tuple(condition for condition in conditions if condition != known)
        if refused and role == ASSISTANT:  # a model may say anything
            name = next(name for name, word in _AS_CONDITION.items() if word == refused[0][0])
            last = last or _dependence(role, Question(role, name))
            continue
        found = replace(plain, contents={**plain.contents, role: Contents(rule, refused)})
        try:
            for content in contents:
                _compare(found, _conversation(role, content), render, short(content))
        except UnrecognisedError as error:
            last = last or error
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


def _dependence(role: str, question: Question) -> UnrecognisedError:
    what = _WHAT.get(question.name, question.name.strip("_"))
    return UnrecognisedError(f"the chat template depends on what the {role} says ({what})")


def _conversations(
    system: bool, contents: Sequence[str], numbers: Sequence[int]
) -> Iterator[list[Message]]:
    """Conversations with random contents, and long ones."""
    draw = random.Random(0)

    def conversation(count: int, has_system: bool, said: Sequence[str]) -> list[Message]:
        roles = [SYSTEM] * has_system + [
            (USER, ASSISTANT)[i % 2] for i in range(count - has_system)
        ]
        return [Message(role, draw.choice(said) + draw.choice(said)) for role in roles]

    for number in range(RANDOM_CHECKS):
        has_system = bool(system and number % 2)
        yield conversation(2 * draw.randrange(6) + 1 + has_system, has_system, contents)
    counts = {LONG} | {n + more for n in numbers for more in range(-2, 4)}
    for count in sorted(count for count in counts if 0 < count <= MOST_MESSAGES):
        has_system = bool(system and count % 2 == 0)
        if count % 2 or has_system:
            yield conversation(count, has_system, ["a ", "b\n", "c"])


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
