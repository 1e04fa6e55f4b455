"""Checkpoints of every family and kind, each with its reference whole and streamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch

from qwenport.exporter import export
from qwenport.validate.reference import Reference, Text
from qwenport.validate.target import Target, open_target

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Case:
    """A checkpoint: its config, and how it is stored."""

    raw: dict[str, Any]
    dtype: torch.dtype
    stacked: bool = False
    shards: int = 1
    exported_as: str | None = None
    max_seq_len: int | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = checkpoints.random_tensors(checkpoints.tensor_shapes(self.raw), self.dtype)
        return checkpoints.stack_experts(tensors) if self.stacked else tensors


def _case(
    model_type: str, dtype: str = "float32", changes: dict[str, Any] | None = None, **how: Any
) -> Case:
    raw = checkpoints.mini(model_type, torch_dtype=dtype, **(changes or {}))
    return Case(raw, getattr(torch, dtype), **how)


CASES = {
    "qwen2 fp32 tied": _case("qwen2"),
    "qwen2 bf16 tied": _case("qwen2", "bfloat16"),
    "qwen2 bf16 untied": _case("qwen2", "bfloat16", {"tie_word_embeddings": False}),
    "qwen2 fp16 sharded": _case("qwen2", "float16", shards=3),
    "qwen2 fp32 yarn": _case("qwen2", changes={"rope_scaling": YARN}),
    "qwen2 fp32 to fp16": _case("qwen2", exported_as="fp16"),
    "qwen2 bf16 to fp16": _case("qwen2", "bfloat16", exported_as="fp16"),
    "llama fp32": _case("llama"),
    "llama bf16 tied": _case("llama", "bfloat16", {"tie_word_embeddings": True}),
    "llama bf16 llama3": _case("llama", "bfloat16", {"rope_scaling": LLAMA3}),
    "llama fp32 dynamic": _case("llama", changes={"rope_scaling": DYNAMIC}, max_seq_len=100),
    "llama fp32 biases": _case("llama", changes={"attention_bias": True, "mlp_bias": True}),
    "qwen2_moe fp32": _case("qwen2_moe"),
    "qwen2_moe bf16": _case("qwen2_moe", "bfloat16", shards=2),
    "qwen2_moe fp32 stacked": _case("qwen2_moe", stacked=True),
    "qwen3_moe fp32 sharded": _case("qwen3_moe", shards=3),
    "qwen3_moe bf16 stacked": _case("qwen3_moe", "bfloat16", stacked=True, shards=2),
}
MIXTURES = [name for name in CASES if "moe" in name]
DTYPES = ("fp32", "bf16", "fp16", "fp64")
TEXTS = (
    Text.ending(range(3, 24), 21),
    Text((5, 5, 40, 9, 17, 2, 33), (0, 3, 4, 6), first_position=11),
    Text.ending((8,), 1, first_position=50),
)


@dataclass(frozen=True)
class Pair:
    """One checkpoint, both ways."""

    case: Case
    path: Path
    target: Target
    whole: Reference
    streamed: Reference

    def both(self) -> tuple[Reference, Reference]:
        return self.whole, self.streamed


def target_of(case: Case, path: Path) -> Target:
    lengths = {} if case.max_seq_len is None else {"max_seq_len": case.max_seq_len}
    package = path.with_name(path.name + ".package")
    return open_target(export(path, package, dtype=case.exported_as, **lengths).path)


def same(first: Any, second: Any) -> bool:
    """Equal shape, dtype and bits."""
    return first.dtype == second.dtype and np.array_equal(first, second)


def rel_l2(found: Any, expected: Any) -> float:
    """The norm of the difference over that of what is expected."""
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
