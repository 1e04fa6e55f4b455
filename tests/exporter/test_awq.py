"""AWQ checkpoints: repacked to the same bits, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed import changed, set_to
from evaluated import dequantized
from quantized import quantize
from quantized_words import write_awq
from safetensors.torch import load_file

from qwenport import exporter

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
SCHEMES: dict[str, dict[str, Any]] = {
    "groups": {},
    "groups of 64, symmetric": {"group": 64, "zero_point": False},
    "rows": {"group": -1},
    "partly": {"unconverted": ["self_attn", "layers.2.mlp.up"]},
}
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_awq(DENSE, tmp_path_factory.mktemp("awq") / "checkpoint")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_package_dequantizes_to_the_same_bits(scheme: str, tmp_path: Path) -> None:
    how = SCHEMES[scheme]
    checkpoint = write_awq(DENSE, tmp_path / "checkpoint", **how)
    package = exporter.export(checkpoint, tmp_path / "package", weights="copy")
    assert package.dtype == "fp16"
    plain, stored = (
        load_file(DENSE / "model.safetensors"),
        load_file(checkpoint / "model.safetensors"),
    )
    quantized = [name for name in stored if name.endswith(".qweight")]
    assert len(quantized) == (35 - 5 * 4 - 1 if scheme == "partly" else 35)
    nodes = [n for n in package.read_model().graph if n.op_type == "DequantizeLinear"]
    assert len(nodes) == len(quantized)
    group = how.get("group", 32)
    for name in quantized[:: len(quantized) // 3]:
        linear = name.removesuffix(".qweight")
        wanted = quantize(
            plain[f"{linear}.weight"].half(),
            4,
            None if group == -1 else group,
            symmetric=not how.get("zero_point", True),
        ).dequantized()
        assert np.array_equal(dequantized(package.path, linear), wanted.double().numpy())


def test_experts_are_quantized_and_the_linears_that_choose_are_not(tmp_path: Path) -> None:
    checkpoint = write_awq(MIXTURE, tmp_path / "checkpoint")
    package = exporter.export(checkpoint, tmp_path / "package")
    names = [n.name for n in package.read_model().graph if n.op_type == "DequantizeLinear"]
    moe = package.config.moe
    assert moe is not None
    assert sum(".experts." in name for name in names) == 3 * moe.num_experts * len(moe.layers)
    assert not any("gate.Dequantize" in name for name in names)


def test_the_package_has_the_dtype_of_the_scales_whatever_the_config_says(
    dense: Path, tmp_path: Path
) -> None:
    config = (dense / "config.json").read_text().replace('"float16"', '"bfloat16"')
    copy = changed(dense, tmp_path / "checkpoint")
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(config)
    assert exporter.export(copy, tmp_path / "package").dtype == "fp16"
    with pytest.raises(exporter.ExportError, match="exported in their dtype: --dtype fp16"):
        exporter.export(copy, tmp_path / "other", dtype="bf16")


def test_other_tensors_in_bf16_are_converted(dense: Path, tmp_path: Path) -> None:
    def in_bf16(stored: dict[str, torch.Tensor]) -> None:
        for name, tensor in stored.items():
            if tensor.dtype == torch.float16 and not name.endswith(".scales"):
                stored[name] = tensor.bfloat16()
        stored["model.norm.weight"][3] = 2.0**-30  # no number of fp16

    copy = changed(dense, tmp_path / "checkpoint", tensors=in_bf16)
    with pytest.raises(exporter.ExportError, match="scales: --dtype fp16 rounds it"):
        exporter.export(copy, tmp_path / "package")
    package = exporter.export(copy, tmp_path / "package", dtype="fp16")
    assert {p.name for p in (package.path / "weights").iterdir()} == {
        "model.safetensors",
        "repacked.safetensors",
    }
    nodes = [n for n in package.read_model().graph if n.op_type == "DequantizeLinear"]
    assert len(nodes) == 35


@pytest.mark.parametrize(
    "harmless",
    [
        {"version": "GEMM"},
        {"version": None, "format": "gemm"},
        {"backend": "autoawq", "do_fuse": False, "exllama_config": {"version": 2}},
        {"fuse_max_seq_len": None, "modules_to_fuse": None, "sym": True, "desc_act": False},
    ],
)
def test_what_a_tool_notes_for_itself_is_accepted(
    harmless: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    exporter.open_checkpoint(changed(dense, tmp_path / "checkpoint", config=set_to(**harmless)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 8}, "bits 8"),
        ({"group_size": 48}, "group_size 48"),
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"version": "marlin"}, "version 'marlin'"),
        ({"version": "exllama"}, "version 'exllama'"),
        ({"backend": "llm-awq"}, "backend 'llm-awq'"),
        ({"zero_point": None}, "zero_point null"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"desc_act": True}, "desc_act"),
        ({"dynamic": {"-:x": {}}}, "dynamic"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(
    change: dict[str, Any], named: str, dense: Path, tmp_path: Path
) -> None:
    copy = changed(dense, tmp_path / "checkpoint", config=set_to(**change))
    with pytest.raises(exporter.ConfigError, match=re.escape(named)):
        exporter.open_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{LINEAR}.qweight"), f"lacks tensor {LINEAR}.qweight"),
        (lambda t: t.pop(f"{LINEAR}.qzeros"), f"lacks tensor {LINEAR}.qzeros"),
        (
            lambda t: t.update({f"{LINEAR}.g_idx": torch.zeros(4).int()}),
            f"has tensor {LINEAR}.g_idx",
        ),
        (
            lambda t: t.update({f"{LINEAR}.scales": t[f"{LINEAR}.scales"][:-1].contiguous()}),
            f"{LINEAR}.scales has shape",
        ),
        (
            lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].float()}),
            f"{LINEAR}.qweight has dtype F32",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.self_attn.o_proj.weight": torch.zeros(2, 2).half()}
            ),
            "has tensor model.layers.1.self_attn.o_proj.weight",
        ),
    ],
)
def test_a_tensor_that_the_format_does_not_have_so_is_named(
    change: Any, named: str, dense: Path, tmp_path: Path
) -> None:
    copy = changed(dense, tmp_path / "checkpoint", tensors=change)
    with pytest.raises(exporter.CheckpointError, match=re.escape(named)):
        exporter.open_checkpoint(copy)


def test_a_linear_that_the_config_leaves_out_and_the_tensors_do_not_is_named(
    dense: Path, tmp_path: Path
) -> None:
    copy = changed(
        dense, tmp_path / "checkpoint", config=set_to(modules_to_not_convert=["1.mlp.up"])
    )
    with pytest.raises(exporter.CheckpointError, match=rf"lacks tensor {LINEAR}\.weight"):
        exporter.open_checkpoint(copy)


def test_zero_points_must_be_as_zero_point_false_says(dense: Path, tmp_path: Path) -> None:
    copy = changed(dense, tmp_path / "checkpoint", config=set_to(zero_point=False))
    with pytest.raises(exporter.CheckpointError, match="qzeros has zero points other than 8"):
        exporter.open_checkpoint(copy)


@pytest.mark.parametrize(
    ("scale", "said"),
    [(torch.nan, "holds NaN"), (torch.inf, "holds infinity"), (6e4, "takes codes beyond")],
)
def test_weights_must_be_finite(scale: float, said: str, dense: Path, tmp_path: Path) -> None:
    def damage(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{LINEAR}.scales"][1, 2] = scale

    copy = changed(dense, tmp_path / "checkpoint", tensors=damage)
    with pytest.raises(exporter.ExportError, match=rf"up_proj\.weight\.scales .*{said}"):
        exporter.export(copy, tmp_path / "package")
