"""The graph against the oracle, for any settings of dual chunk attention, lengths and splits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from chunked import POSITIONS, make_chunked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_model import VOCAB

from qwenport.engines import OnnxRuntimeSession
from qwenport.exporter import export
from qwenport.validate import open_target
from qwenport.validate.reference import Reference, Text

AGREE = 1e-5  # rel-L2 of logits
DECODES = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chunked(tmp_path_factory.mktemp("weights") / "checkpoint")


def _with_settings(weights: Path, folder: Path, **chunks: int | None) -> Path:
    """A checkpoint with the same weights."""
    folder.mkdir()
    for file in weights.iterdir():
        os.link(file, folder / file.name)
    config = json.loads((weights / "config.json").read_text())
    (folder / "config.json").unlink()
    changed = {**config, "dual_chunk_attention_config": chunks}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


@example(chunk=48, local=16, original=60, lengths=[6 * 48, 7], pieces=[50], seed=0).via("a piece")
@example(chunk=1, local=1, original=1, lengths=[3, 1], pieces=[1], seed=0).via("the least")
@example(chunk=9, local=60, original=None, lengths=[70], pieces=[64], seed=0).via("local > chunk")
@given(
    chunk=st.integers(1, 50),
    local=st.integers(1, 70),
    original=st.none() | st.integers(1, 200),
    lengths=st.lists(st.integers(1, POSITIONS - DECODES), min_size=1, max_size=3),
    pieces=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_a_package_agrees_with_the_oracle(
    weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
    chunk: int,
    local: int,
    original: int | None,
    lengths: list[int],
    pieces: list[int],
    seed: int,
) -> None:
    """Ragged prompts in pieces whose sizes alternate, then single tokens."""
    lengths = [min(length, POSITIONS - DECODES) for length in lengths]
    folder = tmp_path_factory.mktemp("settings")
    checkpoint = _with_settings(
        weights,
        folder / "checkpoint",
        chunk_size=chunk + local,
        local_size=local,
        original_max_position_embeddings=original,
    )
    package = export(checkpoint, folder / "package", max_batch=3)
    session = OnnxRuntimeSession(package, max_batch=len(lengths), threads=1)
    reference = Reference(open_target(package.path), checkpoint)
    drawn = np.random.default_rng(seed)
    texts = [drawn.integers(0, VOCAB, n + DECODES).tolist() for n in lengths]
    made: list[list[np.ndarray]] = [[] for _ in texts]
    start, number = 0, 0
    while start < max(lengths):
        end = start + pieces[number % len(pieces)]
        fed = [text[start : min(end, n)] for text, n in zip(texts, lengths, strict=True)]
        logits = session.prefill(fed, all_logits=True, prompt_lengths=lengths)
        for row, found in enumerate(logits):
            made[row].append(found)
        start, number = end, number + 1
    for step in range(DECODES):
        logits = session.decode([text[n + step] for text, n in zip(texts, lengths, strict=True)])
        for row, found in enumerate(logits):
            made[row].append(found[None])
    for text, n, found in zip(texts, lengths, made, strict=True):
        requests = (*[n] * n, *range(n + 1, n + DECODES + 1))
        (right,) = reference.logits([Text(tuple(text), tuple(range(len(text))), 0, requests)])
        joined = np.concatenate(found)
        assert np.linalg.norm(joined - right) < AGREE * np.linalg.norm(right)
    shutil.rmtree(folder)
