"""Networks of one layer in half precision, and what it must come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from .models import (
    BF16,
    FP16,
    Array,
    evaluate,
    parse,
)

HALVES = pytest.mark.parametrize("half", [BF16, FP16], ids=["bf16", "fp16"])


few = settings(max_examples=15)


def value_of(model: Any, inputs: dict[str, Array], *, exact: bool = False) -> Array:
    (got,) = evaluate(parse(model), inputs, ["y"], exact=exact)
    return got


def rounded(values: Array, half: Any) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(half)


def bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.int16)


def spread_out(seed: int, shape: tuple[int, ...], half: Any) -> Array:
    """Numbers of very different magnitudes, and now and then a large one."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    return rounded(np.where(rng.random(shape) < 0.05, values * 2.0**12, values), half)


def short(seed: int, shape: tuple[int, ...], half: Any) -> Array:
    """Multiples of 1/8 below 16: every product and sum of a hundred of them is exact in fp32."""
    return (np.random.default_rng(seed).integers(-127, 128, shape) / 8).astype(half)
