"""Networks of one layer, drawn, and onnxruntime's answer to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from .models import (
    BOOL,
    FP32,
    INT32,
    INT64,
    Array,
    draw_array,
    shapes,
)

SUM_ERROR = 1e-5  # of the sum of the terms' magnitudes


FUNCTION_ERROR = 2e-6  # relative, of one transcendental function


ONE_ULP = 2.0**-23  # of fp32, relative


NUMBERS = (FP32, INT32, INT64)


few = settings(max_examples=20)


TESTED: set[str] = set()


"""What `kinds_of` would name; filled where tests are defined."""


def about(*kinds: str) -> Any:
    TESTED.update(kinds)
    return lambda test: test


def draw_axis(draw: st.DrawFn, rank: int) -> int:
    return draw(st.integers(-rank, rank - 1))


def draw_spelling(draw: st.DrawFn, axis: int, rank: int) -> int:
    """The same axis, counted from the front or from the back."""
    return draw(st.sampled_from([axis, axis - rank]))


def draw_broadcast(draw: st.DrawFn, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that can be broadcast to another: leading axes missing, some sizes 1."""
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple(size if draw(st.booleans()) else 1 for size in kept)


def draw_operands(draw: st.DrawFn, names: str, dtype: Any) -> dict[str, Array]:
    """Values whose shapes can be broadcast together; one of them has the full shape."""
    shape = draw(shapes(0))
    full = draw(st.sampled_from(names))
    return {
        name: draw_array(draw, shape if name == full else draw_broadcast(draw, shape), dtype)
        for name in names
    }


ELEMENTWISE = {
    "SUM": ("Add", NUMBERS),
    "SUB": ("Sub", NUMBERS),
    "PROD": ("Mul", NUMBERS),
    "MAX": ("Max", NUMBERS),
    "MIN": ("Min", NUMBERS),
    "DIV": ("Div", NUMBERS),
    "POW": ("Pow", NUMBERS),
    "FLOOR_DIV": ("Mod", (INT32, INT64)),
    "EQUAL": ("Equal", (*NUMBERS, BOOL)),
    "GREATER": ("Greater", NUMBERS),
    "LESS": ("Less", NUMBERS),
    "AND": ("And", (BOOL,)),
    "OR": ("Or", (BOOL,)),
    "XOR": ("Xor", (BOOL,)),
}


UNARY = {
    "EXP": ("Exp", FUNCTION_ERROR),
    "LOG": ("Log", FUNCTION_ERROR),
    "SQRT": ("Sqrt", ONE_ULP),  # torch's is not always the nearest number
    "RECIP": ("Reciprocal", 0),
    "ABS": ("Abs", 0),
    "NEG": ("Neg", 0),
    "SIN": ("Sin", FUNCTION_ERROR),
    "COS": ("Cos", FUNCTION_ERROR),
    "CEIL": ("Ceil", 0),
    "FLOOR": ("Floor", 0),
    "ROUND": ("Round", 0),
    "ERF": ("Erf", FUNCTION_ERROR),
    "SIGN": ("Sign", 0),
    "NOT": ("Not", 0),
    "ISNAN": ("IsNaN", 0),
    "ISINF": ("IsInf", 0),
}


REDUCTIONS = {"SUM": "ReduceSum", "AVG": "ReduceMean", "MAX": "ReduceMax", "MIN": "ReduceMin"}
