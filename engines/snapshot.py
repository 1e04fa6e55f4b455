"""A session's content as bytes: a SHA-256 followed by a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from qwenport.engines.errors import SnapshotError

MAGIC = b"QWENPORT-SESSION-2\n"
FACTS = "facts"

Array = NDArray[Any]


def pack(facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """Make a snapshot.

    Args:
        facts: values that JSON can represent.
        arrays: the arrays by name.
    """
    text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    data = safetensors.numpy.save({FACTS: text, **arrays})
    return MAGIC + hashlib.sha256(data).digest() + data


def unpack(snapshot: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """The facts and the arrays of a snapshot.

    Raises:
        SnapshotError: it is not a snapshot, of another version, or damaged.
    """
    if not isinstance(snapshot, bytes | bytearray | memoryview):
        raise SnapshotError(f"snapshot: expected bytes, not {type(snapshot).__name__}")
    whole = bytes(snapshot)
    digest, data = whole[len(MAGIC) :][:32], whole[len(MAGIC) + 32 :]
    if not whole.startswith(MAGIC):
        raise SnapshotError("snapshot: not one, or of another version of this library")
    if hashlib.sha256(data).digest() != digest:
        raise SnapshotError("snapshot: damaged")
    try:
        arrays = safetensors.numpy.load(data)
        facts = json.loads(arrays.pop(FACTS).tobytes())
        if not isinstance(facts, dict):
            raise ValueError("no facts")
    except (SafetensorError, KeyError, ValueError) as error:
        raise SnapshotError(f"snapshot: damaged ({error})") from error
    return facts, arrays
