"""The C++ reader of proofs names what is wrong with one, and no bytes do harm."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.contract import PROOF

from . import proofs
from .builds import built, run
from .proofs import toy_with
from .runtime import Error, Library
from .toy import VOCAB

pytestmark = pytest.mark.usefixtures("passes")
FUZZ_RUNS = 30_000


def complaint(library: Library, directory: Path) -> str:
    with pytest.raises(Error) as error:
        library.load(directory).self_test()
    assert error.value.kind == "bad engine"
    assert "\n" not in str(error.value)
    return str(error.value)


OPERATIONS = ("case", "call", "kind", "row", "sequence", "end")


@pytest.mark.parametrize(
    ("tensor", "index", "value", "expected"),
    [
        ("tokens", (0,), VOCAB, "tokens is not inside the vocabulary of 97"),
        ("tokens", (0,), -1, "tokens is not inside"),
        ("sequences", (2, 1), 21, "sequences is not inside tokens"),
        ("sequences", (0, 0), -1, "sequences is not inside tokens"),
        ("sequences", (1, 1), 0, "sequences is not inside tokens"),
        ("marks", (0, 0), 3, "marks is not inside sequences"),
        ("marks", (0, 1), 0, "marks is not inside sequences"),
        ("marks", (0, 1), 2, "marks is not without a pair that occurs twice"),
        ("top_ids", (0, 0), VOCAB, "top_ids is not inside the vocabulary"),
        ("top_values", (0, 0), np.inf, "top_values is not finite"),
        ("norms", (0,), -1, "norms is not finite and large enough"),
        ("projections", (0, 0), np.nan, "projections is not finite"),
        ("bounds", (0, 1), 0, "bounds is not finite and large enough"),
        ("operations", (0, 2), 1, "operations: a case that is not the next"),
        ("operations", (0, 3), 0, "operations: a case without rows or slots"),
        ("operations", (1, 0), 1, "operations: a case that is not the next"),
        ("operations", (1, 1), 0, "operations: a call that is not the next"),
        ("operations", (1, 2), 5, "operations: no such kind"),
        ("operations", (1, 3), 1, "operations: a row of another case"),
        ("operations", (1, 4), 3, "operations: no such sequence"),
        ("operations", (1, 5), 13, "operations: an end outside the row"),
        ("operations", (2, 4), 1, "a sequence that does not begin with what its row holds"),
    ],
)
def test_what_is_wrong_in_a_proof_is_said(
    library: Library, toy_proof, tmp_path: Path, tensor: str, index, value, expected: str
) -> None:
    tensors, metadata = toy_proof
    changed = tensors[tensor].copy()
    changed[index] = value
    proof = proofs.write({**tensors, tensor: changed}, metadata)
    toy = toy_with(library, tmp_path / "toy", proof)
    assert expected in complaint(library, toy)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("format", "other", "format is not qwenport-proof"),
        ("format_version", "1", "qwenport-proof format version 1, this runtime reads 2; build"),
        ("vocab_size", "98", "vocab_size is not 97"),
        ("dtype", "int8", "dtype is not one that a package has"),
        ("cases", "[]", "cases is not a list of names"),
        ("cases", '["a", "b\\n", "c", "d", "e"]', "cases is not a list of names"),
        ("cases", '["a"]', "cases is not a name for each case"),
        ("package_sha256", "b" * 64, "of another package; build the engine again"),
        ("made_by", None, "no made_by in __metadata__"),
        ("more", "", "__metadata__ has keys of another format"),
    ],
)
def test_what_is_wrong_in_the_metadata_is_said(
    library: Library, toy_proof, tmp_path: Path, key: str, value: str | None, expected: str
) -> None:
    tensors, metadata = toy_proof
    metadata = {k: v for k, v in {**metadata, key: value}.items() if v is not None}
    toy = toy_with(library, tmp_path / "toy", proofs.write(tensors, metadata))
    assert expected in complaint(library, toy)


def test_tensors_must_be_those_of_the_format(library: Library, toy_proof, tmp_path: Path) -> None:
    tensors, metadata = toy_proof
    without = {name: tensor for name, tensor in tensors.items() if name != "norms"}
    for changed, expected in (
        (without, "no norms"),
        ({**tensors, "more": np.zeros(3, np.float32)}, "tensors that do not belong there"),
        ({**tensors, "norms": tensors["norms"].astype(np.float64)}, "norms is not of dtype F32"),
        ({**tensors, "norms": tensors["norms"][:, None]}, "norms is not of one dimension"),
        ({**tensors, "top_ids": tensors["top_ids"][:, 1:]}, "top_ids is not of 32 columns"),
        ({**tensors, "bounds": tensors["bounds"][1:]}, "its marks differ in number"),
    ):
        toy = toy_with(library, tmp_path / "toy", proofs.write(changed, metadata))
        assert expected in complaint(library, toy)


@given(data=st.data())
def test_any_cut_or_byte_that_differs_is_refused(
    library: Library, toy_proof, tmp_path_factory, data
) -> None:
    """By the manifest's hash; and if that is right, too, the header is read with care."""
    proof = proofs.write(*toy_proof)
    at = data.draw(st.integers(0, len(proof) - 1))
    damaged = proof[:at] + data.draw(
        st.sampled_from([b"", bytes([proof[at] ^ 1]) + proof[at + 1 :]])
    )
    folder = tmp_path_factory.mktemp("damaged")
    toy = toy_with(library, folder, proof)
    (toy / PROOF).write_bytes(damaged)
    text = complaint(library, toy)
    assert f"{PROOF}: " in text and ("changed since" in text or "the manifest says" in text)
    if len(damaged) < len(proof):
        proofs.put_proof(toy, damaged)
        assert "damaged: " in complaint(library, toy)


@pytest.mark.usefixtures("time_limit")
def test_a_proof_that_is_listed_must_be_a_file(library: Library, toy: Path) -> None:
    (toy / PROOF).rename(toy / "elsewhere")
    for make, expected in (
        (lambda: None, "cannot be read: No such file or directory"),
        (lambda: (toy / PROOF).symlink_to(toy / "elsewhere"), "a symbolic link; an engine"),
        (lambda: os.mkfifo(toy / PROOF), "not a regular file"),
    ):
        (toy / PROOF).unlink(missing_ok=True)
        make()
        with pytest.raises(Error, match=expected) as error:
            library.load(toy)
        assert error.value.kind == "bad engine"


def test_no_bytes_of_a_proof_do_harm(toy_proof, tmp_path: Path) -> None:
    """A short run of the fuzz target under ASan and UBSan; its inputs have no length before the header."""
    proof = proofs.write(*toy_proof)
    length = int.from_bytes(proof[:8], "little")
    file = tmp_path / "proof"
    file.write_bytes(proof[8 : 8 + length] + b"\n" + proof[8 + length :])
    done = run(built("address") / "fuzz_proof", FUZZ_RUNS, file)
    assert f"{FUZZ_RUNS} runs" in done.stdout
