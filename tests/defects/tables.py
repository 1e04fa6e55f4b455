"""Rope tables: rows missing or moved, and settings of the checkpoint that were not followed.

The last four stand in for a whole exporter that reads a setting wrongly; their tables are made with the settings as
it read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport.exporter.rope import KINDS, rope_tables

TABLES = ("rope.cos", "rope.sin")

# tiny-qwen2.5's, for which these defects are made
PLAIN = {"theta": 50000.0, "head_dim": 32, "max_position_embeddings": 512}
YARN_FACTOR = 4.0
YARN = f"yarn:{YARN_FACTOR:g}"
LLAMA3: dict[str, Any] = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}
LINEAR: dict[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}


def short_rope_table(model: ir.Model) -> None:
    """The last position has no row."""
    for name in TABLES:
        _replace_table(model, name, lambda table: table[:-1])


def shifted_rope_table(model: ir.Model) -> None:
    """Row p holds position p + 1. Attention sees differences of positions only: no logit shows this."""
    for name in TABLES:
        _replace_table(model, name, lambda table: np.concatenate([table[1:], table[-1:]]))


def wrong_last_rope_row(model: ir.Model) -> None:
    for name in TABLES:
        _replace_table(model, name, lambda table: np.concatenate([table[:-1], table[-2:-1]]))


def yarn_without_attention_factor(model: ir.Model) -> None:
    """yarn's frequencies with cos and sin not multiplied by 0.1 ln(factor) + 1."""
    scaling = np.float32(0.1 * math.log(YARN_FACTOR) + 1)
    for name in TABLES:
        _replace_table(model, name, lambda table: table / scaling)


def yarn_without_floor_and_ceil(model: ir.Model) -> None:
    """The ends of yarn's ramp as they are computed, not at whole dimensions."""
    _made_with(
        model,
        kind="yarn",
        factor=YARN_FACTOR,
        original_max_position_embeddings=PLAIN["max_position_embeddings"],
        truncate=False,
    )


def llama3_scaling_taken_for_default(model: ir.Model) -> None:
    _made_with(model, kind="default", original_max_position_embeddings=128)


def linear_scaling_ignored(model: ir.Model) -> None:
    _made_with(model, kind="default", original_max_position_embeddings=512)


def _made_with(model: ir.Model, kind: str, **settings: Any) -> None:
    """Put in the tables of other settings, in the same sizes."""
    rope = KINDS[kind](**PLAIN, **settings)
    for index, name in enumerate(TABLES):
        _replace_table(model, name, lambda table, i=index: rope_tables(rope, len(table))[i].numpy())


def _replace_table(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    table = np.ascontiguousarray(change(value.const_value.numpy()))
    value.const_value = ir.tensor(table, name=name)
    value.shape = ir.Shape(table.shape)
    for use in value.uses():
        use.node.outputs[0].shape = ir.Shape(table.shape)
