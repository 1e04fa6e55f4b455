"""Every defect as data: the change, the checkpoint it is made for, and the layers in which the mistake lives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from defects import attention, cache, ends, experts, layers, norms_and_weights, rope, tables

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@dataclass(frozen=True)
class Defect:
    """A mistake in a package's graph.

    Attributes:
        name: unique, the name of `change`.
        change: makes the mistake in a package's graph, in place.
        checkpoint: the folder under examples/ that the package is made from.
        layers: decoder layers in which the mistake lives; None where it lives in none, but in the embedding, the
            mask, the tables, the head or another value that all layers are given.
        config: changes to the checkpoint's config.json before the export; the weights stay.
        rope_scaling, dtype: what the export is asked for.
    """

    name: str
    change: Callable[[ir.Model], None]
    checkpoint: str
    layers: frozenset[int] | None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rope_scaling: str | None = None
    dtype: str | None = None

    def write_checkpoint(self, folder: Path) -> Path:
        """The checkpoint with this defect's config.json: the example itself, or a copy at `folder`."""
        source = EXAMPLES / self.checkpoint
        if not self.config:
            return source
        shutil.copytree(source, folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **self.config}))
        return folder


def _defects(
    checkpoint: str, changes: Mapping[Callable[[ir.Model], None], Iterable[int] | None]
) -> tuple[Defect, ...]:
    return tuple(
        Defect(change.__name__, change, checkpoint, None if where is None else frozenset(where))
        for change, where in changes.items()
    )


_DENSE, _MIXTURE = "tiny-qwen2.5", "tiny-qwen2-moe"
_ALL, _SPARSE = range(5), (0, 2, 3)

DEFECTS: tuple[Defect, ...] = (
    *_defects(
        _DENSE,
        {
            norms_and_weights.wrong_epsilon: _ALL,
            norms_and_weights.wrong_epsilon_in_one_norm: {0},
            norms_and_weights.norm_without_weight: {1},
            norms_and_weights.norm_subtracts_the_mean: {2},
            norms_and_weights.missing_bias: {2},
            norms_and_weights.doubled_bias: {3},
            norms_and_weights.query_bias_on_key: {1},
            norms_and_weights.swapped_key_and_value_weights: {1},
            norms_and_weights.swapped_query_and_key_weights: {2},
            norms_and_weights.transposed_weight: {0},
            attention.strict_mask: None,
            attention.permissive_mask: None,
            attention.causal_from_the_upper_left: None,
            attention.doubled_attention_scale: _ALL,
            attention.attention_without_scale: _ALL,
            attention.swapped_kv_heads: _ALL,
            attention.interleaved_kv_heads: _ALL,
            attention.scores_in_fp16: {1},
            cache.cache_slot_off_by_one: {1},
            cache.rows_share_the_first_rows_slots: _ALL,
            cache.cache_of_another_layer: {3},
            cache.values_not_written: {2},
            cache.second_token_overwritten: {2},
            rope.swapped_cos_and_sin: _ALL,
            rope.interleaved_rope: _ALL,
            rope.rope_restarts_every_step: _ALL,
            rope.key_positions_off_by_one: {3},
            tables.short_rope_table: None,
            tables.shifted_rope_table: None,
            tables.wrong_last_rope_row: None,
            layers.skipped_layer: {3},
            layers.swapped_layers: {1, 2},
            layers.second_residual_from_the_layers_input: {2},
            layers.residual_after_the_norm: {3},
            layers.gelu_for_silu: _ALL,
            layers.sigmoid_for_silu: {2},
            ends.embedding_row_off_by_one: None,
            ends.logits_of_the_position_before: None,
            ends.swapped_head_rows: None,
            ends.changed_row_in_a_copy_of_the_tied_head: None,
            ends.one_nan: None,
            ends.unknown_operator: None,
        },
    ),
    *(
        Defect(change.__name__, change, _DENSE, None, config, rope_scaling)
        for change, config, rope_scaling in (
            (tables.yarn_without_attention_factor, {}, tables.YARN),
            (tables.yarn_without_floor_and_ceil, {}, tables.YARN),
            (tables.llama3_scaling_taken_for_default, tables.LLAMA3, None),
            (tables.linear_scaling_ignored, tables.LINEAR, None),
        )
    ),
    *_defects(
        _MIXTURE,
        {
            norms_and_weights.dense_gate_and_up_swapped: {1},
            experts.renormalised_weights: _SPARSE,
            experts.one_expert_too_few: _SPARSE,
            experts.one_expert_too_many: _SPARSE,
            experts.experts_swapped: {0},
            experts.experts_shifted_by_one: {2},
            experts.gate_and_up_swapped: _SPARSE,
            experts.down_of_another_expert: {3},
            experts.routers_of_each_other_s_layers: {0, 3},
            experts.missing_shared_expert: _SPARSE,
            experts.ungated_shared_expert: _SPARSE,
            experts.probabilities_left_out: _SPARSE,
            experts.weights_before_the_experts: _SPARSE,
        },
    ),
    # in a bf16 package the router's logits are bf16 anyway
    Defect(
        "router_logits_in_bf16",
        experts.router_logits_in_bf16,
        _MIXTURE,
        frozenset(_SPARSE),
        dtype="fp32",
    ),
)
