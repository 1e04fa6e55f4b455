"""benchmarks/roofline.py: its bytes follow from published sizes, and docs/gpu.md and the JSON are what it writes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import Qwen2Config

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# parameters
PUBLISHED = {"qwen2.5-0.5b-instruct": 494_032_768, "qwen2.5-7b-instruct": 7_615_616_512}


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("roofline")


def test_the_page_and_the_json_are_what_the_script_writes() -> None:
    command = [sys.executable, BENCHMARKS / "roofline.py", "--check"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", PUBLISHED)
def test_weights_are_all_matrices_and_no_lookup(shape: str, roofline: ModuleType) -> None:
    config = Qwen2Config(**roofline.config_of(shape))
    width, layers = config.hidden_size, config.num_hidden_layers
    kv = config.num_key_value_heads * width // config.num_attention_heads
    left_out = (
        layers * (2 * width + width + 2 * kv) + width
    )  # norms, biases of q, k and v, the last norm
    if not config.tie_word_embeddings:
        left_out += config.vocab_size * width
    found = roofline.step(shape, 1024, 1)
    assert found.weight_bytes == 2 * (PUBLISHED[shape] - left_out)


@pytest.mark.parametrize(("rows", "context"), [(1, 32768), (8, 1024)])
@pytest.mark.parametrize(("shape", "token"), [*zip(PUBLISHED, (12_288, 57_344), strict=True)])
def test_cache_bytes_are_those_of_every_token(
    shape: str, token: int, rows: int, context: int, roofline: ModuleType
) -> None:
    assert roofline.step(shape, context, rows).cache_bytes == rows * context * token


def test_a_step_that_copies_its_cache_moves_it_three_times(roofline: ModuleType) -> None:
    found = roofline.step("qwen2.5-7b-instruct", 32768, 8)
    ideal = found.weight_bytes + found.cache_bytes
    assert found.bytes["direct"] == ideal
    assert found.bytes["masked"] == ideal + 2 * found.cache_bytes
    assert found.bytes["masked"] > found.bytes["split"] == found.bytes["chunked"] > ideal


def test_a_bound_is_the_bandwidth_over_the_bytes_and_what_does_not_fit_has_none(
    roofline: ModuleType,
) -> None:
    small, large = (roofline.step("qwen2.5-7b-instruct", 32768, rows) for rows in (1, 8))
    for gpu in roofline.GPUS:
        assert small.steps_per_second[gpu.name]["direct"] * small.bytes["direct"] == pytest.approx(
            gpu.bandwidth, rel=0.01
        )
    assert "GeForce RTX 4090" not in large.steps_per_second
    assert "H100 SXM" in large.steps_per_second
