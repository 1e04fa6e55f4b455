"""The layers that TensorRT-RTX's builder makes of an engine: no copy of a cache beyond what its attention states.

The lists are recorded in layer_lists/, one file per checkpoint and GPU. After a change that is meant, record them anew:

    QWENPORT_RECORD=1 python -m pytest tests/engines/test_layer_lists.py
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from random_model import make_checkpoint

from qwenport.contract import CHUNK, CHUNKED, DIRECT
from qwenport.exporter import Package, export

from .layer_list import DecodeStep, LayerList, layer_list

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECORDED = Path(__file__).parent / "layer_lists"
DENSE, SPARSE, HALF = "tiny-qwen2.5", "tiny-qwen2-moe", "qwen2.5-0.5b-instruct"
GPUS = {"sm86": CHUNKED, "sm89": DIRECT, "sm120": DIRECT}
PROFILES = ("decode", "prefill")
MOST_KERNELS = {CHUNKED: (17, 19), DIRECT: (9, 9)}  # of a dense decoder layer, per profile


@pytest.fixture(scope="module")
def shapes() -> Any:
    """The benchmarks' module, which is a script and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("shapes")


@pytest.fixture(scope="module")
def package_of(shapes: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Package]:
    """The bundled checkpoints' packages, and one of two layers in the 0.5B shape with holes for weights; all bf16."""
    folder = tmp_path_factory.mktemp("packages")

    @functools.cache
    def make(name: str) -> Package:
        checkpoint = EXAMPLES / name
        if name == HALF:
            checkpoint = shapes.make_checkpoint(name, folder / "half", sparse=True, layers=2)
        return export(checkpoint, folder / name, dtype="bf16")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", [DENSE, SPARSE, HALF])
def test_the_layers_are_the_recorded_ones(
    package_of: Callable[[str], Package], name: str, gpu: str
) -> None:
    package, form = package_of(name), GPUS[gpu]
    made = layer_list(package.path, gpu, form, 8)
    check_weights(made, package)
    for profile, found in zip(PROFILES, made, strict=True):
        check_copies(found, form, profile)
        check_products(found, package)
    if name != SPARSE:
        for found, most in zip(made, MOST_KERNELS[form], strict=True):
            assert kernels_of_last_layer(found, package) <= most
    text = "".join(
        f"# {profile}\n" + "".join(f"{layer}\n" for layer in found.layers)
        for profile, found in zip(PROFILES, made, strict=True)
    )
    file = RECORDED / f"{name}-{gpu}.txt"
    if os.environ.get("QWENPORT_RECORD"):
        file.write_text(text, encoding="utf-8")
    recorded = file.read_text(encoding="utf-8")
    assert text == recorded, "\n" + "".join(
        difflib.unified_diff(
            recorded.splitlines(keepends=True), text.splitlines(keepends=True), str(file), "built"
        )
    )


def check_weights(made: Sequence[LayerList], package: Package) -> None:
    """Profiles share the weights, which are in the engine once, with little besides: rope tables, folded constants."""
    assert {found.weights_bytes for found in made} == {made[0].weights_bytes}
    assert made[0].weights_bytes <= 1.05 * package.manifest["weights"]["bytes"]


def check_copies(made: LayerList, form: str, profile: str) -> None:
    """Direct: none. Chunked: what prefill's fused attention reads, one K and one V per decoder layer.

    Tuned for prefill, it also copies chunks for the branch of single tokens, which has one chunk in a step of several.
    """
    caches = {t.name for layer in made.layers for t in layer.outputs if t.is_cache}
    copies = [layer for layer in made.layers if layer.copies_cache]
    fused = [layer for layer in made.layers if layer.name.startswith("_gemm_mha")]
    assert len(fused) == len(caches) // 2
    if form == DIRECT:
        assert copies == []
        assert all(sum(t.is_cache for t in layer.inputs) == 2 for layer in fused)
        return
    chunks = [layer for layer in copies if any(CHUNK in t.dims for t in layer.outputs)]
    spans = [layer for layer in copies if layer not in chunks]
    assert sorted(t.name for layer in spans for t in layer.inputs) == sorted(caches)
    assert chunks == [] or profile == "prefill"


def check_products(made: LayerList, package: Package) -> None:
    """Q, K and V are one product, so are gate and up; o_proj and down_proj add to the residual."""
    config = package.config
    hidden = config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    products = Counter(
        (layer.name.startswith("Fc"), constant.dims)
        for layer in made.layers
        if layer.kind == "gemm" or layer.name.startswith("Fc")
        for constant in layer.constants
        if len(constant.dims) == 2
    )
    expected: Counter[Any] = Counter({(False, (hidden, config.vocab_size)): 1})
    for layer in range(config.num_hidden_layers):
        expected[False, (hidden, qkv)] += 1
        expected[True, (heads, hidden)] += 1
        if config.moe is None or layer not in config.moe.layers:
            expected[False, (hidden, 2 * config.intermediate_size)] += 1
            expected[True, (config.intermediate_size, hidden)] += 1
    if config.moe is None:
        assert products == expected
    else:  # and those of the experts
        assert products >= expected


def kernels_of_last_layer(made: LayerList, package: Package) -> int:
    """From its product of Q, K and V to what picks the rows that get logits."""
    last = f"model.layers.{package.config.num_hidden_layers - 1}.self_attn"
    start = next(i for i, x in enumerate(made.layers) if last in x.name and x.kind == "gemm")
    picks = (
        i for i, x in enumerate(made.layers) if any(t.name == "logits_indices" for t in x.inputs)
    )
    return next(picks) - start


# ---- bytes of a decode step of the 7B shape at 32,768 tokens

SHAPE, LAYERS, SPAN = "qwen2.5-7b-instruct", 28, 32768
BUILT_LAYERS, BUILT_VOCABULARY = (
    2,
    2048,
)  # the layers are alike, and the head is counted by its shape
MOST = {
    (DIRECT, 1): 1.02,
    (DIRECT, 8): 1.02,
    (CHUNKED, 1): 1.05,
    (CHUNKED, 8): 1.16,
}


@pytest.fixture(scope="module")
def seven(shapes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in the 7B shape with two layers and a small vocabulary, its weights holes in a sparse file."""
    folder = tmp_path_factory.mktemp("seven")
    config = shapes.config_of(SHAPE) | {
        "num_hidden_layers": BUILT_LAYERS,
        "max_window_layers": BUILT_LAYERS,
        "vocab_size": BUILT_VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "config_of", lambda shape: config)
        checkpoint = shapes.make_checkpoint(SHAPE, folder / "checkpoint", sparse=True)
    return export(checkpoint, folder / "package").path


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "form"), GPUS.items())
def test_a_decode_step_moves_little_more_than_weights_keys_and_values(
    shapes: Any, seven: Path, gpu: str, form: str
) -> None:
    config = shapes.config_of(SHAPE)
    made, _ = layer_list(seven, gpu, form, 8)
    check_copies(made, form, "decode")
    weights = shapes.BYTES * sum(math.prod(shape) for shape in shapes.matrices(config))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    cached = 2 * config["num_key_value_heads"] * SPAN * head_dim * shapes.BYTES  # a row and layer
    for rows in (1, 8):
        step = DecodeStep(rows, SPAN, sliced=SPAN if form == DIRECT else CHUNK, chunk=CHUNK)
        moved = sum(map(step.bytes_of, made.layers)) / BUILT_LAYERS * LAYERS
        ideal = rows * cached * LAYERS
        ratio = (weights + moved) / (weights + ideal)
        print(f"{gpu} {form} {rows} rows: {ratio:.4f}")
        assert 1 <= ratio <= MOST[form, rows]


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_chunks_copy_no_cache_however_long_it_is(kv_heads: int, tmp_path: Path) -> None:
    """TensorRT-RTX does, in fp32, where the longest span is far longer than the one that it tunes for."""
    make_checkpoint(tmp_path / "checkpoint", positions=1 << 17, kv_heads=kv_heads)
    package = export(tmp_path / "checkpoint", tmp_path / "package", dtype="bf16")
    decode, _ = layer_list(package.path, "sm86", CHUNKED, 1)
    check_copies(decode, CHUNKED, "decode")


# ---- memory of one row of the 7B shape at 32,768 tokens

MOST_BYTES = 18e9


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["sm86", "sm89"])
def test_one_row_at_32768_tokens_needs_at_most_18_gb(shapes: Any, gpu: str, tmp_path: Path) -> None:
    """The weights, one row's cache, and the workspace that the builder states for one row of the longest steps.

    A session of one row in an engine for more allocates what TensorRT states for the session's shapes. Only a context
    on a GPU says that, so the engine here is one whose largest shapes these are.
    """
    config = shapes.config_of(SHAPE)
    checkpoint = shapes.make_checkpoint(SHAPE, tmp_path / "checkpoint", sparse=True, layers=2)
    package = export(checkpoint, tmp_path / "package")
    assert package.max_seq_len == SPAN
    made = layer_list(package.path, gpu, GPUS[gpu], 1)
    weights = shapes.BYTES * sum(map(math.prod, shapes.tensors_of(config).values()))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * LAYERS * config["num_key_value_heads"] * SPAN * head_dim * shapes.BYTES
    workspace = max(found.activation_bytes for found in made)  # which layers share
    print(f"{gpu}: {weights} + {cache} + {workspace}")
    assert 15.2e9 + 1.87e9 < weights + cache + workspace <= MOST_BYTES
