"""compressed-tensors' FP8: codes by reference, weights and rounded inputs as the library has them, the rest refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from float_quantized import quantization_config, write_float_quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwenport import exporter
from qwenport.exporter.emission import GraphBuilder
from qwenport.exporter.rounded_activations import Rounding

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
ROUTERS = ("lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
SCHEMES: dict[str, dict[str, Any]] = {
    "rows": {},
    "one scale": {"by_row": False},
    "static": {"activations": "static", "by_row": False},
    "dynamic": {"activations": "dynamic"},
}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(scheme) -> the bundled checkpoint in it. Tests must not change it."""
    folder, known = tmp_path_factory.mktemp("fp8"), {}

    def make(scheme: str) -> Path:
        if scheme not in known:
            known[scheme] = write_float_quantized(DENSE, folder / scheme, **SCHEMES[scheme])
        return known[scheme]

    return make


def _dequantized(package: Path, linear: str) -> torch.Tensor:
    """A weight by ONNX's own evaluator, from what model.onnx points at."""
    model = onnx.load(package / "model.onnx")
    (node,) = [n for n in model.graph.node if n.name == f"{linear}.DequantizeLinear"]
    graph = onnx.helper.make_graph(
        [node],
        "weight",
        [],
        [onnx.helper.make_empty_tensor_value_info(node.output[0])],
        [t for t in model.graph.initializer if t.name in node.input],
    )
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (weight,) = onnx.reference.ReferenceEvaluator(alone).run(None, {})
    return torch.from_numpy(np.asarray(weight).astype(np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_package_refers_to_the_codes_and_dequantizes_to_the_library_s_bits(
    scheme: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made(scheme)
    package = exporter.export(checkpoint, tmp_path / "package", weights="copy")
    stored = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    library = BaseCompressor.get_value_from_registry(config["format"])
    how = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    for linear in (UP, "model.layers.0.self_attn.q_proj", "model.layers.4.mlp.down_proj"):
        held = {key: stored[f"{linear}.{key}"] for key in ("weight", "weight_scale")}
        wanted = library.decompress(held, how)["weight"]
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(_dequantized(package.path, linear), wanted.float())
    own = [f for f in (package.path / "weights").iterdir() if f.name != "model.safetensors"]
    assert not own


@pytest.mark.parametrize(
    ("scheme", "kind"), [("static", "QuantizeLinear"), ("dynamic", "ReduceMax")]
)
def test_linears_with_one_input_share_its_rounding(
    scheme: str, kind: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    graph = exporter.export(made(scheme), tmp_path / "package").read_model().graph
    layers = 5
    assert [node.op_type for node in graph].count(kind) == 4 * layers  # qkv, o, gate and up, down


def test_linears_with_scales_of_their_own_do_not_share(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.k_proj.input_scale"] *= 2

    checkpoint = _changed(made("static"), tmp_path / "checkpoint", change)
    graph = exporter.export(checkpoint, tmp_path / "package").read_model().graph
    assert [node.op_type for node in graph].count("QuantizeLinear") == 21
    inputs = {str(node.name): node.inputs[0] for node in graph if node.op_type == "MatMul"}
    q, k, v = (inputs[f"model.layers.2.self_attn.{n}_proj.MatMul"] for n in "qkv")
    assert q is v and q is not k


def _rounded(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What onnxruntime makes of the nodes that round an input, fp32."""
    builder = GraphBuilder()
    axes: list[int | str] = ["batch", "seq", x.shape[2]]
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(axes))
    held = None
    if scale is not None:
        held = builder.initializer(ir.tensor(scale.reshape(()).numpy(), name="scale"))
    made = Rounding(held)(builder, given)
    graph = ir.Graph(
        [given],
        [made],
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": 24},
        name="rounding",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 5),
    width=st.integers(1, 300),
    size=st.floats(-30, 30),
    share=st.sampled_from([0.01, 0.5, 1.0, 3.0]),
    dynamic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_inputs_are_rounded_to_the_library_s_bits(
    tokens: int, width: int, size: float, share: float, dynamic: bool, seed: int
) -> None:
    """Beyond the largest code, in the middle between codes, zeros, and numbers that no code but zero is near."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, width, generator=generator) * 2**size
    x[0, 0] = 0
    scale = share * x.abs().max().clamp(min=1e-30).reshape(1) / 448
    x[1, -1, ::3] = 17 * scale  # in the middle between 16 and 18
    how = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic}
    arguments = QuantizationArgs(strategy="token" if dynamic else "tensor", **how)
    zero_point, used = None, scale
    if dynamic:
        used, zero_point = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity())
    wanted = fake_quantize(x, used, zero_point, arguments)
    assert torch.equal(_rounded(x, None if dynamic else scale), wanted)


def _changed(
    checkpoint: Path,
    target: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
) -> Path:
    """A copy with other tensors, or another quantization_config."""
    target.mkdir()
    stored = load_file(checkpoint / "model.safetensors")
    tensors(stored)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((checkpoint / "config.json").read_text())
    config(stated["quantization_config"])
    (target / "config.json").write_text(json.dumps(stated))
    return target


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


GROUP = ("config_groups", "group_0")
WEIGHTS, INPUTS = (*GROUP, "weights"), (*GROUP, "input_activations")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("format", value="int-quantized"), "format 'int-quantized'"),
        (_set("format", value="pack-quantized"), "input_activations"),
        (_set("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme"),
        (_set(*GROUP, "output_activations", value={"num_bits": 8}), "output_activations"),
        (_set(*GROUP, "format", value="naive-quantized"), "group_0'.format 'naive-quantized'"),
        (_set(*WEIGHTS, "type", value="int"), "weights.type 'int'"),
        (_set(*WEIGHTS, "num_bits", value=4), "weights.num_bits 4"),
        (_set(*WEIGHTS, "symmetric", value=False), "weights.symmetric false"),
        (_set(*WEIGHTS, "strategy", value="block"), "weights.strategy 'block'"),
        (_set(*WEIGHTS, "strategy", value="group"), "weights.strategy 'group'"),
        (_set(*WEIGHTS, "group_size", value=128), "weights.group_size 128"),
        (_set(*WEIGHTS, "dynamic", value=True), "weights.dynamic true"),
        (_set(*WEIGHTS, "a_key_of_tomorrow", value=1), "a_key_of_tomorrow"),
        (_set(*INPUTS, "type", value="int"), "input_activations.type 'int'"),
        (_set(*INPUTS, "strategy", value="tensor"), "input_activations.strategy 'tensor'"),
        (_set(*INPUTS, "strategy", value="group"), "input_activations.strategy 'group'"),
        (_set(*INPUTS, "dynamic", value="local"), "input_activations.dynamic 'local'"),
        (_set(*INPUTS, "dynamic", value=False), "input_activations.strategy 'token'"),
        (_set(*INPUTS, "scale_dtype", value="torch.uint8"), "input_activations.scale_dtype"),
        (_set(*INPUTS, "symmetric", value=False), "input_activations.symmetric false"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(change: Any, named: str) -> None:
    stated = quantization_config(by_row=True, activations="dynamic", ignore=["lm_head"])
    change(stated)
    raw = json.loads((DENSE / "config.json").read_text())
    with pytest.raises(exporter.ConfigError, match=re.escape(named)):
        exporter.parse_config({**raw, "quantization_config": stated})


def _swap(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("scheme", "change", "named"),
    [
        ("static", lambda t: t.pop(f"{UP}.input_scale"), f"{UP}.input_scale"),
        (
            "dynamic",
            lambda t: t.update({f"{UP}.input_scale": torch.ones(1)}),
            f"{UP}.input_scale",
        ),
        ("static", _swap(f"{UP}.input_scale", torch.zeros_like), "a scale is more than 0"),
        ("static", _swap(f"{UP}.input_scale", lambda t: t / 0), "a scale is more than 0"),
        ("rows", lambda t: t.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale"),
        ("rows", _swap(f"{UP}.weight_scale", lambda t: t[:1]), f"{UP}.weight_scale has shape"),
        ("one scale", _swap(f"{UP}.weight_scale", lambda t: t.expand(640, 1).clone()), "has shape"),
        ("rows", _swap(f"{UP}.weight", lambda t: t.bfloat16()), "the format needs F8_E4M3"),
        ("rows", _swap(f"{UP}.weight", lambda t: t.float().to(torch.float8_e5m2)), "F8_E5M2"),
        ("rows", _swap("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)), "model.norm"),
    ],
)
def test_a_tensor_that_the_format_does_not_have_so_is_named(
    scheme: str, change: Any, named: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = _changed(made(scheme), tmp_path / "checkpoint", change)
    with pytest.raises(exporter.CheckpointError, match=re.escape(named)):
        exporter.open_checkpoint(checkpoint)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number_are_named_when_values_are_checked(
    code: int, made: Callable[..., Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"].view(torch.uint8)[3, 5] = code

    checkpoint = _changed(made("rows"), tmp_path / "checkpoint", change)
    with pytest.raises(exporter.ExportError, match=re.escape(UP) + ".* holds NaN"):
        exporter.export(checkpoint, tmp_path / "package", check_values=True)


def test_a_scale_may_have_no_axis(made: Callable[..., Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_scale")]:
            tensors[name] = tensors[name].reshape(())

    checkpoint = _changed(made("static"), tmp_path / "checkpoint", change)
    one, other = (
        exporter.export(path, tmp_path / str(number), weights="copy")
        for number, path in enumerate((checkpoint, made("static")))
    )
    one.check_graph()
    assert torch.equal(_dequantized(one.path, UP), _dequantized(other.path, UP))


def test_scales_in_fp32_ask_for_a_package_in_fp32(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].float()

    checkpoint = _changed(made("rows"), tmp_path / "checkpoint", change)
    with pytest.raises(exporter.ExportError, match="exported in their dtype: --dtype fp32"):
        exporter.export(checkpoint, tmp_path / "refused")
    exporter.export(checkpoint, tmp_path / "package", dtype="fp32").check_graph()
    with pytest.raises(exporter.ExportError, match="--dtype bf16"):
        exporter.export(made("rows"), tmp_path / "refused", dtype="fp32")


def test_an_adapter_of_a_weight_in_fp8_is_refused(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = _changed(made("rows"), tmp_path / "checkpoint")
    prefix, weights = "base_model.model.", {"A": torch.ones(4, 192), "B": torch.ones(640, 4)}
    save_file(
        {f"{prefix}{UP}.lora_{key}.weight": tensor for key, tensor in weights.items()},
        checkpoint / "adapter_model.safetensors",
    )
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [UP]}
    (checkpoint / "adapter_config.json").write_text(json.dumps(stated))
    with pytest.raises(exporter.CheckpointError, match=f"{UP}.weight, which is quantized"):
        exporter.export(checkpoint, tmp_path / "package", adapter="merge")


@pytest.mark.parametrize(
    ("ignore", "names"),
    [
        (r"re:.*layers\.0\.mlp\.experts\..*", "some experts"),
        (r"re:.*\.experts\.3\.up_proj", "some experts"),
    ],
)
def test_experts_round_all_or_none(ignore: str, names: str, tmp_path: Path) -> None:
    checkpoint = write_float_quantized(
        MIXTURE, tmp_path / "checkpoint", ignore=(*ROUTERS, ignore), activations="dynamic"
    )
    with pytest.raises(exporter.ConfigError, match=names):
        exporter.open_checkpoint(checkpoint)


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_experts_are_in_fp8(activations: str | None, tmp_path: Path) -> None:
    how: dict[str, Any] = {"activations": activations}
    checkpoint = write_float_quantized(MIXTURE, tmp_path / "checkpoint", ignore=ROUTERS, **how)
    package = exporter.export(checkpoint, tmp_path / "package")
    for node in package.read_model().graph:
        if node.op_type == "MoEExperts":
            given = node.inputs[0]
            assert given is not None and ("rounded" in str(given.name)) == (activations is not None)
            assert ("round_inner" in node.attributes) == (activations is not None)
    names = [n.name for n in package.read_model().graph if n.op_type == "DequantizeLinear"]
    moe = package.config.moe
    assert moe is not None
    experts = [name for name in names if name is not None and ".experts." in name]
    assert len(experts) == 3 * moe.num_experts * len(moe.layers)


def test_a_head_that_is_the_embedding_is_not_rounded_silently(tmp_path: Path) -> None:
    """compressed-tensors rounds the input of any Linear that is not ignored, a tied head's too."""
    stated = quantization_config(by_row=True, activations="dynamic", ignore=[])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DENSE))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    apply_quantization_config(model, QuantizationConfig.model_validate(stated))
    assert model.lm_head.quantization_scheme.input_activations.dynamic is True
    checkpoint = write_float_quantized(
        DENSE, tmp_path / "checkpoint", activations="dynamic", ignore=()
    )
    with pytest.raises(exporter.ConfigError, match=r"tied to the embedding.*lm_head in ignore"):
        exporter.open_checkpoint(checkpoint)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_head_rounds_its_input_as_other_linears_do(activations: str, tmp_path: Path) -> None:
    ignore = (*ROUTERS[1:], r"re:.*\.experts\..*")
    checkpoint = write_float_quantized(
        MIXTURE, tmp_path / "checkpoint", ignore=ignore, activations=activations
    )
    model = exporter.export(checkpoint, tmp_path / "package").read_model()
    (head,) = [node for node in model.graph if node.name == "model.lm_head.MatMul"]
    given = head.inputs[0]
    assert given is not None and given.name == "model.norm.RMSNormalization.rounded"
    assert ("lm_head.weight.input_scale" in model.graph.initializers) == (activations == "static")
