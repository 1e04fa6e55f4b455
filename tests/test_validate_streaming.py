"""A model in parts gives the answers of the whole, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.engines import CachedSession, OnnxRuntimeSession
from qwenport.exporter import Package, export
from qwenport.validate import memory, validate
from qwenport.validate.candidate import Candidate, Refused
from qwenport.validate.network import Interpreter, NetworkSession, parse_package
from qwenport.validate.network.parts import NetworkParts
from qwenport.validate.package_parts import PackageParts
from qwenport.validate.streaming import Geometry, Parts, stream
from qwenport.validate.target import open_target

ROWS, CAPACITY = 3, 40
KINDS = [
    ("qwen2", "bfloat16"),
    ("llama", "float32"),
    ("qwen2_moe", "bfloat16"),
    ("qwen3_moe", "float32"),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def package(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Package:
    import torch

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
    return {
        exact: Interpreter(parse_package(package, CAPACITY, exact=exact), exact=exact)
        for exact in (True, False)
    }


tokens = st.integers(0, 47)
prompts = st.lists(st.lists(tokens, max_size=9), min_size=ROWS, max_size=ROWS).filter(any)
steps = st.lists(st.one_of(tokens, st.none()), min_size=ROWS, max_size=ROWS).filter(
    lambda row: any(token is not None for token in row)
)
uses = st.lists(
    st.tuples(st.integers(0, 20), prompts, st.lists(steps, max_size=4)), min_size=1, max_size=3
)


def use(session: CachedSession, calls: list[Any]) -> np.ndarray:
    """Reset, prefill and decode as drawn; all logits in one array."""
    found = []
    for first_position, prompt, decodes in calls:
        session.reset(first_position=first_position)
        found += session.prefill(prompt, all_logits=True)
        found += [session.decode(step) for step in decodes]
    return np.concatenate(found)


def geometry(package: Package) -> Geometry:
    return Geometry(ROWS, CAPACITY, package.config.vocab_size, package.max_seq_len)


def streamed(package: Package, parts: Parts, calls: list[Any]) -> np.ndarray:
    return use(stream(parts, geometry(package), lambda session: use(session, calls)), calls)


@given(uses)
@settings(max_examples=8)
def test_a_package_in_parts_is_the_package(package: Package, calls: list[Any]) -> None:
    whole = use(OnnxRuntimeSession(package, max_batch=ROWS, capacity=CAPACITY), calls)
    parts = PackageParts(package, package.config.num_hidden_layers, CAPACITY)
    assert np.array_equal(streamed(package, parts, calls), whole)


@pytest.mark.parametrize("exact", [True, False])
@given(uses)
@settings(max_examples=8)
def test_a_network_in_parts_is_the_network(
    package: Package, interpreters: dict[bool, Interpreter], exact: bool, calls: list[Any]
) -> None:
    layers = package.config.num_hidden_layers
    size = {"max_batch": ROWS, "capacity": CAPACITY, "max_positions": package.max_seq_len}
    whole = use(NetworkSession(interpreters[exact], package.config, **size), calls)
    parts = NetworkParts(interpreters[exact], layers, layers)
    assert np.array_equal(streamed(package, parts, calls), whole)


def test_what_is_observed_in_parts_is_what_is_observed_whole(package: Package) -> None:
    names = [f"model.layers.{i}.residual_2" for i in range(package.config.num_hidden_layers)]
    names += ["model.embedding", "model.layers.0.self_attn.attention"]

    def look(session: CachedSession) -> dict[str, np.ndarray]:
        session.reset()
        session.prefill([[5, 6, 7]])
        return {name: np.array(session.observed[name]) for name in names}

    whole = look(OnnxRuntimeSession(package, capacity=CAPACITY, observe=names))
    parts = PackageParts(package, package.config.num_hidden_layers, CAPACITY)

    def rehearse(session: CachedSession) -> None:
        session.reset()
        session.prefill([[5, 6, 7]])

    seen = look(stream(parts, geometry(package), rehearse, names))
    assert whole.keys() == seen.keys()
    assert all(np.array_equal(whole[name], seen[name]) for name in names)


@pytest.mark.parametrize("judged_as", [None, "tensorrt-network"])
def test_a_streamed_verdict_has_the_numbers_of_a_whole_one(
    tiny_checkpoint: Path, tiny_package: Path, judged_as: str | None
) -> None:
    whole = validate(tiny_package, tiny_checkpoint, judged_as=judged_as)
    parts = validate(tiny_package, tiny_checkpoint, judged_as=judged_as, streamed=True)
    assert (whole.reference_mode, parts.reference_mode) == ("whole", "streamed")
    assert whole.passed and parts.passed
    assert whole.layers_error == parts.layers_error
    for a, b in zip(whole.scenarios, parts.scenarios, strict=True):
        assert (a.name, a.status) == (b.name, b.status)
        if a.metrics is not None and a.name != "greedy":  # shorter when streamed
            assert b.metrics is not None
            assert a.metrics.by_position == b.metrics.by_position
            assert (a.metrics.max_abs, a.metrics.kl_mean) == (b.metrics.max_abs, b.metrics.kl_mean)


def test_fewer_layers_are_the_first_layers(tiny_checkpoint: Path, tiny_package: Path) -> None:
    report = validate(tiny_package, tiny_checkpoint, layers=2)
    assert report.passed
    assert (report.layers_judged, report.layers, report.reference_mode) == (2, 5, "streamed")
    assert [error.name for error in report.layers_error] == ["embedding", "layer 0", "layer 1"]


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
        open_target(faulty),
        max_batch=1,
        capacity=CAPACITY,
        layers=package.config.num_hidden_layers,
        streamed=True,
    )
    with pytest.raises(Refused):
        candidate.open(lambda session: session.prefill([[1, 2]]))


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
