"""The bundled checkpoint with dual chunk attention: its package, and the attention that it was trained under."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwenport.engines import Tokenizer, build, open_session
from qwenport.exporter import DualChunk, export, load_package
from qwenport.validate import open_target, validate
from qwenport.validate.reference import Reference, Text

from .bundled import EXAMPLES, IN_CHUNKS, row, status

AGREE = 1e-5  # rel-L2 of logits


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_chunks") / "package"
    return export(IN_CHUNKS, folder, weights="copy", max_batch=2).path


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """400 tokens of tales that the model was not trained on."""
    text = (EXAMPLES / "long_tale.txt").read_text(encoding="utf-8")
    return Tokenizer(IN_CHUNKS).encode(text.removesuffix("\n"))


@pytest.fixture
def trained_under(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], None]:
    """What makes transformers' model attend as in training."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from chunked_attention import attend_in_chunks

    return attend_in_chunks


@pytest.fixture
def long_texts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Texts of 1024 tokens, of the same kind."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_chunked import tales

    tokenizer = Tokenizer(IN_CHUNKS)
    return [tokenizer.encode(tales(random.Random(seed), [8]))[:1024] for seed in range(100, 104)]


def test_its_package_passes(package: Path) -> None:
    report = validate(package, IN_CHUNKS, budget="quick")
    assert report.passed, report.failures
    found = status(report)
    assert {name for name, what in found.items() if what != "passed"} == {"past original context"}
    for name in ("whole context", "decode", "chunked prefill", "random walk", "chunk borders"):
        metrics = row(report, name).metrics
        assert metrics is not None and metrics.rel_l2 < AGREE


def test_it_crosses_many_borders_and_is_scaled_within_its_context(
    package: Path, ids: list[int]
) -> None:
    opened = load_package(package)
    settings = opened.config.dual_chunk
    assert settings == DualChunk(48, 16, 256)
    assert len(ids) == 400 and len(ids) // settings.chunk == 12
    assert opened.manifest["max_seq_len"] == 1024


def test_it_was_trained_under_the_attention_that_the_oracle_computes(
    package: Path,
    ids: list[int],
    trained_under: Callable[[PreTrainedModel], None],
) -> None:
    reference = Reference(open_target(package), IN_CHUNKS)
    model = AutoModelForCausalLM.from_pretrained(IN_CHUNKS, dtype=torch.float32)
    trained_under(model)
    for count in (30, 250, len(ids)):
        text = ids[:count]
        (right,) = reference.logits([Text(tuple(text), tuple(range(count)))])
        with torch.inference_mode():
            made = model(torch.tensor([text]), use_cache=False).logits[0].numpy()
        assert np.linalg.norm(made - right) < AGREE * np.linalg.norm(right), count


def test_its_engine_reads_twice_as_far_as_it_was_trained_where_plain_rope_fails(
    package: Path, tmp_path: Path, long_texts: list[list[int]]
) -> None:
    build(package, tmp_path / "engine", target="onnxruntime")
    session = open_session(tmp_path / "engine")
    model = AutoModelForCausalLM.from_pretrained(IN_CHUNKS, dtype=torch.float32)
    near, far, plain = [], [], []
    for ids in long_texts:
        session.reset()
        logits = torch.from_numpy(session.prefill([ids], all_logits=True)[0])
        near.append(loss(logits, ids, slice(100, 300)))
        far.append(loss(logits, ids, slice(700, 1000)))
        with torch.inference_mode():
            plain.append(loss(model(torch.tensor([ids])).logits[0], ids, slice(700, 1000)))
    assert sum(far) < 1.2 * sum(near)
    assert sum(far) < 0.5 * sum(plain)


def loss(logits: torch.Tensor, ids: list[int], positions: slice) -> float:
    """Mean loss in nats of the tokens after these positions; logits [len(ids), vocab]."""
    return cross_entropy(logits[:-1][positions], torch.tensor(ids[1:])[positions]).item()
