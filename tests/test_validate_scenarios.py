"""The scenarios and bounds with sessions that are known to be right, or wrong in one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwenport.exporter import export
from qwenport.validate.prompts import make_prompts
from qwenport.validate.reference import Reference
from qwenport.validate.scenarios import SCENARIOS, Bench
from qwenport.validate.target import open_target
from qwenport.validate.validation import judge_scenario

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5"


class TransformersSession:
    """The session protocol over transformers itself, without a cache; `wrong` spoils one thing."""

    def __init__(self, dtype: torch.dtype, wrong: str = "") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype).eval()
        self.max_batch, self.capacity, self.wrong = 4, 128, wrong
        self.vocab_size = self.model.config.vocab_size
        self.rows: list[list[int]] = []
        self.reset()

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows])

    def reset(self) -> None:
        self.rows = [[] for _ in range(self.max_batch)]

    def prefill(
        self, tokens: Sequence[Sequence[int]], *, all_logits: bool = False
    ) -> list[np.ndarray]:
        results = []
        for row, new in zip(self.rows, tokens, strict=False):
            row.extend(new)
            logits = np.zeros((0, self.vocab_size), np.float32)
            if new:
                with torch.inference_mode():
                    every = self.model(torch.tensor([row])).logits[0].float().numpy()
                logits = every[-len(new) :] if all_logits else every[-1:]
            if self.wrong == "token 30" and len(row) == 30 and len(new) == 1:
                logits = np.roll(logits, 1, axis=1)
            results.append(logits)
        return results

    def decode(self, token_ids: Sequence[int | None]) -> np.ndarray:
        rows = self.prefill([[] if token is None else [token] for token in token_ids])
        zeros = np.zeros((1, self.vocab_size), np.float32)
        return np.concatenate([row if len(row) else zeros for row in rows])

    def failing(self, reference: Reference, compute_dtype: str) -> set[str]:
        bench = Bench(self, reference, make_prompts(CHECKPOINT, self.vocab_size))  # type: ignore[arg-type]
        results = [judge_scenario(s, bench, compute_dtype, own_rounding=4e-7) for s in SCENARIOS]
        return {result.name for result in results if result.status == "failed"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    package = export(CHECKPOINT, tmp_path_factory.mktemp("scenarios") / "package")
    return Reference(open_target(package.path), CHECKPOINT)


ALL = {scenario.name for scenario in SCENARIOS}


def test_transformers_itself_passes_every_scenario(reference: Reference) -> None:
    assert TransformersSession(torch.float32).failing(reference, "fp32") == set()


def test_one_wrong_step_is_seen_where_it_is_taken(reference: Reference) -> None:
    wrong = TransformersSession(torch.float32, wrong="token 30").failing(reference, "fp32")
    assert wrong == {"decode", "greedy"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_passes_its_own_bar_and_not_that_of_fp32(
    dtype: str, reference: Reference
) -> None:
    session = TransformersSession({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    assert session.failing(reference, dtype) == set()
    assert session.failing(reference, "fp32") == ALL


@pytest.mark.slow
def test_bf16_does_not_pass_the_bar_of_fp16(reference: Reference) -> None:
    assert TransformersSession(torch.bfloat16).failing(reference, "fp16") == ALL
