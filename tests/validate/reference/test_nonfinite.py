"""Where infinities come from when transformers computes in half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Reference, Text

from .pairs import TEXTS, Case, Pair, same, target_of

TEXT = Text.ending(range(1, 30), 29)


def _scaled(
    folder: Path, model_type: str, factors: dict[str, float], **changes: Any
) -> tuple[Reference, Reference]:
    """A bf16 checkpoint with some of its tensors scaled; whole and streamed."""
    raw = checkpoints.mini(model_type, torch_dtype="bfloat16", **changes)
    case = Case(raw, torch.bfloat16)
    tensors = case.tensors()
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    path = checkpoints.write_checkpoint(folder / "checkpoint", raw, tensors)
    target = target_of(case, path)
    return Reference(target, path), Reference(target, path, streamed=True)


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", 1),
        ("qwen2", "model.layers.0.mlp.down_proj.weight", 0),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert.down_proj.weight", 2),
        ("qwen3_moe", "model.layers.1.self_attn.o_proj.weight", 1),
        ("llama", "lm_head.weight", "final norm and lm_head"),
        ("llama", "model.norm.weight", "final norm and lm_head"),
        ("llama", "model.embed_tokens.weight", "embedding"),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_first_place_that_overflows_fp16_is_named(
    model_type: str, name: str, expected: int | str, attention: str, tmp_path: Path
) -> None:
    for reference in _scaled(tmp_path, model_type, {name: 1e6}):
        assert reference.first_nonfinite(TEXT, "fp16", attention) == expected
        for dtype in ("fp32", "bf16"):
            assert reference.first_nonfinite(TEXT, dtype, attention) is None
        states = reference.hidden_states([TEXT], "fp16", attention=attention)[0]
        finite = [bool(np.isfinite(state).all()) for state in states]
        first = finite.index(False) if False in finite else len(finite)
        place = {0: "embedding", len(finite): "final norm and lm_head"}.get(first, first - 1)
        assert place == expected


def test_an_activation_that_overflows_is_found_where_it_does(tmp_path: Path) -> None:
    """As bf16 checkpoints do that are converted to fp16: the weight fits, what it makes does not."""
    name = "model.layers.1.mlp.down_proj.weight"
    for reference in _scaled(tmp_path, "llama", {name: 30000.0}):
        with reference.layer(1, "fp16") as layer:
            assert all(bool(weight.isfinite().all()) for weight in layer.parameters())
        assert reference.first_nonfinite(TEXT, "fp16") == 1
        assert reference.first_nonfinite(TEXT, "bf16") is None
        assert not np.isfinite(reference.logits([TEXT], "fp16")[0]).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_is_found_where_all_is_finite(pair: Pair, attention: str) -> None:
    for reference in pair.both():
        before = reference.logits(TEXTS)
        for text in (*TEXTS, Text((1, 2), ())):
            assert reference.first_nonfinite(text, "fp16", attention) is None
        assert all(map(same, before, reference.logits(TEXTS)))


def test_later_layers_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    whole, streamed = _scaled(tmp_path, "llama", {"model.layers.0.mlp.down_proj.weight": 1e6})
    for reference in (whole, streamed):
        calls: list[tuple[str, int, int]] = []
        reference._progress = lambda *call, calls=calls: calls.append(call)  # type: ignore[misc]
        assert reference.first_nonfinite(TEXT, "fp16") == 0
        assert calls == [("first non-finite value", 1, 2)]


def test_what_cannot_be_run_is_refused(pair_of: Callable[[str], Pair]) -> None:
    for reference in pair_of("llama fp32").both():
        with pytest.raises(ValidationError, match="text"):
            reference.first_nonfinite(Text((), ()), "fp16")
        with pytest.raises(ValidationError, match="'nf4'"):
            reference.first_nonfinite(TEXT, "nf4")
