"""The C++ library on onnxruntime writes what transformers writes, with none of our code between the two but the draws.

transformers computes the logits in fp32 and its processors filter them. A token is then drawn by the stream of random
numbers that `tests/test_sampling.py` holds to its published values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qwenport import engines, exporter
from qwenport.contract import ONNXRUNTIME
from qwenport.engines.sampling import Xoshiro256StarStar

from .builds import ROOT
from .runtime import Library, Session

CHECKPOINTS = ROOT / "examples"
PROMPTS = [list(range(100, 170)), [7], list(range(300, 333))]
NEW_TOKENS = 40
SAMPLED = [
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5},
    {"temperature": 1.1, "repetition_penalty": 1.2, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2**64 - 1},
]


@pytest.fixture(scope="module", params=["tiny-qwen2.5", "tiny-qwen2-moe"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        CHECKPOINTS / name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def session(
    name: str,
    release: Path,
    package_of: Callable[[str], exporter.Package],
    onnxruntime_library: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Session:
    path = tmp_path_factory.mktemp("engine") / name
    engines.build(package_of(name).path, path, target=ONNXRUNTIME)
    library = Library(release / "runtime" / "libqwenport.so")
    engine = library.load(path, onnxruntime=onnxruntime_library)
    return engine.session(max_batch=len(PROMPTS))


def processors(options: dict[str, Any]) -> transformers.LogitsProcessorList:
    """Those that transformers' generate makes of these options, in its order."""
    found = transformers.LogitsProcessorList()
    if options.get("repetition_penalty", 1.0) != 1.0:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    found.append(transformers.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        found.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        found.append(transformers.TopPLogitsWarper(options["top_p"]))
    return found


@torch.inference_mode()
def drawn_with_transformers(model: Any, prompt: list[int], row: int, options: dict) -> list[int]:
    numbers = Xoshiro256StarStar.for_row(options["seed"], row)
    process, text = processors(options), torch.tensor([prompt])
    cache, fed = transformers.DynamicCache(), text
    for _ in range(NEW_TOKENS):
        logits = model(fed, past_key_values=cache).logits[:, -1]
        shares = torch.softmax(process(text, logits)[0].double(), -1).numpy()
        token = int(np.searchsorted(np.cumsum(shares), numbers.uniform(), side="right"))
        fed = torch.tensor([[token]])
        text = torch.cat([text, fed], 1)
    return text[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_those_of_transformers_generate(
    session: Session, model: Any, name: str
) -> None:
    stops = exporter.stop_ids(CHECKPOINTS / name, model.config.vocab_size)
    found = session.generate(PROMPTS, max_new_tokens=NEW_TOKENS, stop_tokens=stops)
    for prompt, result in zip(PROMPTS, found, strict=True):
        text = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False
            ),
        )
        stop = [result.stop_token] if result.reason == "stop" else []
        assert result.tokens + stop == text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("options", SAMPLED, ids=["top k and p", "penalty", "top p"])
def test_sampled_tokens_equal_draws_from_transformers_scores(
    session: Session, model: Any, options: dict[str, Any]
) -> None:
    found = session.generate(PROMPTS, max_new_tokens=NEW_TOKENS, **options)
    for row, (prompt, result) in enumerate(zip(PROMPTS, found, strict=True)):
        assert result.tokens == drawn_with_transformers(model, prompt, row, options)
