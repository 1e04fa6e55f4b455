"""The bundled checkpoints' real steps, played back: the C++ session must give each exactly what Python's gave.

onnxruntime runs the generation once, under Python's session and generate; its steps are taken down. The C++
library then generates on a stand-in device whose network accepts only those steps, in that order, over caches
that hold what the steps before left there.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwenport import engines, exporter
from qwenport.engines import Generated
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession

from .builds import built
from .recording import Recorder
from .runtime import Error, Library

MAX_STEP_TOKENS = 32  # of the recorded engine, so that the longer prompts run in several steps


@dataclass(frozen=True)
class Run:
    """A recorded generation: an engine directory that plays it back, the request, the results."""

    directory: Path
    prompts: list[list[int]]
    options: dict[str, float]
    stop_ids: list[int]
    results: list[Generated]
    steps: list[tuple[int, int, int]]


REQUESTS = {
    "one": ([[40, 41, 42]], {"max_new_tokens": 90}),
    "ragged": (
        [list(range(100, 170)), [7], list(range(300, 333))],
        {"max_new_tokens": 60, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5},
    ),
    "penalty": (
        [[5, 6, 7, 8], [9, 10]],
        {"max_new_tokens": 40, "temperature": 1.1, "repetition_penalty": 1.2, "seed": 1},
    ),
    "full": ([[11] * 508, [12] * 3], {"max_new_tokens": 12}),
    "full at once": ([list(range(1000, 1512)), [12] * 3], {"max_new_tokens": 6}),
}


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
    package_of: Callable[[str], exporter.Package],
    engine_of: Callable[[str], engines.Engine],
) -> Callable[[str, str], Run]:
    """(checkpoint, name of a request) -> its recorded run."""
    made: dict[tuple[str, str], Run] = {}

    def make(name: str, request: str) -> Run:
        if (name, request) in made:
            return made[name, request]
        prompts, options = REQUESTS[request]
        directory = tmp_path_factory.mktemp("recorded")
        engine = engine_of(name)
        manifest = json.loads(json.dumps(engine.manifest))
        manifest["profiles"][-1]["input_ids"]["max"][1] = MAX_STEP_TOKENS
        manifest["flavour"] = "tensorrt"  # which has graphs
        (directory / "qwenport.json").write_text(json.dumps(manifest))
        session = OnnxRuntimeSession(package_of(name), max_batch=3, threads=1)
        session.max_step_tokens = MAX_STEP_TOKENS
        recorder = Recorder(session)
        stop_ids = [1, 2]
        wanted = engines.GenerateOptions(stop_tokens=stop_ids, **options)
        results = engines.generate(session, prompts, wanted)
        recorder.write(directory / "recording.bin")
        made[name, request] = Run(directory, prompts, options, stop_ids, results, recorder.steps)
        return made[name, request]

    return make


every_run = pytest.mark.parametrize(
    ("name", "request_name"),
    [*(("tiny-qwen2.5", request) for request in REQUESTS), ("tiny-qwen2-moe", "ragged")],
)


@every_run
@pytest.mark.parametrize("cuda_graphs", [0, 1])
def test_the_same_steps_and_the_same_tokens(
    library: Library, recorded, name: str, request_name: str, cuda_graphs: int
) -> None:
    run = recorded(name, request_name)
    session = library.load(run.directory).session(max_batch=3, cuda_graphs=cuda_graphs)
    assert session.cuda_graphs == bool(cuda_graphs)
    streamed: list[list[int]] = [[] for _ in run.prompts]
    results = session.generate(
        run.prompts,
        stop_tokens=run.stop_ids,
        on_token=lambda row, token: streamed[row].append(token),
        **run.options,
    )
    assert results == run.results
    assert streamed == [result.tokens for result in results]


def test_the_recordings_hold_what_they_are_for(recorded) -> None:
    """Chunks, rows that end early, span buckets, a full cache, real stops: else the tests above show less."""
    runs = {request: recorded("tiny-qwen2.5", request) for request in REQUESTS}
    assert {32, 6, 1} <= {width for _, width, _ in runs["ragged"].steps}
    assert {64, 128} <= {span for _, _, span in runs["one"].steps}
    assert runs["full"].results[0].reason == "capacity"
    reasons = {result.reason for run in runs.values() for result in run.results}
    assert {"capacity", "length"} <= reasons


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_recorded_run_is_clean_under(sanitizer: str, recorded, tmp_path: Path) -> None:
    run = recorded("tiny-qwen2.5", "ragged")
    options = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "seed": 0}
    options |= run.options
    names = "max_new_tokens temperature top_k top_p repetition_penalty seed".split()
    numbers = [len(run.prompts), *(options[name] for name in names)]
    for row in (run.stop_ids, *run.prompts):
        numbers += [len(row), *row]
    request = tmp_path / "request"
    request.write_text(" ".join(map(str, numbers)))
    done = subprocess.run(
        [built(sanitizer) / "replay", run.directory, request], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [[int(word) for word in line.split()[1:]] for line in done.stdout.splitlines()]
    assert rows == [result.tokens for result in run.results]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda prompts: [prompts[0], [8], prompts[2]], "input_ids is not the recorded one"),
        (lambda prompts: [prompts[0], prompts[2], prompts[1]], "input_ids is not the recorded one"),
        (lambda prompts: prompts[:2], "rows, width or span are not the recorded ones"),
    ],
)
def test_another_run_is_noticed(library: Library, recorded, change, complaint: str) -> None:
    run = recorded("tiny-qwen2.5", "ragged")
    session = library.load(run.directory).session(max_batch=3)
    with pytest.raises(Error, match=complaint):
        session.generate(change(run.prompts), stop_tokens=run.stop_ids, **run.options)
