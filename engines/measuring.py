"""How fast a package or an engine runs on this machine, and the memory it takes.

examples/cpp/bench measures the same, in the same order, for the C++ library. Call `measure` in a process that has not
opened a session yet: the load then begins without anything of an earlier one, and memory is this target's alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from qwenport import import_extra
from qwenport.contract import ONNXRUNTIME, SPAN_MULTIPLE, Progress, no_progress
from qwenport.engines.engine import load_engine
from qwenport.engines.errors import MeasuringError
from qwenport.engines.open import open_session
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.session_arguments import whole
from qwenport.exporter import Note, kind_of, load_package
from qwenport.machine import peak_resident_bytes, resident_bytes

PROMPT_TOKENS, NEW_TOKENS = 512, 64  # by default, or fewer if the target has less room
WARMUP = 4  # decode steps of the first request
PREFILLS = 3  # after the first request


@dataclass(frozen=True)
class Measurement:
    """What `measure` found. Times are wall time in seconds; those named cpu are CPU time of all threads.

    Attributes:
        flavour: what ran it: "onnxruntime", "tensorrt-rtx" or "tensorrt".
        runtime_version: the release of that.
        dtype: of the weights in the directory. onnxruntime computes in fp32 on the CPU.
        prompt_tokens: tokens of each prompt.
        new_tokens: decode steps that were timed.
        load_seconds: from the directory to a session that can run, the runtime's library included. The first time,
            a package's lowered model is written to the cache (see `open_session`).
        load_cpu_seconds: the same in CPU time.
        first_request_seconds: from the prompt to the first new token, right after the load.
        first_token_seconds: the same in later requests, the median.
        prefill_tokens_per_second: of later requests, the median.
        prefill_cpu_seconds: of one prompt, the median.
        decode_tokens_per_second: by the median step.
        decode_seconds: the median step, with the choice of the most likely token.
        decode_p10_seconds, decode_p90_seconds: the 10th and 90th percentile of the steps.
        decode_cpu_seconds: of one step, the mean.
        loaded_bytes: resident memory after the load; None if the system does not report it.
        peak_bytes: the most resident memory of the process.
        token_ids: what the prompt was continued with.
    """

    flavour: str
    runtime_version: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    load_cpu_seconds: float
    first_request_seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    prefill_cpu_seconds: float
    decode_tokens_per_second: float
    decode_seconds: float
    decode_p10_seconds: float
    decode_p90_seconds: float
    decode_cpu_seconds: float
    loaded_bytes: int | None
    peak_bytes: int | None
    token_ids: list[int]


def measure(
    target: Path | str,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    note: Note = lambda text: None,
) -> Measurement:
    """Load a package or an engine, and time prefill and decoding of one row.

    Args:
        target: a directory written by `export` or `build`.
        prompt_tokens: tokens of the prompt, which are the same for every target with as many; 512 by default, or as
            many as fit.
        new_tokens: decode steps to time; 64 by default, or half of the target's positions if that is less.
        threads: as in `open_session`.
        progress: called before each request and after each decode step.
        note: as in `open_session`.

    Raises:
        MeasuringError: prompt and new tokens are more than the target has positions.
        PackageError, EngineError, MissingExtraError, SessionError: as `open_session`.
    """
    target = Path(target)
    opened = load_engine(target) if kind_of(target) == "engine" else load_package(target)
    manifest = opened.manifest
    longest: int = manifest["max_seq_len"]
    prompt_length, steps = lengths(longest, prompt_tokens, new_tokens)
    capacity = -(-(prompt_length + steps) // SPAN_MULTIPLE) * SPAN_MULTIPLE

    progress("loading", 0, 1)
    clock = _Clock()
    session = open_session(
        target, capacity=min(capacity, longest), threads=threads, progress=progress, note=note
    )
    load, loaded = clock.read(), resident_bytes()

    ids = prompt_of(session.vocab_size, prompt_length)
    progress(f"first request, {prompt_length} tokens", 0, 1 + PREFILLS)
    _, first, token = _request(session, ids)
    _decode(session, token, min(WARMUP, steps), no_progress)
    prefills, requests = [], []
    for number in range(1, 1 + PREFILLS):
        progress(f"prefill of {prompt_length} tokens", number, 1 + PREFILLS)
        prefill, request, token = _request(session, ids)
        prefills.append(prefill)
        requests.append(request)
    tokens, decodes = _decode(session, token, steps, progress)

    flavour = manifest.get("flavour", ONNXRUNTIME)
    times = sorted(step.seconds for step in decodes)
    tail = (steps - 1) // 10
    return Measurement(
        flavour=flavour,
        runtime_version=_onnxruntime_version()
        if flavour == ONNXRUNTIME
        else manifest["runtime_version"],
        dtype=manifest["dtype"],
        prompt_tokens=prompt_length,
        new_tokens=steps,
        load_seconds=load.seconds,
        load_cpu_seconds=load.cpu_seconds,
        first_request_seconds=first.seconds,
        first_token_seconds=median(request.seconds for request in requests),
        prefill_tokens_per_second=prompt_length / median(prefill.seconds for prefill in prefills),
        prefill_cpu_seconds=median(prefill.cpu_seconds for prefill in prefills),
        decode_tokens_per_second=1 / median(times),
        decode_seconds=median(times),
        decode_p10_seconds=times[tail],
        decode_p90_seconds=times[-1 - tail],
        decode_cpu_seconds=mean(step.cpu_seconds for step in decodes),
        loaded_bytes=loaded,
        peak_bytes=peak_resident_bytes(),
        token_ids=tokens,
    )


def lengths(longest: int, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """The tokens of the prompt and the decode steps, for a target with `longest` positions; None: as many as fit.

    Raises:
        MeasuringError: they do not fit.
        SessionError: a number that is not whole.
    """
    for value in (prompt_tokens, new_tokens):
        if value is not None:
            whole(value, "tokens")
    room = longest - (prompt_tokens or 1)
    steps = min(NEW_TOKENS, longest // 2, max(room, 1)) if new_tokens is None else new_tokens
    prompt = min(PROMPT_TOKENS, max(longest - steps, 1)) if prompt_tokens is None else prompt_tokens
    if steps < 1 or prompt < 1 or prompt + steps > longest:
        raise MeasuringError(
            f"a prompt of {prompt} and {steps} new tokens: at least 1 each, and together at most the "
            f"target's {longest} positions"
        )
    return prompt, steps


def prompt_of(vocab_size: int, count: int) -> list[int]:
    """The token ids of the prompt, the same in every language."""
    return [(13 + 7919 * index) % vocab_size for index in range(count)]


class _Time(NamedTuple):
    """How long something took."""

    seconds: float
    cpu_seconds: float


class _Clock:
    """Wall time and the process's CPU time, from its construction on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> _Time:
        return _Time(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def _request(session: SavedSession, prompt: list[int]) -> tuple[_Time, _Time, int]:
    """A prompt in an empty session: the time of its prefill, that up to the first new token, and the token."""
    session.reset()
    clock = _Clock()
    (logits,) = session.prefill([prompt])
    prefill = clock.read()
    token = int(logits[0].argmax())
    return prefill, clock.read(), token


def _decode(
    session: SavedSession, token: int, steps: int, progress: Progress
) -> tuple[list[int], list[_Time]]:
    """Append the most likely token again and again, `token` first: the tokens, and the time of each step."""
    tokens, times = [], []
    for step in range(steps):
        tokens.append(token)
        clock = _Clock()
        token = int(session.decode([token])[0].argmax())
        times.append(clock.read())
        progress(f"decode of {steps} tokens", step + 1, steps)
    return tokens, times


def _onnxruntime_version() -> str:
    return str(import_extra("onnxruntime", "cpu", "run packages").__version__)
