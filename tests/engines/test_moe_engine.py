"""Mixtures of experts as TensorRT-RTX engines, built without a GPU and without plugins."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import onnx_ir as ir
import pytest
import torch

from qwenport import engines, exporter
from qwenport.engines.lowering import for_tensorrt

GPUS = "sm86,sm89,sm120"


def wide(model_type: str) -> dict:
    """Wide enough for the experts to outweigh everything else; head_dim 64."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"num_experts": 30, "moe_intermediate_size": 256, "torch_dtype": "bfloat16"}
    if model_type == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 512
    else:
        sizes["head_dim"] = 64
    return checkpoints.mini(model_type, **sizes)


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def package(request, tmp_path_factory: pytest.TempPathFactory) -> exporter.Package:
    folder = tmp_path_factory.mktemp("moe")
    checkpoints.write_checkpoint(folder / "checkpoint", wide(request.param), dtype=torch.bfloat16)
    return exporter.export(folder / "checkpoint", folder / "package")


def extra_bytes(engine: engines.Engine, package: exporter.Package) -> int:
    """What the plan holds beside the weights: kernels, some megabytes for three GPUs."""
    return engine.plan.stat().st_size - package.manifest["weights"]["bytes"]


def expert_bytes(package: exporter.Package) -> int:
    """What a second copy of all experts would add."""
    moe = package.config.moe
    element = 4 if package.dtype == "fp32" else 2
    one = 3 * moe.expert_size * package.config.hidden_size * element
    return one * moe.num_experts * len(moe.layers)


def test_an_engine_holds_the_experts_once(package: exporter.Package, tmp_path: Path) -> None:
    engine = engines.build(package.path, tmp_path / "engine", target="tensorrt-rtx", gpus=GPUS)
    assert engine.manifest["gpus"] == GPUS.split(",")
    assert extra_bytes(engine, package) < expert_bytes(package) / 2


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_packed_experts_build_in_every_dtype(
    package: exporter.Package, dtype: str, tmp_path: Path
) -> None:
    source = package.path.parent / "checkpoint"
    converted = exporter.export(source, tmp_path / "package", dtype=dtype)
    engine = engines.build(converted.path, tmp_path / "engine", target="tensorrt-rtx", gpus=GPUS)
    assert extra_bytes(engine, converted) < expert_bytes(converted) / 2


def test_tensorrt_is_given_the_operators_with_their_bodies(package: exporter.Package) -> None:
    model, _ = for_tensorrt(
        ir.load(package.model), dtype="bf16", capacity=64, rope_rows=64, kv_heads=2
    )
    called = {node.op_type for node in model.graph if node.domain == "qwenport"}
    assert called == {"RotaryEmbedding", "MoERouter", "MoEExperts"}
    assert {name for _, name, _ in model.functions} == called
