"""validate() on real packages: every rope kind, every dtype, wrong pairs, and what cannot be judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import seed, wrong_last_rope_row
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qwenport.exporter import (
    MANIFEST,
    as_json,
    export,
    load_package,
    parse_config,
    read_config_json,
    write_json,
)
from qwenport.validate import Report, ValidationError, validate
from qwenport.validate.prompts import make_prompts
from qwenport.validate.reference import Reference
from qwenport.validate.scenarios import SCENARIOS
from qwenport.validate.target import open_target

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5"
HEAD_DIM = 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and parallel test workers would fight over cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_checkpoint(
    folder: Path,
    rope: dict[str, Any] | None = None,
    *,
    family: type = Qwen2Config,
    positions: int = 64,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A random two-layer checkpoint with biases and norms that are not trivial."""
    config = family(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return folder


def status(report: Report) -> dict[str, str]:
    return {scenario.name: scenario.status for scenario in report.scenarios}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(CHECKPOINT, tmp_path_factory.mktemp("tiny") / "package", weights="copy").path


def test_bundled_checkpoint_passes_every_scenario(package: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = validate(package, CHECKPOINT, progress=lambda *step: seen.append(step))
    assert report.passed, report.failures
    assert set(status(report).values()) == {"passed"}
    assert report.reference_weights == "fp32" and "text" in report.prompts
    assert {s.name for s in report.scenarios} == {s.name for s in SCENARIOS} | {"rope tables"}
    assert seen[-1][1] == seen[-1][2]
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["passed"] is True
    assert (
        data["hashes"]["source config.json"]
        == load_package(package).manifest["source"]["config_sha256"]
    )
    assert "# Parity passed" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes_of_the_bundled_checkpoint_pass(dtype: str, tmp_path: Path) -> None:
    made = export(CHECKPOINT, tmp_path / "package", dtype=dtype)
    report = validate(made.path, CHECKPOINT)
    assert report.passed, report.failures
    assert report.reference_weights == f"fp32, weights rounded to {dtype} first"


LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.3 * i for i in range(HEAD_DIM // 2)],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("rope", "checkpoint", "request_"),
    [
        pytest.param({"rope_type": "linear", "factor": 2.0}, {}, {}, id="linear"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, {}, {}, id="dynamic"),
        pytest.param(YARN, {}, {}, id="yarn-from-the-model-card"),
        pytest.param(LLAMA3, {"family": LlamaConfig}, {"max_batch": 1}, id="llama3"),
        pytest.param(LONGROPE, {"positions": 128}, {}, id="longrope-long"),
        pytest.param(
            LONGROPE, {"positions": 128}, {"max_seq_len": 64}, id="longrope-short", marks=slow
        ),
        pytest.param(None, {}, {"rope_scaling": "linear:2"}, id="ask-linear", marks=slow),
        pytest.param(None, {}, {"rope_scaling": "dynamic:2"}, id="ask-dynamic", marks=slow),
        pytest.param(
            None,
            {"family": LlamaConfig},
            {"rope_scaling": "yarn:4"},
            id="ask-yarn-llama",
            marks=slow,
        ),
        pytest.param(
            None,
            {"family": LlamaConfig, "attention_bias": True, "mlp_bias": True},
            {"max_seq_len": 1},
            id="llama-with-biases-and-one-slot",
            marks=slow,
        ),
    ],
)
def test_rope_kind_passes(
    rope: dict[str, Any] | None,
    checkpoint: dict[str, Any],
    request_: dict[str, Any],
    tmp_path: Path,
) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", rope, **checkpoint)
    made = export(source, tmp_path / "package", **request_)
    report = validate(made.path, source)
    assert report.passed, report.failures
    if made.max_batch == 1:
        assert status(report)["ragged batch"] == "not run"
        assert "one row" in report.to_markdown()
    if made.config.rope.depends_on_length and made.max_seq_len > 64:
        _assert_pinning_matters(made.path, source)


def _assert_pinning_matters(path: Path, source: Path) -> None:
    """Without the pin, transformers would use the frequencies of a short text here."""
    target = open_target(path)
    pinned = Reference(target, source).rope_tables(0, 8)
    other = Reference(replace(target, rope_length=8), source).rope_tables(0, 8)
    assert np.abs(pinned[0] - other[0]).max() > 1e-3


def test_yarn_asked_for_on_a_plain_checkpoint_passes_beyond_the_cache_that_is_filled(
    tmp_path: Path,
) -> None:
    """Positions 512 to 2047 exist by the request alone; only the rope check reaches the last of them."""
    source = make_checkpoint(tmp_path / "checkpoint", positions=512)
    made = export(source, tmp_path / "package", rope_scaling="yarn:4", weights="copy")
    report = validate(made.path, source)
    assert report.passed, report.failures
    assert report.max_seq_len == 2048 > report.cache_slots

    wrong_end = validate(seed(made.path, tmp_path / "end", wrong_last_rope_row), source)
    assert [s.name for s in wrong_end.scenarios if s.status == "failed"] == ["rope tables"]
    assert "2047" in wrong_end.failures[0]

    manifest = json.loads((made.path / MANIFEST).read_text(encoding="utf-8"))
    claims = as_json(asdict(parse_config(read_config_json(made.path), "yarn:5")))
    write_json(made.path / MANIFEST, {**manifest, "rope_scaling": "yarn:5", "model": claims})
    other_factor = validate(made.path, source)
    assert not other_factor.passed
    assert status(other_factor)["rope tables"] == status(other_factor)["prefill"] == "failed"


def test_weights_rounded_by_the_export_are_rounded_in_the_oracle(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    made = export(source, tmp_path / "package", dtype="bf16")
    report = validate(made.path, source)
    assert report.passed, report.failures
    assert report.reference_weights == "fp32, weights rounded to bf16 first"
    assert "random token ids" in report.prompts

    shutil.rmtree(made.path)
    exact = export(source, tmp_path / "package", weights="copy")
    assert validate(exact.path, source).passed
    for name in load_package(exact.path).manifest["weights"]["files"]:
        _change_one_weight(exact.path / name)
    changed = validate(exact.path, source)
    assert not changed.passed, "other values under the same header"


def _change_one_weight(file: Path) -> None:
    tensors = load_file(file)
    before = file.stat().st_size
    tensors["model.layers.1.mlp.down_proj.weight"][3] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == before


def test_another_checkpoint_is_refused(package: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    with pytest.raises(ValidationError, match=r"not made from .*: config.json differs"):
        validate(package, other)

    renamed = tmp_path / "renamed"
    shutil.copytree(CHECKPOINT, renamed)
    file = renamed / "model.safetensors"
    save_file(load_file(file), file, metadata={"other": "header"})
    with pytest.raises(ValidationError, match=r"model.safetensors has another header or size"):
        validate(package, renamed)


def test_what_is_no_target_is_refused(package: Path, tmp_path: Path) -> None:
    for nothing in (tmp_path / "absent", tmp_path, CHECKPOINT):
        with pytest.raises(ValidationError, match="neither a package nor an engine"):
            validate(nothing, CHECKPOINT)


def test_prompts_are_random_where_no_tokenizer_fits(tmp_path: Path) -> None:
    assert "text" in make_prompts(CHECKPOINT, 2048).description
    too_small = make_prompts(CHECKPOINT, 100)
    assert "does not fit" in too_small.description and max(too_small.ids) < 100
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    broken = make_prompts(tmp_path, 50)
    assert "does not load" in broken.description
    assert broken.take(3000) == make_prompts(tmp_path, 50).take(3000)
