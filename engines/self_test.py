"""The self-test: an engine must reproduce the proof that it carries, on the machine where it will run.

Nothing is passed that has not run: cases that the engine has no room for are counted, and a proof without a case that
runs is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from qwenport import QwenportError
from qwenport.contract import FP32, KEY_POSITIONS, PROOF, Progress, no_progress
from qwenport.engines.engine import Engine, load_engine
from qwenport.engines.errors import EngineError, ProofError
from qwenport.engines.open import open_session
from qwenport.engines.proof import NO_PROOF, Kind, Operation, Proof, read_proof
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.self_test_passes import forget_pass, remember_pass
from qwenport.engines.session import Step
from qwenport.wording import one_line

IN_FP32, IN_PACKAGE_DTYPE, WITH_ROUNDED_ACTIVATIONS = 0, 1, 2
"""Columns of a proof's bounds."""


@dataclass(frozen=True)
class SelfTestFailure:
    """Logits that are not the proof's, the first of a case.

    Attributes:
        case: the case's name.
        call: which call of the proof.
        row: of the session.
        sequence: the proof's token sequence.
        position: the token of that sequence, counted from 0, whose logits they are.
        span: cache slots that the step attended to.
        error, bound: relative L2; an infinite error for logits that are not finite.
    """

    case: str
    call: int
    row: int
    sequence: int
    position: int
    span: int
    error: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.case}: call {self.call}, row {self.row}, position {self.position} of sequence {self.sequence}, "
            f"span {self.span}: error {self.error:.4g}, allowed {self.bound:.4g}"
        )


@dataclass(frozen=True)
class SelfTest:
    """What a self-test found.

    Attributes:
        cases: cases that ran.
        left_out: cases that need more rows or slots than the engine has.
        marks: rows of logits that were compared, with a bound that proves something.
        worst: the largest error, in units of its bound.
        failures: the first of each case that failed.
        remembered: whether it passed and that could be written down, for `require_self_test`.
    """

    cases: int
    left_out: int
    marks: int = 0
    worst: float = 0.0
    failures: tuple[SelfTestFailure, ...] = ()
    remembered: bool = False

    @property
    def passed(self) -> bool:
        """Whether every case that ran was reproduced."""
        return not self.failures


def engine_proof(engine: Engine) -> Proof | None:
    """The proof that an engine carries; None if it has none.

    Raises:
        ProofError: it is damaged, or of another package.
    """
    if PROOF not in engine.manifest["files"]:
        return None
    proof = read_proof(engine.path / PROOF, engine.manifest["package"]["manifest_sha256"])
    manifest = engine.manifest
    if (proof.vocab_size, proof.dtype) != (
        manifest["model"]["vocab_size"],
        manifest["package"]["dtype"],
    ):
        raise ProofError(f"{engine.path / PROOF}: damaged (of another vocabulary or dtype)")
    if manifest["dtype"] not in (FP32.name, proof.dtype):
        raise ProofError(f"{engine.path}: in {manifest['dtype']}, its proof is for {proof.dtype}")
    return proof


def fitting_cases(engine: Engine, proof: Proof) -> list[Operation]:
    """The first operations of the cases for which an engine has rows and slots."""
    rows, slots = engine.manifest["max_batch"], engine.manifest["max_seq_len"]
    begins = (o for o in proof.operations if o.kind is Kind.BEGIN)
    return [o for o in begins if o.row <= rows and o.end <= slots]


def self_test(target: Path | str, *, progress: Progress = no_progress) -> SelfTest:
    """Run an engine's proof here and remember a pass, see `has_passed`; a failure forgets an earlier one.

    Args:
        target: an engine directory.
        progress: called with (what, cases done, cases).

    Raises:
        ProofError: the engine carries no proof, or a damaged one, or has no room for any of its cases, or none of
            them compares anything.
        EngineError, SessionError, MissingExtraError: it is no engine, damaged, or cannot run here.
    """
    engine = load_engine(target)
    proof = engine_proof(engine)
    if proof is None:
        raise ProofError(
            f"{engine.path}: carries no proof; `qwenport validate` keeps one in a package, and engines built after "
            "that carry it"
        )
    fitting = fitting_cases(engine, proof)
    if not fitting:
        rows, slots = engine.manifest["max_batch"], engine.manifest["max_seq_len"]
        raise ProofError(
            f"{engine.path}: no case of its proof fits a batch of {rows} with {slots} slots"
        )
    session = open_session(
        engine.path, max_batch=max(o.row for o in fitting), capacity=max(o.end for o in fitting)
    )
    found = run_proof(session, proof, _column(engine), progress)
    if not found.marks and found.passed:
        dtype = engine.manifest["dtype"]
        raise ProofError(f"{engine.path}: its proof has nothing to compare in {dtype}")
    if found.passed:
        kept = remember_pass(engine, found.cases, found.left_out, found.marks)
        return replace(found, remembered=kept)
    forget_pass(engine)
    return found


def _column(engine: Engine) -> int:
    if engine.manifest["dtype"] != FP32.name:
        return IN_PACKAGE_DTYPE
    return IN_FP32 if engine.activations == FP32.name else WITH_ROUNDED_ACTIVATIONS


def run_proof(
    session: SavedSession, proof: Proof, column: int, progress: Progress = no_progress
) -> SelfTest:
    """Run a proof's cases that fit a session.

    Args:
        session: it is reset for each case and afterwards; its `on_step` is used.
        proof: of the session's package.
        column: of the bounds.
        progress: called with (what, cases done, cases).

    Raises:
        EngineError: the runtime fails in a step.
    """
    runner = _Runner(session, proof, column)
    session.on_step = runner.note
    result = SelfTest(cases=0, left_out=0)
    for number, (case, several) in enumerate(groupby(proof.operations, lambda o: o.case)):
        progress(f"self-test: {proof.cases[case]}", number, len(proof.cases))
        operations = list(several)
        begin = operations[0]
        if begin.row > session.max_batch or begin.end > session.capacity:
            result = replace(result, left_out=result.left_out + 1)
            continue
        failures = runner.failures(operations)
        first = next(failures, None)
        result = replace(
            result,
            cases=result.cases + 1,
            failures=(*result.failures, *([] if first is None else [first])),
        )
    session.reset()
    session.on_step = None
    return replace(result, marks=runner.marks, worst=runner.worst)


def prompt_ends(operations: Sequence[Operation]) -> dict[tuple[int, int], int]:
    """(call, row) -> tokens of the prompt of which a FEED is a piece; not of calls that are a decode.

    A call that gives no row more than one token is a decode. A row's prompt goes on until that, or until it is cut.

    Args:
        operations: of one case.
    """
    held: dict[int, int] = {}
    last: dict[int, list[tuple[int, int]]] = {}  # row -> its prompt's calls so far
    found: dict[tuple[int, int], int] = {}
    for _, several in groupby(operations, lambda o: o.call):
        call = list(several)
        if call[0].kind is Kind.FEED:
            decodes = all(o.end - held.get(o.row, 0) == 1 for o in call)
            for o in call:
                held[o.row] = o.end
                prompt = last.setdefault(o.row, [])
                if decodes:
                    prompt.clear()
                    continue
                prompt.append((o.call, o.row))
                found |= dict.fromkeys(prompt, o.end)
        elif call[0].kind is Kind.TRUNCATE:
            held[call[0].row] = call[0].end
            last.pop(call[0].row, None)
        elif call[0].kind is Kind.RESET:
            held, last = {}, {}
    return found


class _Runner:
    """Runs cases on a session; `marks` and `worst` as in `SelfTest`."""

    def __init__(self, session: SavedSession, proof: Proof, column: int) -> None:
        self._session, self._proof, self._column = session, proof, column
        self._marks = {(s, n): index for index, (s, n) in enumerate(proof.marks.tolist())}
        self.marks, self.worst = 0, 0.0
        self._span = 0
        self._prompts: dict[tuple[int, int], int] = {}

    def failures(self, operations: Sequence[Operation]) -> Iterator[SelfTestFailure]:
        """Run one case, as far as its failures are asked for."""
        session = self._session
        session.reset()
        self._prompts = prompt_ends(operations)
        for _, several in groupby(operations, lambda o: o.call):
            call = list(several)
            (first, *_) = call
            if first.kind is Kind.FEED:
                yield from self._feed(call)
            elif first.kind is Kind.TRUNCATE:
                session.truncate(first.end, first.row)
            elif first.kind is Kind.POISON:
                session.poison()
            elif first.kind is Kind.RESET:
                session.reset()

    def note(self, step: Step) -> None:
        """Called after each step."""
        self._span = len(step.feeds[KEY_POSITIONS])

    def _feed(self, call: Sequence[Operation]) -> Iterator[SelfTestFailure]:
        tokens: list[list[int]] = [[] for _ in range(call[-1].row + 1)]
        held = self._session.lengths
        totals: list[int] = held[: len(tokens)].tolist()
        for o in call:
            tokens[o.row] = self._proof.sequence(o.sequence)[held[o.row] : o.end].tolist()
            totals[o.row] = self._prompts.get((o.call, o.row), o.end)
        try:
            if (call[0].call, call[0].row) in self._prompts:
                results = self._session.prefill(tokens, prompt_lengths=totals)
            else:
                given = [row[0] if row else None for row in tokens]
                results = list(self._session.decode(given)[:, None])
        except QwenportError:
            raise
        except Exception as failure:  # onnxruntime's have no base class
            said = one_line(failure)
            raise EngineError(
                f"{self._proof.cases[call[0].case]}: call {call[0].call}: the runtime fails: {said}"
            ) from failure
        judged = [o for o in call if (o.sequence, o.end) in self._marks]
        if not judged:
            return
        marks = [self._marks[o.sequence, o.end] for o in judged]
        logits = np.concatenate([results[o.row] for o in judged])
        bounds = self._proof.bounds[marks, self._column].astype(np.float64)
        errors = self._proof.fingerprints.errors(marks, logits)
        self.marks += int((bounds < NO_PROOF).sum())
        self.worst = max(self.worst, float((errors / bounds).max()))
        for o, error, bound in zip(judged, errors, bounds, strict=True):
            if not error <= bound:
                yield SelfTestFailure(
                    self._proof.cases[o.case],
                    o.call,
                    o.row,
                    o.sequence,
                    o.end - 1,
                    self._span,
                    float(error),
                    float(bound),
                )
