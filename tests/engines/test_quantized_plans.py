"""TensorRT-RTX engines of quantized packages: which kernels its builder makes, without a GPU."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from quantized_shapes import write_gptq_shape, write_shape

from qwenport import cli, engines
from qwenport.contract import MASKED, PLAN, no_progress
from qwenport.engines import FLAVOURS, BuildError, serves
from qwenport.engines.layer_check import check_layers
from qwenport.engines.lowering import SignedWeight
from qwenport.engines.lowering.made_tensors import Correction
from qwenport.engines.plan import build_plan
from qwenport.engines.targets import (
    INT4,
    INT8,
    code_types,
    load_tensorrt,
    parse_gpus,
    product_types,
)
from qwenport.exporter import Package, export

from .layer_list import Layer, LayerList, layer_list

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = Path(__file__).parents[2] / "examples"
HALF, BIG = "qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct"
MIXTURE = "qwen1.5-moe-a2.7b-chat"
VOCABULARY = 256
LOW_BIT = ("Int4", "Int8")
DENSE = 4  # products of a dense decoder layer: QKV, output, gate and up, down
PLAIN_KERNELS = 24  # of an engine of one symmetric dense layer
MOST_CORRECTING = (
    7  # kernels more with corrections: four products, and three norms that are cut for sums
)
RTX = FLAVOURS["tensorrt-rtx"]

SCHEMES = [(4, 128, True), (4, 32, True), (4, None, True), (8, None, True)]
CORRECTED = [(4, 128, False), (8, 128, True), (8, None, False)]


@pytest.fixture
def package_of(tmp_path: Path) -> Callable[..., Package]:
    """The first decoder layers of a shape, with random codes and a small vocabulary."""

    def make(
        shape: str,
        layers: int,
        bits: int,
        group: int | None,
        symmetric: bool,
        act_order: bool = False,
        **changes: Any,
    ) -> Package:
        config = json.loads((CONFIGS / f"{shape}.json").read_text())
        folder = (write_gptq_shape if act_order else write_shape)(
            {**config, "vocab_size": VOCABULARY, **changes},
            tmp_path / "checkpoint",
            layers=layers,
            bits=bits,
            group=group,
            symmetric=symmetric,
        )
        return export(folder, tmp_path / "package", max_seq_len=1024)

    return make


def low_bit(made: LayerList) -> list[Layer]:
    return [k for k in made.layers if any(c.dtype in LOW_BIT for c in k.constants)]


def elements(made: LayerList) -> int:
    """Of all codes; a constant counts once, however many layers read it."""
    sizes = {
        c.name: math.prod(c.dims)
        for layer in made.layers
        for c in layer.constants
        if c.dtype in LOW_BIT
    }
    return sum(sizes.values())


def quantized_elements(package: Package) -> int:
    found = package.read_model().graph.initializers.values()
    return sum(v.const_value.size for v in found if str(v.name).endswith(".codes"))


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_a_dense_layer_has_four_fused_products(
    package_of: Callable[..., Package], bits: int, group: int | None, symmetric: bool
) -> None:
    package = package_of(HALF, 1, bits, group, symmetric)
    dtype = "Int8" if bits == 8 else "Int4"
    for made in layer_list(package.path, "sm89", "direct", 2):
        fused = low_bit(made)
        assert [layer.kind for layer in fused] == ["runtime_fusion"] * DENSE
        assert {c.dtype for layer in fused for c in layer.constants} <= {dtype, "BFloat16"}
        assert elements(made) == quantized_elements(package)
        assert made.weights_bytes <= 1.05 * package.manifest["weights"]["bytes"] + 2**16


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group", "symmetric"), CORRECTED)
def test_corrections_leave_the_products_fused(
    package_of: Callable[..., Package], bits: int, group: int | None, symmetric: bool
) -> None:
    package = package_of(HALF, 1, bits, group, symmetric)
    for made in layer_list(package.path, "sm89", "direct", 2):
        fused = low_bit(made)
        assert [layer.kind for layer in fused] == ["runtime_fusion"] * DENSE
        assert elements(made) == quantized_elements(package) * (2 if bits == 8 and group else 1)
        assert len(made.layers) <= PLAIN_KERNELS + MOST_CORRECTING


EXPERTS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, asymmetric": {"symmetric": False},
    "8 bits": {"bits": 8},
    "8 bits, asymmetric": {"bits": 8, "symmetric": False},
    "act-order": {"act_order": True},
    "8 bits, act-order": {"bits": 8, "act_order": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", EXPERTS)
def test_experts_are_read_as_codes_and_never_expanded(
    package_of: Callable[..., Package], scheme: str
) -> None:
    how = {"bits": 4, "group": 128, "symmetric": True, **EXPERTS[scheme]}
    package = package_of(MIXTURE, 1, num_experts=8, **how)
    moe = package.config.moe
    assert moe is not None
    stack = moe.num_experts * 2 * moe.expert_size * package.config.hidden_size
    for made in layer_list(package.path, "sm89", "auto", 2):
        read = Counter(k.kind for k in low_bit(made) for c in k.constants if c.dtype in LOW_BIT)
        assert read == {"runtime_fusion": 2 + 2, "kgen": 2}  # attention, shared expert; experts
        assert elements(made) == quantized_elements(package) * how["bits"] // 4
        for layer in made.layers:
            for tensor in layer.outputs:
                assert min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) < stack // 4


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_plan_is_hardly_larger_than_the_quantized_weights(
    package_of: Callable[..., Package], tmp_path: Path, symmetric: bool
) -> None:
    """In the 7B shape; in that of 0.5B the kernels of a layer are a fifth of its weights."""
    package = package_of(BIG, 2, 4, 128, symmetric)
    engine = engines.build(
        package.path, tmp_path / "engine", target="tensorrt-rtx", gpus="sm89", max_batch=1
    )
    assert engine.plan.stat().st_size <= 1.05 * package.manifest["weights"]["bytes"]


def product(folder: Path, block: int | None) -> SignedWeight:
    """y = x W^T with INT8 codes, in blocks or with a scale per row; what the check is told of it."""
    n, k = 64, 256
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (n, k), dtype=np.int8)
    shape = (n,) if block is None else (n, k // block)
    attributes = {"axis": 0} if block is None else {"axis": 1, "block_size": block}
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["d"], name="l", **attributes),
        helper.make_node("Transpose", ["d"], ["t"], name="t", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="product"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT16, [1, "m", k])],
        [value("y", TensorProto.FLOAT16, [1, "m", n])],
        [
            onnx.numpy_helper.from_array(codes, "c"),
            onnx.numpy_helper.from_array(random.random(shape).astype(np.float16), "s"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), folder / "m.onnx"
    )
    return SignedWeight("l", ("l.weight",), n * k, None, None)  # type: ignore[arg-type]


def build_product(folder: Path, block: int | None) -> None:
    weight = product(folder, block)
    profile = {"x": {"min": [1, 1, 256], "opt": [1, 1, 256], "max": [1, 64, 256]}}
    trt = load_tensorrt(RTX, "test")
    model, plan = folder / "m.onnx", folder / PLAN
    build_plan(trt, model, plan, ("sm89",), [profile], MASKED, [weight], no_progress)


def test_the_check_passes_a_product_that_tensorrt_fuses(tmp_path: Path) -> None:
    build_product(tmp_path, None)


def test_a_weight_that_tensorrt_expands_fails_the_build(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"expand 1 quantized weights in every step, l\.weight first"
    ):
        build_product(tmp_path, 64)


def test_digits_that_are_added_before_experts_are_chosen_are_an_expanded_weight() -> None:
    """Of two digits side by side: what is made has half as many elements."""
    layer = (
        "Layers:\nName: __myl_Sum_myl0_1, LayerType: kgen, Inputs: [], Constants: "
        "[Name: c, Dimensions: [8,32], Format/Datatype: Int4], Outputs: "
        "[Name: y, Dimensions: [8,{}], Format/Datatype: BFloat16], TacticName: t, Metadata: [ONNX Layer: l]"
    )
    correction = Correction("l.correction", (), 136, 2, 2, of_experts=True)
    weight = SignedWeight("l", ("l.weight",), 8 * 32, None, correction)  # type: ignore[arg-type]
    check_layers([layer.format(15)], [weight])
    with pytest.raises(BuildError, match=r"expand 1 quantized weights in every step, l\.weight"):
        check_layers([layer.format(16)], [weight])


def test_without_a_list_of_layers_nothing_is_known() -> None:
    weight = SignedWeight("l", ("l.weight",), 4, None, None)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="did not list"):
        check_layers(["[V] something else"], [weight])


@pytest.mark.parametrize(
    ("dtype", "codes", "default"),
    [
        ("bf16", INT4, "sm80 sm86 sm89 sm120 sm121"),
        ("fp16", INT4, "sm80 sm86 sm89 sm120 sm121"),
        ("bf16", INT8, "sm80 sm86 sm89 sm120 sm121"),
        ("fp16", INT8, "sm75 sm80 sm86 sm89 sm120 sm121"),
    ],
)
def test_default_gpus_are_those_that_have_the_types(dtype: str, codes: str, default: str) -> None:
    assert parse_gpus(None, RTX, dtype, (codes,)) == tuple(default.split())


def test_a_named_gpu_without_the_type_is_refused() -> None:
    words = rf"^sm75 has no kernels for {INT4}, .*leave it out of --gpu$"
    with pytest.raises(BuildError, match=words):
        parse_gpus("sm86,sm75", RTX, "fp16", (INT4,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group", "codes"), [(4, 128, INT4), (8, None, INT8), (8, 128, INT4), (4, None, INT4)]
)
def test_engines_for_every_default_gpu_build(
    tmp_path: Path, bits: int, group: int | None, codes: str
) -> None:
    """That TensorRT has the kernels: one GPU in the list without them fails a build."""
    config = json.loads((CONFIGS / f"{HALF}.json").read_text()) | {"vocab_size": VOCABULARY}
    folder = write_shape(
        config, tmp_path / "c", layers=1, bits=bits, group=group, dtype=torch.float16
    )
    package = export(folder, tmp_path / "package", max_seq_len=1024, dtype="fp16")
    assert code_types(package.config) == (codes,)
    engine = engines.build(package.path, tmp_path / "engine", target="tensorrt-rtx", max_batch=1)
    assert engine.manifest["gpus"] == list(parse_gpus(None, RTX, "fp16", (codes,)))


def test_a_quantized_mixture_with_plugins_is_refused(
    package_of: Callable[..., Package], tmp_path: Path
) -> None:
    package = package_of(MIXTURE, 1, 4, 128, True, num_experts=4, moe_intermediate_size=128)
    with pytest.raises(BuildError, match="MoEExperts does not multiply by quantized weights"):
        engines.build(
            package.path, tmp_path / "engine", target="tensorrt-rtx", plugins=tmp_path / "library"
        )


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("w4a16", {"sm80", "sm86", "sm89", "sm120", "sm121"}),
        ("fp8-dynamic", {"sm89", "sm120", "sm121"}),
    ],
)
def test_inspect_says_which_gpus_build_takes(
    name: str, gpus: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = export(EXAMPLES / "quantized" / name, tmp_path / "package")
    chosen = parse_gpus(None, RTX, package.dtype, product_types(package.config))
    assert set(chosen) == gpus
    told = {gpu for gpu in RTX.gpus if serves(RTX, gpu, package.config, package.dtype)}
    assert told == gpus
    assert cli.main(["inspect", str(package.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    able = {g["architecture"] for g in shown["gpus"] if RTX.name in g["targets"]}
    assert able and able <= gpus
