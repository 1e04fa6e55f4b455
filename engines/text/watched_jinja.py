"""Jinja that notes what a template asks of the contents of messages.

A content is a `Content`, a string that notes its methods. What is made of contents by joining stays one, also in set
blocks, macros and filter blocks. Filters, tests, calls and subscripts that are given one are noted, unless they only
pass it on. What stays unseen is a content that is looked for inside another text (`content in "a b"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_STEPS = 200_000
"""Numbers that the ranges of a template may give together."""


@dataclass(frozen=True)
class Question:
    """What a template asks.

    Attributes:
        role: of whom; None of a text that is made of contents.
        name: the method, or what else the content is given to.
        argument: a text that the method is given, if it is its only argument.
    """

    role: str | None
    name: str
    argument: str | None = None


class Content(str):
    """What a message says, or a text that is made of it; notes what is asked of it in `asked`."""

    role: str | None
    asked: set[Question]

    def __new__(cls, text: str, role: str | None, asked: set[Question]) -> Content:
        made = super().__new__(cls, text)
        made.role, made.asked = role, asked
        return made

    def note(self, name: str, argument: str | None = None) -> None:
        self.asked.add(Question(self.role, name, argument))

    def made(self, text: str) -> Content:
        """A text that is made of this one."""
        return Content(text, None, self.asked)

    def __hash__(self) -> int:
        self.note("__hash__")
        return str.__hash__(self)

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return self.made(str.__add__(self, other))

    def __radd__(self, other: str) -> str:
        return self.made(str.__add__(other, self))

    def strip(self, chars: str | None = None, /) -> str:
        self.note("strip", chars)
        return self


def _noting(name: str) -> Callable[..., Any]:
    def method(self: Content, *args: Any) -> Any:
        only = args[0] if len(args) == 1 and isinstance(args[0], str) else None
        self.note(name, None if only is None else str.__str__(only))
        result = getattr(str, name)(self, *args)
        return self.made(result) if type(result) is str else result

    return method


_OWN = {*vars(Content), "__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__"}
_OWN |= {
    "__getattribute__",
    "__setattr__",
    "__delattr__",
    "__getstate__",
    "__getnewargs__",
    "__dir__",
}
_OWN |= {"__reduce__", "__reduce_ex__", "__repr__", "__sizeof__", "__format__", "__doc__"}
for _name in set(dir(str)) - _OWN:
    setattr(Content, _name, _noting(_name))


def contents_in(value: Any) -> list[Content]:
    """The contents in a value, or in the lists and objects that it has."""
    if isinstance(value, Content):
        return [value]
    if isinstance(value, Mapping):
        return [found for inner in value.values() for found in contents_in(inner)]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in contents_in(inner)]
    return []


def _note_all(name: str, *values: Any) -> None:
    for value in values:
        for content in contents_in(value):
            content.note(name)


def _joined(pieces: Iterable[str]) -> str:
    """What Jinja makes of the pieces of a block; one that is alone stays itself."""
    parts = [piece for piece in pieces if str.__len__(piece)]
    contents = contents_in(parts)
    if not contents or len(parts) == 1:
        return parts[0] if parts else ""
    return contents[0].made("".join(parts))


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 Jinja's name
        self.write("environment.concat(map(str, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """The tag of transformers that marks what the model says; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 as Extension has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PASSED_ON = {"trim", "default", "d", "string"}
_OF_LISTS = {
    "length",
    "count",
    "first",
    "last",
    "reverse",
    "list",
    "default",
    "d",
    "selectattr",
    "rejectattr",
}
_KINDS = {
    "defined",
    "undefined",
    "none",
    "string",
    "number",
    "integer",
    "float",
    "boolean",
    "callable",
}
_KINDS |= {"mapping", "true", "false", "filter", "test", "sequence", "iterable"}


class WatchedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with everything that takes a content noting it."""

    code_generator_class = _Generator
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        for name, function in self.filters.items():
            self.filters[name] = _watched(
                f"the filter {name}", function, name in _PASSED_ON, name in _OF_LISTS
            )
        for name, function in self.tests.items():
            self.tests[name] = _watched(
                f"the test {name}", function, name in _KINDS, name in _KINDS
            )
        self.tests["sequence"] = self.tests["iterable"] = _is_iterable
        self.globals |= {"raise_exception": _refuse, "range": self._range}
        self._steps = 0

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        allowed = isinstance(__obj, Macro) or __obj in (Namespace, dict, _refuse)
        if not allowed and not isinstance(getattr(__obj, "__self__", None), Content):
            _note_all("a call", args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _note_all("a subscript", argument)
        return super().getitem(obj, argument)

    def _range(self, *bounds: int) -> range:
        made = range(*bounds)
        self._steps += len(made)
        if self._steps > MOST_STEPS:
            raise TemplateError("it takes too long")
        return made


def _watched(what: str, function: Any, of_contents: bool, of_lists: bool) -> Callable[..., Any]:
    """A filter or test that notes the contents that it is given, unless it only passes on such a value."""

    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if not (of_contents if isinstance(value, Content) else of_lists):
                _note_all(what, value)
        return function(*args, **kwargs)

    return watched


def _is_iterable(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__iter__")


def _refuse(message: str) -> None:
    raise TemplateError(message)
