"""`measure`: what it runs is what it says, and the clock and the memory are the system's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qwenport.engines import (
    MeasuringError,
    OnnxRuntimeSession,
    SessionError,
    build,
    measure,
    measuring,
    open_session,
)
from qwenport.exporter import Package
from qwenport.machine import peak_resident_bytes, resident_bytes

from .conftest import CHECKPOINT

TASKS = Path("/proc/self/task")
OPTIONAL = st.none() | st.integers(1, 700)


@pytest.fixture(scope="module")
def targets(package_of: Callable[[str], Package], tmp_path_factory: pytest.TempPathFactory):
    package = package_of("fp32").path
    engine = tmp_path_factory.mktemp("measured") / "engine"
    return package, build(package, engine, target="onnxruntime").path


@pytest.mark.parametrize("number", [0, 1], ids=["package", "engine"])
def test_the_tokens_are_transformers_own_after_the_same_prompt(number: int, targets) -> None:
    progress: list[tuple[str, int, int]] = []
    found = measure(
        targets[number],
        prompt_tokens=40,
        new_tokens=12,
        threads=1,
        progress=lambda *call: progress.append(call),
    )
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    prompt = torch.tensor([measuring.prompt_of(model.config.vocab_size, 40)])
    expected = model.generate(
        prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert found.token_ids == expected[0, 40:].tolist()
    assert (found.prompt_tokens, found.new_tokens, found.flavour) == (40, 12, "onnxruntime")
    assert progress[-1] == ("decode of 12 tokens", 12, 12)
    assert all(done <= total for _, done, total in progress)


def test_times_are_those_of_the_session(targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is slowed down is measured as slow: single tokens, prompts and the load each by as much."""
    step, load = OnnxRuntimeSession._step, OnnxRuntimeSession._load

    def slow_step(self, feeds):
        time.sleep(0.02 if feeds["input_ids"].shape[1] == 1 else 0.1)
        return step(self, feeds)

    def slow_load(self, threads):
        time.sleep(0.3)
        return load(self, threads)

    monkeypatch.setattr(OnnxRuntimeSession, "_step", slow_step)
    monkeypatch.setattr(OnnxRuntimeSession, "_load", slow_load)
    found = measure(targets[1], prompt_tokens=20, new_tokens=10, threads=1)
    assert found.load_seconds >= 0.3
    assert min(found.first_request_seconds, found.first_token_seconds) >= 0.1
    assert found.prefill_tokens_per_second <= 20 / 0.1
    assert 0.02 <= found.decode_p10_seconds <= found.decode_seconds <= found.decode_p90_seconds
    assert found.decode_tokens_per_second == pytest.approx(1 / found.decode_seconds)
    assert found.decode_cpu_seconds < found.decode_seconds  # sleeping takes no CPU time


@given(st.integers(2, 800), OPTIONAL, OPTIONAL)
def test_lengths_fit_or_are_refused(longest: int, prompt: int | None, new: int | None) -> None:
    fits = (prompt or 1) + (new or 1) <= longest
    if not fits:
        with pytest.raises(MeasuringError, match=f"at most the target's {longest} positions"):
            measuring.lengths(longest, prompt, new)
        return
    tokens, steps = measuring.lengths(longest, prompt, new)
    assert tokens >= 1 and steps >= 1 and tokens + steps <= longest
    assert prompt in (None, tokens) and new in (None, steps)
    if prompt is None and new is None and longest >= 576:
        assert (tokens, steps) == (512, 64)


def test_a_target_with_one_position_has_no_room() -> None:
    with pytest.raises(MeasuringError):
        measuring.lengths(1, None, None)


@pytest.mark.parametrize("number", [0, 1], ids=["package", "engine"])
def test_threads_are_onnxruntime_s(number: int, targets) -> None:
    """The caller's thread is one of them."""
    before = len(list(TASKS.iterdir()))
    session = open_session(targets[number], threads=4)
    assert len(list(TASKS.iterdir())) == before + 3
    del session


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 1025])
def test_threads_that_are_no_count_are_refused(threads: object, targets) -> None:
    with pytest.raises(SessionError, match="threads must be"):
        open_session(targets[1], threads=threads)


def test_memory_is_what_the_process_has_touched() -> None:
    before = resident_bytes()
    held = bytearray(b"x") * (64 << 20)
    after = resident_bytes()
    assert before is not None and after is not None
    assert 60 << 20 <= after - before <= 80 << 20
    del held
    peak = peak_resident_bytes()
    assert peak is not None and peak >= after - (4 << 20)  # the system counts in batches
