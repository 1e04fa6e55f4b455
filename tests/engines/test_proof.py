"""proof.safetensors: what is written is read, by us and by the safetensors library, and nothing else is read."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qwenport.engines import (
    Fingerprints,
    Kind,
    Operation,
    Proof,
    ProofError,
    read_proof,
    write_proof,
)
from qwenport.engines.proof import signs

VOCAB = 80
PACKAGE = "ab" * 32


def make_proof() -> Proof:
    """Two rows: a prefill, a ragged step, a way back; logits are random."""
    generator = np.random.default_rng(0)
    marks = np.array([[0, 3], [0, 4], [1, 2]], dtype=np.int32)
    feed, begin = Kind.FEED, Kind.BEGIN
    return Proof(
        tokens=generator.integers(0, VOCAB, 9).astype(np.int32),
        sequences=np.array([[0, 5], [5, 4]], dtype=np.int32),
        marks=marks,
        fingerprints=Fingerprints.of(generator.normal(size=(3, VOCAB)).astype(np.float32)),
        bounds=np.full((3, 3), [1e-5, 0.1, 0.2], dtype=np.float32),
        operations=(
            Operation(0, 0, begin, 1, end=4),
            Operation(0, 1, feed, 0, 0, 3),
            Operation(0, 2, Kind.POISON),
            Operation(0, 3, feed, 0, 0, 4),
            Operation(0, 4, Kind.TRUNCATE, 0, end=1),
            Operation(0, 5, feed, 0, 0, 2),
            Operation(1, 6, begin, 2, end=5),
            Operation(1, 7, feed, 0, 0, 3),
            Operation(1, 7, feed, 1, 1, 2),
            Operation(1, 8, Kind.RESET),
            Operation(1, 9, feed, 0, 1, 2),
        ),
        package_sha256=PACKAGE,
        dtype="bf16",
        vocab_size=VOCAB,
        cases=("one row", "two rows"),
        experts=(0, 0),
        made_by={"qwenport": "1"},
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    proof, file = make_proof(), tmp_path / "proof.safetensors"
    write_proof(file, proof)
    read = read_proof(file, PACKAGE)
    assert read.operations == proof.operations
    for name in ("package_sha256", "dtype", "vocab_size", "cases", "experts", "made_by"):
        assert getattr(read, name) == getattr(proof, name)
    assert read.to_bytes() == proof.to_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_safetensors_library_reads_the_documented_tensors(tmp_path: Path) -> None:
    file = tmp_path / "proof.safetensors"
    write_proof(file, make_proof())
    page = (Path(__file__).parents[2] / "docs/reference/proof.md").read_text()
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    documented = {
        name.strip(" `"): dtype.strip()
        for name, dtype, shape in rows
        if dtype.strip() in ("I32", "F32")
    }
    with safe_open(file, "np") as opened:
        found = {n: opened.get_slice(n).get_dtype() for n in opened.keys()}  # noqa: SIM118
        keys = opened.metadata()
    assert found == documented
    for key in keys:
        assert f"`{key}`" in page


@pytest.mark.parametrize(
    ("token", "value"),
    # the first outputs of Vigna's splitmix64 for these seeds
    [(0, 0xE220A8397B1DCDAF), (1, 0x910A2DEC89025CC1), (1234567, 6457827717110365317)],
)
def test_signs_are_the_bits_of_splitmix64(token: int, value: int) -> None:
    column = signs(token + 1)[:, token]
    assert sum(1 << j for j in range(64) if column[j] > 0) == value


@given(st.integers(0, 2**32), st.floats(1e-6, 1.0), st.sampled_from([64, 1000, 20000]))
def test_error_estimates_the_relative_l2_error(seed: int, size: float, vocab: int) -> None:
    """Against NumPy's norm of the difference itself."""
    generator = np.random.default_rng(seed)
    exact = generator.normal(size=(2, vocab)).astype(np.float32)
    off = generator.normal(size=vocab)
    other = exact[1] + size * np.linalg.norm(exact[1]) * off / np.linalg.norm(off)
    true = np.linalg.norm(other - exact[1].astype(np.float64)) / np.linalg.norm(exact[1])
    (error,) = Fingerprints.of(exact).errors([1], other[None].astype(np.float32))
    assert 0.6 * true < error < 1.6 * true


@given(st.integers(0, VOCAB - 1), st.floats(0.01, 100))
def test_one_wrong_logit_shows_fully(column: int, size: float) -> None:
    exact = np.random.default_rng(column).normal(size=(1, VOCAB)).astype(np.float32)
    other = exact.copy()
    other[0, column] += np.float32(size)
    true = abs(other - exact).max() / np.linalg.norm(exact)
    (error,) = Fingerprints.of(exact).errors([0], other)
    assert error > 0.99 * true


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_has_an_infinite_error(bad: float) -> None:
    exact = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32)
    other = exact.copy()
    other[0, 11] = bad
    assert Fingerprints.of(exact).errors([0], other).tolist() == [np.inf]


def _set(name: str, index: Any, value: Any) -> Callable[[dict, dict], None]:
    def change(tensors: dict, metadata: dict) -> None:
        tensors[name][index] = value

    return change


def _meta(key: str, value: str) -> Callable[[dict, dict], None]:
    return lambda tensors, metadata: metadata.update({key: value})


DAMAGE: dict[str, Callable[[dict, dict], None]] = {
    "another format": _meta("format", "other"),
    "a newer version": _meta("format_version", "3"),
    "another package": _meta("package_sha256", "cd" * 32),
    "another dtype": _meta("dtype", "int8"),
    "no number": _meta("vocab_size", "080"),
    "cases that are no list": _meta("cases", '"one"'),
    "a case too many": _meta("cases", json.dumps(["a", "b", "c"])),
    "experts that are no pair": _meta("experts", "[1]"),
    "an unknown key": _meta("more", "1"),
    "a missing key": lambda tensors, metadata: metadata.pop("made_by") and None,
    "a missing tensor": lambda tensors, metadata: tensors.pop("norms") is None or None,
    "another tensor": lambda tensors, metadata: tensors.update(extra=np.zeros(1, np.float32)),
    "another type": lambda tensors, _: tensors.update(tokens=tensors["tokens"].astype(np.int64)),
    "fewer columns": lambda tensors, _: tensors.update(
        top_ids=tensors["top_ids"][:, :5], top_values=tensors["top_values"][:, :5]
    ),
    "fewer rows": lambda tensors, _: tensors.update(norms=tensors["norms"][:2]),
    "no marks": lambda tensors, _: tensors.update(marks=tensors["marks"][:0]),
    "a token outside the vocabulary": _set("tokens", 2, VOCAB),
    "a negative token": _set("tokens", 2, -1),
    "an id outside the vocabulary": _set("top_ids", (0, 3), VOCAB),
    "a value that is not finite": _set("top_values", (0, 3), np.nan),
    "an infinite projection": _set("projections", (0, 3), np.inf),
    "a negative norm": _set("norms", 1, -1.0),
    "an infinite bound": _set("bounds", (0, 1), np.inf),
    "a bound of zero": _set("bounds", (0, 0), 0.0),
    "a sequence that is too long": _set("sequences", (1, 1), 5),
    "an empty sequence": _set("sequences", (1, 1), 0),
    "a mark outside its sequence": _set("marks", (2, 1), 5),
    "a mark of no sequence": _set("marks", (2, 0), 2),
    "a mark twice": _set("marks", 1, [0, 3]),
    "an unknown kind": _set("operations", (1, 2), 5),
    "a file that begins with no case": _set("operations", (0, 2), 4),
    "a case left out": _set("operations", (6, 0), 2),
    "an operation of another case": _set("operations", (1, 0), 1),
    "a call left out": _set("operations", (10, 1), 11),
    "a reset in the call before": _set("operations", (9, 1), 7),
    "rows of a call in no order": _set("operations", (8, 3), 0),
    "a row that the case has not": _set("operations", (1, 3), 1),
    "a feed of no sequence": _set("operations", (1, 4), 2),
    "a feed beyond its sequence": _set("operations", (10, 5), 5),
    "a feed beyond the slots": _set("operations", (0, 5), 3),
    "a feed of nothing": _set("operations", (3, 5), 3),
    "a feed that continues another sequence": _set("operations", (3, 4), 1),
    "a truncation to more": _set("operations", (4, 5), 5),
    "a truncation to less than nothing": _set("operations", (4, 5), -1),
    "a case of no rows": _set("operations", (0, 3), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "proof.safetensors"
    write_proof(file, make_proof())
    with safe_open(file, "np") as opened:
        metadata = dict(opened.metadata())
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    DAMAGE[damage](tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(ProofError, match=r"proof\.safetensors"):
        read_proof(file, PACKAGE)


@given(data=st.data())
def test_cut_or_changed_bytes_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever the bytes, there is a proof or a ProofError."""
    whole = bytearray(make_proof().to_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "proof.safetensors"
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(ProofError):
        assert isinstance(read_proof(file, PACKAGE), Proof)


def test_a_case_of_very_many_rows_costs_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "proof.safetensors"
    write_proof(file, make_proof())
    with safe_open(file, "np") as opened:
        metadata = dict(opened.metadata())
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    tensors["operations"][0, 3] = 2**31 - 1
    save_file(tensors, file, metadata)
    tracemalloc.start()
    assert read_proof(file, PACKAGE).operations[0].row == 2**31 - 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="cannot be read"):
        read_proof(tmp_path / "proof.safetensors", PACKAGE)


@pytest.mark.parametrize("name", ["caf\u00e9", "two\nlines", "\x7f"])
def test_names_of_cases_are_printable_ascii(name: str, tmp_path: Path) -> None:
    file = tmp_path / "proof.safetensors"
    write_proof(file, replace(make_proof(), cases=("one row", name)))
    with pytest.raises(ProofError, match="printable ASCII"):
        read_proof(file, PACKAGE)
