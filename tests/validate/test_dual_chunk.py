"""Dual chunk attention: the oracle against formulas of others, packages against the oracle, and mistakes found."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from chunked import CHUNK, CHUNK_SIZE, ORIGINAL, make_chunked, run_in_pieces
from defects.chunks import (
    CHUNK_DEFECTS,
    keys_rotated_by_position,
    same_for_previous,
    scale_of_queries_alone,
)
from defects.tools import constant, seed
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import VOCAB
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from qwenport.engines import OnnxRuntimeSession, build, load_engine
from qwenport.exporter import DualChunk, export, load_package
from qwenport.validate import open_target, validate
from qwenport.validate.budget import make_plan
from qwenport.validate.candidate import Candidate
from qwenport.validate.investigation import Bench
from qwenport.validate.prompts import Prompts
from qwenport.validate.reference import Reference, Text
from qwenport.validate.reference.dual_chunk import attend
from qwenport.validate.rows import replay_of_walk
from qwenport.validate.run import Run

from .bundled import failing, status
from .bundled import row as result_of

AGREE = 1e-5  # rel-L2 of logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chunked(tmp_path_factory.mktemp("chunked") / "checkpoint")


@pytest.fixture(scope="module")
def package(checkpoint: Path) -> Path:
    path = checkpoint.parent / "package"
    export(checkpoint, path, weights="copy", max_batch=3)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: Path, package: Path) -> Reference:
    return Reference(open_target(package), checkpoint)


def tokens(count: int, stream: int = 0) -> list[int]:
    return np.random.default_rng(stream).integers(0, VOCAB, count).tolist()


def apart(made: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(made - right) / np.linalg.norm(right))


# --- the oracle


def test_the_oracle_is_plain_attention_up_to_a_chunk_and_not_beyond(
    checkpoint: Path, reference: Reference
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    text = tokens(CHUNK_SIZE + 12)
    with torch.inference_mode():
        plain = model(torch.tensor([text])).logits[0].numpy()
    (made,) = reference.logits([Text(tuple(text), tuple(range(len(text))))])
    assert apart(made[: CHUNK_SIZE + 1], plain[: CHUNK_SIZE + 1]) < AGREE
    assert apart(made[CHUNK_SIZE + 1 :], plain[CHUNK_SIZE + 1 :]) > 1e-3


@given(
    chunk=st.integers(2, 9),
    local=st.integers(1, 12),
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_oracles_attention_is_a_merge_of_three(
    chunk: int, local: int, count: int, seed: int
) -> None:
    """As vLLM computes it: three ordinary attentions, of keys in the same, the previous and older chunks, merged."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, count, 16, dtype=torch.float64)
    rotary = _rotary(16)
    positions = torch.arange(count)
    made = attend(q, k, v, positions, positions, DualChunk(chunk + local, local, None), rotary)
    merged = torch.zeros_like(q)
    for p in range(count):
        begin = p // chunk * chunk
        before = max(0, begin - chunk)
        parts = [
            _part(q[:, p], k, v, where, range(*keys), chunk, rotary)
            for where, keys in (
                (p % chunk, (begin, p + 1)),
                (min(p % chunk + chunk, chunk + local), (before, begin)),
                (min(2 * chunk - 1, chunk + local), (0, before)),
            )
            if keys[0] < keys[1]
        ]
        whole = torch.logsumexp(torch.stack([weight for _, weight in parts]), dim=0)
        for mixed, weight in parts:
            merged[:, p] += mixed * (weight - whole).exp()[:, None]
    assert torch.allclose(made, merged, atol=1e-5)


def _rotary(head_dim: int) -> Qwen2RotaryEmbedding:
    from transformers import Qwen2Config

    return Qwen2RotaryEmbedding(
        Qwen2Config(hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=128)
    )


def _part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    where: int,
    keys: range,
    chunk: int,
    rotary: Qwen2RotaryEmbedding,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinary attention of a query at `where` to some keys: (result [heads, head_dim], log of the weights' sum)."""
    at = torch.tensor([key % chunk for key in keys])
    cos_q, sin_q = rotary(q, torch.tensor([[where]]))
    cos_k, sin_k = rotary(q, at[None])
    turned, _ = apply_rotary_pos_emb(q[None, :, None], q[None, :, None], cos_q, sin_q)
    _, known = apply_rotary_pos_emb(k[None, :, keys], k[None, :, keys], cos_k, sin_k)
    scores = (turned[0] @ known[0].mT)[:, 0] / math.sqrt(q.shape[-1])
    mixed = (scores.softmax(-1)[:, None] @ v[:, keys])[:, 0]
    return mixed, torch.logsumexp(scores, dim=-1)


# --- packages


@given(
    lengths=st.lists(st.integers(1, 6 * CHUNK + 3), min_size=1, max_size=3),
    piece=st.integers(1, 50),
    decodes=st.integers(0, 4),
)
@settings(max_examples=15, deadline=None)
def test_ragged_prompts_in_pieces_and_decoding_agree_with_the_oracle(
    package: Path, reference: Reference, lengths: list[int], piece: int, decodes: int
) -> None:
    session = OnnxRuntimeSession(load_package(package), max_batch=len(lengths), threads=1)
    texts = [tokens(length + decodes, row) for row, length in enumerate(lengths)]
    made = run_in_pieces(session, texts, lengths, piece)
    for text, (found, requests) in zip(texts, made, strict=True):
        (right,) = reference.logits([Text(tuple(text), tuple(range(len(text))), 0, requests)])
        assert apart(found, right) < AGREE


def test_the_first_piece_of_a_long_prompt_is_scaled_too(
    package: Path, reference: Reference
) -> None:
    text, whole = tokens(CHUNK - 5), ORIGINAL + 60
    session = OnnxRuntimeSession(load_package(package), threads=1)
    (made,) = session.prefill([text], all_logits=True, prompt_lengths=[whole])
    every = tuple(range(len(text)))
    (right,) = reference.logits([Text(tuple(text), every, 0, (whole,) * len(text))])
    (short,) = reference.logits([Text(tuple(text), every)])
    assert apart(made, right) < AGREE
    assert apart(made, short) > 1e-3


def test_a_text_that_begins_far_into_the_context_agrees_with_the_oracle(
    package: Path, reference: Reference
) -> None:
    session, first = OnnxRuntimeSession(load_package(package), threads=1), 5 * CHUNK - 7
    session.reset(first_position=first)
    text = tokens(3 * CHUNK)
    (made,) = session.prefill([text], all_logits=True)
    requests = (first + len(text),) * len(text)
    (right,) = reference.logits([Text(tuple(text), tuple(range(len(text))), first, requests)])
    assert apart(made, right) < AGREE


def test_without_an_original_length_nothing_is_scaled(tmp_path: Path) -> None:
    checkpoint = make_chunked(tmp_path / "checkpoint", original_max_position_embeddings=0)
    package = export(checkpoint, tmp_path / "package")
    assert "request_lengths" not in {b["name"] for b in package.manifest["bindings"]["inputs"]}
    text = tokens(5 * CHUNK)
    (made,) = OnnxRuntimeSession(package, threads=1).prefill([text], all_logits=True)
    reference = Reference(open_target(package.path), checkpoint)
    (right,) = reference.logits([Text(tuple(text), tuple(range(len(text))))])
    assert apart(made, right) < AGREE


@pytest.mark.parametrize("slots", [1, CHUNK - 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_an_engine_for_fewer_positions_rotates_by_as_many(
    package: Path, reference: Reference, tmp_path: Path, slots: int
) -> None:
    """Queries for keys of other chunks are rotated by positions that no short text has."""
    build(package, tmp_path / "engine", target="onnxruntime", max_seq_len=slots)
    session = OnnxRuntimeSession(load_engine(tmp_path / "engine"), threads=1)
    text = tokens(slots)
    (made,) = session.prefill([text], all_logits=True)
    (right,) = reference.logits([Text(tuple(text), tuple(range(slots)))])
    assert apart(made, right) < AGREE
    config = load_package(package).config
    assert config.dual_chunk is not None
    assert config.rope_rows(slots) == config.dual_chunk.rope_rows >= CHUNK_SIZE + 1


@pytest.mark.parametrize(
    ("positions", "size", "local", "original"),
    [
        pytest.param(90, 1000, 0, 50, id="scaled within one chunk"),
        # at position 253,972 fp32 angles are off by 0.01: the oracle rotates by as exact ones as the package
        pytest.param(600_000, 262_144, 8192, 262_144, id="far from its beginning"),
    ],
)
def test_whatever_the_sizes_a_healthy_package_passes(
    tmp_path: Path, positions: int, size: int, local: int, original: int
) -> None:
    checkpoint = make_chunked(
        tmp_path / "checkpoint",
        positions=positions,
        chunk_size=size,
        local_size=local,
        original_max_position_embeddings=original,
    )
    package = export(checkpoint, tmp_path / "package", max_batch=1)
    report = validate(package.path, checkpoint, budget="quick")
    assert report.passed, failing(report)


def test_a_mistake_in_texts_within_a_chunk_is_located(tmp_path: Path) -> None:
    """There the oracle is transformers' own attention, whose functions probes replace."""
    checkpoint = make_chunked(
        tmp_path / "checkpoint",
        positions=700,
        chunk_size=400,
        local_size=8,
        original_max_position_embeddings=600,
    )
    package = export(checkpoint, tmp_path / "package", max_batch=1)

    def other_scale(model: ir.Model) -> None:
        scaled = [n for n in model.graph if n.op_type == "Mul" and _is_scaled(n)]
        scaled[1].replace_input_with(1, constant(model, "scale", [0.2], np.float32))

    seed(package.path, tmp_path / "seeded", other_scale)
    report = validate(tmp_path / "seeded", checkpoint, budget="quick")
    assert not report.passed
    assert report.fault is not None and report.fault.layer == 1


def _is_scaled(product: ir.Node) -> bool:
    return str(product.inputs[1].name) == "const_scale"  # type: ignore[union-attr]


def test_a_healthy_package_and_engine_pass(checkpoint: Path, package: Path, tmp_path: Path) -> None:
    report = validate(package, checkpoint, budget="quick")
    assert report.passed, failing(report)
    assert status(report)["chunk borders"] == "passed"
    build(package, tmp_path / "engine", target="onnxruntime")
    assert validate(tmp_path / "engine", checkpoint, budget="quick").passed


# --- mistakes


def test_a_failing_walk_becomes_a_script_that_asks_the_oracle(
    checkpoint: Path, package: Path, tmp_path: Path
) -> None:
    """Run on the healthy package it finds nothing, on the faulty one what the walk found."""
    faulty = seed(package, tmp_path / "faulty", scale_of_queries_alone)
    report = validate(faulty, checkpoint, budget="quick")
    assert result_of(report, "random walk").status == "failed" and report.script is not None
    assert max(_printed(report.script, package, checkpoint)) < 1e-3
    assert max(_printed(report.script, faulty, checkpoint)) > 1e-3


def test_a_whole_walk_is_a_script_that_a_session_takes(checkpoint: Path, package: Path) -> None:
    """Also where prompts follow keys that are scaled for another length, which no session lets them."""
    target = open_target(package)
    candidate = Candidate(target, layers=2, streamed=False)
    plan = make_plan(
        target.config,
        budget="quick",
        seed=3,
        rows=3,
        capacity=target.capacity,
        max_positions=target.capacity,
        max_step_tokens=512,
        streamed=False,
    )
    prompts = Prompts(tuple(tokens(1000)), "")

    def make_run(session: Any, **keywords: Any) -> Run:
        return Run(session, prompts, plan, chunk=CHUNK, **keywords)

    bench, judge = Bench(candidate, make_run, prompts, plan), None  # judges shorter walks alone
    script = replay_of_walk(bench, judge, target, streamed=True)  # type: ignore[arg-type]
    assert script is not None and "session.truncate(0, row=" in script
    found = _printed(script, package, checkpoint)
    assert len(found) > 20 and max(found) < 1e-3


def _printed(script: str, target: Path, checkpoint: Path) -> list[float]:
    """The differences that a script prints."""
    with redirect_stdout(StringIO()) as printed:
        exec(script, {"TARGET": target, "CHECKPOINT": checkpoint})
    return [float(line.rpartition(": ")[2]) for line in printed.getvalue().splitlines()]


FAST = (same_for_previous, scale_of_queries_alone, keys_rotated_by_position)


@pytest.mark.parametrize(
    "change",
    [pytest.param(d, marks=() if d in FAST else pytest.mark.slow) for d in CHUNK_DEFECTS],
    ids=lambda change: change.__name__,
)
def test_a_mistake_fails_where_it_shows(
    checkpoint: Path, package: Path, tmp_path: Path, change: Callable[[ir.Model], None]
) -> None:
    faulty = seed(package, tmp_path / "faulty", change)
    report = validate(faulty, checkpoint, budget="quick")
    assert not report.passed
    assert result_of(report, "whole context").status == "failed"
    assert result_of(report, "rope tables").status == "passed"
