"""What a session on TensorRT asks of TensorRT and of the GPU: calls in order, memory, and kernels that are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenport import engines
from qwenport.contract import query
from qwenport.engines import CapacityError, Engine, EngineError, SessionError
from qwenport.engines.cache import cache_entries
from qwenport.engines.tensorrt_session import TensorRTSession

from . import stand_in_tensorrt
from .stand_in_tensorrt import AllocationStrategy, CudaGraphStrategy, Specialization

PROMPTS = [[5, 6, 7], list(range(100, 170)), [9]]
ROWS, VOCABULARY = 3, 2048


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qwenport"


@pytest.fixture
def started(engine_of: Any, package_of: Any) -> Callable[..., tuple[TensorRTSession, Any]]:
    """Starts a session on the stand-in, on an engine whose manifest is changed; returns both."""
    package, plain = package_of("fp32"), engine_of("fp32")

    def start(change: Any = None, **options: Any) -> tuple[TensorRTSession, Any]:
        manifest = copy.deepcopy(plain.manifest)
        if change is not None:
            change(manifest)
        engine = Engine(plain.path, manifest)
        trt = stand_in_tensorrt.stand_in(engine, package)
        if "identity" in options:
            trt.gpu.identity = options.pop("identity")
        return TensorRTSession(engine, tensorrt=trt, gpu=trt.gpu, **options), trt

    return start


@pytest.fixture
def logits_of(package_of: Any) -> Callable[[list[list[int]]], list[np.ndarray]]:
    """The last logits of texts, from the package on onnxruntime."""

    def logits(texts: list[list[int]]) -> list[np.ndarray]:
        session = engines.OnnxRuntimeSession(package_of("fp32"), max_batch=len(texts))
        return session.prefill(texts)

    return logits


def run(session: TensorRTSession, steps: int = 3) -> np.ndarray:
    """The prompts and some tokens; the last logits of each row."""
    session.prefill(PROMPTS)
    return [session.decode([11 + step] * ROWS) for step in range(steps)][-1]


def texts(steps: int = 3) -> list[list[int]]:
    return [[*prompt, *range(11, 11 + steps)] for prompt in PROMPTS]


def close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


def test_rtx_is_configured_before_its_contexts_are_made(started: Any) -> None:
    _, trt = started()
    kinds = [call[0] for call in trt.calls]
    assert kinds == ["deserialize", *["create_execution_context"] * 2, "profile"]
    single, wide = (call[1] for call in trt.calls[1:3])
    assert single.pop("cuda_graph_strategy") is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert wide.pop("cuda_graph_strategy") is CudaGraphStrategy.DISABLED
    assert single == wide and isinstance(single.pop("cache"), stand_in_tensorrt.RuntimeCache)
    assert single == {
        "strategy": AllocationStrategy.USER_MANAGED,
        "dynamic_shapes_kernel_specialization_strategy": Specialization.LAZY,
    }


def test_rtx_s_options_are_passed_on(started: Any) -> None:
    for name in ("lazy", "eager", "none"):
        _, trt = started(specialization=name, cuda_graphs=False)
        for _, config in (call for call in trt.calls if call[0] == "create_execution_context"):
            strategy = config["dynamic_shapes_kernel_specialization_strategy"]
            assert strategy is Specialization[name.upper()]
            assert config["cuda_graph_strategy"] is CudaGraphStrategy.DISABLED
    with pytest.raises(SessionError, match="must be one of lazy, eager, none, found 'fast'"):
        started(specialization="fast")


def test_tensorrt_has_no_such_configuration(started: Any) -> None:
    session, trt = started(lambda manifest: manifest.update(flavour="tensorrt"), max_batch=ROWS)
    run(session)
    contexts = [("create_execution_context", AllocationStrategy.USER_MANAGED)] * 2
    assert trt.calls == [("deserialize",), *contexts, ("profile", 1)]
    del session
    assert not [entry for entry in cache_entries() if entry.kind == "kernels"]


def test_a_step_allocates_nothing_and_the_first_with_all_logits_makes_room_once(
    started: Any,
) -> None:
    session, trt = started(max_batch=ROWS)
    before = trt.gpu.allocations
    for _ in range(2):
        run(session)
        session.decode([1, None, 2])
        session.reset()
    assert trt.gpu.allocations == before
    for _ in range(2):
        session.prefill(PROMPTS, all_logits=True)
        run(session)
        session.reset()
    assert trt.gpu.allocations == before + 2  # on the device and the host


def test_logits_with_and_without_all_of_them_are_the_same(started: Any) -> None:
    session, _ = started(max_batch=ROWS)
    last = run(session)
    session.reset()
    session.prefill(PROMPTS, all_logits=True)
    close([session.decode([11 + step] * ROWS) for step in range(3)][-1], last)


def test_only_logits_that_are_asked_for_are_copied(started: Any) -> None:
    def narrow(manifest: dict[str, Any]) -> None:
        for name in ("input_ids", "position_ids"):
            manifest["profiles"][1][name]["max"][1] = 32

    session, trt = started(narrow, max_batch=ROWS)

    def copied(work: Callable[[], Any]) -> int:
        before = trt.gpu.copied
        work()
        return (trt.gpu.copied - before) // (VOCABULARY * 4)

    assert copied(lambda: session.prefill(PROMPTS)) == 3  # in three steps
    assert copied(lambda: session.decode([1, None, 2])) == 2
    assert copied(lambda: session.prefill([[], [1, 2]], all_logits=True)) == 2


def test_each_context_has_the_first_profile_that_admits_its_steps(
    started: Any, logits_of: Any
) -> None:
    session, trt = started(max_batch=ROWS)
    assert [context.profile for context in trt.contexts] == [0, 1]
    close(run(session), logits_of(texts()))
    assert {ids[1] for ids, _ in trt.contexts[0].ran} == {1}
    assert min(ids[1] for ids, _ in trt.contexts[1].ran) > 1

    session, trt = started(lambda manifest: manifest["profiles"].pop(0), max_batch=ROWS)
    assert [context.profile for context in trt.contexts] == [0, 0]
    close(run(session), logits_of(texts()))


def test_steps_beyond_every_profile_are_an_error(started: Any) -> None:
    def small(manifest: dict[str, Any]) -> None:
        for profile in manifest["profiles"]:
            profile["key_positions"]["max"] = [64]

    with pytest.raises(EngineError, match="no profile of the engine admits steps of"):
        started(small)


def test_the_workspace_is_of_the_session_s_own_shapes_and_grows_when_it_must(
    started: Any, logits_of: Any
) -> None:
    sizes = {}
    for rows, capacity in ((1, 512), (3, 512), (3, 64)):
        session, trt = started(max_batch=rows, capacity=capacity)
        session.prefill([[1, 2]])
        sizes[rows, capacity] = trt.contexts[1].workspace[1]
    assert sizes[1, 512] == 256 + 512 * 512
    assert sizes[3, 512] == 256 + 3 * 512 * 512
    assert sizes[3, 64] == 256 + 3 * 64 * 64

    session, trt = started(max_batch=ROWS, capacity=200)
    trt.contexts[0].extra = 1 << 20
    allocations = trt.gpu.allocations
    close(run(session), logits_of(texts()))
    session.decode([1] * ROWS)
    assert trt.gpu.allocations == allocations + 1
    session.prefill([[1, 2], [3], [4]])  # the other context has the new one
    assert trt.contexts[0].workspace == trt.contexts[1].workspace


@pytest.mark.parametrize(
    ("form", "multiple", "spans"),
    [("direct", 512, {512}), ("chunked", 256, {256}), ("split", 256, {256})],
)
def test_every_form_of_attention_is_fed_its_spans_and_has_its_outputs(
    started: Any, logits_of: Any, form: str, multiple: int, spans: set[int]
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["attention"] = {"form": form, "span_multiple": multiple, "slots": 512}
        manifest["max_seq_len"] = 500
        if form == "chunked":
            return
        for layer in range(manifest["model"]["num_hidden_layers"]):
            binding = {"name": query(layer), "dtype": "float", "shape": ["batch", 14, "seq", 64]}
            manifest["bindings"]["outputs"].append(binding)

    session, trt = started(change, max_batch=ROWS, capacity=300)
    assert session.capacity == 300 and session.max_positions == 500
    close(run(session), logits_of(texts()))
    assert {shape[0] for context in trt.contexts for _, shape in context.ran} == spans
    snapshot = session.save()
    session.reset()
    session.restore(snapshot)
    close(session.decode([14] * ROWS), logits_of(texts(4)))
    with pytest.raises(CapacityError):
        session.prefill([[1] * 300])


def test_a_text_that_begins_late_has_the_positions_of_its_slots(
    started: Any, package_of: Any
) -> None:
    ours, _ = started()
    theirs = engines.OnnxRuntimeSession(package_of("fp32"))
    for first in (0, 100, 100, 0):
        for session in (ours, theirs):
            session.reset(first_position=first)
        close(ours.prefill([[1, 2, 3]]), theirs.prefill([[1, 2, 3]]))


# ---- kernels that are kept


def kernels_of(trt: Any) -> int | None:
    """How many a session began with."""
    return next((call[1] for call in trt.calls if call[0] == "kernels"), None)


def entry_in(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    assert entry.name.startswith("kernels-")
    return entry


def test_the_next_session_begins_with_what_this_one_compiled(
    started: Any, empty_cache: Path, engine_of: Any
) -> None:
    engine = engine_of("fp32").path
    before = {file.name: file.stat().st_mtime_ns for file in engine.iterdir()}
    session, trt = started(max_batch=ROWS)
    assert kernels_of(trt) is None
    run(session)
    assert not empty_cache.exists()
    del session  # saves
    session, trt = started(max_batch=ROWS)
    assert kernels_of(trt) == 2  # a step of 70 tokens, and single ones
    session.prefill([[1] * 200])
    del session  # replaces
    assert kernels_of(started()[1]) == 3
    changed = entry_in(empty_cache).stat().st_mtime_ns
    session, trt = started(max_batch=ROWS)
    run(session)
    del session  # nothing new
    assert entry_in(empty_cache).stat().st_mtime_ns >= changed
    assert [entry.of for entry in cache_entries()] == [str(engine)]
    assert {file.name: file.stat().st_mtime_ns for file in engine.iterdir()} == before


def test_another_gpu_driver_release_or_plan_has_kernels_of_its_own(
    started: Any, empty_cache: Path
) -> None:
    def save(change: Any = None, **options: Any) -> int | None:
        session, trt = started(change, **options)
        session.prefill([[1, 2]])
        return kernels_of(trt)

    def other_plan(manifest: dict[str, Any]) -> None:
        manifest["files"]["engine.plan"]["sha256"] = "0" * 64

    def other_release(manifest: dict[str, Any]) -> None:
        manifest["runtime_version"] = "9.9"

    assert save() is None
    assert save(identity=["stand-in", "0.0", "12000", "600.1"]) is None
    assert save(identity=["another", "0.0", "12000", ""]) is None
    assert save(other_plan) is None
    assert save(other_release) is None
    assert len(list(empty_cache.iterdir())) == 5
    assert save() == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "not TensorRT's"])
def test_damaged_kernels_are_ignored_and_replaced(
    started: Any, empty_cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    magic = stand_in_tensorrt.RuntimeCache.MAGIC
    if damage == "not TensorRT's":
        monkeypatch.setattr(stand_in_tensorrt.RuntimeCache, "MAGIC", b"of another release")
    session, _ = started()
    session.prefill([[1, 2]])
    del session
    monkeypatch.setattr(stand_in_tensorrt.RuntimeCache, "MAGIC", magic)
    file = entry_in(empty_cache) / "kernels.bin"
    data = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "missing":
        file.unlink()
    session, trt = started()
    assert kernels_of(trt) is None
    session.prefill([[1, 2]])
    del session
    assert kernels_of(started()[1]) == 1


def test_sessions_that_end_one_after_the_other_leave_whole_kernels(
    started: Any, empty_cache: Path
) -> None:
    """The last one's; one that ends while another reads them leaves them alone."""
    sessions = [started(max_batch=rows)[0] for rows in (1, 2, 3)]
    for rows, session in enumerate(sessions, start=1):
        session.prefill([[1, 2]] * rows)
    while sessions:
        sessions.pop()
        session = None
        assert kernels_of(started()[1]) == 1
    assert entry_in(empty_cache).is_dir()


def test_where_nothing_can_be_kept_sessions_run_as_well(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    session, _ = started()
    session.prefill([[1, 2]])
    del session


# ---- the plan


def test_a_plan_that_tensorrt_refuses_or_that_cannot_be_read_is_an_error(
    started: Any, engine_of: Any, package_of: Any, tmp_path: Path
) -> None:
    plain = engine_of("fp32")
    trt = stand_in_tensorrt.stand_in(plain, package_of("fp32"))
    other = Engine(tmp_path, plain.manifest)
    (tmp_path / "engine.plan").write_bytes(plain.plan.read_bytes()[:-1])
    with pytest.raises(EngineError, match="refused the plan"):
        TensorRTSession(other, tensorrt=trt, gpu=trt.gpu)
    (tmp_path / "engine.plan").unlink()
    with pytest.raises(EngineError, match=r"engine\.plan: cannot be read: No such file"):
        TensorRTSession(other, tensorrt=trt, gpu=trt.gpu)
