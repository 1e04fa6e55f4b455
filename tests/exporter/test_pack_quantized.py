"""pack-quantized checkpoints: exported by reference, read strictly, dequantized to the same bits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed import changed, set_to
from evaluated import dequantized
from hypothesis import given
from hypothesis import strategies as st
from quantized import quantize, write_pack_quantized
from safetensors.torch import load_file

from qwenport import exporter
from qwenport.exporter.quantization import parse_quantization
from qwenport.exporter.quantization.pack_quantized import PackQuantized

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
ROUTERS = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
SCHEMES: dict[str, dict[str, Any]] = {
    "4 bits, groups": {"group": 32},
    "4 bits, groups, asymmetric": {"group": 16, "symmetric": False},
    "4 bits, rows": {"group": None},
    "8 bits, rows, asymmetric": {"bits": 8, "group": None, "symmetric": False},
    "8 bits, groups, partly": {"bits": 8, "ignore": ("lm_head", r"re:.*layers\.[02]\..*")},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """(scheme, checkpoint) -> a quantized copy of it. Tests must not change it."""
    folder, known = tmp_path_factory.mktemp("quantized"), {}

    def make(scheme: str, source: Path = DENSE) -> Path:
        key = scheme, source.name
        if key not in known:
            options = dict(SCHEMES[scheme])
            if source == MIXTURE:
                options["ignore"] = (*options.get("ignore", ("lm_head",)), *ROUTERS)
            known[key] = write_pack_quantized(source, folder / str(len(known)), **options)
        return known[key]

    return make


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_package_refers_to_the_codes_and_dequantizes_to_the_same_bits(
    scheme: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(scheme)
    package = exporter.export(checkpoint, tmp_path / "package")
    copied = exporter.export(checkpoint, tmp_path / "copied", weights="copy")  # onnx reads no links
    options = SCHEMES[scheme]
    plain = load_file(DENSE / "model.safetensors")
    quantized = [name for name in load_file(checkpoint / "model.safetensors") if "packed" in name]
    assert len(quantized) == (21 if "partly" in scheme else 35)
    for name in quantized[:: len(quantized) // 3]:
        linear = name.removesuffix(".weight_packed")
        wanted = quantize(
            plain[f"{linear}.weight"],
            options.get("bits", 4),
            options.get("group", 32),
            symmetric=options.get("symmetric", True),
        ).dequantized()
        found = dequantized(copied.path, linear)
        assert np.array_equal(found, wanted.double().numpy())
    shared = (package.path / "weights" / "model.safetensors").stat()
    assert (
        shared.st_nlink > 1 or shared.st_size == (checkpoint / "model.safetensors").stat().st_size
    )
    own = [f for f in (package.path / "weights").iterdir() if f.name != "model.safetensors"]
    assert sum(f.stat().st_size for f in own) < 0.04 * shared.st_size


def test_single_experts_are_quantized_and_the_router_is_not(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    package = exporter.export(made("4 bits, groups", MIXTURE), tmp_path / "package")
    names = [n.name for n in package.read_model().graph if n.op_type == "DequantizeLinear"]
    experts = [name for name in names if ".experts." in name]
    moe = package.config.moe
    assert moe is not None and len(experts) == 3 * moe.num_experts * len(moe.layers)
    assert not any("gate.Dequantize" in name for name in names)
    with pytest.raises(exporter.ExportError, match="the experts are quantized"):
        exporter.export(made("4 bits, groups", MIXTURE), tmp_path / "packed", weights="pack")


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)
def test_zero_points_are_those_that_were_packed(
    rows: int, groups: int, bits: int, group: int, seed: int
) -> None:
    """Packed by the tests' own writer along rows, and read back as ONNX packs them, along columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, groups * group, generator=generator) + seed % 3
    stored = quantize(weight, bits, group, symmetric=False)
    packed = stored.tensors("w", symmetric=False)["w_zero_point"].contiguous()
    format_ = PackQuantized(bits=bits, group=group, symmetric=False)
    data = format_.zero_points(packed.numpy().tobytes(), (rows, groups))
    wanted = stored.zeros.flatten().numpy()
    if bits == 8:
        assert data == wanted.tobytes()
    else:
        halves = np.frombuffer(data, np.uint8)
        found = np.stack([halves & 15, halves >> 4], axis=1).reshape(-1)
        assert found[: wanted.size].tolist() == wanted.tolist()


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("quant_method", value="quanto"), "quantized by 'quanto' are not supported"),
        (_set("quant_method", value="bitsandbytes"), "bitsandbytes"),
        (_set("quant_method", value=None), "quant_method"),
        (_set("format", value="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (_set("format", value="int-quantized"), "format"),
        (_set("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme"),
        (_set("sparsity_config", value={"format": "x"}), "sparsity_config"),
        (_set("a_key_of_tomorrow", value=1), "a_key_of_tomorrow"),
        (_set("ignore", value="lm_head"), "ignore"),
        (_set("config_groups", value={}), "config_groups"),
        (_set("config_groups", "group_1", value={}), "group_1"),
        (_set("config_groups", "group_1", value=7), "group_1' must be an object"),
        (_set(*WEIGHTS[:2], "targets", value=["Conv2d"]), "targets"),
        (_set(*WEIGHTS[:2], "targets", value=[]), "targets"),
        (_set(*WEIGHTS[:2], "format", value="float-quantized"), "format"),
        (_set(*WEIGHTS[:2], "input_activations", value={"num_bits": 8}), "input_activations"),
        (_set(*WEIGHTS, "num_bits", value=2), "num_bits 2"),
        (_set(*WEIGHTS, "type", value="float"), "type 'float'"),
        (_set(*WEIGHTS, "strategy", value="tensor"), "strategy 'tensor'"),
        (_set(*WEIGHTS, "group_size", value=24), "group_size 24"),
        (_set(*WEIGHTS, "actorder", value="group"), "actorder 'group'"),
        (_set(*WEIGHTS, "dynamic", value=True), "dynamic true"),
        (_set(*WEIGHTS, "a_key_of_tomorrow", value=1), "a_key_of_tomorrow"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(
    change: Any, named: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = changed(made("4 bits, groups"), tmp_path / "checkpoint", config=change)
    with pytest.raises(exporter.ConfigError, match=re.escape(named)):
        exporter.export(checkpoint, tmp_path / "package")
    assert not (tmp_path / "package").exists()


PACKED = "model.layers.1.mlp.up_proj.weight_packed"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(PACKED), PACKED),
        (lambda t: t.pop(PACKED.replace("packed", "shape")), "up_proj.weight_shape"),
        (lambda t: t.update({PACKED: t[PACKED][:, :-1].contiguous()}), PACKED),
        (lambda t: t.update({PACKED: t[PACKED].to(torch.int64)}), "has dtype I64"),
        (
            lambda t: t.update({PACKED.replace("packed", "shape"): torch.tensor([1, 2])}),
            "says [1, 2]",
        ),
        (
            lambda t: t.update({PACKED.replace("packed", "g_idx"): torch.zeros(64).int()}),
            "weight_g_idx",
        ),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}), "model.norm"),
    ],
)
def test_a_tensor_that_the_format_does_not_have_so_is_named(
    change: Any, named: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = changed(made("4 bits, groups"), tmp_path / "checkpoint", tensors=change)
    with pytest.raises(exporter.CheckpointError, match=re.escape(named)):
        exporter.export(checkpoint, tmp_path / "package")


def test_another_dtype_would_round_again(made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(exporter.ExportError, match="exported in their dtype: --dtype bf16"):
        exporter.export(made("4 bits, groups"), tmp_path / "package", dtype="fp16")


@pytest.mark.parametrize(
    ("scale", "said"),
    [(torch.nan, "holds NaN"), (-torch.inf, "holds infinity"), (3e38, "takes codes beyond")],
)
def test_scales_by_reference_are_checked_when_asked(
    scale: float, said: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    def damage(stored: dict[str, torch.Tensor]) -> None:
        stored["model.layers.1.mlp.up_proj.weight_scale"][3, 1] = scale

    copy = changed(made("4 bits, groups"), tmp_path / "checkpoint", tensors=damage)
    with pytest.raises(exporter.ExportError, match=rf"up_proj\.weight\.scales .*{said}"):
        exporter.export(copy, tmp_path / "package", check_values=True)
    assert not (tmp_path / "package").exists()


def test_scales_of_two_dtypes_are_named(made: Callable[..., Path], tmp_path: Path) -> None:
    def change(stored: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight_scale"
        stored[name] = stored[name].half()

    copy = changed(made("4 bits, groups"), tmp_path / "checkpoint", tensors=change)
    with pytest.raises(exporter.ExportError, match=r"q_proj are bf16 and those of .*up_proj fp16"):
        exporter.export(copy, tmp_path / "package")


@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_a_pattern_that_is_none_is_named(
    key: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    def change(stated: dict[str, Any]) -> None:
        place = stated if key == "ignore" else stated["config_groups"]["group_0"]
        place[key] = [*place[key], "re:*gate"]

    copy = changed(made("4 bits, groups"), tmp_path / "checkpoint", config=change)
    with pytest.raises(exporter.ConfigError, match=rf"{key} has '\*gate', which is no regular"):
        exporter.open_checkpoint(copy)


def test_dense_is_no_sparsity(made: Callable[..., Path], tmp_path: Path) -> None:
    sparsity = {"format": "dense", "sparsity_structure": "unstructured", "targets": []}
    change = set_to(sparsity_config=sparsity)
    exporter.open_checkpoint(
        changed(made("4 bits, groups"), tmp_path / "checkpoint", config=change)
    )


def test_the_old_name_of_the_config_is_named(made: Callable[..., Path], tmp_path: Path) -> None:
    copy = changed(made("4 bits, groups"), tmp_path / "checkpoint", config=set_to())
    stated = json.loads((copy / "config.json").read_text())
    stated["compression_config"] = stated.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(stated))
    with pytest.raises(exporter.ConfigError, match="old name of quantization_config; rename it"):
        exporter.open_checkpoint(copy)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "quantized by 'bitsandbytes'"),
        ({"quant_type": "gptq"}, "quant_method is missing"),
        ({"quant_method": "compressed-tensors", "format": "mixed-precision"}, "has no group"),
    ],
)
def test_a_method_that_is_not_said_plainly(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(exporter.ConfigError, match=said):
        parse_quantization(stated)


def test_a_group_without_a_format_of_its_own(made: Callable[..., Path], tmp_path: Path) -> None:
    change = set_to(format="mixed-precision")
    copy = changed(made("4 bits, groups"), tmp_path / "checkpoint", config=change)
    with pytest.raises(exporter.ConfigError, match=r"group_0'?\.format is missing"):
        exporter.open_checkpoint(copy)
