"""Both sessions against transformers: whatever the order of steps, the logits are the model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenport import engines, exporter
from qwenport.engines.session import CachedSession

from . import stand_in_tensorrt
from .conftest import CHECKPOINT

ROWS, CAPACITY = 3, 80


@pytest.fixture(scope="module")
def oracle() -> Callable[[list[int]], np.ndarray]:
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def logits(tokens: list[int]) -> np.ndarray:
        """fp32 [len(tokens), vocab]."""
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    return logits


@pytest.fixture(scope="module", params=["onnxruntime", "onnxruntime engine", "tensorrt"])
def session(request, package_of, engine_of, tmp_path_factory) -> CachedSession:
    if request.param == "onnxruntime":
        return engines.OnnxRuntimeSession(package_of("bf16"), max_batch=ROWS, capacity=CAPACITY)
    if request.param == "onnxruntime engine":
        folder = tmp_path_factory.mktemp("sessions") / "engine"
        built = engines.build(package_of("bf16").path, folder, target="onnxruntime")
        return engines.OnnxRuntimeSession(built, max_batch=ROWS, capacity=CAPACITY)
    engine = engine_of("fp32")
    return engines.TensorRTSession(
        engine,
        max_batch=ROWS,
        capacity=CAPACITY,
        tensorrt=(runtime := stand_in_tensorrt.stand_in(engine, package_of("fp32"))),
        gpu=runtime.gpu,
    )


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


token = st.integers(0, 2047)
step = st.one_of(
    st.tuples(
        st.just("prefill"),
        st.lists(st.lists(token, max_size=30), min_size=1, max_size=ROWS),
        st.booleans(),
    ),
    st.tuples(
        st.just("decode"), st.lists(st.none() | token, min_size=1, max_size=ROWS), st.just(False)
    ),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(step, min_size=1, max_size=6))
def test_any_order_of_steps_gives_the_logits_of_the_whole_text(session, oracle, steps):
    """Ragged rows, idle rows, chunks, decodes and rows that join late, up to a full cache."""
    session.reset()
    held: list[list[int]] = [[] for _ in range(ROWS)]
    for kind, rows, all_logits in steps:
        new = [[] if row is None else [row] if isinstance(row, int) else row for row in rows]
        fits = all(len(held[b]) + len(row) <= CAPACITY for b, row in enumerate(new))
        if not fits:
            with pytest.raises(engines.CapacityError):
                session.prefill(new)
            continue
        got = (
            session.decode(rows)
            if kind == "decode"
            else session.prefill(new, all_logits=all_logits)
        )
        for b, row in enumerate(new):
            held[b] += row
            if not row:
                assert not np.any(got[b])
                continue
            want = oracle(held[b])
            if kind == "decode":
                close(got[b], want[-1])
            else:
                close(got[b], want[-len(row) :] if all_logits else want[-1:])
    assert session.lengths.tolist() == [len(row) for row in held]


def test_a_step_past_the_capacity_writes_nothing(session, oracle):
    session.reset()
    text = list(range(5, 5 + CAPACITY - 1))
    session.prefill([text, [7, 8]])
    with pytest.raises(engines.CapacityError, match=f"row 0 holds {CAPACITY - 1} tokens"):
        session.prefill([[1, 2], [9]])
    assert session.lengths.tolist() == [CAPACITY - 1, 2, 0]
    got = session.decode([3, 9])
    close(got[0], oracle([*text, 3])[-1])
    close(got[1], oracle([7, 8, 9])[-1])
    with pytest.raises(engines.CapacityError):
        session.decode([1, None])


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [([[0]] * (ROWS + 1), "rows given"), ([[2048]], "vocabulary"), ([[-1]], "vocabulary")],
)
def test_rows_and_tokens_that_do_not_exist_are_refused(session, tokens, complaint):
    session.reset()
    with pytest.raises(engines.SessionError, match=complaint):
        session.prefill(tokens)
    assert not session.lengths.any()


def test_what_is_saved_is_restored(session):
    session.reset()
    session.prefill([[5, 6, 7], [8, 9]])
    snapshot = session.save()
    expected = session.decode([10, 11])
    session.reset()
    session.prefill([[20] * 9] * ROWS)
    session.restore(snapshot)
    assert session.lengths.tolist() == [3, 2, 0]
    assert session.save() == snapshot
    np.testing.assert_array_equal(session.decode([10, 11]), expected)


def test_past_and_present_are_one_memory_of_the_expected_size(session, package_of):
    config = package_of("bf16").config
    addresses = session.cache_addresses()
    slots = addresses["past_key_values.0.key"][1] // (
        ROWS * config.num_key_value_heads * config.head_dim * 4
    )
    assert slots >= CAPACITY  # an engine's cache has the engine's capacity
    spans = []
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            past = addresses[f"past_key_values.{layer}.{part}"]
            assert past == addresses[f"present.{layer}.{part}"]
            spans.append((past[0], past[0] + past[1]))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_step_writes_its_own_slots_and_no_others(session, package_of):
    config = package_of("bf16").config
    session.reset()
    session.prefill([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    addresses = session.cache_addresses()
    address, size = addresses["present.2.value"]
    slots = size // (ROWS * config.num_key_value_heads * config.head_dim * 4)
    shape = (ROWS, config.num_key_value_heads, slots, config.head_dim)
    memory = stand_in_tensorrt.read(address, shape)
    before = memory.copy()
    session.decode([11, None, 12])
    changed = (memory != before).any(axis=(1, 3))
    # rows 0 and 2 got a token; row 1 padding, where its next token will be written
    assert np.argwhere(changed).tolist() == [[0, 3], [1, 3], [2, 3]]


def test_onnxruntime_returns_the_very_memory_that_was_bound(package_of):
    session = engines.OnnxRuntimeSession(package_of("bf16"), max_batch=2, capacity=70)
    session.prefill([[1, 2, 3]])
    outputs = session._binding.get_outputs()
    names = [f"present.{key}" for key in session._cache]
    addresses = session.cache_addresses()
    for name, value in zip(names, outputs[: len(names)], strict=True):
        assert value.data_ptr() == addresses[name][0]


def test_a_step_touches_no_memory_of_unused_slots(tmp_path: Path):
    """The byte count: a 268 MB cache of which one step may make a few pages resident."""
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=131072,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    package = exporter.export(tmp_path / "checkpoint", tmp_path / "package")
    session = engines.OnnxRuntimeSession(package)
    sizes = dict(session.cache_addresses().values())
    assert sum(sizes.values()) == 2 * 8 * 131072 * 32 * 4
    session.prefill([[1, 2, 3]])
    before = resident_bytes()
    for id_ in range(20):
        session.decode([id_])
    assert resident_bytes() - before < sum(sizes.values()) / 10


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_sessions_refuse_more_than_their_target_has(package_of, engine_of):
    package, engine = package_of("bf16"), engine_of("fp32")
    runtime = stand_in_tensorrt.stand_in(engine, package)
    with pytest.raises(engines.SessionError, match="capacity"):
        engines.OnnxRuntimeSession(package, capacity=package.max_seq_len + 1)
    with pytest.raises(engines.SessionError, match="rows"):
        engines.OnnxRuntimeSession(package, max_batch=package.max_batch + 1)
    for extra in ({"max_batch": 4}, {"capacity": 513}):
        with pytest.raises(engines.SessionError, match="built for"):
            engines.TensorRTSession(engine, tensorrt=runtime, gpu=runtime.gpu, **extra)


def test_what_is_no_number_and_no_list_is_named(package_of, session):
    path = package_of("fp32").path
    for options in ({"capacity": "x"}, {"max_batch": "2"}, {"max_batch": None}, {"capacity": 2.5}):
        with pytest.raises(engines.SessionError, match=r"(rows|slots) must be an integer"):
            engines.open_session(path, **options)
    for device in ("gpu", ["cpu"], None):
        with pytest.raises(engines.SessionError, match="device must be one of cpu, cuda, found"):
            engines.open_session(path, device=device)
    session.reset()
    for tokens in (None, 5, b"ab", "ab", {1: 2}, iter([[1]])):
        with pytest.raises(engines.SessionError, match="must be a list"):
            session.prefill(tokens)
        with pytest.raises(engines.SessionError, match="must be a list"):
            session.decode(tokens)
    with pytest.raises(engines.SessionError, match="more than 64 bits"):
        session.prefill([[2**70]])
    assert not session.lengths.any()


def test_a_text_that_begins_late_ends_where_the_positions_end(package_of):
    session = engines.open_session(package_of("fp32").path)
    session.reset(first_position=session.max_positions - 12)
    assert session.free_slots.tolist() == [12]
    (result,) = engines.generate(session, [[1, 2, 3, 4]], engines.GenerateOptions(30, append=True))
    assert (result.reason, len(result.tokens)) == ("capacity", 9)
    session.reset(first_position=session.max_positions - 12)
    with pytest.raises(engines.CapacityError, match="the session has room for 12"):
        engines.generate(session, [[1] * 13], engines.GenerateOptions(append=True))


def test_an_engine_without_a_gpu_is_one_clear_line(engine_of):
    if torch.cuda.is_available():
        pytest.fail("this test is for machines without a GPU")
    with pytest.raises(engines.EngineError, match="needs an NVIDIA GPU") as caught:
        engines.open_session(engine_of("fp32").path)
    assert "\n" not in str(caught.value)


def test_an_engine_of_another_tensorrt_version_is_refused(engine_of, package_of):
    engine = engine_of("fp32")
    runtime = stand_in_tensorrt.stand_in(engine, package_of("fp32"))
    runtime.__version__ = "1.0.0"
    with pytest.raises(engines.EngineError, match=r"installed is 1\.0\.0"):
        engines.TensorRTSession(engine, tensorrt=runtime, gpu=runtime.gpu)
