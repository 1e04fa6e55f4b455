"""The scenarios and bounds with sessions that are known to be right, or wrong in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qwenport.engines import CachedSession, CapacityError
from qwenport.exporter import export
from qwenport.validate import Report, Validation
from qwenport.validate.prompts import Prompts
from qwenport.validate.reference import Reference
from qwenport.validate.scenarios import SCENARIOS, TAPPED, Bench, NotApplicable, capacity_for
from qwenport.validate.target import Target, open_target

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5"
ROWS, CAPACITY, POSITIONS = 4, 128, 512
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL = {scenario.name for scenario in SCENARIOS} - {"past original context"}

Array = np.ndarray
Logits = Callable[[list[int], int], Array]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def logits_of() -> Callable[[str], Logits]:
    """transformers in a dtype: tokens and the position of the first -> fp32 [len(tokens), vocab]."""
    models: dict[str, Any] = {}

    def of(dtype: str) -> Logits:
        if dtype not in models:
            models[dtype] = AutoModelForCausalLM.from_pretrained(
                CHECKPOINT, dtype=TORCH[dtype], attn_implementation="eager"
            ).eval()
        model = models[dtype]

        def logits(tokens: list[int], first_position: int) -> Array:
            positions = first_position + torch.arange(len(tokens))[None]
            with torch.inference_mode():
                return (
                    model(torch.tensor([tokens]), position_ids=positions).logits[0].float().numpy()
                )

        return logits

    return of


class TransformersSession:
    """The session protocol over transformers itself, without a cache; `wrong` spoils one thing."""

    def __init__(self, logits: Logits, wrong: str = "") -> None:
        self._logits, self.wrong = logits, wrong
        self.max_batch, self.capacity, self.max_positions = ROWS, CAPACITY, POSITIONS
        self.vocab_size = 2048
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.first_position = 0

    def reset(self, *, first_position: int = 0) -> None:
        self.first_position = first_position
        self.rows = [row[-5:] if self.wrong == "reset" else [] for row in self.rows]

    def prefill(self, tokens: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[Array]:
        results = []
        for row, new in zip(self.rows, tokens, strict=False):
            if self.wrong == "chunks" and len(new) > 1:
                row.clear()
            if self.wrong == "idle rows" and not new and row:
                row.append(0)
            row.extend(new)
            logits = np.zeros((0, self.vocab_size), np.float32)
            if new:
                every = self._logits(row, self.first_position)
                logits = every[-len(new) :] if all_logits else every[-1:]
            if len(row) == 30 and len(new) == 1:
                if self.wrong == "token 30":
                    logits = np.roll(logits, 1, axis=1)
                if self.wrong == "raises":
                    raise ZeroDivisionError("at token 30")
                if self.wrong == "a row too many":
                    logits = np.repeat(logits, 2, axis=0)
            results.append(logits)
        return results

    def decode(self, token_ids: Sequence[int | None]) -> Array:
        rows = self.prefill([[] if token is None else [token] for token in token_ids])
        zeros = np.zeros((1, self.vocab_size), np.float32)
        return np.concatenate([row if len(row) else zeros for row in rows])


class Posing:
    """A candidate that is this session, and cannot be looked into."""

    can_be_tapped = False
    complaints = ()

    def __init__(self, session: TransformersSession) -> None:
        self._session = session

    def open(self, rehearse: object, observe: Sequence[str] = ()) -> TransformersSession:
        return self._session


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return open_target(export(CHECKPOINT, tmp_path_factory.mktemp("scenarios") / "package").path)


@pytest.fixture(scope="module")
def reference(target: Target) -> Reference:
    return Reference(target, CHECKPOINT)


@pytest.fixture
def judge(
    target: Target, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Report]:
    def report(session: TransformersSession, compute_dtype: str = "fp32") -> Report:
        how = "package" if compute_dtype == "fp32" else "tensorrt-network"
        opened = replace(target, compute_dtype=compute_dtype, judged_as=how)
        validation = Validation(opened, CHECKPOINT)
        monkeypatch.setattr(validation, "_open_candidate", lambda: Posing(session))
        validation.run(reference)
        return validation.report()

    return report


def failing(report: Report) -> set[str]:
    return {scenario.name for scenario in report.scenarios if scenario.status == "failed"}


def test_transformers_itself_passes_every_scenario(judge: Any, logits_of: Any) -> None:
    report = judge(TransformersSession(logits_of("fp32")))
    assert report.passed and failing(report) == set()
    assert {s.name for s in report.scenarios if s.status == "passed"} >= ALL


@pytest.mark.parametrize(
    ("wrong", "seen_by", "words"),
    [
        ("token 30", {"decode", "greedy"}, "same top-1"),
        ("reset", ALL - {"prefill"}, "rel-L2"),
        ("chunks", {"full cache", "chunked prefill", "ragged batch"}, "rel-L2"),
        ("idle rows", {"ragged batch"}, "rel-L2"),
        ("raises", {"decode", "greedy"}, "the target raised ZeroDivisionError: at token 30"),
        ("a row too many", {"decode", "greedy"}, "the target gave logits of shape"),
    ],
)
def test_one_mistake_is_seen_where_it_is_made(
    wrong: str, seen_by: set[str], words: str, judge: Any, logits_of: Any
) -> None:
    report = judge(TransformersSession(logits_of("fp32"), wrong))
    assert failing(report) == seen_by
    for scenario in report.scenarios:
        if scenario.name in seen_by:
            assert any(words in failure for failure in scenario.failures), scenario.failures


def mixed(exact: Logits, rounded: Logits, times: float) -> Logits:
    """`times` the error of `rounded`."""

    def logits(tokens: list[int], first_position: int) -> Array:
        right, theirs = (of(tokens, first_position) for of in (exact, rounded))
        return (right + times * (theirs - right)).astype(np.float32)

    return logits


@pytest.mark.parametrize(("times", "passes"), [(1.15, True), (1.45, False)])
def test_bf16_may_be_a_quarter_worse_than_transformers_own(
    times: float, passes: bool, judge: Any, logits_of: Any
) -> None:
    session = TransformersSession(mixed(logits_of("fp32"), logits_of("bf16"), times))
    report = judge(session, "bf16")
    assert failing(report) == (set() if passes else ALL)
    (prefill,) = [s for s in report.scenarios if s.name == "prefill"]
    assert prefill.metrics.own_ratio == pytest.approx(times, rel=1e-3)
    (check,) = [c for c in prefill.checks if c.metric == "rel-L2 over transformers' own in bf16"]
    assert 1.25 < check.bound < 1.35 and check.passed == passes


def test_bf16_passes_neither_the_bar_of_fp16_nor_that_of_fp32(judge: Any, logits_of: Any) -> None:
    session = TransformersSession(logits_of("bf16"))
    assert failing(judge(session, "fp16")) == failing(judge(session, "fp32")) == ALL


@pytest.mark.slow
def test_fp16_passes_its_own_bar_and_that_of_bf16(judge: Any, logits_of: Any) -> None:
    session = TransformersSession(logits_of("fp16"))
    assert failing(judge(session, "fp16")) == failing(judge(session, "bf16")) == set()
    assert failing(judge(session, "fp32")) == ALL


# what the scenarios do, on sessions of any size


class Diary(CachedSession):
    """Writes down what each slot of each row is given; answers each token's position in every logit."""

    def __init__(self, rows: int, capacity: int, positions: int) -> None:
        super().__init__(
            max_batch=rows,
            capacity=capacity,
            vocab_size=50,
            max_step_tokens=512,
            max_step_logits=512,
            max_positions=positions,
        )

    def _step(self, feeds: dict[str, Array]) -> Array:
        wanted = np.take_along_axis(feeds["position_ids"], feeds["logits_indices"], axis=1)
        return np.broadcast_to(wanted[..., None], (*wanted.shape, 50)).astype(np.float32)


@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(0, 300),
    st.none() | st.integers(1, 400),
    st.sampled_from((*SCENARIOS, TAPPED)),
)
def test_every_scenario_asks_the_oracle_about_the_positions_it_ran(
    rows: int, capacity: int, more: int, original: int | None, scenario: Any
) -> None:
    """Each observed row of logits belongs to the label and to the position of the text beside it."""
    session = Diary(rows, capacity, capacity + more)
    prompts = Prompts(tuple(range(50)), "numbers")
    greedy = tuple(range(min(32, capacity - min(12, capacity) + 1)))
    try:
        observation = scenario.run(Bench(session, prompts, greedy, original))
    except NotApplicable:
        assert rows == 1 or scenario.name == "past original context"
        return
    expected = [
        text.first_position + position
        for text in observation.texts
        for position in range(len(text.tokens) - text.last, len(text.tokens))
    ]
    assert observation.candidate[:, 0].tolist() == expected
    assert len(observation.labels) == len(expected)
    for label, position in zip(observation.labels, expected, strict=True):
        assert label.startswith("new token") or label.endswith(f" position {position}")
    for text in observation.texts:
        assert text.first_position + len(text.tokens) <= session.max_positions
        assert len(text.tokens) <= capacity


def test_a_capacity_that_is_passed_would_be_seen() -> None:
    """The session of the test above refuses what does not fit."""
    session = Diary(1, 4, 6)
    session.reset(first_position=3)
    with pytest.raises(CapacityError):
        session.prefill([[1, 2, 3, 4]])


@given(st.integers(1, 10**6))
def test_a_cache_is_filled_whole_or_is_short(available: int) -> None:
    slots = capacity_for(available)
    assert slots == available if available <= 1024 else slots == 256
