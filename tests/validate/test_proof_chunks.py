"""A proof's cases for dual chunk attention, on sessions whose logits are what attention depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from qwenport.contract import INPUT_IDS, LOGITS_INDICES, REQUEST_LENGTHS, WRITE_INDICES, no_progress
from qwenport.engines import (
    CachedSession,
    Fingerprints,
    Kind,
    Operation,
    Proof,
    read_proof,
    run_proof,
    write_proof,
)
from qwenport.engines.self_test import prompt_ends
from qwenport.exporter import DualChunk
from qwenport.validate.proof_cases import (
    CONTEXTS,
    MAIN,
    REQUESTS,
    make_cases,
    make_sequences,
    operations,
    span_edges,
)
from qwenport.validate.proof_chunks import (
    chunk_cases,
    request_prompts,
    scaled_requests,
    self_test_stops,
    unscaled_context,
)
from qwenport.validate.proof_making import _lay_out
from qwenport.validate.proof_run import ProofRun

from .sessions import signature

VOCAB, ROWS = 64, 3


class Ledger(CachedSession):
    """Logits are drawn from all that a token's depend on: tokens and request lengths up to it."""

    def __init__(self, slots: int, unscaled: int | None) -> None:
        super().__init__(
            max_batch=ROWS,
            capacity=slots,
            vocab_size=VOCAB,
            max_step_tokens=50,
            max_step_logits=50,
            max_positions=slots,
            unscaled_length=unscaled,
        )
        self.cache = np.zeros((ROWS, slots, 2), dtype=np.int64)

    def poison(self) -> None:
        for row, held in enumerate(self.lengths):
            self.cache[row, held:] = -1

    def _step(self, feeds: Mapping[str, Any]) -> Any:
        ids, starts, wanted = (feeds[name] for name in (INPUT_IDS, WRITE_INDICES, LOGITS_INDICES))
        lengths = feeds.get(REQUEST_LENGTHS, np.zeros(len(ids), dtype=np.int64))
        logits = np.zeros((*wanted.shape, VOCAB), np.float32)
        for row, start in enumerate(starts.tolist()):
            self.cache[row, start : start + ids.shape[1], 0] = ids[row]
            self.cache[row, start : start + ids.shape[1], 1] = lengths[row]
            for column, index in enumerate(wanted[row].tolist()):
                seen = [*self.cache[row, : start + index + 1].ravel(), lengths[row]]
                drawn = np.random.default_rng(int(signature(seen))).normal(size=VOCAB)
                logits[row, column] = drawn
        return logits


def _proof(chunks: DualChunk, context: int, folder: Path) -> Proof:
    """A proof of a package with `context` slots, after the strict reader."""
    plain, requests = unscaled_context(chunks, context), scaled_requests(chunks, context)
    sequences = make_sequences(
        VOCAB, plain, experts=False, longer=[request.length for request in requests]
    )
    cases = [
        *make_cases(plain, ROWS, whole=plain == context),
        *chunk_cases(chunks, context, context, ROWS),
    ]
    run = ProofRun(sequences, request_prompts(requests), [], no_progress)
    session = Ledger(context, chunks.original_max_position_embeddings)

    def opened(act: Any, observe: Any) -> CachedSession:
        return session

    prints = run.exact(opened)
    marks = sorted({mark for case in cases for mark in case.marks})
    tokens, starts = _lay_out(sequences)
    proof = Proof(
        np.array(tokens, np.int32),
        np.array([[s, len(t)] for s, t in zip(starts, sequences, strict=True)], np.int32),
        np.array(marks, np.int32),
        Fingerprints.join([prints[s].take([n - 1]) for s, n in marks]),
        np.full((len(marks), 3), 1e-3, np.float32),
        tuple(operations(cases)),
        "0" * 64,
        "fp32",
        VOCAB,
        tuple(case.name for case in cases),
        (0, 0),
        {},
    )
    write_proof(folder / "proof", proof)
    return read_proof(folder / "proof", proof.package_sha256)


@st.composite
def settings_of_chunks(draw: Any) -> DualChunk:
    local = draw(st.integers(1, 40))
    original = draw(st.none() | st.integers(1, 300))
    return DualChunk(local + draw(st.integers(1, 90)), local, original)


@example(chunks=DualChunk(48, 16, 256), context=512)
@example(chunks=DualChunk(48, 16, None), context=600)
@example(chunks=DualChunk(2, 1, 1), context=3)
@given(chunks=settings_of_chunks(), context=st.integers(1, 400))
def test_however_a_session_gets_there_a_mark_has_the_same_logits(
    chunks: DualChunk, context: int, tmp_path_factory: Any
) -> None:
    """No case is refused by a session, and none depends on what another way of running has scaled."""
    proof = _proof(chunks, context, tmp_path_factory.mktemp("proof"))
    session = Ledger(context, chunks.original_max_position_embeddings)
    found = run_proof(session, proof, 0)  # type: ignore[arg-type]
    assert found.passed and found.left_out == 0 and found.worst < 1e-3
    marks = set(map(tuple, proof.marks.tolist()))
    plain = unscaled_context(chunks, context)
    for border in (chunks.chunk, 2 * chunks.chunk, 3 * chunks.chunk):
        if border < plain:
            assert {(MAIN, border), (MAIN, border + 1)} <= marks
    original = chunks.original_max_position_embeddings
    if original is not None and context > original + 4:
        assert (REQUESTS, original + 1) in marks  # decoded across the length
        assert any(s > REQUESTS and n > original for s, n in marks) or context < original + 10
        for edge in span_edges(context):
            if edge.bit_count() == 1 and original < edge - 2 and edge + 1 < context:
                ends = {case.end for case in proof.operations if case.kind is Kind.BEGIN}
                assert {edge, edge + 1} <= ends
                assert {edge, edge + 1} <= {n for s, n in marks if s >= REQUESTS}


def test_a_fed_prompt_goes_on_until_a_single_token_or_a_cut() -> None:
    def fed(call: int, *ends: int) -> list[Operation]:
        return [Operation(0, call, Kind.FEED, row, 0, end) for row, end in enumerate(ends)]

    several = [
        Operation(0, 0, Kind.BEGIN, 2, end=99),
        *fed(1, 4, 3),
        *fed(2, 9, 4),  # row 0 is given five: a piece of both prompts
        *fed(3, 10, 5),
        *fed(4, 12),
        Operation(0, 5, Kind.TRUNCATE, 0, end=11),
        *fed(6, 20),
        *fed(7, 30),
        Operation(0, 8, Kind.RESET),
        *fed(9, 7, 1),
    ]
    assert prompt_ends(several) == {
        (1, 0): 9,
        (1, 1): 4,
        (2, 0): 9,
        (2, 1): 4,
        (4, 0): 12,
        (6, 0): 30,
        (7, 0): 30,
        (9, 0): 7,
        (9, 1): 1,
    }


def test_what_no_self_test_reaches_is_said() -> None:
    real = DualChunk(262144, 8192, 262144)
    told = self_test_stops(real, 1_010_000)
    assert told is not None
    for part in (str(CONTEXTS[0]), "first", "second", "third", "253952", "761856", "length"):
        assert part in told
    short = self_test_stops(real, 300_000)
    assert short is not None and "second" not in short
    assert self_test_stops(DualChunk(48, 16, 256), 1024) is None
    assert self_test_stops(None, 1 << 20) is None
    late = self_test_stops(DualChunk(48, 16, 2000), 4096)
    assert late is not None and "border" not in late and "2000" in late
