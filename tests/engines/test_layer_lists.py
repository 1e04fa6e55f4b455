"""The layers that TensorRT-RTX's builder makes of an engine: no copy of a cache beyond what its attention states.

The lists are recorded in layer_lists/, one file per checkpoint and GPU. After a change that is meant, record them anew:

    QWENPORT_RECORD=1 python -m pytest tests/engines/test_layer_lists.py
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
from pathlib import Path
from typing import Any

import pytest

from qwenport.contract import CHUNK, CHUNKED, DIRECT
from qwenport.exporter import export

from .layer_list import DecodeStep, LayerList, layer_list

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECORDED = Path(__file__).parent / "layer_lists"
CASES = [
    ("tiny-qwen2.5", "sm86", CHUNKED),
    ("tiny-qwen2.5", "sm89", DIRECT),
    ("tiny-qwen2.5", "sm120", DIRECT),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    names = {name for name, _, _ in CASES}
    return {name: export(EXAMPLES / name, folder / name, dtype="bf16").path for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpu", "form"), CASES)
def test_the_layers_are_the_recorded_ones(
    packages: dict[str, Path], name: str, gpu: str, form: str
) -> None:
    made = layer_list(packages[name], gpu, form, 8)
    check_copies(made, form)
    text = "".join(f"{layer}\n" for layer in made.layers)
    file = RECORDED / f"{name}-{gpu}.txt"
    if os.environ.get("QWENPORT_RECORD"):
        file.write_text(text, encoding="utf-8")
    recorded = file.read_text(encoding="utf-8")
    assert text == recorded, "\n" + "".join(
        difflib.unified_diff(
            recorded.splitlines(keepends=True), text.splitlines(keepends=True), str(file), "built"
        )
    )


def check_copies(made: LayerList, form: str) -> None:
    """Direct: none. Chunked: what prefill's fused attention reads, one K and one V per decoder layer."""
    caches = {t.name for layer in made.layers for t in layer.outputs if t.is_cache}
    copies = [layer for layer in made.layers if layer.copies_cache]
    fused = [layer for layer in made.layers if layer.name.startswith("_gemm_mha")]
    assert len(fused) == len(caches) // 2
    if form == DIRECT:
        assert copies == []
        assert all(sum(t.is_cache for t in layer.inputs) == 2 for layer in fused)
    else:
        assert sorted(t.name for layer in copies for t in layer.inputs) == sorted(caches)


# ---- bytes of a decode step of the 7B shape at 32,768 tokens

SHAPE, LAYERS, SPAN = "qwen2.5-7b-instruct", 28, 32768
BUILT_LAYERS, BUILT_VOCABULARY = (
    2,
    2048,
)  # the layers are alike, and the head is counted by its shape
MOST = {
    ("sm89", DIRECT, 1): 1.02,
    ("sm89", DIRECT, 8): 1.02,
    ("sm86", CHUNKED, 1): 1.05,
    ("sm86", CHUNKED, 8): 1.16,
}


@pytest.fixture(scope="module")
def shapes() -> Any:
    """The benchmarks' module, which is a script and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("shapes")


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
@pytest.mark.parametrize(("gpu", "form"), [("sm89", DIRECT), ("sm86", CHUNKED)])
def test_a_decode_step_moves_little_more_than_weights_keys_and_values(
    shapes: Any, seven: Path, gpu: str, form: str
) -> None:
    config = shapes.config_of(SHAPE)
    made = layer_list(seven, gpu, form, 8)
    check_copies(made, form)
    weights = shapes.BYTES * sum(math.prod(shape) for shape in shapes.matrices(config))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    cached = 2 * config["num_key_value_heads"] * SPAN * head_dim * shapes.BYTES  # a row and layer
    for rows in (1, 8):
        step = DecodeStep(rows, SPAN, sliced=SPAN if form == DIRECT else CHUNK, chunk=CHUNK)
        moved = sum(map(step.bytes_of, made.layers)) / BUILT_LAYERS * LAYERS
        ideal = rows * cached * LAYERS
        ratio = (weights + moved) / (weights + ideal)
        print(f"{gpu} {form} {rows} rows: {ratio:.4f}")
        assert 1 <= ratio <= MOST[gpu, form, rows]
