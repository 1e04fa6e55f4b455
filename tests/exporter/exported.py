"""Packages to look at, and the numbers of their graphs."""

from __future__ import annotations

from packaged import (
    DTYPES,
)

CHANGES = [(a, b) for a in DTYPES for b in DTYPES if a != b]
