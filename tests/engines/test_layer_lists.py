"""The layers that TensorRT-RTX's builder makes of an engine: no copy of a cache beyond what its attention states.

The lists are recorded in layer_lists/, one file per checkpoint and GPU. After a change that is meant, record them anew:

    QWENPORT_RECORD=1 python -m pytest tests/engines/test_layer_lists.py
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest
from layer_list import LayerList, layer_list

from qwenport.contract import CHUNKED, DIRECT
from qwenport.exporter import export

EXAMPLES = Path(__file__).parents[2] / "examples"
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
