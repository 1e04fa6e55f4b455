"""The bundled checkpoint with dual chunk attention: its package, and the attention that it was trained under."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwenport.engines import Tokenizer, build, open_session
from qwenport.exporter import DualChunk, load_package
from qwenport.validate import open_target, validate
from qwenport.validate.reference import Reference, Text

from .bundled import EXAMPLES, IN_CHUNKS, row, status

AGREE = 1e-5  # rel-L2 of logits
FAR = 300  # positions before it: nine chunks


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


def test_its_package_passes(package_of: Callable[[Path], Path]) -> None:
    report = validate(package_of(IN_CHUNKS), IN_CHUNKS, budget="quick")
    assert report.passed, report.failures
    found = status(report)
    assert {name for name, what in found.items() if what != "passed"} == {"past original context"}
    for name in ("whole context", "decode", "chunked prefill", "random walk", "chunk borders"):
        metrics = row(report, name).metrics
        assert metrics is not None and metrics.rel_l2 < AGREE


def test_it_crosses_many_borders_and_is_scaled_within_its_context(
    package_of: Callable[[Path], Path], ids: list[int]
) -> None:
    package = load_package(package_of(IN_CHUNKS))
    settings = package.config.dual_chunk
    assert settings == DualChunk(48, 16, 256)
    assert len(ids) == 400 and len(ids) // settings.chunk == 12
    assert package.manifest["max_seq_len"] == 1024


def test_it_was_trained_under_the_attention_that_the_oracle_computes(
    package_of: Callable[[Path], Path],
    ids: list[int],
    trained_under: Callable[[PreTrainedModel], None],
) -> None:
    reference = Reference(open_target(package_of(IN_CHUNKS)), IN_CHUNKS)
    model = AutoModelForCausalLM.from_pretrained(IN_CHUNKS, dtype=torch.float32)
    trained_under(model)
    for count in (30, 250, len(ids)):
        text = ids[:count]
        (right,) = reference.logits([Text(tuple(text), tuple(range(count)))])
        with torch.inference_mode():
            made = model(torch.tensor([text]), use_cache=False).logits[0].numpy()
        assert np.linalg.norm(made - right) < AGREE * np.linalg.norm(right), count


def test_its_engine_needs_dual_chunk_attention_where_the_context_is_long(
    package_of: Callable[[Path], Path], ids: list[int], tmp_path: Path
) -> None:
    """Far into a text it predicts as well as from the last 200 tokens, and better than with plain rope."""
    build(package_of(IN_CHUNKS), tmp_path / "engine", target="onnxruntime")
    session = open_session(tmp_path / "engine")
    (near,) = session.prefill([ids[FAR - 100 :]], all_logits=True)
    session.reset()
    (far,) = session.prefill([ids], all_logits=True)
    model = AutoModelForCausalLM.from_pretrained(IN_CHUNKS, dtype=torch.float32)
    with torch.inference_mode():
        plain = model(torch.tensor([ids])).logits[0].numpy()
    loss = {name: nll(logits, ids) for name, logits in {"n": near, "f": far, "p": plain}.items()}
    print(loss)


def nll(logits: NDArray[np.float32], ids: list[int]) -> float:
    """Mean loss of the tokens from FAR on, in nats; the last row of logits is after the last token."""
    count = len(ids) - FAR
    chosen = torch.from_numpy(logits[-count - 1 : -1].copy())
    return cross_entropy(chosen, torch.tensor(ids[FAR:])).item()
