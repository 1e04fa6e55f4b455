"""proof.safetensors: what an engine must reproduce. docs/reference/proof.md is its format, read here strictly.

Token sequences, operations on a session, and marks: fingerprints of the logits after the first n tokens of a sequence.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import DTYPES, MANIFEST, PROOF, PROOF_FORMAT, PROOF_VERSION
from qwenport.engines.errors import ProofError
from qwenport.exporter import Package, sha256

TOP = 32
"""Logits whose values a mark has, the largest ones."""
PROJECTIONS = 64
"""Random projections of all logits that a mark has."""
MOST_PROOF_BYTES = 32 << 20
"""The size of the largest file that is read, or made."""
NO_PROOF = 0.5
"""Of a bound: so large an error is compared with it, and counts as nothing compared."""

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class Kind(IntEnum):
    """What an operation does.

    `BEGIN` starts a case, `FEED` appends tokens to a row, `TRUNCATE` goes back in it, `POISON` fills the slots that
    hold no token, and `RESET` forgets all tokens; docs/reference/proof.md says it exactly.
    """

    BEGIN = 0
    FEED = 1
    TRUNCATE = 2
    POISON = 3
    RESET = 4


@dataclass(frozen=True)
class Operation:
    """A row of `operations`; -1 where a field has no meaning.

    Attributes:
        case, call: its numbers; FEEDs of one call are made at once.
        kind: what it does.
        row, sequence, end: what it is done to; see the table in docs/reference/proof.md.
    """

    case: int
    call: int
    kind: Kind
    row: int = -1
    sequence: int = -1
    end: int = -1


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of n rows of logits.

    Attributes:
        top_ids: int32 [n, K], largest logits first; K is the smaller of TOP and the vocabulary.
        top_values: fp32 [n, K].
        norms: fp32 [n].
        projections: fp32 [n, PROJECTIONS].
    """

    top_ids: Int32
    top_values: Float32
    norms: Float32
    projections: Float32

    @classmethod
    def of(cls, logits: Float32) -> Fingerprints:
        """Those of fp32 logits [n, vocab]."""
        exact, count = logits.astype(np.float64), min(TOP, logits.shape[1])
        ids = np.sort(np.argpartition(-exact, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(exact, ids, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        return cls(
            ids.astype(np.int32),
            np.take_along_axis(logits, ids, axis=1),
            np.linalg.norm(exact, axis=1).astype(np.float32),
            project(exact).astype(np.float32),
        )

    @classmethod
    def join(cls, parts: Sequence[Fingerprints]) -> Fingerprints:
        """Those of all parts, in order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def take(self, rows: Sequence[int]) -> Fingerprints:
        """Those of some rows."""
        return Fingerprints(*(getattr(self, f.name)[list(rows)] for f in fields(self)))

    def errors(self, rows: Sequence[int], logits: Float32) -> Float64:
        """The errors of logits fp32 [n, vocab] against n of the fingerprints; docs/reference/proof.md defines them."""
        exact, vocab, at = logits.astype(np.float64), logits.shape[1], list(rows)
        norms = self.norms[at].astype(np.float64)
        norms[norms == 0] = 1.0
        ids, values = self.top_ids[at], self.top_values[at].astype(np.float64)
        least = norms * math.sqrt(ids.shape[1] / vocab)
        with np.errstate(invalid="ignore", over="ignore"):
            top = np.linalg.norm(np.take_along_axis(exact, ids, axis=1) - values, axis=1)
            off = project(exact) - self.projections[at]
            found = np.maximum(
                top / np.maximum(np.linalg.norm(values, axis=1), least),
                np.sqrt(np.mean(off**2, axis=1)) / norms,
            )
        found[~np.isfinite(logits).all(axis=1)] = np.inf
        return found


@dataclass(frozen=True)
class Proof:
    """The contents of a proof, as docs/reference/proof.md defines them.

    Attributes:
        tokens, sequences: the token ids, int32 [T], and each sequence's start and length in them, int32 [S, 2].
        marks: sequence and n of the logits that are compared, int32 [M, 2].
        fingerprints: of each mark's logits.
        bounds: the errors allowed, fp32 [M, 3]: to an engine that computes in fp32, to one in the package's dtype, and
            to one in fp32 that rounds activations where it multiplies by quantized weights.
        operations: what is done, in order.
        package_sha256: of the manifest of the package that the logits are of.
        dtype: that package's.
        vocab_size: columns of the logits.
        cases: names of the cases.
        experts: experts that the sequences reach, and of how many, over all layers.
        made_by: program -> version.
    """

    tokens: Int32
    sequences: Int32
    marks: Int32
    fingerprints: Fingerprints
    bounds: Float32
    operations: tuple[Operation, ...]
    package_sha256: str
    dtype: str
    vocab_size: int
    cases: tuple[str, ...]
    experts: tuple[int, int]
    made_by: Mapping[str, str]

    def sequence(self, index: int) -> Int32:
        """The tokens of a sequence."""
        start, length = self.sequences[index]
        return self.tokens[start : start + length]

    def to_bytes(self) -> bytes:
        """The file. The same proof gives the same bytes, which the library's own writer does not promise."""
        operations = [[o.case, o.call, o.kind, o.row, o.sequence, o.end] for o in self.operations]
        tensors = {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "marks": self.marks,
            **vars(self.fingerprints),
            "bounds": self.bounds,
            "operations": np.array(operations, dtype=np.int32),
        }
        metadata = {
            "format": PROOF_FORMAT,
            "format_version": str(PROOF_VERSION),
            "package_sha256": self.package_sha256,
            "dtype": self.dtype,
            "vocab_size": str(self.vocab_size),
            "cases": json.dumps(self.cases),
            "experts": json.dumps(self.experts),
            "made_by": json.dumps(dict(self.made_by)),
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        data = b""
        for name, array in tensors.items():
            begin = len(data)
            data += array.tobytes()
            header[name] = {
                "dtype": "I32" if array.dtype == np.int32 else "F32",
                "shape": list(array.shape),
                "data_offsets": [begin, len(data)],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data


@lru_cache(maxsize=1)
def signs(vocab_size: int) -> Float64:
    """The projection R, [PROJECTIONS, vocab] of +1 and -1: bits of splitmix64 of each token id."""
    z = np.arange(vocab_size, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bits = (z[None, :] >> np.arange(PROJECTIONS, dtype=np.uint64)[:, None]) & np.uint64(1)
    return np.where(bits == 1, 1.0, -1.0)


def project(logits: Float64) -> Float64:
    """R x of logits float64 [n, vocab], [n, PROJECTIONS].

    Not a BLAS product, whose threads would wait for onnxruntime's.
    """
    found: Float64 = np.einsum("nv,jv->nj", logits, signs(logits.shape[1]), optimize=False)
    return found


def write_proof(file: Path, proof: Proof) -> None:
    """Write a proof next to `file`, then rename it, so that a reader finds the old one or the new one.

    Raises:
        OSError: it cannot be written there.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        scratch.write_bytes(proof.to_bytes())
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def kept_proof(package: Package) -> Proof | None:
    """The proof that a package holds; None if it has none.

    Raises:
        ProofError: it is damaged, or of another package.
    """
    file = package.path / PROOF
    return read_proof(file, sha256(package.path / MANIFEST)) if file.exists() else None


def read_proof(file: Path, package_sha256: str) -> Proof:
    """Read and check a proof.

    Args:
        file: proof.safetensors.
        package_sha256: of the package's manifest; for an engine, its manifest has it.

    Raises:
        ProofError: it is damaged, of another format version, or of another package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.stat().st_size > MOST_PROOF_BYTES:
            raise ValueError(f"larger than {MOST_PROOF_BYTES} bytes")
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ProofError(f"{file}: cannot be read ({error})") from error
    found, version = metadata.get("format"), metadata.get("format_version")
    if found != PROOF_FORMAT or version != str(PROOF_VERSION):
        raise ProofError(
            f"{file}: {found!r:.40} version {version!r:.20}, this Qwenport reads {PROOF_FORMAT} {PROOF_VERSION}"
        )
    try:
        proof = _parse(metadata, tensors)
        _check_tensors(proof)
        _check_operations(proof)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProofError(f"{file}: damaged ({error})") from error
    if proof.package_sha256 != package_sha256:
        raise ProofError(f"{file}: of another package; remove it, and make it again")
    return proof


SHAPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tokens": ("int32", ("T",)),
    "sequences": ("int32", ("S", 2)),
    "marks": ("int32", ("M", 2)),
    "top_ids": ("int32", ("M", "K")),
    "top_values": ("float32", ("M", "K")),
    "norms": ("float32", ("M",)),
    "projections": ("float32", ("M", PROJECTIONS)),
    "bounds": ("float32", ("M", 3)),
    "operations": ("int32", ("N", 6)),
}
KEYS = {
    "format", "format_version", "package_sha256", "dtype", "vocab_size", "cases", "experts", "made_by",
}  # fmt: skip


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> Proof:
    if metadata.keys() != KEYS or tensors.keys() != SHAPES.keys():
        raise ValueError("its tensors or metadata are not those of the format")
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in SHAPES.items():
        array = tensors[name]
        wanted = [s if isinstance(s, int) else sizes.get(s) for s in shape]
        if array.dtype != dtype or array.ndim != len(shape) or not array.size:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        for size, found, want in zip(shape, array.shape, wanted, strict=True):
            if want is not None and found != want:
                raise ValueError(f"{name} has the shape {list(array.shape)}")
            if isinstance(size, str):
                sizes[size] = found
    vocab_size, cases = int(metadata["vocab_size"]), json.loads(metadata["cases"])
    experts, made_by = json.loads(metadata["experts"]), json.loads(metadata["made_by"])
    if str(vocab_size) != metadata["vocab_size"] or vocab_size < 1:
        raise ValueError("vocab_size is not a number")
    if not (isinstance(cases, list) and cases and all(map(_is_line, cases))):
        raise ValueError("cases is not a list of names in printable ASCII")
    if not (
        isinstance(experts, list) and len(experts) == 2 and all(type(n) is int for n in experts)
    ):
        raise ValueError("experts is not a list of two numbers")
    if not (isinstance(made_by, dict) and all(isinstance(v, str) for v in made_by.values())):
        raise ValueError("made_by is not an object of names")
    if metadata["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {metadata['dtype']!r:.20}")
    rows = tensors["operations"].tolist()
    return Proof(
        tensors["tokens"],
        tensors["sequences"],
        tensors["marks"],
        Fingerprints(*(tensors[f.name] for f in fields(Fingerprints))),
        tensors["bounds"],
        tuple(Operation(case, call, Kind(kind), *rest) for case, call, kind, *rest in rows),
        metadata["package_sha256"],
        metadata["dtype"],
        vocab_size,
        tuple(cases),
        (experts[0], experts[1]),
        made_by,
    )


def _is_line(name: Any) -> bool:
    return isinstance(name, str) and name.isascii() and name.isprintable()


def _check_tensors(proof: Proof) -> None:
    """Raises ValueError: a number is outside what it counts or points to."""
    prints, vocab = proof.fingerprints, proof.vocab_size
    if prints.top_ids.shape[1] != min(TOP, vocab):
        raise ValueError("top_ids has not as many columns as it should")
    for name, ids in (("tokens", proof.tokens), ("top_ids", prints.top_ids)):
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"{name} has an id outside the vocabulary of {vocab}")
    for name, numbers in (*vars(prints).items(), ("bounds", proof.bounds)):
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} has a number that is not finite")
    if prints.norms.min() < 0 or proof.bounds.min() <= 0:
        raise ValueError("a norm is negative, or a bound is not positive")
    for start, length in proof.sequences.tolist():
        if start < 0 or length < 1 or start + length > len(proof.tokens):
            raise ValueError("a sequence lies outside the tokens")
    marks = list(map(tuple, proof.marks.tolist()))
    if len(set(marks)) != len(marks):
        raise ValueError("a mark is there twice")
    for sequence, n in marks:
        if not (0 <= sequence < len(proof.sequences) and 1 <= n <= proof.sequences[sequence][1]):
            raise ValueError(f"mark ({sequence}, {n}) lies outside the sequences")


def _check_operations(proof: Proof) -> None:
    """Raises ValueError: the operations are not a run that a session can make."""
    case = call = -1
    rows, slots, before, nothing = 0, 0, proof.operations[0], proof.tokens[:0]
    held: dict[int, Int32] = {}
    for number, o in enumerate(proof.operations):
        same_call = o.call == call
        if o.kind is Kind.BEGIN:
            if o.case != case + 1 or o.row < 1 or o.end < 1 or o.sequence != -1:
                raise ValueError(f"operation {number} begins no case")
            case, rows, slots, held = o.case, o.row, o.end, {}
        elif number == 0 or o.case != case:
            raise ValueError(f"operation {number} is of no case that has begun")
        if o.call != call + 1 and not (
            same_call and o.kind is Kind.FEED is before.kind and o.row > before.row
        ):
            raise ValueError(f"operation {number} has the call {o.call}")
        if o.kind in (Kind.FEED, Kind.TRUNCATE) and not 0 <= o.row < rows:
            raise ValueError(f"operation {number} is for row {o.row}")
        if o.kind is Kind.FEED:
            _check_feed(proof, o, held.get(o.row, nothing), slots, number)
            held[o.row] = proof.sequence(o.sequence)[: o.end]
        elif o.kind is Kind.TRUNCATE:
            kept = held.get(o.row, nothing)
            if not 0 <= o.end <= len(kept):
                raise ValueError(f"operation {number} keeps more than there is")
            held[o.row] = kept[: o.end]
        elif o.kind is Kind.RESET:
            held = {}
        call, before = o.call, o
    if case + 1 != len(proof.cases):
        raise ValueError(f"{case + 1} cases for {len(proof.cases)} names")


def _check_feed(proof: Proof, o: Operation, held: Int32, slots: int, number: int) -> None:
    if not 0 <= o.sequence < len(proof.sequences):
        raise ValueError(f"operation {number} feeds sequence {o.sequence}")
    tokens = proof.sequence(o.sequence)
    if not len(held) < o.end <= min(slots, len(tokens)):
        raise ValueError(f"operation {number} feeds up to {o.end}")
    if not np.array_equal(tokens[: len(held)], held):
        raise ValueError(f"operation {number} continues another sequence")
