"""Every defect as data: the change, the checkpoint it is made for, and the layers in which the mistake lives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from defects import (
    attention,
    cache,
    ends,
    experts,
    layers,
    norms_and_weights,
    rope,
    rounding,
    tables,
)
from defects.defect import DENSE, EXACT_NETWORK, MIXTURE, NETWORK, Defect, defect
from defects.run_dependent import RUN_DEPENDENT

Changes = Mapping[Callable[[ir.Model], None], Iterable[int] | None]


def _family(
    name: str, changes: Changes, *, checkpoint: str = DENSE, forms: tuple[str, ...] | None = None
) -> tuple[Defect, ...]:
    asked = {} if forms is None else {"forms": forms}
    return tuple(
        defect(name, change, where, checkpoint=checkpoint, **asked)
        for change, where in changes.items()
    )


_ALL, _SPARSE = range(5), (0, 2, 3)

ALWAYS_WRONG: tuple[Defect, ...] = (
    *_family(
        "norms",
        {
            norms_and_weights.wrong_epsilon: _ALL,
            norms_and_weights.wrong_epsilon_in_one_norm: {0},
            norms_and_weights.norm_without_weight: {1},
            norms_and_weights.norm_subtracts_the_mean: {2},
        },
    ),
    *_family(
        "weights",
        {
            norms_and_weights.missing_bias: {2},
            norms_and_weights.doubled_bias: {3},
            norms_and_weights.query_bias_on_key: {1},
            norms_and_weights.swapped_key_and_value_weights: {1},
            norms_and_weights.swapped_query_and_key_weights: {2},
            norms_and_weights.transposed_weight: {0},
        },
    ),
    *_family(
        "attention",
        {
            attention.strict_mask: None,
            attention.permissive_mask: None,
            attention.causal_from_the_upper_left: None,
            attention.doubled_attention_scale: _ALL,
            attention.attention_without_scale: _ALL,
            attention.swapped_kv_heads: _ALL,
            attention.interleaved_kv_heads: _ALL,
            attention.scores_in_fp16: {1},
        },
    ),
    *_family(
        "cache",
        {
            cache.cache_slot_off_by_one: {1},
            cache.rows_share_the_first_rows_slots: _ALL,
            cache.cache_of_another_layer: {3},
            cache.values_not_written: {2},
            cache.second_token_overwritten: {2},
        },
    ),
    *_family(
        "rope",
        {
            rope.swapped_cos_and_sin: _ALL,
            rope.interleaved_rope: _ALL,
            rope.rope_restarts_every_step: _ALL,
            rope.key_positions_off_by_one: {3},
        },
    ),
    *_family(
        "tables",
        {
            tables.short_rope_table: None,
            tables.shifted_rope_table: None,
            tables.wrong_last_rope_row: None,
        },
    ),
    *(
        defect("tables", change, None, config=config, rope_scaling=rope_scaling)
        for change, config, rope_scaling in (
            (tables.yarn_without_attention_factor, {}, tables.YARN),
            (tables.yarn_without_floor_and_ceil, {}, tables.YARN),
            (tables.llama3_scaling_taken_for_default, tables.LLAMA3, None),
            (tables.linear_scaling_ignored, tables.LINEAR, None),
        )
    ),
    *_family(
        "layers",
        {
            layers.skipped_layer: {3},
            layers.swapped_layers: {1, 2},
            layers.second_residual_from_the_layers_input: {2},
            layers.residual_after_the_norm: {3},
            layers.gelu_for_silu: _ALL,
            layers.sigmoid_for_silu: {2},
        },
    ),
    *_family(
        "ends",
        {
            ends.embedding_row_off_by_one: None,
            ends.logits_of_the_position_before: None,
            ends.swapped_head_rows: None,
            ends.changed_row_in_a_copy_of_the_tied_head: None,
            ends.one_nan: None,
        },
    ),
    # onnxruntime does not load such a package: an error, and no verdict
    *_family("ends", {ends.unknown_operator: None}, forms=(EXACT_NETWORK,)),
    *_family(
        "experts",
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
        checkpoint=MIXTURE,
    ),
    # in a bf16 package the router's logits are bf16 anyway
    defect("experts", experts.router_logits_in_bf16, _SPARSE, checkpoint=MIXTURE, dtype="fp32"),
)

ROUNDING: tuple[Defect, ...] = (
    *_family(
        "rounding",
        {
            rounding.query_projection_in_8_pieces: {1},
            rounding.down_projection_in_16_pieces: {2},
            rounding.head_in_16_pieces: None,
            rounding.every_product_of_a_layer_in_4_pieces: {3},
            rounding.norm_in_bf16: {2},
            rounding.every_norm_in_bf16: _ALL,
            rounding.rotation_by_three_products: _ALL,
            rounding.rope_angles_in_bf16: _ALL,
            rounding.residual_stream_scaled_and_back: {2},
            rounding.hidden_states_of_6_bits: {1},
            rounding.cached_keys_of_6_bits: {3},
            rounding.silu_by_exp: _ALL,
        },
        forms=(NETWORK,),
    ),
    *_family(
        "rounding",
        {rounding.router_product_in_8_pieces: _SPARSE},
        checkpoint=MIXTURE,
        forms=(NETWORK,),
    ),
)

# Coarser than ours and no worse than transformers' own: its eager attention rounds scores to bf16, its routers give
# bf16 weights. By that yardstick these are no defects, and are not to be accused.
AS_TRANSFORMERS: tuple[Defect, ...] = (
    *_family(
        "as transformers",
        {
            rounding.softmax_in_bf16: {1},
            rounding.softmax_in_bf16_in_every_layer: _ALL,
            rounding.weights_divided_after_the_values: {2},
            rounding.scores_rounded_before_they_are_scaled: {2},
        },
        forms=(NETWORK,),
    ),
    *_family(
        "as transformers",
        {rounding.router_softmax_in_bf16: _SPARSE},
        checkpoint=MIXTURE,
        forms=(NETWORK,),
    ),
)

DEFECTS: tuple[Defect, ...] = (*ALWAYS_WRONG, *RUN_DEPENDENT, *ROUNDING)

__all__ = ["ALWAYS_WRONG", "AS_TRANSFORMERS", "DEFECTS", "ROUNDING", "RUN_DEPENDENT", "Defect"]
