"""Scenarios and judge together: transformers itself passes, and one mistake is seen where it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwenport.exporter import export
from qwenport.validate.budget import Plan, make_plan
from qwenport.validate.judge import Judge
from qwenport.validate.oracle import Oracle
from qwenport.validate.prompts import Prompts
from qwenport.validate.reference import Reference
from qwenport.validate.run import CandidateError, NotApplicable, Run
from qwenport.validate.scenarios import SCENARIOS, greedy_prompt, scenarios
from qwenport.validate.target import Target, open_target

from .sessions import capacity_of

ROWS, CAPACITY, ORIGINAL, WIDEST = 4, 300, 150, 280
VOCABULARY = 48
SPECIAL = (47, 0, 46)
# no prompt has the highest id
PROMPTS = Prompts(tuple((np.random.default_rng(3).permutation(940) % 47).tolist()), "")
SMALL = {"cache of 64", "cache of 192"}
ALL = {scenario.name for scenario in SCENARIOS} | SMALL

Array = Any
Model = Callable[[Sequence[int], int], Array]


class Posing:
    """The session protocol over transformers itself, in plain lists and without a cache; `wrong` spoils one thing."""

    def __init__(self, model: Model, capacity: int, wrong: str = "") -> None:
        self._model, self.capacity, self.wrong = model, capacity, wrong
        self.max_batch, self.max_positions, self.vocab_size = ROWS, CAPACITY, VOCABULARY
        self.max_step_tokens = self.max_step_logits = WIDEST
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.first_position = 0
        self.on_step: Any = None

    def reset(self, *, first_position: int = 0) -> None:
        self.first_position = first_position
        self.rows = [row[-5:] if self.wrong == "reset" else [] for row in self.rows]

    def truncate(self, length: int, row: int = 0) -> None:
        assert 0 <= length <= len(self.rows[row])
        if self.wrong != "truncation ignored":
            del self.rows[row][length:]

    unscaled_length = None

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        prompt_lengths: Sequence[int] | None = None,
    ) -> list[Array]:
        wanted = [list(range(len(new)) if all_logits else range(len(new))[-1:]) for new in tokens]
        return self._step(tokens, wanted, all_logits=all_logits)

    def prefill_choosing(self, tokens: Any, wanted: Any) -> Array:
        wanted = [sorted(indices) for indices in wanted]
        if self.wrong == "chosen":  # a last logit that is asked for beside others
            wanted = [[*indices[:-1], max(0, indices[-1] - 1)] for indices in wanted]
        return np.stack(self._step(tokens, wanted))

    def decode(self, token_ids: Sequence[int | None]) -> Array:
        rows = [[] if token is None else [token] for token in token_ids]
        made = self._step(rows, [range(len(row)) for row in rows])
        zeros = np.zeros((1, self.vocab_size), np.float32)
        return np.concatenate([row if len(row) else zeros for row in made])

    def _step(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Any], *, all_logits: bool = False
    ) -> list[Array]:
        before = [len(row) for row in self.rows]
        results = []
        for number, (row, new) in enumerate(zip(self.rows, tokens, strict=False)):
            assert len(row) + len(new) <= self.capacity
            if self.wrong == "chunks" and len(new) > 1:
                row.clear()
            if self.wrong == "idle rows" and not new and row:
                row.append(0)
            if self.wrong == "joining" and len(new) > 1 and not row and any(before):
                new = [new[1], new[0], *new[2:]]
            row.extend(new)
            made = np.zeros((0, self.vocab_size), np.float32)
            if new:
                every = self._model(row, self.first_position)[-len(new) :]
                made = every[list(wanted[number])]
            results.append(self._spoil(made, number, new, all_logits))
        if self.wrong == "third row" and len(results) > 2 and len(results[1]) == len(results[2]):
            results[2] = results[1]
        return results

    def _spoil(self, made: Array, number: int, new: Sequence[int], all_logits: bool) -> Array:
        length, width = len(self.rows[number]), len(new)
        end = self.first_position + length
        if self.wrong == "raises" and length == 30 and width == 1:
            raise ZeroDivisionError("at token 30")
        if self.wrong == "a row too many" and length == 30 and width == 1:
            return np.repeat(made, 2, axis=0)
        wrong = {
            "token 30": length == 30 and width == 1,
            "last logits": width > 1 and not all_logits and len(made) == 1,
            "all logits": width > 1 and all_logits,
            "wide steps": width > 256,
            "narrow steps": 1 < width < 64,
            "single tokens": width == 1,
            "small cache": self.capacity == 64 and length > 60,
            "full cache": length == self.capacity,
            "past 290": end > 290,
            "deep": length > 200 and width == 1,
            "highest id": VOCABULARY - 1 in new,
        }
        return np.roll(made, 1, axis=1) if wrong.get(self.wrong) else made


@dataclass(frozen=True)
class Setting:
    model: Model
    reference: Reference
    oracle: Oracle
    target: Target
    plan: Plan
    greedy: list[int]

    def results(self, wrong: str = "") -> dict[str, Any]:
        """Every scenario's result on one session for each capacity."""
        judge = Judge(self.oracle, "fp32", {})
        sessions: dict[int, Posing] = {}
        found: dict[str, Any] = {}
        for scenario in scenarios(self.plan):
            capacity = capacity_of(scenario, self.plan)
            session = sessions.setdefault(capacity, Posing(self.model, capacity, wrong))
            run = Run(
                session,  # type: ignore[arg-type]
                PROMPTS,
                self.plan,
                greedy=self.greedy,
                original_context=ORIGINAL,
                special_ids=SPECIAL,
            )
            try:
                scenario.run(run)
                found[scenario.name] = judge.judge(scenario, run.observation())
            except (CandidateError, NotApplicable) as error:
                found[scenario.name] = error
        return found


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("mistakes")
    raw = checkpoints.mini("llama", max_position_embeddings=CAPACITY, torch_dtype="float32")
    path = checkpoints.write_checkpoint(folder / "checkpoint", raw)
    target = open_target(export(path, folder / "package").path)
    reference = Reference(target, path)
    plan = make_plan(
        target.config, budget="quick", seed=0, rows=ROWS, capacity=CAPACITY,
        max_positions=CAPACITY, max_step_tokens=WIDEST, streamed=False,
    )  # fmt: skip
    plan = replace(plan, caches=(64, 192))
    prompt, count = greedy_prompt(plan)
    greedy, _ = reference.greedy(PROMPTS.take(prompt), count)
    oracle = Oracle(reference, PROMPTS.take(128))
    return Setting(remembering(path), reference, oracle, target, plan, greedy)


def remembering(path: Any) -> Model:
    """transformers' logits fp32 [len(tokens), vocab] of a text that begins somewhere; each text once."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    known: dict[tuple[int, ...], Array] = {}

    def logits(tokens: Sequence[int], first_position: int) -> Array:
        key = (first_position, *tokens)
        if key not in known:
            positions = first_position + torch.arange(len(tokens))[None]
            with torch.inference_mode():
                made = model(torch.tensor([list(tokens)]), position_ids=positions)
            known[key] = made.logits[0].numpy()
        return known[key]

    return logits


def failing(results: dict[str, Any]) -> set[str]:
    return {
        name
        for name, result in results.items()
        if isinstance(result, CandidateError) or result.status == "failed"
    }


def test_transformers_itself_passes_every_scenario(setting: Setting) -> None:
    results = setting.results()
    assert not any(isinstance(result, Exception) for result in results.values())
    assert failing(results) == set()
    assert all(result.metrics.positions for result in results.values())


CHUNKED = {"batches", "chosen logits", "chunked prefill", "step widths", "truncation"}
AT_30 = {"decode", "greedy", "truncation", "batches"}
POSITIONS = {"end of context", "middle of context", "past original context"}
# but for the random walk, which sees most of them
MISTAKES = {
    "token 30": AT_30,
    "reset": ALL - SMALL - {"prefill"},
    "chunks": CHUNKED,
    "idle rows": {"batches", "truncation"},
    "joining": {"batches", "truncation"},
    "third row": {"batches", "wide batch"},
    "chosen": {"chosen logits"},
    "truncation ignored": {"step widths", "truncation", "whole context"},
    "last logits": ALL - POSITIONS - {"prefill", "whole context", "chosen logits", "token ids"},
    "all logits": {"prefill", "whole context", "chunked prefill", "batches", "token ids"}
    | POSITIONS,
    "wide steps": {"step widths", "wide batch"},
    "narrow steps": ALL
    - {"prefill", "chosen logits", "whole context", "wide batch", "cache of 192"},
    "single tokens": ALL - {"prefill", "chosen logits", "token ids"},
    "small cache": {"cache of 64"},
    "full cache": SMALL,
    "past 290": POSITIONS - {"past original context"},
    "deep": {"step widths", "whole context", "wide batch"},
    "highest id": {"token ids"},
    "raises": AT_30,
    "a row too many": AT_30,
}
WALKED = {
    "reset", "chunks", "idle rows", "joining", "third row", "truncation ignored", "last logits",
    "all logits", "narrow steps", "single tokens",
}  # fmt: skip
WORDS = {
    "raises": "the target raised ZeroDivisionError: at token 30",
    "a row too many": "the target gave logits of shape (",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_one_mistake_is_seen_where_it_is_made(wrong: str, setting: Setting) -> None:
    results = setting.results(wrong)
    walk = {"random walk"}
    assert failing(results) - walk == MISTAKES[wrong] - walk
    assert wrong not in WALKED or "random walk" in failing(results)
    for name in MISTAKES[wrong] - walk:
        result = results[name]
        if isinstance(result, CandidateError):
            assert WORDS.get(wrong, "AssertionError") in str(result)
        else:
            assert any(failure.startswith("rel-L2 ") for failure in result.failures)
