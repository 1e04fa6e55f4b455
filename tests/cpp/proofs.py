"""Writes proofs with NumPy and the safetensors package, from their definition in docs/reference/proof.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from qwenport.contract import MANIFEST, PROOF

from .runtime import Library
from .toy import VOCAB, toy_directory

Logits = Callable[[list[int]], Any]
"""Tokens -> fp32 [vocab] after the last of them."""

TOY_TEXTS = [[(3 + i * i) % VOCAB for i in range(140)], [*range(20)], [*range(40, 60)]]
PACKAGE = "a" * 64
BEGIN, FEED, TRUNCATE, POISON, RESET = range(5)


def small_cases(sequences: Sequence[Sequence[int]]) -> dict[str, list[tuple]]:
    """Name -> (kind, {row: (sequence, end)} or row, length), for three sequences of at least 140, 20 and 20 tokens."""
    assert len(sequences) == 3
    return {
        "decode": [(BEGIN, 1, 12), *((FEED, {0: (0, n)}) for n in (1, 2, 3, 8, 9))],
        "poisoned": [
            (BEGIN, 1, 40),
            (POISON,),
            (FEED, {0: (0, 20)}),
            (POISON,),
            *((FEED, {0: (0, n)}) for n in (21, 22)),
        ],
        "ragged rows": [
            (BEGIN, 3, 20),
            (FEED, {0: (0, 3), 1: (1, 9), 2: (2, 1)}),
            (FEED, {0: (0, 4), 2: (2, 2)}),
            (TRUNCATE, 1, 4),
            (FEED, {0: (0, 5), 1: (1, 9), 2: (2, 3)}),
            (RESET,),
            (FEED, {1: (1, 2)}),
        ],
        "span edges": [
            (BEGIN, 1, 140),
            (FEED, {0: (0, 63)}),
            *((FEED, {0: (0, n)}) for n in (64, 65, 66, 128, 129, 140)),
        ],
        "more rows than there are": [(BEGIN, 99, 20), (FEED, {98: (1, 2)})],
    }


def tensors_of(
    logits: Logits, sequences: Sequence[Sequence[int]], cases: dict[str, list[tuple]], bound: float
) -> dict[str, Any]:
    """The tensors of a proof in which each FEED has a mark."""
    marks: list[tuple[int, int]] = []
    operations: list[tuple[int, ...]] = []
    call = -1
    for case, steps in enumerate(cases.values()):
        for kind, *rest in steps:
            call += 1
            if kind == FEED:
                marks += [mark for mark in rest[0].values() if mark not in marks]
                operations += [(case, call, kind, row, *mark) for row, mark in rest[0].items()]
            elif kind in (BEGIN, TRUNCATE):
                operations.append((case, call, kind, rest[0], -1, rest[1]))
            else:
                operations.append((case, call, kind, -1, -1, -1))
    rows = np.stack([logits(list(sequences[s][:n])) for s, n in marks]).astype(np.float64)
    vocab = rows.shape[1]
    top = np.argsort(-rows, axis=1, kind="stable")[:, :32]
    with np.errstate(over="ignore"):
        z = np.arange(vocab, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    signs = np.where(z[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1), 1.0, -1.0)
    lengths = [len(tokens) for tokens in sequences]
    starts = np.cumsum([0, *lengths[:-1]])
    return {
        "tokens": np.array([t for tokens in sequences for t in tokens], np.int32),
        "sequences": np.stack([starts, lengths], axis=1).astype(np.int32),
        "marks": np.array(marks, np.int32),
        "top_ids": top.astype(np.int32),
        "top_values": np.take_along_axis(rows, top, axis=1).astype(np.float32),
        "norms": np.linalg.norm(rows, axis=1).astype(np.float32),
        "projections": (rows @ signs).astype(np.float32),
        "bounds": np.full((len(marks), 3), bound, np.float32),
        "operations": np.array(operations, np.int32),
    }


def metadata_of(cases: dict[str, list[tuple]], vocab: int, package_sha256: str) -> dict[str, str]:
    return {
        "format": "qwenport-proof",
        "format_version": "2",
        "package_sha256": package_sha256,
        "dtype": "fp32",
        "vocab_size": str(vocab),
        "cases": json.dumps(list(cases)),
        "experts": "[0, 0]",
        "made_by": "{}",
    }


def put_proof(directory: Path, data: bytes) -> None:
    """Write a proof into an engine directory and list it in the manifest."""
    (directory / PROOF).write_bytes(data)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"][PROOF] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def package_of(directory: Path) -> str:
    """The package's SHA-256 that an engine's manifest names."""
    return json.loads((directory / MANIFEST).read_text())["package"]["manifest_sha256"]


def write(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    return save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)


def change(tensors: dict[str, Any], name: str, index: tuple[int, ...], by: float) -> dict[str, Any]:
    """The tensors with something added to one number."""
    changed = tensors[name].copy()
    changed[index] += by
    return {**tensors, name: changed}


def toy_with(library: Library, folder: Path, proof: bytes) -> Path:
    """An engine directory of the toy network that carries a proof."""
    toy_directory(library, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["package"] = {"manifest_sha256": PACKAGE}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    put_proof(folder, proof)
    return folder
