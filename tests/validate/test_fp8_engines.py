"""Engines whose linears round their inputs to FP8: proven, judged by inputs that are moved, and caught when wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from float_quantized import write_float_quantized

from qwenport import engines, exporter
from qwenport.contract import BF16, E4M3, ENGINE_WEIGHTS, no_progress
from qwenport.engines import open_session, self_test
from qwenport.engines.lowering import MoveRoundedInputs
from qwenport.exporter import Package, read_safetensors_header
from qwenport.validate import keep_proof
from qwenport.validate.judge import Judge, status_of
from qwenport.validate.metrics import Metrics
from qwenport.validate.oracle import Oracle
from qwenport.validate.proof_making import make_proof
from qwenport.validate.reference import Reference, Text
from qwenport.validate.reference.rounded_inputs import moved
from qwenport.validate.run import Observation
from qwenport.validate.target import Target, open_target
from qwenport.validate.thresholds import FP8_ROUNDING_MARGIN, FP8_TIMES_OWN
from qwenport.validate.weights_identity import compare_engine_weights

EXAMPLES = Path(__file__).parents[2] / "examples"
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
SCHEMES = ("dynamic", "static")
LONG = 160  # tokens


@dataclass(frozen=True)
class Made:
    """A checkpoint in FP8, its package with a proof, and an engine of it."""

    checkpoint: Path
    package: Package
    engine: engines.Engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """(scheme) -> what is made in it. Tests must not change it."""
    folder, known = tmp_path_factory.mktemp("fp8-engines"), dict[str, Made]()

    def make(name: str) -> Made:
        if name not in known:
            checkpoint = EXAMPLES / "quantized" / "fp8-dynamic"
            if name == "static":
                checkpoint = write_float_quantized(
                    EXAMPLES / "tiny-qwen2.5", folder / name, activations=name, by_row=False
                )
            package = exporter.export(checkpoint, folder / f"{name}.package")
            assert keep_proof(package).note is None
            engine = engines.build(
                package.path, folder / f"{name}.engine", target="onnxruntime", max_batch=4
            )
            known[name] = Made(checkpoint, package, engine)
        return known[name]

    return make


def judged(
    engine: Path, checkpoint: Path, count: int = LONG, seed: int = 0
) -> tuple[bool, Metrics]:
    """(whether `validate` passes an engine on random tokens, its metrics)."""
    target: Target = open_target(engine)
    random = np.random.default_rng(seed)
    tokens = random.integers(0, target.config.vocab_size, count).tolist()
    oracle = Oracle(Reference(target, checkpoint), tokens[:64])
    session = open_session(engine, max_batch=1, capacity=count)
    found = np.concatenate(session.prefill([tokens], all_logits=True))
    text = Text.ending(tokens, count)
    seen = Observation(found, tuple(map(str, range(count))), (text,), (), (frozenset(),))
    metrics, checks = Judge(oracle, target.compute_dtype, {}).measure(
        seen, np.concatenate(oracle.logits([text]))
    )
    return status_of(checks) == "passed", metrics


@pytest.mark.parametrize("name", SCHEMES)
def test_a_correct_engine_passes_and_reproduces_its_proof(
    name: str, made: Callable[[str], Made]
) -> None:
    found = made(name)
    assert found.engine.activations == E4M3 and found.engine.manifest["dtype"] == "fp32"
    for seed in range(3):
        passed, metrics = judged(found.engine.path, found.checkpoint, seed=seed)
        assert passed and metrics.own_ratio is not None
        assert metrics.own_ratio < 0.8 * FP8_TIMES_OWN, "not at the edge"
    result = self_test(found.engine.path)
    assert result.passed and result.marks > 20 and result.worst < 0.8


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_code_that_falls_the_other_way_is_no_failure_at_few_positions(
    count: int, made: Callable[[str], Made]
) -> None:
    """Where the measurement has none there."""
    found = made("dynamic")
    for seed in range(4):
        assert judged(found.engine.path, found.checkpoint, count, seed)[0]


def test_a_streamed_proof_has_the_same_bounds(made: Callable[[str], Made]) -> None:
    package = made("dynamic").package
    whole, streamed = make_proof(package), make_proof(package, streamed=True)
    np.testing.assert_allclose(streamed.bounds, whole.bounds, rtol=0.2)


def test_inputs_are_moved_by_no_more_than_two_programs_may_differ_by(
    made: Callable[[str], Made],
) -> None:
    tokens = torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    shares = (moved(tokens) - tokens) / tokens.abs().amax(1, keepdim=True) / FP8_ROUNDING_MARGIN
    assert 0.9 < shares.abs().max() <= 1.02 and shares.std() > 0.5
    assert torch.equal(moved(tokens)[:5], moved(tokens[:5]))
    model = made("static").package.read_model()
    assert MoveRoundedInputs(FP8_ROUNDING_MARGIN)(model).modified
    moves = [v for name, v in model.graph.initializers.items() if name.startswith("moved.by")]
    assert {v.shape[0] for v in moves if v.shape} == {192, 640}
    for value in moves:
        assert value.const_value is not None
        largest = np.abs(value.const_value.numpy()).max()
        assert 0.9 * FP8_ROUNDING_MARGIN < largest <= FP8_ROUNDING_MARGIN
    quantized = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(quantized) == 4 * 5
    for node in quantized:
        assert node.inputs[0] is not None and (node.inputs[0].name or "").endswith(".moved.Add")


def _changed(engine: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a tensor of an engine's weight file, in its bf16 as fp32."""
    _, entries = read_safetensors_header(engine / ENGINE_WEIGHTS)
    (entry,) = [e for e in entries if e.name == name]
    with (engine / ENGINE_WEIGHTS).open("r+b") as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.length))
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[entry.dtype]
        values = torch.frombuffer(data, dtype=dtype).float().numpy()
        changed = torch.from_numpy(np.ascontiguousarray(change(values))).to(dtype)
        file.seek(entry.offset)
        file.write(changed.view(torch.uint8).numpy().tobytes())


FAULTS: list[tuple[str, str, Callable[[np.ndarray], np.ndarray], bool]] = [
    ("dynamic", f"{UP}.weight.scales", lambda scales: np.roll(scales, 1), False),
    ("dynamic", f"{UP}.weight.scales", lambda scales: 1 / scales, True),
    ("static", f"{UP}.weight.scales", lambda scale: 1 / scale, True),
    ("static", f"{DOWN}.weight.input_scale", lambda scale: 1 / scale, False),
    ("static", f"{DOWN}.weight.input_scale", lambda scale: scale / 1024, True),
]
"""(scheme, the tensor of the engine that is changed, how, whether logits show more than FP8's own rounding)."""


@pytest.mark.parametrize(("name", "tensor", "change", "shows"), FAULTS)
def test_a_fault_in_one_scale_is_caught(
    name: str,
    tensor: str,
    change: Callable[[np.ndarray], np.ndarray],
    shows: bool,
    made: Callable[[str], Made],
    tmp_path: Path,
) -> None:
    """FP8 has exponents: a static scale that is 275 times too large only takes the smallest inputs' last bits."""
    found, engine = made(name), tmp_path / "engine"
    shutil.copytree(found.engine.path, engine)
    assert not _wrong_weights(engine, found.checkpoint)
    _changed(engine, tensor, change)
    assert _wrong_weights(engine, found.checkpoint)
    if shows:
        assert not judged(engine, found.checkpoint)[0]
        assert not self_test(engine).passed


def _wrong_weights(engine: Path, checkpoint: Path) -> int:
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    source = exporter.open_checkpoint(checkpoint)
    compared = compare_engine_weights(model, engine, source, BF16, no_progress)
    return sum(not check.passed for check in compared.checks)


def _never_rounded(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "MatMul" and (x := node.inputs[0]) is not None:
            node.replace_input_with(0, _before_rounding(x))


def _before_rounding(x: ir.Value) -> ir.Value:
    """What was rounded to make x; x itself if nothing was."""
    if not str(x.name).partition(".rounded")[1]:
        return x
    node = x.producer()
    while node is not None:
        given = node.inputs[0]
        assert given is not None
        if node.op_type in ("QuantizeLinear", "Div"):
            return given
        node = given.producer()
    raise AssertionError(x.name)


def _one_scale_for_all_tokens(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "ReduceMax":
            axes = ir.tensor(np.array([1, 2], dtype=np.int64), name="seeded")
            value = model.graph.initializers.get("seeded") or ir.Value(
                name="seeded", type=ir.TensorType(axes.dtype), shape=axes.shape, const_value=axes
            )
            model.graph.initializers["seeded"] = value
            node.replace_input_with(1, value)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("dynamic", _never_rounded),
        ("static", _never_rounded),
        ("dynamic", _one_scale_for_all_tokens),
    ],
)
def test_a_fault_in_the_rounding_is_caught(
    name: str,
    seed: Callable[[ir.Model], None],
    made: Callable[[str], Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stays within the proof's bounds, which are for single positions; `validate` has many."""
    found = made(name)
    model = found.package.read_model()
    seed(model)
    for method in ("read_model", "check_graph"):
        monkeypatch.setattr(Package, method, lambda package: model.clone())
    engine = engines.build(found.package.path, tmp_path / "engine", target="onnxruntime")
    passed, metrics = judged(engine.path, found.checkpoint)
    assert not passed and metrics.own_ratio is not None and metrics.own_ratio > 1.2 * FP8_TIMES_OWN
