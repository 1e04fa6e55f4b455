"""Sessions of models that scale by the length of a request: which lengths they feed, keep and refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chunked import ORIGINAL, POSITIONS, make_chunked
from random_model import VOCAB

from qwenport.contract import REQUEST_LENGTHS, SCORE_BYTES
from qwenport.engines import (
    GenerateOptions,
    OnnxRuntimeSession,
    SessionError,
    SnapshotError,
    generate,
    perplexity,
)
from qwenport.engines import session as sessions
from qwenport.exporter import Package, export

LONG = ORIGINAL + 30


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("scaled")
    return export(make_chunked(folder / "checkpoint"), folder / "package", max_batch=2)


def opened(package: Package, rows: int = 1, **options: Any) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(package, max_batch=rows, threads=1, **options)


def tokens(count: int) -> list[int]:
    return np.random.default_rng(1).integers(2, VOCAB, count).tolist()


def fed(session: OnnxRuntimeSession) -> list[list[int]]:
    """What each step from now on is fed."""
    found: list[list[int]] = []
    session.on_step = lambda step: found.append(step.feeds[REQUEST_LENGTHS].tolist())
    return found


def test_all_steps_of_a_prompt_are_fed_its_length_and_each_decode_step_the_current_one(
    package: Package,
) -> None:
    session = opened(package)
    seen = fed(session)
    session.max_step_tokens = 25
    session.prefill([tokens(LONG)])
    session.decode([3])
    session.decode([4])
    assert seen == [[LONG]] * 3 + [[LONG + 1], [LONG + 2]]


def test_a_prompt_given_in_pieces_states_its_length(package: Package) -> None:
    whole, pieces = opened(package), opened(package)
    text = tokens(LONG)
    (right,) = whole.prefill([text])
    pieces.prefill([text[:20]], prompt_lengths=[LONG])
    (made,) = pieces.prefill([text[20:]], prompt_lengths=[LONG])
    assert np.abs(made - right).max() < 1e-4
    pieces.reset()
    pieces.prefill([text[:20]])
    with pytest.raises(SessionError, match="reset the row"):
        pieces.prefill([text[20:]])


def test_generation_states_the_length_of_its_prompts(package: Package) -> None:
    session, narrow = opened(package, 2), opened(package, 2)
    narrow.max_step_tokens = 16
    prompts = [tokens(LONG), tokens(9)]
    options = GenerateOptions(max_new_tokens=4)
    seen = fed(narrow)
    made = [generate(s, prompts, options) for s in (session, narrow)]
    assert made[0] == made[1]
    assert seen[0] == [LONG, ORIGINAL]


def test_a_prefix_under_another_factor_is_refused_and_nothing_is_written(package: Package) -> None:
    session = opened(package)
    text = tokens(LONG)
    session.prefill([text])
    session.truncate(50)
    for rejected in (
        lambda: session.prefill([[5, 6]]),
        lambda: session.prefill_choosing([[5]], [[0]]),
    ):
        with pytest.raises(
            SessionError, match=f"a request of {LONG} positions, and this request has 5"
        ):
            rejected()
    with pytest.raises(
        SessionError, match=f"a request of {LONG} positions, and this request has 51"
    ):
        session.decode([5])
    assert session.lengths.tolist() == [50]
    session.prefill([text[50:]])  # the same request again
    session.decode([5])
    session.decode([5])
    session.truncate(LONG + 1)  # back into what was decoded, not into the prompt
    session.decode([6])
    session.truncate(0)
    session.prefill([tokens(7)])


def test_what_is_reusable_is_what_prefill_takes(package: Package) -> None:
    session = opened(package, 2)
    text = tokens(LONG)
    session.prefill([text[: ORIGINAL - 5], text])
    assert [session.reusable(n) for n in (1, ORIGINAL, ORIGINAL + 1)] == [ORIGINAL - 5] * 2 + [0]
    assert [session.reusable(n, 1) for n in (ORIGINAL, LONG, LONG + 1)] == [0, LONG, 0]
    for token in text[ORIGINAL - 5 : ORIGINAL + 3]:
        session.decode([token])
    assert [session.reusable(n) for n in (ORIGINAL, ORIGINAL + 1)] == [ORIGINAL, 0]
    session.truncate(session.reusable(ORIGINAL - 1))
    with pytest.raises(SessionError, match="reset the row"):
        session.prefill([[7]])
    session.truncate(ORIGINAL - 2)
    session.prefill([[7]])
    with pytest.raises(SessionError, match="row 2 of a session of 2"):
        session.reusable(3, 2)


def test_up_to_the_original_length_a_prefix_is_reused(package: Package) -> None:
    session = opened(package)
    session.prefill([tokens(12)])
    session.decode([3])
    session.prefill([tokens(ORIGINAL - 13)])
    with pytest.raises(SessionError, match="reset the row"):
        session.prefill([[7]])
    session.decode([7])


def test_prompt_lengths_that_cannot_be_are_refused(package: Package) -> None:
    session = opened(package)
    for lengths in ([4], [POSITIONS + 1], [5, 5], [5.5], "5"):
        with pytest.raises(SessionError, match="prompt"):
            session.prefill([tokens(5)], prompt_lengths=lengths)  # type: ignore[arg-type]
    assert session.lengths.tolist() == [0]


def test_a_snapshot_keeps_the_factors(package: Package) -> None:
    session, other = opened(package), opened(package)
    text = tokens(LONG)
    session.prefill([text])
    saved = session.save()
    other.restore(saved)
    assert np.array_equal(session.decode([9]), other.decode([9]))
    with pytest.raises(SessionError, match="reset the row"):
        other.prefill([[5]])


def test_a_snapshot_with_impossible_factors_is_refused(package: Package) -> None:
    from qwenport.engines import snapshot

    session = opened(package)
    session.prefill([tokens(5)])
    facts, arrays = snapshot.unpack(session.save())
    name = f"0.{REQUEST_LENGTHS}"
    for damaged in (np.full(5, POSITIONS + 1), np.full(5, 1), np.full(4, ORIGINAL)):
        with pytest.raises(SnapshotError, match=r"request.lengths"):
            session.restore(snapshot.pack(facts, {**arrays, name: damaged.astype(np.int64)}))


def test_a_full_row_that_idles_keeps_its_last_key(package: Package) -> None:
    alone, both = opened(package, 2, capacity=LONG), opened(package, 2, capacity=LONG)
    for session in (alone, both):
        session.prefill([tokens(LONG), tokens(4)])
    before = both._read_slots("0.key", 0, LONG).copy()
    both.decode([None, 8])
    assert np.allclose(
        before.view(np.float32), both._read_slots("0.key", 0, LONG).view(np.float32), atol=1e-5
    )


def test_perplexity_scores_windows_as_whole_requests(package: Package) -> None:
    text = tokens(120)
    wide, narrow = opened(package), opened(package)
    narrow.max_step_tokens = narrow.max_step_logits = 30
    made = [perplexity(s, text, window=100, stride=40).mean_nll for s in (wide, narrow)]
    assert made[0] == pytest.approx(made[1], rel=1e-5)


def test_steps_narrow_as_the_span_grows(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tokens(200)
    (right,) = opened(package).prefill([text])
    monkeypatch.setattr(sessions, "MOST_SCORES", 4 * SCORE_BYTES * 64 * 20)
    session = opened(package)
    sizes: list[tuple[int, int]] = []
    session.on_step = lambda step: sizes.append(
        (step.feeds["input_ids"].shape[1], len(step.feeds["key_positions"]))
    )
    (made,) = session.prefill([text])
    assert np.abs(made - right).max() < 1e-4
    assert all(width * span <= 64 * 20 for width, span in sizes)
    assert len({width for width, _ in sizes[:-1]}) > 1
    with pytest.raises(SessionError, match="memory"):
        session.prefill_choosing([tokens(50)], [[0]])
