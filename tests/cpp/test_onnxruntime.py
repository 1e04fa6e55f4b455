"""The C++ library in onnxruntime, executed: both bundled checkpoints write in C++ what they write in Python.

The engines are run by the library of the onnxruntime wheel, through the C API. In `fast_steps` the logits are the same
bit by bit, with any number of threads: both sessions give onnxruntime the same graph, inputs and options. `fast_start`
multiplies with other kernels, so there the tokens are the same and the logits are close.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import digits
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwenport import engines, exporter
from qwenport.contract import ENGINE_WEIGHTS, INPUT_IDS, MANIFEST, MODEL, ONNXRUNTIME
from qwenport.engines import Generated
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession

from .builds import built, run
from .runtime import IDLE, Engine, Error, Library

NAMES = ["tiny-qwen2.5", "tiny-qwen2-moe"]
every_checkpoint = pytest.mark.parametrize("name", NAMES)
MAX_STEP_TOKENS = 32  # of some engines, so that the longer prompts run in several steps
ROWS = 3
PROMPTS = [list(range(100, 170)), [7], list(range(300, 333))]
TELEMETRY = "ORT_DISABLE_TELEMETRY"
TOLERANCE = 1e-3
"""Of logits that are multiplied with other kernels; they differ by 1e-5."""


@pytest.fixture(scope="module")
def library(release: Path) -> Library:
    """The real library, not the stand-in's."""
    return Library(release / "runtime" / "libqwenport.so")


@pytest.fixture(scope="module")
def directory_of(
    tmp_path_factory: pytest.TempPathFactory, package_of: Callable[[str], exporter.Package]
) -> Callable[..., Path]:
    """Name of a bundled checkpoint -> its onnxruntime engine directory."""
    folder, made = tmp_path_factory.mktemp("onnxruntime"), dict[tuple[str, int], Path]()

    def make(name: str, max_step_tokens: int = 512) -> Path:
        key = name, max_step_tokens
        if key not in made:
            path = folder / f"{name}-{max_step_tokens}"
            engines.build(package_of(name).path, path, target=ONNXRUNTIME)
            manifest = json.loads((path / MANIFEST).read_text())
            manifest["profiles"][0][INPUT_IDS]["max"][1] = max_step_tokens
            (path / MANIFEST).write_text(json.dumps(manifest))
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="module")
def load(library: Library, directory_of, onnxruntime_library: Path) -> Callable[..., Engine]:
    """Load the engine of a bundled checkpoint."""

    def make(name: str, max_step_tokens: int = 512, **options) -> Engine:
        options = {"threads": 1, "onnxruntime": onnxruntime_library} | options
        return library.load(directory_of(name, max_step_tokens), **options)

    return make


@pytest.fixture(scope="module")
def python_session(package_of) -> Callable[..., OnnxRuntimeSession]:
    """A Python session of the package that an engine was made of."""

    def make(name: str, max_step_tokens: int = 512, **options) -> OnnxRuntimeSession:
        session = OnnxRuntimeSession(
            package_of(name), **{"max_batch": ROWS, "threads": 1} | options
        )
        session.max_step_tokens = max_step_tokens
        return session

    return make


def in_python(session: OnnxRuntimeSession, prompts: list[list[int]], **options) -> list[Generated]:
    return engines.generate(session, prompts, engines.GenerateOptions(**options))


# The same tokens

REQUESTS = {
    "greedy": ([[40, 41, 42]], {"max_new_tokens": 90}),
    "ragged": (
        PROMPTS,
        {"max_new_tokens": 60, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5},
    ),
    "penalty": (
        [[5, 6, 7, 8], [9, 10]],
        {"max_new_tokens": 40, "temperature": 1.1, "repetition_penalty": 1.2, "seed": 1},
    ),
    "full": ([[11] * 508, [12] * 3], {"max_new_tokens": 12}),
    "full at once": ([list(range(1000, 1512)), [12] * 3], {"max_new_tokens": 6}),
}


@every_checkpoint
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("max_step_tokens", [MAX_STEP_TOKENS, 512])
@pytest.mark.parametrize("mode", ["fast_steps", "fast_start"])
def test_the_same_tokens_as_python(
    load, python_session, name: str, request_name: str, max_step_tokens: int, mode: str
) -> None:
    prompts, options = REQUESTS[request_name]
    options = {**options, "stop_tokens": [1, 2]}
    expected = in_python(python_session(name, max_step_tokens), prompts, **options)
    session = load(name, max_step_tokens, load=mode).session(max_batch=ROWS)
    streamed: list[list[int]] = [[] for _ in prompts]
    found = session.generate(
        prompts, on_token=lambda row, token: streamed[row].append(token), **options
    )
    assert found == expected
    assert streamed == [result.tokens for result in found]


@every_checkpoint
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("mode", "tolerance"), [("fast_steps", 0), ("fast_start", TOLERANCE)])
def test_the_same_logits_as_python(
    load, python_session, name: str, threads: int, mode: str, tolerance: float
) -> None:
    """Ragged prompts in several steps, decoding across a span's end, an idle row, a truncation."""
    capacity = 150
    theirs = python_session(name, MAX_STEP_TOKENS, threads=threads, capacity=capacity)
    engine = load(name, MAX_STEP_TOKENS, threads=threads, load=mode)
    session = engine.session(max_batch=ROWS, capacity=capacity)
    assert session.capacity == capacity

    def compare(found: list, expected: np.ndarray) -> None:
        for row, other in zip(found, expected, strict=True):
            if row is not None:
                np.testing.assert_allclose(row, other, rtol=0, atol=tolerance)

    compare(session.prefill(PROMPTS), [rows[-1] for rows in theirs.prefill(PROMPTS)])
    for step in range(70):
        tokens = [step + 10, IDLE if step % 3 else step, 4 * step]
        given = [None if token == IDLE else token for token in tokens]
        compare(session.decode(tokens), theirs.decode(given))
    for row, length in enumerate((80, 3, 0)):
        session.truncate(length, row)
        theirs.truncate(length, row)
    compare(session.decode([9, 8, 7]), theirs.decode([9, 8, 7]))


@every_checkpoint
def test_snapshots_append_and_the_engine_may_go_first(load, python_session, name: str) -> None:
    engine = load(name)
    session = engine.session(max_batch=2, capacity=200)
    del engine
    theirs = python_session(name, max_batch=2, capacity=200)
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": 3}
    first, expected = (
        session.generate(PROMPTS[:2], **options),
        in_python(theirs, PROMPTS[:2], **options),
    )
    assert first == expected
    saved = session.save()
    turn = [[*result.pending, 7, 8, 9] for result in first]
    second = session.generate(turn, append=1, **options)
    assert second == in_python(theirs, turn, append=True, **options)

    session.restore(saved)
    assert session.generate(turn, append=1, **options) == second
    other = load(name).session(max_batch=2, capacity=300)  # another engine handle, another layout
    other.restore(saved)
    assert other.generate(turn, append=1, **options) == second


def test_a_snapshot_of_another_engine_is_refused(load) -> None:
    session, other = (load(name).session() for name in NAMES)
    session.prefill([[1, 2, 3]])
    with pytest.raises(Error, match="of another engine") as error:
        other.restore(session.save())
    assert error.value.kind == "bad snapshot"


@every_checkpoint
def test_two_threads_with_two_sessions_of_one_engine(load, python_session, name: str) -> None:
    engine = load(name, threads=2)
    sessions = [engine.session(max_batch=ROWS) for _ in range(2)]
    found: list[list[Generated]] = [[], []]
    seeds = (1, 2)

    def work(index: int) -> None:
        found[index] = sessions[index].generate(
            PROMPTS, temperature=0.9, seed=seeds[index], max_new_tokens=50
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results in zip(seeds, found, strict=True):
        expected = in_python(
            python_session(name, threads=2), PROMPTS, temperature=0.9, seed=seed, max_new_tokens=50
        )
        assert results == expected


def test_cancellation_ends_a_generation_within_a_long_prompt(load, library: Library) -> None:
    session = load("tiny-qwen2.5", MAX_STEP_TOKENS).session(max_batch=2)
    prompts = [
        list(range(100, 103)),
        list(range(100, 500)),
    ]  # row 0 gets tokens before row 1 is read
    cancellation = c.c_void_p(library.c.qwenport_cancellation_create())
    short, long = session.generate(
        prompts,
        max_new_tokens=20,
        cancellation=cancellation,
        on_token=lambda *_: library.c.qwenport_cancellation_request(cancellation),
    )
    library.c.qwenport_cancellation_free(cancellation)
    assert (short.reason, len(short.tokens)) == ("cancelled", 1)
    assert (long.reason, long.tokens) == ("cancelled", [])
    assert long.pending == prompts[1][MAX_STEP_TOKENS:]
    assert session.lengths == [3, MAX_STEP_TOKENS]


def test_any_sequence_of_calls(load, python_session) -> None:
    """A session behaves as one that is given the whole text of each row anew."""
    capacity = 70
    engine = load("tiny-qwen2.5", MAX_STEP_TOKENS)
    oracle = python_session("tiny-qwen2.5", max_batch=1, capacity=capacity)
    token = st.integers(0, engine.info().vocab_size - 1)

    class Calls(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.session = engine.session(max_batch=ROWS, capacity=capacity)
            self.held: list[list[int]] = [[] for _ in range(ROWS)]
            self.saved: tuple[bytes, list[list[int]]] | None = None

        def compare(self, fed: list[list[int]], logits: list) -> None:
            for row, new, found in zip(self.held, fed, logits, strict=False):
                row += new
                if not new:
                    assert found is None
                    continue
                oracle.reset()
                np.testing.assert_allclose(found, oracle.prefill([row])[0][-1], atol=TOLERANCE)

        @rule(rows=st.lists(st.lists(token, max_size=40), min_size=1, max_size=ROWS))
        def prefill(self, rows: list[list[int]]) -> None:
            if any(len(h) + len(r) > capacity for h, r in zip(self.held, rows, strict=False)):
                with pytest.raises(Error, match="slots"):
                    self.session.prefill(rows)
            else:
                self.compare(rows, self.session.prefill(rows))

        @rule(tokens=st.lists(st.one_of(token, st.just(IDLE)), min_size=1, max_size=ROWS))
        def decode(self, tokens: list[int]) -> None:
            tokens = [
                IDLE if len(held) == capacity else token
                for held, token in zip(self.held, tokens, strict=False)
            ]
            fed = [[] if token == IDLE else [token] for token in tokens]
            self.compare(fed, self.session.decode(tokens))

        @rule(row=st.integers(0, ROWS - 1), length=st.integers(0, capacity))
        def truncate(self, row: int, length: int) -> None:
            length = min(length, len(self.held[row]))
            self.session.truncate(length, row)
            del self.held[row][length:]

        @rule()
        def save(self) -> None:
            self.saved = self.session.save(), [list(row) for row in self.held]

        @precondition(lambda self: self.saved is not None)
        @rule(elsewhere=st.booleans())
        def restore(self, elsewhere: bool) -> None:
            assert self.saved is not None
            if elsewhere:
                self.session = engine.session(max_batch=ROWS, capacity=capacity)
            self.session.restore(self.saved[0])
            self.held = [list(row) for row in self.saved[1]]

        @rule()
        def reset(self) -> None:
            self.session.reset()
            self.held = [[] for _ in range(ROWS)]

        @invariant()
        def lengths_are_those_of_the_tokens(self) -> None:
            assert self.session.lengths == [len(row) for row in self.held]

    Calls.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
    Calls.TestCase("runTest").runTest()


# What it costs


def test_a_step_allocates_nothing_and_binds_nothing(release: Path, directory_of) -> None:
    """With a library that computes nothing in onnxruntime's place. The program prints the time of a step, too."""
    nothing = release / "onnxruntime" / "fits" / "libonnxruntime.so.1"
    done = run(release / "onnxruntime_steps", directory_of("tiny-qwen2.5"), nothing, 10_000)
    _, allocations, binds = map(float, done.stdout.split())
    assert (allocations, binds) == (0, 0)


MEASURE_MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.cpp.runtime import Library
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
engine = Library(Path(sys.argv[2])).load(Path(sys.argv[3]), threads=1, onnxruntime=Path(sys.argv[4]))
before = resident()
session = engine.session(max_batch=8)
made = resident()
session.prefill([[5]])
for step in range(200): session.decode([step])
warm = resident()
for turn in range(50):
    session.truncate(1, 0)
    for step in range(200): session.decode([step])
print(made - before, resident() - warm)
"""


def test_a_cache_costs_what_it_holds_and_10_000_steps_cost_no_memory(
    release: Path, directory_of, onnxruntime_library: Path
) -> None:
    directory = directory_of("tiny-qwen2.5")
    arguments = [release / "runtime" / "libqwenport.so", directory, onnxruntime_library]
    root = Path(__file__).parents[2]
    done = run(sys.executable, "-c", MEASURE_MEMORY, root, *arguments)
    made, grown = map(int, done.stdout.split())
    manifest = json.loads((directory / "qwenport.json").read_text())
    model = manifest["model"]
    cache = 8 * 2 * model["num_hidden_layers"] * manifest["max_seq_len"]
    cache *= model["num_key_value_heads"] * model["head_dim"] * 4
    assert made < cache / 2
    assert grown < 1 << 20


LOAD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.cpp.runtime import Library
Library(Path(sys.argv[2])).load(Path(sys.argv[3]), onnxruntime=Path(sys.argv[4]))
"""


@pytest.mark.parametrize("wanted", [False, True])
def test_onnxruntime_reports_nothing_unless_it_is_wanted(
    release: Path, directory_of, onnxruntime_library: Path, tmp_path: Path, wanted: bool
) -> None:
    """What it would report it first keeps in the user's cache."""
    env = {key: value for key, value in os.environ.items() if key not in ("CI", TELEMETRY)}
    env |= {"XDG_CACHE_HOME": str(tmp_path)} | ({TELEMETRY: "0"} if wanted else {})
    arguments = [release / "runtime" / "libqwenport.so", directory_of("tiny-qwen2.5")]
    root = Path(__file__).parents[2]
    run(sys.executable, "-c", LOAD, root, *arguments, onnxruntime_library, env=env)
    assert any(tmp_path.iterdir()) == wanted


# What is missing or wrong


@pytest.fixture
def engine(directory_of, tmp_path: Path) -> Path:
    """A copy of an engine directory, to be damaged."""
    return Path(shutil.copytree(directory_of("tiny-qwen2.5"), tmp_path / "engine"))


@pytest.mark.parametrize(
    ("variant", "kind", "complaint"),
    [
        ("nowhere", "missing library", "onnxruntime cannot be loaded: "),
        ("empty", "missing library", "has no OrtGetApiBase; it is no onnxruntime"),
        (
            "too_old",
            "wrong version",
            "is onnxruntime 1.24.1, engines need 1.26 or newer; name another",
        ),
    ],
)
@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_library_that_does_not_fit_is_named(
    release: Path, library: Library, engine: Path, monkeypatch, by: str, variant: str, kind: str,
    complaint: str,
) -> None:  # fmt: skip
    path = release / "onnxruntime" / variant / "libonnxruntime.so.1"
    if by == "environment":
        monkeypatch.setenv("QWENPORT_ONNXRUNTIME", str(path))
    with pytest.raises(Error) as error:
        library.load(engine, onnxruntime=path if by == "option" else None)
    assert error.value.kind == kind
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_comes_before_the_environment(
    library: Library, engine: Path, onnxruntime_library: Path, monkeypatch
) -> None:
    monkeypatch.setenv("QWENPORT_ONNXRUNTIME", "/nowhere")
    library.load(engine, onnxruntime=onnxruntime_library)
    with pytest.raises(Error, match="/nowhere"):
        library.load(engine)


def test_an_engine_that_needs_a_newer_release_is_refused(
    library: Library, engine: Path, onnxruntime_library: Path
) -> None:
    path = engine / "qwenport.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime_version": "1.400"}))
    with pytest.raises(
        Error, match=r"needs onnxruntime 1\.400 or newer, installed is 1\."
    ) as error:
        library.load(engine, onnxruntime=onnxruntime_library)
    assert error.value.kind == "wrong version"


@pytest.mark.parametrize("name", [MODEL, ENGINE_WEIGHTS])
def test_a_changed_file_is_refused(
    library: Library, engine: Path, onnxruntime_library: Path, name: str
) -> None:
    path = engine / name
    content = path.read_bytes()

    def complaint() -> str:
        with pytest.raises(Error) as error:
            library.load(engine, onnxruntime=onnxruntime_library)
        assert error.value.kind == "bad engine"
        return str(error.value)

    path.write_bytes(content + b"x")
    assert f"{name}: {len(content) + 1} bytes, the manifest says {len(content)}" in complaint()
    path.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    assert f"{name}: changed since it was built" in complaint()
    path.unlink()
    assert f"{name}: cannot be read: No such file or directory" in complaint()


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("name", [MODEL, ENGINE_WEIGHTS])
def test_a_pipe_or_a_link_in_a_files_place_is_refused(
    library: Library, engine: Path, onnxruntime_library: Path, name: str
) -> None:
    path = engine / name
    path.rename(engine / "elsewhere")

    def complaint() -> str:
        with pytest.raises(Error) as error:
            library.load(engine, onnxruntime=onnxruntime_library)
        assert error.value.kind == "bad engine"
        return str(error.value)

    path.symlink_to(engine / "elsewhere")
    assert complaint() == f"{path}: a symbolic link; an engine directory holds files only"
    path.unlink()
    os.mkfifo(path)
    assert complaint() == f"{path}: not a regular file"


@pytest.mark.usefixtures("time_limit")
def test_a_pipe_in_onnxruntimes_place_is_refused(
    library: Library, engine: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Error, match=r"pipe: not a regular file$") as error:
        library.load(engine, onnxruntime=tmp_path / "pipe")
    assert error.value.kind == "missing library"


@pytest.mark.parametrize("header", [2**64 - 1, 2**63, 0])
def test_any_length_of_a_header_is_refused(
    library: Library, engine: Path, onnxruntime_library: Path, header: int
) -> None:
    path = engine / ENGINE_WEIGHTS
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(Error, match="changed since it was built"):
        library.load(engine, onnxruntime=onnxruntime_library)


def test_options_outside_their_range_are_refused(
    library: Library, engine: Path, onnxruntime_library: Path
) -> None:
    for options, complaint in (
        ({"threads": -1}, r"threads must be in \[0, 1024\], got -1"),
        ({"threads": 1025}, r"threads must be in \[0, 1024\], got 1025"),
        ({"load": 7}, "no such load mode: 7"),
    ):
        with pytest.raises(Error, match=complaint) as error:
            library.load(engine, onnxruntime=onnxruntime_library, **options)
        assert error.value.kind == "invalid argument"


def test_an_engine_says_what_it_is(load) -> None:
    info = load("tiny-qwen2.5").info()
    assert (info.dtype, info.flavour, info.gpus) == (b"fp32", b"onnxruntime", b"")
    assert info.runtime_version == b"1.26"


# Sanitizers


@pytest.mark.parametrize("sanitizer", ["release", "address", "thread"])
@every_checkpoint
def test_sessions_are_clean_under(
    sanitizer: str, name: str, directory_of, onnxruntime_library: Path
) -> None:
    suppressions = Path(__file__).parent / "suppressions" / "threads.txt"
    written = digits.by_transformers(name, [40, 41, 42], 30, 0)
    done = subprocess.run(
        [built(sanitizer) / "onnxruntime_sessions"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "QWENPORT_ONNXRUNTIME": str(onnxruntime_library),
            "QWENPORT_TEST_ENGINE": str(directory_of(name)),
            "QWENPORT_TEST_DIGITS": " ".join(map(str, digits.digit_tokens(name))),
            "QWENPORT_TEST_WRITTEN": " ".join(map(str, written)),
            "TSAN_OPTIONS": f"suppressions={suppressions}",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
