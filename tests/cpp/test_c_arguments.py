"""The C API, bound with ctypes: NULL arguments, and callbacks that use their session, are refused in one line."""

from __future__ import annotations

import ctypes as c
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenport.engines import Generated

from .builds import ROOT
from .runtime import Error, Library, Session
from .toy import toy_directory

HEADER = (ROOT / "engines/cpp/include/qwenport/qwenport.h").read_text()
MAY_BE_NULL = {"options", "on_token", "user", "logprobs", "prompt_lengths"}
VALUES = ["session_max_batch", "session_capacity", "session_cuda_graphs"]
INVALID = 1


def declared() -> dict[str, list[tuple[str, str]]]:
    """Functions that return an error code -> the type and name of each parameter, from the header."""
    found = re.findall(r"^QWENPORT_EXPORT int qwenport_(\w+)\(([^)]*)\);", HEADER, re.MULTILINE)
    return {
        name: [
            tuple(re.fullmatch(r"\s*(.*?)(\w+)\s*", one).groups()) for one in parameters.split(",")
        ]
        for name, parameters in found
        if name not in VALUES
    }


POINTERS = [
    (function, name)
    for function, parameters in declared().items()
    for kind, name in parameters
    if "*" in kind and name not in MAY_BE_NULL
]


@pytest.fixture(scope="module")
def toy(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_directory(library, tmp_path_factory.mktemp("toy"))


@pytest.fixture
def session(library: Library, toy: Path) -> Session:
    return library.load(toy).session()


def refused(library: Library, code: int) -> str:
    assert code == INVALID
    return library.c.qwenport_last_error().decode()


def test_the_header_is_read() -> None:
    assert len(declared()) == 10
    assert ("generate", "prompts") in POINTERS


@pytest.mark.parametrize(("function", "missing"), POINTERS)
def test_an_argument_that_is_null_is_named(
    library: Library, toy: Path, session: Session, function: str, missing: str
) -> None:
    engine = library.load(toy)
    given: list[Any] = []
    for kind, name in declared()[function]:
        if name == missing or name in MAY_BE_NULL:
            given.append(None)
        elif "*" not in kind:
            given.append(c.c_size_t(0) if "size_t" in kind else 0)
        elif name in ("engine", "session") and "**" not in kind:
            given.append((engine if name == "engine" else session).handle)
        else:
            given.append(c.create_string_buffer(64))
    code = getattr(library.c, f"qwenport_{function}")(*given)
    assert refused(library, code) == f"{missing} is NULL"


def test_a_row_that_is_null_is_named(library: Library, session: Session) -> None:
    rows, sizes = (c.POINTER(c.c_int64) * 2)(), (c.c_size_t * 2)(0, 3)
    room = c.create_string_buffer(4096)
    count = c.c_size_t(2)
    code = library.c.qwenport_session_prefill(session.handle, rows, sizes, None, count, room)
    assert refused(library, code) == "rows[1] is NULL"
    code = library.c.qwenport_generate(
        session.handle, rows, sizes, count, None, None, None, room, room, None
    )
    assert refused(library, code) == "prompts[1] is NULL"


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        ("stop_token_count", "options.stop_tokens is NULL"),
        ("stop_sequence_count", "options.stop_sequences is NULL"),
    ],
)
def test_an_option_that_is_null_is_named(
    library: Library, session: Session, field: str, complaint: str
) -> None:
    options = library.c.qwenport_generate_defaults()
    setattr(options, field, 1)
    prompts = (c.POINTER(c.c_int64) * 1)((c.c_int64 * 1)(1))
    room = c.create_string_buffer(4096)
    code = library.c.qwenport_generate(
        session.handle,
        prompts,
        (c.c_size_t * 1)(1),
        c.c_size_t(1),
        c.byref(options),
        None,
        None,
        room,
        room,
        None,
    )
    assert refused(library, code) == complaint


def test_what_returns_no_code_takes_null(library: Library) -> None:
    for name in VALUES:
        assert getattr(library.c, f"qwenport_{name}")(None) == -1
        assert library.c.qwenport_last_error() == b"session is NULL"
    assert bytes(library.c.qwenport_engine_get_info(None)).strip(b"\0") == b""
    library.c.qwenport_session_reset(None)
    library.c.qwenport_cancellation_request(None)
    for name in ("engine", "session", "snapshot", "cancellation"):
        getattr(library.c, f"qwenport_{name}_free")(None)


# Callbacks

USES: dict[str, Callable[[Session], Any]] = {
    "prefill": lambda session: session.prefill([[1]]),
    "decode": lambda session: session.decode([3]),
    "generate": lambda session: session.generate([[3]]),
    "reset": lambda session: session.reset(),
    "truncate": lambda session: session.truncate(0),
    "save": lambda session: session.save(),
    "restore": lambda session: session.restore(b"x"),
}


def generate(session: Session, by: str, work: Callable[[], None]) -> list[Generated]:
    """Generate and call `work` at the first token, by on_token or on_logits."""
    calls: list[int] = []

    def first(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            work()

    return session.generate([[5, 6]], max_new_tokens=4, **{by: first})


@pytest.mark.parametrize("by", ["on_token", "on_logits"])
@pytest.mark.parametrize("use", USES)
def test_a_callback_that_uses_its_session_ends_the_generation(
    session: Session, by: str, use: str
) -> None:
    expected = generate(session, by, lambda: None)
    said: list[Error] = []

    def work() -> None:
        try:
            USES[use](session)
        except Error as error:
            said.append(error)

    with pytest.raises(Error, match=r"^a callback must not use its session$") as error:
        generate(session, by, work)
    assert error.value.kind == "invalid argument"
    assert [one.kind for one in said] == ([] if use == "reset" else ["invalid argument"])
    assert session.lengths == [2]
    assert generate(session, by, lambda: None) == expected


def test_a_session_that_a_callback_frees_lives_until_its_generation_ends(
    library: Library, toy: Path
) -> None:
    expected = library.load(toy).session().generate([[5, 6]], max_new_tokens=4)
    session = library.load(toy).session()
    handle = session.handle
    freed: list[bool] = []

    def free(*_: Any) -> None:
        if not freed:
            session.handle = c.c_void_p()  # not to be freed again
            library.c.qwenport_session_free(handle)
        freed.append(True)

    assert session.generate([[5, 6]], max_new_tokens=4, on_token=free) == expected
    assert len(freed) == 4


# Messages


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\x9b", "\u2028"])
def test_messages_are_one_line(library: Library, tmp_path: Path, character: str) -> None:
    with pytest.raises(Error) as error:
        library.load(Path(f"a{character}b"))
    assert re.fullmatch("a +b: no qwenport.json; not an engine directory", str(error.value))
    text = toy_directory(library, tmp_path) / "qwenport.json"
    text.write_text(json.dumps({"format": f"x{character}yé"}))
    with pytest.raises(Error) as error:
        library.load(tmp_path)
    assert re.search("holds a x +yé, expected", str(error.value))


def test_an_empty_name_of_a_directory_is_said(library: Library) -> None:
    engine = c.c_void_p()
    code = library.c.qwenport_engine_load(b"", None, c.byref(engine))
    assert refused(library, code) == "the name of the engine directory is empty"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -1}, "temperature must be 0 or in [1e-30, 1e30], got -1"),
        ({"temperature": np.nan}, "temperature must be 0 or in [1e-30, 1e30], got nan"),
        ({"top_k": -2}, "top_k must be at least 0, got -2"),
        ({"top_p": 1.5}, "top_p must be in [0, 1], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in [1e-30, 1e30], got 0"),
    ],
)
def test_a_range_is_said(session: Session, options: dict[str, float], complaint: str) -> None:
    with pytest.raises(Error, match=f"^{re.escape(complaint)}$"):
        session.generate([[1]], **options)
