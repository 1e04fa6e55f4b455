"""A model in parts gives the answers of the whole, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.engines import CachedSession, OnnxRuntimeSession
from qwenport.exporter import Package, export
from qwenport.validate import Report, budget, memory, validate
from qwenport.validate.candidate import Candidate, Refused
from qwenport.validate.network import Interpreter, NetworkSession, parse_package
from qwenport.validate.network.parse import with_exact_tables
from qwenport.validate.network.parts import NetworkParts
from qwenport.validate.package_parts import PackageParts
from qwenport.validate.sites import hidden_states, router_choices
from qwenport.validate.streaming import Geometry, Parts, Rehearsal, Use, stream
from qwenport.validate.target import open_target

ROWS, CAPACITY = 3, 40
EXAMPLES = 3  # of many steps each
KINDS = [
    ("qwen2", "bfloat16"),
    ("llama", "float32"),
    ("qwen2_moe", "bfloat16"),
    ("qwen3_moe", "float32"),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def package(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Package:
    model_type, dtype = request.param
    folder = tmp_path_factory.mktemp(model_type)
    raw = checkpoints.mini(model_type, torch_dtype=dtype)
    checkpoint = checkpoints.write_checkpoint(
        folder / "checkpoint",
        raw,
        checkpoints.random_tensors(checkpoints.tensor_shapes(raw), getattr(torch, dtype)),
    )
    return export(checkpoint, folder / "package", weights="copy")


@pytest.fixture(scope="module")
def interpreters(package: Package) -> dict[bool, Interpreter]:
    """Of the network in exact arithmetic, and as it is declared."""
    parsed = parse_package(package, CAPACITY)
    exact = Interpreter(with_exact_tables(parsed, package), exact=True)
    return {True: exact, False: Interpreter(parsed)}


tokens = st.integers(0, 47)
prompts = st.lists(st.lists(tokens, max_size=9), min_size=ROWS, max_size=ROWS).filter(any)
steps = st.lists(st.one_of(tokens, st.none()), min_size=ROWS, max_size=ROWS).filter(
    lambda row: any(token is not None for token in row)
)
calls = st.lists(
    st.tuples(
        st.integers(0, 20), prompts, st.lists(steps, max_size=3), st.lists(tokens, max_size=4)
    ),
    min_size=1,
    max_size=2,
)
capacities = st.lists(st.integers(20, CAPACITY), min_size=1, max_size=3)


def use(session: CachedSession, drawn: list[Any]) -> np.ndarray:
    """Reset, prefill, decode, cut the fullest row, go on; all logits in one array."""
    found = []
    for first_position, prompt, decodes, other in drawn:
        session.reset(first_position=first_position)
        found += session.prefill(prompt, all_logits=True)
        found += [session.decode(step) for step in decodes]
        fullest = int(session.lengths.argmax())
        session.truncate(int(session.lengths[fullest]) // 2, fullest)
        found += session.prefill([other if row == fullest else [] for row in range(ROWS)])
        found += [session.prefill_choosing([[1, 2, 3]] * ROWS, [[0, 2]] * ROWS).reshape(-1, 48)]
    return np.concatenate(found)


def geometry(package: Package, capacity: int = CAPACITY) -> Geometry:
    return Geometry(
        max_batch=ROWS,
        capacity=capacity,
        vocab_size=package.config.vocab_size,
        max_step_tokens=7,
        max_step_logits=5,
        max_positions=package.max_seq_len,
    )


def of_size(whole: CachedSession) -> CachedSession:
    """Steps as narrow as the geometry's: in steps of another width the arithmetic may differ in the last bit."""
    whole.max_step_tokens, whole.max_step_logits = 7, 5
    return whole


def streamed(
    package: Package, parts: Parts, capacities: list[int], drawn: list[Any]
) -> list[np.ndarray]:
    """Of sessions of several capacities in one stream."""
    sessions = stream(
        parts, [Use(geometry(package, slots), lambda s: use(s, drawn)) for slots in capacities]
    )
    # in any order: each has its own answers
    made = [use(session, drawn) for session in sessions[::-1]]
    return made[::-1]


@given(capacities, calls)
@settings(max_examples=EXAMPLES)
def test_a_package_in_parts_is_the_package(
    package: Package, capacities: list[int], drawn: list[Any]
) -> None:
    first = OnnxRuntimeSession(package)
    parts = PackageParts(package, package.config.num_hidden_layers)
    made = streamed(package, parts, capacities, drawn)
    for slots, got in zip(capacities, made, strict=True):
        whole = of_size(first.beside(max_batch=ROWS, capacity=slots))
        assert np.array_equal(got, use(whole, drawn))


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
@given(capacities, calls)
@settings(max_examples=EXAMPLES)
def test_a_network_in_parts_is_the_network(
    package: Package,
    interpreters: dict[bool, Interpreter],
    exact: bool,
    capacities: list[int],
    drawn: list[Any],
) -> None:
    layers = package.config.num_hidden_layers
    made = streamed(package, NetworkParts(interpreters[exact], layers, layers), capacities, drawn)
    for slots, got in zip(capacities, made, strict=True):
        whole = NetworkSession(
            interpreters[exact],
            package.config,
            max_batch=ROWS,
            capacity=slots,
            max_positions=package.max_seq_len,
        )
        assert np.array_equal(got, use(of_size(whole), drawn))


def test_what_is_observed_in_parts_is_what_is_observed_whole(package: Package) -> None:
    names = [f"model.layers.{i}.residual_2" for i in range(package.config.num_hidden_layers)]
    names += ["model.embedding", "model.layers.0.self_attn.attention"]
    names += router_choices(package.config, package.config.num_hidden_layers).values()

    def act(session: CachedSession) -> None:
        session.reset()
        session.prefill([[5, 6, 7]])

    def look(session: CachedSession) -> dict[str, np.ndarray]:
        act(session)
        return {name: np.array(session.observed[name]) for name in names}

    whole = look(OnnxRuntimeSession(package, capacity=CAPACITY, observe=names))
    parts = PackageParts(package, package.config.num_hidden_layers)
    (session,) = stream(parts, [Use(geometry(package), act)], names)
    seen = look(session)
    assert whole.keys() == seen.keys()
    assert all(np.array_equal(whole[name], seen[name]) for name in names)


@pytest.mark.parametrize("kind", ["package", "network"])
def test_parts_by_themselves_are_pieces_of_the_whole(
    package: Package, interpreters: dict[bool, Interpreter], kind: str
) -> None:
    """The embedding, a layer on given hidden states, and the head, each opened alone."""
    layers = package.config.num_hidden_layers
    text = [5, 6, 7, 8, 9]
    if kind == "package":
        parts: Parts = PackageParts(package, layers)
    else:
        parts = NetworkParts(interpreters[True], layers, layers)
    states = hidden_states(layers)
    whole = OnnxRuntimeSession(package, capacity=CAPACITY, observe=states)
    logits = whole.prefill([text], all_logits=True)[0]
    seen = {name: whole.observed[name] for name in states}
    rehearsal = Rehearsal(geometry(package))
    rehearsal.prefill([text])
    (feeds,) = rehearsal.steps
    feeds["logits_indices"] = np.arange(5, dtype=np.int64)[None]
    given_as = np.asarray if kind == "package" else torch.from_numpy
    with parts.prologue([]) as run:
        assert np.array_equal(np.asarray(run(0, feeds, None)[0]), seen[states[0]])
    for index in reversed(range(layers)):
        with parts.layer(index, [geometry(package)], []) as run:
            made, _ = run(0, feeds, given_as(seen[states[index]]))
        assert np.allclose(np.asarray(made), seen[states[index + 1]], rtol=1e-4, atol=1e-5)
    with parts.epilogue([]) as run:
        made, _ = run(0, {"logits_indices": feeds["logits_indices"]}, given_as(seen[states[-1]]))
    assert np.allclose(made[0], logits, rtol=1e-4, atol=1e-4)


def test_logits_are_given_once(package: Package) -> None:
    """They are large: a session that has answered holds none."""
    parts = PackageParts(package, package.config.num_hidden_layers)

    def act(session: CachedSession) -> None:
        session.prefill([[1, 2]])

    (session,) = stream(parts, [Use(geometry(package), act)])
    act(session)
    with pytest.raises(StopIteration):
        act(session)


def same_numbers(whole: Report, parts: Report) -> None:
    assert (whole.reference_mode, parts.reference_mode) == ("whole", "streamed")
    assert whole.passed and parts.passed, (whole.failures, parts.failures)
    assert whole.layers_error == parts.layers_error
    for a, b in zip(whole.scenarios, parts.scenarios, strict=True):
        assert (a.name, a.status) == (b.name, b.status)
        if a.metrics is not None and a.name != "greedy":  # shorter when streamed
            assert b.metrics is not None
            # when streamed, transformers is asked about the longest texts, which rounds in another order
            assert a.metrics.positions == b.metrics.positions
            assert a.metrics.rel_l2 == pytest.approx(b.metrics.rel_l2, rel=0.1, abs=3e-7)
            assert a.metrics.top1_clear == b.metrics.top1_clear


@pytest.mark.parametrize(
    ("package", "judged_as"),
    [
        (KINDS[0], None),
        pytest.param(KINDS[0], "tensorrt-network", marks=pytest.mark.slow),
        pytest.param(KINDS[2], None, marks=pytest.mark.slow),
        pytest.param(KINDS[3], "tensorrt-network", marks=pytest.mark.slow),
    ],
    indirect=["package"],
    ids=str,
)
def test_a_streamed_verdict_has_the_numbers_of_a_whole_one(
    package: Package, judged_as: str | None
) -> None:
    checkpoint = package.path.parent / "checkpoint"
    whole, parts = (
        validate(package.path, checkpoint, judged_as=judged_as, budget="quick", streamed=streamed)
        for streamed in (False, True)
    )
    same_numbers(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("judged_as", [None, "tensorrt-network"])
def test_a_streamed_verdict_of_the_bundled_model_has_the_numbers_of_a_whole_one(
    tiny_checkpoint: Path, tiny_package: Path, judged_as: str | None
) -> None:
    whole, parts = (
        validate(
            tiny_package, tiny_checkpoint, judged_as=judged_as, budget="quick", streamed=streamed
        )
        for streamed in (False, True)
    )
    same_numbers(whole, parts)


def test_fewer_layers_are_the_first_layers(tiny_checkpoint: Path, tiny_package: Path) -> None:
    report = validate(tiny_package, tiny_checkpoint, layers=2, budget="quick")
    assert report.passed
    assert (report.layers_judged, report.layers, report.reference_mode) == (2, 5, "streamed")
    assert [error.name for error in report.layers_error] == ["embedding", "layer 0", "layer 1"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_large_model_is_read_again_for_its_layers_only_if_something_failed(
    broken: bool,
    tiny_checkpoint: Path,
    tiny_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from defects.catalogue import DEFECTS
    from defects.tools import seed

    (defect,) = [d for d in DEFECTS if d.name == "wrong_epsilon_in_one_norm"]
    judged = seed(tiny_package, tmp_path / "p", defect.change) if broken else tiny_package
    monkeypatch.setattr(budget, "SMALL_MODEL_STEPS", 10**9)
    report = validate(judged, tiny_checkpoint, layers=2, budget="quick")
    assert report.passed is not broken and report.coverage is not None
    left_out = [text for text in report.coverage.left_out if "from layer to layer" in text]
    assert (len(left_out), len(report.layers_error)) == ((0, 3) if broken else (1, 0))


def test_a_layer_that_needs_another_s_cache_is_refused_and_not_a_crash(
    package: Package, tmp_path: Path
) -> None:
    import onnx_ir as ir
    from defects.tools import seed

    def read_the_first_cache(model: ir.Model) -> None:
        (node,) = [n for n in model.graph if n.name == "model.layers.1.self_attn.Slice"]
        (other,) = [v for n in model.graph for v in n.outputs if v.name == "present.0.key"]
        node.replace_input_with(0, other)

    faulty = seed(package.path, tmp_path / "faulty", read_the_first_cache)
    candidate = Candidate(
        open_target(faulty), layers=package.config.num_hidden_layers, streamed=True
    )
    with pytest.raises(Refused, match=r"the graph cannot be cut before model\.layers\.1\."):
        candidate.open([(1, CAPACITY, lambda session: session.prefill([[1, 2]]))])


def test_memory_decides_what_is_streamed(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_target(tiny_package)
    needed = target.package.manifest["weights"]["bytes"] / 2 * memory.BYTES_A_WEIGHT
    for available, expected in (
        (None, False),
        (int(needed / memory.SHARE * 1.01), False),
        (int(needed / memory.SHARE * 0.99), True),
    ):
        monkeypatch.setattr(memory, "available_bytes", lambda value=available: value)
        assert memory.must_stream(target) is expected


def test_the_memory_that_is_free_is_known_on_linux() -> None:
    import psutil

    found = memory.available_bytes()
    if not Path("/proc/meminfo").is_file():
        assert found is None
        return
    assert found is not None
    assert abs(found - psutil.virtual_memory().available) < 0.2 * psutil.virtual_memory().total
