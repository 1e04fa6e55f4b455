"""JSON and bytes that somebody might hand us: broken by accident, by another tool, or on purpose."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NAMES = ("x" * 400, "\ud800", "", "attribute_map", "text_config", "__class__", "to_dict")
DEEP = 3000  # levels, more than Python's parser follows

VALUES = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            10**6,
            10**9,
            2**63,
            10**30,
            -(10**30),
            10**400,
            0.5,
            1e300,
            1e308,
            1e-320,
            -0.0,
            float("nan"),
            float("inf"),
            float("-inf"),
            "",
            "0",
            "\0",
            "../../outside",
            "/etc/passwd",
            "name\nwith\nlines",
            "é" * 5000,
            "\ud800",
            [],
            {},
            [[]],
            [None],
            [-1],
            {"": None},
            [10**12] * 3,
            [0] * 20_000,
            "(" * 3000 + ")" * 3000,
            "(([a-z._0-9]+)+)+!",
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)


def paths_of(value: Any, depth: int = 0) -> list[tuple[Any, ...]]:
    """The way to everything in a JSON value, four levels deep at most."""
    found: list[tuple[Any, ...]] = [()]
    if depth < 4 and isinstance(value, dict):
        for key in value:
            found += [(key, *rest) for rest in paths_of(value[key], depth + 1)]
    elif depth < 4 and isinstance(value, list):
        for index in range(min(len(value), 3)):
            found += [(index, *rest) for rest in paths_of(value[index], depth + 1)]
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON value with one to three places changed, removed, renamed or added."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_of(result)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        inner = result
        for key in path[:-1]:
            inner = inner[key]
        act = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if act == "replace":
            inner[path[-1]] = draw(VALUES)
        elif act == "remove":
            del inner[path[-1]]
        elif isinstance(inner, dict):
            moved = inner.pop(path[-1]) if act == "rename" else draw(VALUES)
            inner[draw(st.one_of(st.text(max_size=8), st.sampled_from(NAMES)))] = moved
    return result


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> bytes:
    """The bytes of a JSON file after a change to what it says, to how it is written, or to any byte."""
    how = draw(st.sampled_from(["value"] * 6 + ["bytes", "cut", "written", "none"]))
    if how == "none":
        return draw(st.binary(max_size=60))
    text = json.dumps(draw(changed(document)) if how == "value" else document)
    data = text.encode("utf-8", "surrogatepass")
    if how == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, len(data) - 1))
            data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
    elif how == "cut":
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif how == "written":
        odd: list[bytes] = [
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            data + data,
            b"[" * DEEP + data + b"]" * DEEP,
            b'{"a":' * DEEP + data + b"}" * DEEP,
            data[:1] + b'"model_type": "llama", ' + data[1:],
            data + b"\0",
            b"",
        ]
        data = draw(st.sampled_from(odd))
    return data
