"""FP8 on TensorRT-RTX: which kernels its builder makes, without a GPU, and what is refused before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from command_line import Capture
from fine_grained_fp8 import write_fine_grained_fp8
from float_quantized import write_float_quantized
from safetensors.torch import load_file, save_file

from qwenport import cli, engines
from qwenport.engines import FLAVOURS, BuildError
from qwenport.engines.lowering import MadeFile, MultiplyByFloat8
from qwenport.engines.targets import FLOAT8, code_types, parse_gpus
from qwenport.exporter import Package, export

from .layer_list import layer_list
from .quantized_graphs import count

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
GATES = (r"re:.*\.gate$", r"re:.*shared_expert_gate$")
RTX = FLAVOURS["tensorrt-rtx"]
SM = "sm89"
PRODUCTS = 4  # of a dense decoder layer: QKV, output, gate and up, down
SCHEMES: dict[str, dict[str, Any]] = {
    "rows": {},
    "one scale": {"by_row": False},
    "static": {"activations": "static"},
    "dynamic": {"activations": "dynamic"},
    "partly": {"activations": "dynamic", "ignore": ("lm_head", r"re:.*\.mlp\..*")},
}


def package_of(folder: Path, source: Path = DENSE, **how: Any) -> Package:
    checkpoint = write_float_quantized(source, folder / "checkpoint", **how)
    return export(checkpoint, folder / "package", max_seq_len=64)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_weight_is_read_as_codes_by_a_fused_product(tmp_path: Path, scheme: str) -> None:
    package = package_of(tmp_path, **SCHEMES[scheme])
    codes = {
        str(name): value.const_value.size
        for name, value in package.read_model().graph.initializers.items()
        if str(name).endswith(".codes") and value.const_value is not None
    }
    products = PRODUCTS // 2 if scheme == "partly" else PRODUCTS
    for made in layer_list(package.path, SM, "direct", 2):
        readers = [k for k in made.layers if any(c.dtype == "FP8" for c in k.constants)]
        assert len(readers) == products * package.config.num_hidden_layers
        sizes = [c.dims[-1] * c.dims[-2] for k in readers for c in k.constants if c.dtype == "FP8"]
        assert sum(sizes) == sum(codes.values())
        if "activations" in SCHEMES[scheme]:
            assert {k.kind for k in readers} == {"gemm"}
            for layer in readers:  # a product of two FP8 matrices, written before it is scaled
                assert [t.dtype for t in layer.inputs] == ["FP8"]
                assert [t.dtype for t in layer.outputs] == ["Float"]
        else:
            assert {k.kind for k in readers} == {"runtime_fusion"}


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_head_that_rounds_its_input_is_a_product_of_codes(
    tmp_path: Path, activations: str
) -> None:
    ignore = (*GATES, r"re:.*\.mlp\..*", r"re:.*self_attn.*")
    package = package_of(tmp_path, MIXTURE, activations=activations, ignore=ignore)
    shape = (package.config.hidden_size, package.config.vocab_size)
    for made in layer_list(package.path, SM, "direct", 2):
        (head,) = [k for k in made.layers if any(c.dtype == "FP8" for c in k.constants)]
        assert head.kind == "gemm" and [t.dtype for t in head.inputs] == ["FP8"]
        assert [c.dims[-2:] for c in head.constants if c.dtype == "FP8"] == [shape]


def test_the_command_line_builds_for_every_gpu_that_has_fp8(
    tmp_path: Path, capsys: Capture
) -> None:
    package = package_of(tmp_path, activations="dynamic")
    out = tmp_path / "engine"
    assert cli.main(["build", str(package.path), str(out), "--target", "tensorrt-rtx"]) == 0
    engine = engines.load_engine(out)
    assert engine.manifest["gpus"] == ["sm89", "sm120", "sm121"]
    capsys.readouterr()


@pytest.mark.parametrize("gpu", ["sm75", "sm80", "sm86"])
def test_a_named_gpu_without_fp8_is_refused(tmp_path: Path, gpu: str) -> None:
    package = package_of(tmp_path)
    assert code_types(package.config) == (FLOAT8,)
    assert gpu not in parse_gpus(None, RTX, "fp16", (FLOAT8,))
    with pytest.raises(BuildError, match=rf"^{gpu} has no kernels for (FP8|bf16)"):
        engines.build(package.path, tmp_path / "engine", target="tensorrt-rtx", gpus=f"{SM},{gpu}")
    assert not (tmp_path / "engine").exists()


def test_linears_of_one_input_with_other_scales_are_not_merged(tmp_path: Path) -> None:
    checkpoint = write_float_quantized(DENSE, tmp_path / "checkpoint", activations="static")
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_proj.input_scale"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    model = export(checkpoint, tmp_path / "package").read_model()
    made = MadeFile()
    MultiplyByFloat8(made)(model)
    first = [w.weights for w in made.weights if "layers.0.self_attn" in w.node]
    assert [len(names) for names in first] == [2, 1, 1]
    assert first[1] == ("model.layers.0.self_attn.k_proj.weight",)
    scales = {str(v.dtype) for n, v in model.graph.initializers.items() if n.endswith("d.scales")}
    assert scales == {str(ir.DataType.FLOAT)}
    assert count(model, "QuantizeLinear") == len({w.node for w in made.weights})


@pytest.mark.parametrize(
    "how",
    [{}, {"by_row": False}, {"activations": "dynamic"}, {"activations": "static"}],
    ids=["rows", "one scale", "dynamic", "static"],
)
def test_chosen_experts_are_read_as_codes(tmp_path: Path, how: dict[str, Any]) -> None:
    """In a decode step by two kernels per layer, which dequantize, multiply and add."""
    others = (r"re:.*self_attn.*", r"re:.*shared_expert.*", r"re:.*\.mlp\.[a-z]+_proj")
    package = package_of(tmp_path, MIXTURE, ignore=("lm_head", *GATES, *others), **how)
    moe, hidden = package.config.moe, package.config.hidden_size
    assert moe is not None
    sizes = {2 * moe.expert_size * hidden, moe.expert_size * hidden}  # of one expert's matrices
    decode, prefill = layer_list(package.path, SM, "direct", 2)
    for made in (decode, prefill):
        readers = [k for k in made.layers if any(c.dtype == "FP8" for c in k.constants)]
        codes = [c.dims[-1] * c.dims[-2] for k in readers for c in k.constants if c.dtype == "FP8"]
        assert sorted(codes) == sorted(moe.num_experts * size for size in sizes for _ in moe.layers)
        assert {k.kind for k in readers} == {"kgen"}
        fixed = [t for k in made.layers for t in k.outputs if min(t.dims, default=-1) > 0]
        assert all(math.prod(t.dims) < moe.num_experts * min(sizes) for t in fixed)
    readers = [k for k in decode.layers if any(c.dtype == "FP8" for c in k.constants)]
    assert len(readers) == 2 * len(moe.layers)
    for layer in readers:  # sums: what they write is no weight, chosen or not
        assert all(min(sizes) not in (t.dims[-1] * t.dims[-2], t.dims[-1]) for t in layer.outputs)
        assert any(t.dtype == "Float" and t.dims[-1] == 1 for t in layer.outputs)


def test_an_input_that_is_rounded_in_another_way_is_refused(tmp_path: Path) -> None:
    model = package_of(tmp_path, activations="dynamic").read_model()
    where = next(n for n in model.graph if n.op_type == "Where" and ".rounded" in str(n.name))
    where.replace_input_with(2, where.inputs[1])
    with pytest.raises(engines.LoweringError, match="not rounded to FP8 as an export does it"):
        MultiplyByFloat8(MadeFile()).call(model)


def test_an_engine_of_fp8_blocks_is_that_of_plain_weights(tmp_path: Path) -> None:
    checkpoint = write_fine_grained_fp8(DENSE, tmp_path / "checkpoint")
    package = export(checkpoint, tmp_path / "package", max_seq_len=64)
    plain = export(DENSE, tmp_path / "plain", max_seq_len=64)
    assert code_types(package.config) == ()
    made, wanted = (
        engines.build(p.path, tmp_path / f"{p.path.name}.engine", target="tensorrt-rtx", gpus=SM)
        for p in (package, plain)
    )
    assert made.manifest["layers"] == wanted.manifest["layers"]
