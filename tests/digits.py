"""The grammar that allows digits only, and what transformers writes under it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from qwenport.engines import Sampler, SamplingParams

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = [[40, 41, 42], list(range(100, 140)), [7]]


@cache
def tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a bundled checkpoint."""
    return Tokenizer.from_file(str(EXAMPLES / name / "tokenizer.json"))


@cache
def digit_tokens(name: str) -> tuple[int, ...]:
    """The tokens of a bundled checkpoint whose text is digits."""
    words = tokenizer(name)
    return tuple(i for i in range(words.get_vocab_size()) if words.decode([i]).isdecimal())


class DigitsOnly(transformers.LogitsProcessor):
    """The grammar, as transformers takes it."""

    def __init__(self, name: str) -> None:
        self.allowed = list(digit_tokens(name))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


@cache
def _model(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(EXAMPLES / name, dtype=torch.float32)


@torch.no_grad()
def by_transformers(
    name: str, prompt: Sequence[int], count: int, row: int, **sampling: Any
) -> list[int]:
    """New tokens under the grammar: by `generate` if greedy, else drawn by our sampler from transformers' logits."""
    model, grammar, ids = _model(name), DigitsOnly(name), torch.tensor([list(prompt)])
    params = SamplingParams(**sampling)
    if params.greedy:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            logits_processor=transformers.LogitsProcessorList([grammar]),
        )
        return found[0, len(prompt) :].tolist()
    sampler = Sampler(params, row=row)
    for _ in range(count):
        scores = grammar(ids, model(ids).logits[:, -1])
        token = sampler.sample(scores[0].numpy(), ids[0].numpy())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return ids[0, len(prompt) :].tolist()
