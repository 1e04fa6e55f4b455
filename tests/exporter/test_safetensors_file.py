"""Headers of safetensors files: what the library refuses is refused, at once, and as one error."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qwenport.exporter import CheckpointError
from qwenport.exporter.safetensors_file import MOST_HEADER_BYTES, read_safetensors_header

GOOD = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})
(LENGTH,) = struct.unpack("<Q", GOOD[:8])
HEADER, DATA = GOOD[8 : 8 + LENGTH], GOOD[8 + LENGTH :]


def file_of(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def library_accepts(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_slice(name).get_shape()
        return True
    except (SafetensorError, OSError):
        return False


def ours_accepts(file: Path) -> bool:
    try:
        read_safetensors_header(file)
        return True
    except CheckpointError:
        return False


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(HEADER), **changes}).encode()


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(GOOD)
    known, entries = read_safetensors_header(tmp_path / "f")
    assert known.size == len(GOOD)
    with safe_open(tmp_path / "f", framework="pt") as opened:
        assert {e.name: list(e.shape) for e in entries} == {
            name: opened.get_slice(name).get_shape()
            for name in opened.keys()  # noqa: SIM118
        }
    for entry in entries:
        expected = save(
            {"x": torch.ones(2, 3)} if entry.name == "a" else {"x": torch.zeros(4).bfloat16()}
        )
        assert GOOD[entry.offset : entry.offset + entry.length] == expected[-entry.length :]


@pytest.mark.parametrize(
    "content",
    [
        file_of(edited(__metadata__="pt")),
        file_of(edited(__metadata__={"format": 1})),
        file_of(edited(__metadata__=[["format", "pt"]])),
        file_of(b"\xef\xbb\xbf" + HEADER),
        file_of(HEADER.decode().encode("utf-16")),
        file_of(b" " + HEADER),
        file_of(HEADER.replace(b'"b"', b'"a"')),
        file_of(HEADER.replace(b'"shape"', b'"shape":[9],"shape"', 1)),
        file_of(HEADER.replace(b"[2,3]", b"[2,NaN]")),
        file_of(HEADER.replace(b"[2,3]", b"[2,3.0]")),
        file_of(HEADER.replace(b"[2,3]", b"[-2,-3]")),
        file_of(HEADER, DATA[:-1]),
        file_of(HEADER, DATA + b"\0"),
        file_of(HEADER, length=1 << 63),
        file_of(b"[" * 5000 + b"]" * 5000),
        b"",
        b"\x05",
    ],
    ids=range(17),
)
def test_what_is_no_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    assert not ours_accepts(tmp_path / "f")


@given(
    position=st.integers(0, len(GOOD) - 1),
    change=st.binary(min_size=0, max_size=6),
    removed=st.integers(0, 6),
)
def test_nothing_is_accepted_that_the_library_refuses(
    position: int, change: bytes, removed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("mutated") / "f"
    file.write_bytes(GOOD[:position] + change + GOOD[position + removed :])
    assert library_accepts(file) or not ours_accepts(file)


def test_a_huge_header_is_refused_without_being_read(tmp_path: Path) -> None:
    entry = '"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(entry % n for n in range(MOST_HEADER_BYTES // 50)) + "}"
    (tmp_path / "f").write_bytes(file_of(header.encode(), b""))
    assert len(header) > MOST_HEADER_BYTES
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match="no checkpoint needs more"):
        read_safetensors_header(tmp_path / "f")
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
