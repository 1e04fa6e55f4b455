"""Engines for onnxruntime: they compute what their package computes, and nothing is left to do when they load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import MINI, mini, random_tensors, stack_experts, tensor_shapes, write_checkpoint
from healthy_models import HealthyModel, healthy_models, write
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file

from qwenport import engines, exporter
from qwenport.contract import DTYPES, ENGINE_WEIGHTS, MANIFEST, MODEL, TOKENIZER
from qwenport.engines import Engine, OnnxRuntimeSession, build, open_session
from qwenport.engines.lowering import ALIGNMENT
from qwenport.exporter import Package

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
BUNDLED = [
    *((DENSE, dtype, "link") for dtype in DTYPES),
    *((MIXTURE, dtype, "link") for dtype in DTYPES),
    (MIXTURE, "bf16", "pack"),
]
ROWS = [[1, 2, 3, 4, 5, 6, 7], [900, 11]]
SMALL = 1024  # bytes of a constant of the graph, such as a target shape


@dataclass(frozen=True)
class Built:
    """A package, and the engine that was built from it."""

    checkpoint: Path
    package: Package
    engine: Engine


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, str], Built]:
    """(checkpoint, dtype, mode of the weights) -> package and engine, made once."""
    folder = tmp_path_factory.mktemp("onnxruntime")
    made: dict[str, Built] = {}

    def call(checkpoint: Path, dtype: str, mode: str) -> Built:
        name = f"{checkpoint.name}.{dtype}.{mode}"
        if name not in made:
            package = exporter.export(checkpoint, folder / name, dtype=dtype, weights=mode)
            engine = build(package.path, folder / f"{name}.engine", target="onnxruntime")
            made[name] = Built(checkpoint, package, engine)
        return made[name]

    return call


@pytest.fixture(params=BUNDLED, ids=lambda p: f"{p[0].name}-{p[1]}-{p[2]}")
def built(request: Any, make: Callable[[Path, str, str], Built]) -> Built:
    return make(*request.param)


@pytest.fixture
def dense(make: Callable[[Path, str, str], Built]) -> Built:
    return make(DENSE, "bf16", "link")


def graph_of(engine: Engine) -> onnx.GraphProto:
    return onnx.load(engine.model, load_external_data=False).graph


def opened(path: Path, **limits: int) -> OnnxRuntimeSession:
    """A session of an engine, or of a package lowered in memory: `open_session` would take it from the cache."""
    engine = exporter.kind_of(path) == "engine"
    return OnnxRuntimeSession(
        engines.load_engine(path) if engine else exporter.load_package(path), **limits
    )


def logits_of(path: Path) -> list[np.ndarray]:
    """The logits of ragged prefills and decodes, up to where the shorter row is full."""
    session = opened(path, max_batch=2, capacity=48)
    found = session.prefill(ROWS, all_logits=True)
    found += [session.decode([3, None]), session.decode([5, 6])]
    return [*found, *session.prefill([[9] * 30, [8]])]


def assert_same(left: Path, right: Path) -> None:
    for ours, theirs in zip(logits_of(left), logits_of(right), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_logits_are_the_package_s_bit_for_bit(built: Built) -> None:
    assert_same(built.engine.path, built.package.path)


def test_generated_tokens_are_the_package_s(built: Built) -> None:
    options = engines.GenerateOptions(24)
    found = [
        engines.generate(opened(path, max_batch=2, capacity=64), ROWS, options)
        for path in (built.engine.path, built.package.path)
    ]
    assert [row.tokens for row in found[0]] == [row.tokens for row in found[1]]
    assert all(len(row.tokens) for row in found[0])


def test_nothing_is_cast_folded_or_inlined_at_load(built: Built) -> None:
    model = onnx.load(built.engine.model, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    assert not model.functions
    assert {opset.domain for opset in model.opset_import} == {"", "com.microsoft"}
    assert not [node for node in model.graph.node if node.op_type == "Constant"]
    assert not [node.name for node in model.graph.node if set(node.input) <= constants]
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert all(node.attribute[0].i == onnx.TensorProto.INT64 for node in casts)
    halves = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)
    assert not [tensor.name for tensor in model.graph.initializer if tensor.data_type in halves]


def test_all_but_small_constants_lie_in_the_weight_file_aligned(built: Built) -> None:
    size = built.engine.model.parent.joinpath(ENGINE_WEIGHTS).stat().st_size
    odd = []
    for tensor in graph_of(built.engine).initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert tensor.ByteSize() < SMALL, tensor.name
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        assert place["location"] == ENGINE_WEIGHTS and offset + length <= size
        assert length == 4 * np.prod(tensor.dims) and offset % 4 == 0
        if offset % ALIGNMENT:
            odd.append(tensor.name)
    assert not odd  # every tensor of the bundled checkpoints has a multiple of 64 bytes


def test_every_weight_of_the_checkpoint_is_in_the_file_in_fp32_once(built: Built) -> None:
    dtype = DTYPES[built.package.dtype].torch
    wanted = {
        name: tensor.to(dtype).to(torch.float32)
        for file in built.checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    with safe_open(built.engine.path / ENGINE_WEIGHTS, framework="pt") as stored:
        names = set(stored.keys())
        tables = {"rope.cos", "rope.sin"}
        cut = {n for n in names if n.rpartition(".")[2].isdigit()}  # experts of a packed stack
        assert names - cut - tables <= wanted.keys()
        for name in names & wanted.keys():
            assert torch.equal(stored.get_tensor(name), wanted[name]), name
        total = sum(tensor.numel() for tensor in wanted.values())
        assert total == sum(stored.get_tensor(name).numel() for name in names - tables)
        for name in cut:
            stack, _, number = name.rpartition(".")
            part = ("gate_proj", "up_proj")[int(number) % 2] if "gate_up" in stack else "down_proj"
            expert = int(number) // (2 if "gate_up" in stack else 1)
            single = f"{stack.rpartition('.')[0]}.{expert}.{part}.weight"
            assert torch.equal(stored.get_tensor(name), wanted[single]), name
        rope = load_file(built.package.path / "rope.safetensors")
        assert all(torch.equal(stored.get_tensor(name), rope[name]) for name in tables)


def test_the_directory_holds_what_the_manifest_says(built: Built) -> None:
    engine, package = built.engine, built.package
    manifest = json.loads((engine.path / MANIFEST).read_text())
    assert manifest == engine.manifest == engines.load_engine(engine.path).manifest
    assert (manifest["format_version"], manifest["flavour"]) == (6, "onnxruntime")
    assert (manifest["runtime_version"], manifest["dtype"]) == ("1.26", "fp32")
    assert manifest["gpus"] == manifest["plugins"] == [] and manifest["plugin_layers"] == {}
    assert manifest["package"]["dtype"] == package.dtype
    assert manifest["layers"] == len(graph_of(engine).node)
    assert manifest["profiles"][0]["input_ids"]["max"] == [8, 512]
    assert manifest["profiles"][0]["logits_indices"]["max"] == [8, 512]
    inputs = {binding["name"]: binding for binding in manifest["bindings"]["inputs"]}
    config = package.config
    assert inputs["past_key_values.0.key"] == {
        "name": "past_key_values.0.key",
        "dtype": "float",
        "shape": ["batch", config.num_key_value_heads, "capacity", config.head_dim],
    }
    weights = engine.path / ENGINE_WEIGHTS
    (listed,) = manifest["weights"]["files"].values()
    assert listed["bytes"] == weights.stat().st_size
    assert 0 <= listed["bytes"] - manifest["weights"]["bytes"] < 100_000  # the header
    assert {path.name for path in engine.path.iterdir()} == {
        MANIFEST,
        MODEL,
        ENGINE_WEIGHTS,
        TOKENIZER,
        *(name for name in exporter.COMPANIONS if (package.path / name).is_file()),
    }


def test_an_engine_needs_its_package_no_more(dense: Built, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(dense.engine.path, tmp_path / "moved"))
    assert_same(moved, dense.package.path)
    assert all(path.stat().st_nlink == 1 for path in dense.engine.path.iterdir())


def test_lower_limits_cut_the_tables_and_the_cache(dense: Built, tmp_path: Path) -> None:
    engine = build(
        dense.package.path,
        tmp_path / "engine",
        target="onnxruntime",
        max_seq_len=100,
        max_batch=2,
    )
    with safe_open(engine.path / ENGINE_WEIGHTS, framework="pt") as stored:
        assert stored.get_slice("rope.cos").get_shape() == [100, 16]
    assert engine.manifest["profiles"][0]["input_ids"]["max"] == [2, 100]
    assert_same(engine.path, dense.package.path)
    assert open_session(engine.path).capacity == 100
    session = open_session(engine.path, capacity=10)
    assert session.cache_addresses()["present.0.key"][1] == 2 * 10 * 32 * 4
    with pytest.raises(engines.SessionError, match="beyond the engine's max_seq_len 100"):
        open_session(engine.path, capacity=101)
    with pytest.raises(engines.SessionError, match="3 rows, but the engine was made for 2"):
        open_session(engine.path, max_batch=3)


def test_sessions_beside_each_other_share_the_model(dense: Built) -> None:
    first = OnnxRuntimeSession(dense.engine, capacity=32)
    second = first.beside(max_batch=2, capacity=16)
    (alone,), both = first.prefill([[1, 2, 3]]), second.prefill([[4], [1, 2, 3]])
    np.testing.assert_allclose(both[1], alone, rtol=1e-5, atol=1e-5)


def test_a_snapshot_goes_on_in_another_session_of_the_engine_only(dense: Built) -> None:
    first, second = (OnnxRuntimeSession(dense.engine, capacity=n) for n in (32, 64))
    first.prefill([[1, 2, 3]])
    second.restore(first.save())
    np.testing.assert_array_equal(second.decode([4]), first.decode([4]))
    with pytest.raises(engines.SnapshotError, match="another package or engine"):
        OnnxRuntimeSession(dense.package).restore(first.save())


def test_what_an_engine_cannot_do_is_refused(dense: Built) -> None:
    with pytest.raises(engines.SessionError, match="runs on the CPU only"):
        OnnxRuntimeSession(dense.engine, device="cuda")
    with pytest.raises(engines.SessionError, match="cannot be observed"):
        OnnxRuntimeSession(dense.engine, observe=["residual_1"])


@pytest.mark.parametrize(
    ("family", "stacked"),
    [*((family, False) for family in MINI), ("qwen2_moe", True), ("qwen3_moe", True)],
)
def test_every_family_is_the_same_as_its_package(
    family: str, stacked: bool, tmp_path: Path
) -> None:
    raw = mini(family)
    tensors = random_tensors(tensor_shapes(raw), torch.bfloat16)
    if stacked:
        tensors = stack_experts(tensors)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    package = exporter.export(checkpoint, tmp_path / "package", dtype="bf16").path
    engine = build(package, tmp_path / "engine", target="onnxruntime")
    texts = [[3, 1, 4, 1, 5], [9, 2]]
    found = [opened(p, max_batch=2).prefill(texts, all_logits=True) for p in (engine.path, package)]
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    graph = graph_of(engine)
    constants = {tensor.name for tensor in graph.initializer}
    assert not [node.name for node in graph.node if set(node.input) <= constants]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=healthy_models())
def test_any_model_is_the_same_as_its_package(
    model: HealthyModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    try:
        checkpoint = write(folder / "checkpoint", model)
        package = exporter.export(checkpoint, folder / "package", **model.export_arguments)
        engine = build(package.path, folder / "engine", target="onnxruntime")
        length = min(12, package.max_seq_len)
        text = [token % package.config.vocab_size for token in range(3, 3 + length)]
        found = [
            opened(path).prefill([text], all_logits=True)[0] for path in (engine.path, package.path)
        ]
        np.testing.assert_array_equal(*found)
    finally:
        shutil.rmtree(folder)


MEASURED = """
import sys
from pathlib import Path
from qwenport.engines import build

def status(name):
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name)]
    return int(line.split()[1]) * 1024

small, large, folder = sys.argv[1:]
build(small, folder + "/warm", target="onnxruntime")  # whatever is imported late is imported now
held = status("VmRSS")
build(large, folder + "/engine", target="onnxruntime")
print(status("VmHWM") - held)
"""


@pytest.mark.slow
def test_a_build_holds_chunks_of_the_weights_in_memory(dense: Built, tmp_path: Path) -> None:
    from checkpoints import write_sparse_checkpoint

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 100_000}
    raw = mini("llama", num_hidden_layers=4, torch_dtype="bfloat16", head_dim=64, **sizes)
    stored = write_sparse_checkpoint(tmp_path / "checkpoint", raw)
    assert stored > 1e9
    package = exporter.export(tmp_path / "checkpoint", tmp_path / "package")
    arguments = [str(path) for path in (dense.package.path, package.path, tmp_path)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 300e6
    assert (tmp_path / "engine" / ENGINE_WEIGHTS).stat().st_size > 2 * stored
    shutil.rmtree(tmp_path / "engine")


def test_a_session_of_an_engine_needs_no_torch(dense: Built) -> None:
    """It takes longer to import than a small engine to load."""
    script = (
        "import sys\n"
        "from qwenport.engines import open_session\n"
        "open_session(sys.argv[1], capacity=8).prefill([[1, 2]])\n"
        "print('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", script, str(dense.engine.path)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
