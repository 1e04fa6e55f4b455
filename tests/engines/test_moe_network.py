"""What TensorRT's parser makes of the operators' bodies, evaluated: transformers' numbers, and sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from qwenport import exporter
from qwenport.validate.network import Interpreter, ParsedNetwork, layers, parse_package

SHAPES = [(1, 1), (1, 2), (4, 1), (2, 7), (3, 11), (1, 40)]


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def parsed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ParsedNetwork]:
    """transformers' model, and the network of its package."""
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("network")
    checkpoint = checkpoints.write_checkpoint(folder / "c", checkpoints.mini(request.param))
    package = exporter.export(checkpoint, folder / "package")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )
    return model, parse_package(package, 64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parsed_experts_are_transformers_and_gather_what_the_tokens_chose(
    parsed, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, network = parsed
    gathered: list[tuple[int, int]] = []

    def counting(context: layers.Context, layer: Any) -> layers.Compute:
        compute = ours.read(context, layer)

        def count(x: torch.Tensor, indices: torch.Tensor) -> Any:
            gathered.append((x.ndim, indices.numel()))
            return compute(x, indices)

        return count

    ours = layers.KINDS["GATHER"]
    monkeypatch.setitem(layers.KINDS, "GATHER", layers.Kind(ours.interface, counting, ours.moves))
    interpreter, config = Interpreter(network), model.config
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        x = torch.randn(*shape, config.hidden_size, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            expected = layer.mlp(x)
        prefix = f"model.layers.{index}"
        shared = hasattr(layer.mlp, "shared_expert")
        result = f"{prefix}.mlp.mixed" if shared else f"{prefix}.mlp.experts_sum"
        norm = f"{prefix}.post_attention_layernorm.RMSNormalization"
        gathered.clear()
        got = interpreter.program([norm], [result]).run({norm: x})[result]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        pairs = shape[0] * shape[1] * config.num_experts_per_tok
        stacks = [count for rank, count in gathered if rank == 3]
        used = [count for count in stacks if count]
        assert (len(stacks), len(used)) == (4, 2)  # in two ways: gate and up together, then down
        few = pairs <= config.num_experts // config.num_experts_per_tok * config.num_experts_per_tok
        assert used == [pairs if few else min(pairs, 2 * config.num_experts)] * 2
