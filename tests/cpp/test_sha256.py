"""The runtime's SHA-256 is hashlib's, in hardware and without."""

from __future__ import annotations

import ctypes as c
import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from .runtime import Library


@pytest.mark.parametrize("hardware", [0, 1])
@given(data=st.binary(max_size=500), first=st.integers(0, 500))
@example(b"", 0)
@example(b"x" * 55, 0)
@example(b"x" * 56, 9)
@example(b"x" * 63, 1)
@example(b"x" * 64, 64)
@example(b"abc" * 70_000, 1000)
def test_any_bytes_in_two_parts(library: Library, hardware: int, data: bytes, first: int) -> None:
    text = c.create_string_buffer(64)
    size = c.c_size_t(len(data))
    library.c.test_sha256(data, size, c.c_size_t(min(first, len(data))), hardware, text)
    assert text.raw.decode() == hashlib.sha256(data).hexdigest()
