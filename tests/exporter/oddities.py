"""Checkpoints as people have them, and transformers' logits of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenport.engines import open_session

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


Tensors = dict[str, torch.Tensor]


def logits_of(package: Path) -> np.ndarray:
    (logits,) = open_session(package).prefill([TOKENS], all_logits=True)
    return logits


def theirs(checkpoint: Path, **arguments: Any) -> np.ndarray:
    """transformers' logits in fp32, whatever the files hold."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", **arguments
    )
    return model(torch.tensor([TOKENS])).logits[0].detach().numpy()


def assert_as_transformers(package: Path, checkpoint: Path, **arguments: Any) -> None:
    right = theirs(checkpoint, **arguments)
    assert np.linalg.norm(logits_of(package) - right) <= 1e-5 * np.linalg.norm(right)


def with_buffers(factor: float, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        frequencies = 500000.0 ** -(torch.arange(0, 16, 2) / 16) * factor
        return tensors | {
            f"model.layers.{n}.self_attn.rotary_emb.inv_freq": frequencies.to(dtype, copy=True)
            for n in range(2)
        }

    return change
