"""What TensorRT's parser makes of the operators' bodies, evaluated: transformers' numbers, and sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx_ir as ir
import pytest
import torch

from qwenport import exporter
from qwenport.engines.lowering import check_network, for_tensorrt
from qwenport.engines.targets import FLAVOURS, load_tensorrt

from .parsed_network import Network

SHAPES = [(1, 1), (1, 2), (4, 1), (2, 7), (3, 11), (1, 40)]


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def parsed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network, list[Any]]:
    """transformers' model, the parsed network, and what keeps the latter alive."""
    from transformers import AutoModelForCausalLM

    trt = load_tensorrt(FLAVOURS["tensorrt-rtx"], "parse graphs")
    from polygraphy.backend.trt import network_from_onnx_path  # of the flavour just chosen

    folder: Path = tmp_path_factory.mktemp("network")
    checkpoint = checkpoints.write_checkpoint(folder / "c", checkpoints.mini(request.param))
    package = exporter.export(checkpoint, folder / "package")
    kv_heads = package.config.num_key_value_heads
    lowered = for_tensorrt(
        ir.load(package.model), dtype="fp32", capacity=64, positions=64, kv_heads=kv_heads
    )
    ir.save(lowered, package.path / "lowered.onnx")
    owners = network_from_onnx_path(str(package.path / "lowered.onnx"), strongly_typed=True)
    check_network(owners[1], trt)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )
    return model, Network(trt, owners[1]), list(owners)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parsed_experts_are_transformers_and_gather_what_the_tokens_chose(
    parsed, shape: tuple[int, int]
) -> None:
    model, network, _ = parsed
    config = model.config
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        x = torch.randn(*shape, config.hidden_size, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            expected = layer.mlp(x).numpy()
        prefix = f"model.layers.{index}"
        shared = hasattr(layer.mlp, "shared_expert")
        result = f"{prefix}.mlp.Add" if shared else f"{prefix}.mlp.experts.MoEExperts"
        network.gathered.clear()
        got = network.value(
            result, {f"{prefix}.post_attention_layernorm.RMSNormalization": x.numpy()}
        )
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
        pairs = shape[0] * shape[1] * config.num_experts_per_tok
        stacks = [count for source, count in network.gathered if len(source) == 3]
        assert len(stacks) == 2  # gate and up together, then down
        assert max(stacks) <= min(pairs, 2 * config.num_experts)
