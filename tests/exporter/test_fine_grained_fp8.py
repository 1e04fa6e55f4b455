"""Qwen's and DeepSeek's FP8 blocks: dequantized by the export as transformers does, the rest refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from fine_grained_fp8 import quantize, write_fine_grained_fp8
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizers_utils import should_convert_module

from qwenport import exporter
from qwenport.exporter.quantization import WHOLE, Repacked, parse_quantization
from qwenport.exporter.quantization.fine_grained_fp8 import FineGrainedFP8

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
UP = "model.layers.1.mlp.up_proj"
STATED: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def dequantized(codes: torch.Tensor, factors: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What the export writes for a weight in bf16."""
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    tensors = {
        "L.weight": exporter.TensorEntry("L.weight", "f", "F8_E4M3", tuple(codes.shape), 0, 0),
        "L.weight_scale_inv": exporter.TensorEntry(
            "L.weight_scale_inv", "f", dtypes[factors.dtype], tuple(factors.shape), 0, 0
        ),
    }
    storage = FineGrainedFP8(block_rows=block[0], block_columns=block[1])
    shape = (int(codes.shape[0]), int(codes.shape[1]))
    part = storage.parts("L", shape, tensors, "BF16")[WHOLE]
    assert isinstance(part, Repacked)
    read = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (codes, factors)]
    made = torch.frombuffer(bytearray(part.repack(read)), dtype=torch.bfloat16)
    return made.view(codes.shape)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (64, 32), (1, 128)]),
    size=st.floats(-20, 20),
    single=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weights_are_dequantized_to_the_libraries_bits(
    rows: int, columns: int, block: tuple[int, int], size: float, single: bool, seed: int
) -> None:
    """transformers' where blocks divide the weight, and compressed-tensors' for every shape."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2**size
    weight[0] = 0
    codes, factors = quantize(weight if single else weight.bfloat16(), block)
    made = dequantized(codes, factors, block)
    if not rows % block[0] and not columns % block[1]:
        theirs = Fp8Dequantize(None)._dequantize_one(codes, factors, torch.bfloat16)
        assert torch.equal(made, theirs)
    arguments = QuantizationArgs(
        num_bits=8, type="float", strategy="block", block_structure=list(block)
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    library = BaseCompressor.get_value_from_registry("naive-quantized")
    wanted = library.decompress({"weight": codes, "weight_scale": factors}, scheme)["weight"]
    assert torch.equal(made, wanted.bfloat16())


def test_whole_blocks_are_dequantized_as_transformers_loads_them(tmp_path: Path) -> None:
    checkpoint = write_fine_grained_fp8(DENSE, tmp_path / "checkpoint", block=(64, 64))
    package = exporter.export(checkpoint, tmp_path / "package")
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(weight_block_size=(64, 64), dequantize=True),
    ).state_dict()
    graph = package.read_model().graph
    assert not [node for node in graph if node.op_type == "DequantizeLinear"]
    for linear in (UP, "model.layers.0.self_attn.k_proj", "model.layers.4.mlp.down_proj"):
        tensor = graph.initializers[f"{linear}.weight"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        with (package.path / str(tensor.location)).open("rb") as stream:
            stream.seek(tensor.offset or 0)
            data = bytearray(stream.read(tensor.nbytes))
        found = torch.frombuffer(data, dtype=torch.bfloat16).view(tensor.shape.numpy())
        assert torch.equal(found, theirs[f"{linear}.weight"])
    (note,) = package.manifest["source"]["notes"]
    assert "activations are not rounded to FP8" in note


def test_experts_are_dequantized_one_by_one(tmp_path: Path) -> None:
    kept = ("lm_head", "mlp.gate", "shared_expert_gate")
    checkpoint = write_fine_grained_fp8(MIXTURE, tmp_path / "checkpoint", kept=kept)
    package = exporter.export(checkpoint, tmp_path / "package")
    package.check_graph()
    with pytest.raises(exporter.ExportError, match="the experts are quantized"):
        exporter.export(checkpoint, tmp_path / "packed", weights="pack")


NAMES = [
    "lm_head",
    *(
        f"model.layers.{layer}.{linear}"
        for layer in (1, 11)
        for linear in ("mlp.gate", "mlp.gate_proj", "mlp.shared_expert_gate", "self_attn.o_proj")
    ),
]


@pytest.mark.parametrize(
    "kept",
    [
        ["lm_head"],
        ["model.layers.1"],
        ["model.layers.1.mlp.gate", "lm_head"],
        ["mlp.gate"],
        ["gate"],
        ["model.layers.*.mlp"],
        ["model.layers.1.self_attn|lm_head"],
        [],
    ],
)
def test_what_is_kept_is_what_transformers_keeps(kept: list[str]) -> None:
    quantization = parse_quantization({**STATED, "modules_to_not_convert": kept})
    assert quantization is not None
    for name in NAMES:
        is_converted = quantization.storage(f"{name}.weight") is not None
        assert is_converted == should_convert_module(name, kept), name


def test_without_a_list_the_head_is_kept() -> None:
    quantization = parse_quantization(STATED)
    assert quantization is not None
    assert quantization.storage("lm_head.weight") is None
    assert quantization.storage(f"{UP}.weight") is not None


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("activation_scheme", "static", "activation_scheme 'static'"),
        ("weight_block_size", None, "weight_block_size"),
        ("weight_block_size", [128], "weight_block_size"),
        ("weight_block_size", [128, 0], "weight_block_size"),
        ("fmt", "e5m2", "fmt 'e5m2'"),
        ("scale_fmt", "ue8m0", "scale_fmt 'ue8m0'"),
        ("modules_to_convert", ["embed_tokens"], "modules_to_convert"),
        ("modules_to_not_convert", "lm_head", "modules_to_not_convert 'lm_head'"),
        ("modules_to_not_convert", ["("], "no regular expression"),
        ("expert_dtype", "fp4", "expert_dtype 'fp4'"),
        ("a_key_of_tomorrow", 1, "a_key_of_tomorrow"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(key: str, value: Any, named: str) -> None:
    with pytest.raises(exporter.ConfigError, match=re.escape(named)):
        parse_quantization({**STATED, key: value})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (f"{UP}.weight", lambda t: t.fill_(0x7F), "holds NaN"),
        (f"{UP}.weight_scale_inv", lambda t: t.fill_(3e38), "values that bf16 does not have"),
    ],
)
def test_values_that_are_no_number_are_named(
    name: str, change: Any, named: str, tmp_path: Path
) -> None:
    checkpoint = write_fine_grained_fp8(DENSE, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors[name].view(torch.uint8) if name.endswith("weight") else tensors[name])
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(exporter.ExportError, match=f"{UP}.*{named}"):
        exporter.export(checkpoint, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_another_dtype_would_round_other_values(tmp_path: Path) -> None:
    checkpoint = write_fine_grained_fp8(DENSE, tmp_path / "checkpoint")
    assert json.loads((checkpoint / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(exporter.ExportError, match="--dtype bf16"):
        exporter.export(checkpoint, tmp_path / "package", dtype="fp32")
