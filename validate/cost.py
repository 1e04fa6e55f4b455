"""What quantization cost: the quantized model against the original, both run by transformers. It is no verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import Progress
from qwenport.exporter import ModelConfig, open_checkpoint
from qwenport.validate.errors import ValidationError
from qwenport.validate.metrics import compare
from qwenport.validate.oracle import Oracle
from qwenport.validate.target import Target
from qwenport.validate.text import Text

TOKENS = 512
BLOCK = 16  # positions at once

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Cost:
    """The quantized model's logits compared with the original's, on one text.

    Attributes:
        original: the original checkpoint, as given.
        tokens: of the text.
        kl_mean: mean KL(original || quantized) over positions, in nats.
        same_top1: share of positions with the same most likely token.
        perplexity, original_perplexity: of the text's tokens after the first.
        warning: what is wrong with the weights by their looks; None if nothing is.
    """

    original: str
    tokens: int
    kl_mean: float
    same_top1: float
    perplexity: float
    original_perplexity: float
    warning: str | None

    def __str__(self) -> str:
        warning = "" if self.warning is None else f"; {self.warning}"
        return (
            f"against {self.original}, on {self.tokens} tokens: mean KL {self.kl_mean:.2g}, the same most likely token "
            f"in {100 * self.same_top1:.1f}%, perplexity {self.perplexity:.4g} ({self.original_perplexity:.4g} before)"
            f"{warning}"
        )


def check_original(target: Target, original: Path) -> None:
    """Refuse an original that is another model.

    Raises:
        ConfigError, CheckpointError: it is no checkpoint.
        ValidationError: nothing is quantized, or it has another shape.
    """
    if target.config.quantization is None:
        raise ValidationError(f"{target.path}: nothing is quantized, so there is no --original")
    config = open_checkpoint(
        original, target.rope_scaling, max_seq_len=target.rope_length, merged=target.merged
    ).config
    for name, value in _shape(config).items():
        if value != _shape(target.config)[name]:
            raise ValidationError(
                f"{original} is not the original of {target.path}: its config.json differs in {name}"
            )


def cost_of_quantization(
    oracle: Oracle,
    target: Target,
    checkpoint: Path,
    original: Path,
    tokens: Sequence[int],
    *,
    layers: int,
    streamed: bool,
    progress: Progress,
) -> Cost:
    """Run the original on some tokens, and compare.

    Args:
        oracle: the quantized model.
        target: what is judged.
        checkpoint: the quantized one.
        original: a checkpoint that `check_original` accepts.
        tokens: at least 2, as many as the model has positions for.
        layers, streamed: as the oracle runs.
        progress: called with (what, done, total).
    """
    from qwenport.validate.constant_shift import constant_shift
    from qwenport.validate.reference import Reference

    before, after = (
        open_checkpoint(path, target.rope_scaling, max_seq_len=target.rope_length)
        for path in (original, checkpoint)
    )
    text = Text(tuple(tokens), tuple(range(len(tokens))))
    (quantized,) = oracle.logits([text])
    reference = Reference(
        _as_it_is(target, original), original, layers=layers, streamed=streamed, progress=progress
    )
    (right,) = reference.logits([text])
    metrics = compare(quantized, right)
    return Cost(
        str(original),
        len(tokens),
        kl_mean=metrics.kl_mean,
        same_top1=metrics.top1,
        perplexity=_perplexity(quantized, tokens),
        original_perplexity=_perplexity(right, tokens),
        warning=constant_shift(after, before),
    )


def _shape(config: ModelConfig) -> dict[str, Any]:
    """What two checkpoints of one model agree in."""
    stored = {"quantization", "dtype", "unread_keys", "context_note", "sparse_attention"}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in stored
    }


def _as_it_is(target: Target, original: Path) -> Target:
    """The target as if it had been made from the original without a change of its weights."""
    checkpoint = open_checkpoint(
        original, target.rope_scaling, max_seq_len=target.rope_length, merged=target.merged
    )
    source: dict[str, Any] = {
        "prefix": checkpoint.prefix,
        "dtype": target.dtype,
        "converted": {},
        "adapter": None,
    }
    return dataclasses.replace(target, source={**target.source, **source})


def _perplexity(logits: Float32, tokens: Sequence[int]) -> float:
    """Of tokens 1 and later, each given all before it."""
    total = 0.0
    for start in range(0, len(tokens) - 1, BLOCK):
        stop = min(start + BLOCK, len(tokens) - 1)
        block = logits[start:stop].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(block, np.array(tokens[start + 1 : stop + 1])[:, None], axis=1)
        total += float((np.log(np.exp(block).sum(axis=1)) - chosen[:, 0]).sum())
    return float(np.exp(total / max(len(tokens) - 1, 1)))
