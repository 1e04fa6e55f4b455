"""The defects that depend on the way of running: each is right in one way and wrong in another."""

from __future__ import annotations

from defects import choices, distance, places, rows, shapes, stale
from defects.choices import END_OF_TEXT, END_OF_TURN
from defects.defect import MIXTURE, PACKAGE, Defect, hidden
from defects.runs import Run, decode, pick, prefill, reset, run, say, truncate
from defects.tables import YARN

_ALL = range(5)

_LONG = run(prefill(300, all_logits=True))
_EVEN_ROWS = run(prefill(20, 20, 20, 20, all_logits=True), decode(3, rows=4), rows=4)
_TWO_ROWS = run(prefill(20, 13), decode(3, rows=2), rows=2)
_JOINING = run(prefill(30), decode(2), prefill(0, 12), decode(2, rows=2), rows=2)
_FAR = run(prefill(1100), decode(2))
_SMALL = run(prefill(40, all_logits=True), decode(4), capacity=64)


def _short(seed: int) -> Run:
    """A text of which no token goes to the expert in question."""
    return run(prefill(16), decode(3), seed=seed)


RUN_DEPENDENT: tuple[Defect, ...] = (
    *(
        hidden("n < seq", change, None, shown_by, hidden_in)
        for change, shown_by, hidden_in in (
            (shapes.logits_damped_where_fewer_are_asked_for, run(prefill(64)), _LONG),
            (shapes.one_of_many_picked_a_position_early, run(prefill(64)), _LONG),
            (
                shapes.last_position_picked_whatever_was_asked,
                run(prefill(20, 13), rows=2),
                run(prefill(64), decode(20), prefill(30)),
            ),
            (
                shapes.several_positions_picked_in_reverse,
                run(pick(20, [3, 11, 19])),
                run(prefill(64, all_logits=True), prefill(20), decode(3)),
            ),
            (
                shapes.two_positions_picked_from_the_first_row,
                run(pick(20, [18, 19], [11, 12]), rows=2),
                run(pick(20, [18, 19]), prefill(20, all_logits=True)),
            ),
        )
    ),
    # an engine's step gives no more than 64
    hidden(
        "n < seq",
        shapes.logits_beyond_64_repeat_the_64th,
        None,
        _LONG,
        run(prefill(64, all_logits=True), prefill(300), decode(3)),
        forms=(PACKAGE,),
    ),
    *(
        hidden("width", change, layers, shown_by, hidden_in)
        for change, layers, shown_by, hidden_in in (
            (
                shapes.wide_steps_see_the_next_slot,
                None,
                run(prefill(129)),
                run(prefill(128, all_logits=True), prefill(128), decode(20)),
            ),
            (
                shapes.steps_above_256_lose_their_first_block,
                None,
                run(prefill(300), decode(3)),
                run(prefill(256, all_logits=True), prefill(200), decode(20)),
            ),
            (
                shapes.last_token_of_a_full_step_damped,
                None,
                run(prefill(512)),
                run(prefill(500, all_logits=True), decode(12)),
            ),
            (
                shapes.steps_of_65_to_127_turned,
                {1},
                run(prefill(100)),
                run(prefill(64, all_logits=True), prefill(128), prefill(64)),
            ),
            (
                shapes.odd_steps_above_100_end_blind,
                None,
                run(prefill(101)),
                run(prefill(99, all_logits=True), prefill(128), decode(9)),
            ),
            (
                shapes.prompt_of_one_token_damped,
                None,
                run(prefill(1), decode(5)),
                run(prefill(2), decode(20)),
            ),
            (
                shapes.short_continuations_turned,
                _ALL,
                run(prefill(64), prefill(5, all_logits=True)),
                run(prefill(5), decode(5), prefill(8, all_logits=True)),
            ),
        )
    ),
    *(
        hidden("batch", change, layers, shown_by, hidden_in)
        for change, layers, shown_by, hidden_in in (
            (
                shapes.third_of_three_rows_reads_the_second,
                {2},
                run(prefill(20, 20, 20), rows=3),
                _EVEN_ROWS,
            ),
            (
                shapes.five_rows_or_more_damped,
                None,
                run(prefill(9, 9, 9, 9, 9), rows=5),
                _EVEN_ROWS,
            ),
            (
                shapes.second_of_two_rows_decodes_at_the_positions_of_the_first,
                _ALL,
                _TWO_ROWS,
                run(prefill(20, 20), decode(9, rows=2), rows=2),
            ),
            (
                shapes.last_row_of_a_full_batch_writes_less,
                {0},
                run(prefill(*[12] * 8), decode(2, rows=8), rows=8),
                run(prefill(*[12] * 7), decode(2, rows=7), rows=7),
            ),
        )
    ),
    *(
        hidden("row", change, layers, shown_by, hidden_in)
        for change, layers, shown_by, hidden_in in (
            (
                rows.rows_from_four_on_read_four_rows_before,
                {1},
                run(prefill(9, 9, 9, 9, 9), rows=5),
                _EVEN_ROWS,
            ),
            (
                rows.last_row_of_several_damped,
                None,
                _TWO_ROWS,
                run(prefill(64, all_logits=True), decode(20)),
            ),
            (
                rows.second_row_loses_its_first_slot_beside_a_longer_one,
                None,
                _TWO_ROWS,
                run(prefill(20, 20), decode(9, rows=2), rows=2),
            ),
            (rows.rows_of_unlike_length_share_the_longest_mask, None, _TWO_ROWS, _EVEN_ROWS),
            (
                rows.idle_rows_overwrite_their_last_slot,
                _ALL,
                run(
                    prefill(20, 13),
                    decode(2, rows=2, idle=(1,)),
                    decode(2, rows=2),
                    rows=2,
                ),
                run(prefill(20, 13), decode(9, rows=2), rows=2),
            ),
            (rows.joining_rows_lose_their_first_token, None, _JOINING, _TWO_ROWS),
            (
                rows.first_decode_beside_a_prefill_damped,
                None,
                run(prefill(30), prefill(1, 12), decode(2, rows=2), rows=2),
                _JOINING,
            ),
        )
    ),
    *(
        hidden("position", change, layers, shown_by, hidden_in)
        for change, layers, shown_by, hidden_in in (
            (
                places.decoding_between_100_and_200_turned,
                _ALL,
                run(prefill(130), decode(3)),
                run(prefill(64), decode(20), prefill(130), decode(20)),
            ),
            (
                places.decoding_from_340_to_350_damped,
                None,
                run(prefill(342), decode(3)),
                run(prefill(339), decode(1), prefill(60)),
            ),
            (
                places.keys_of_the_last_quarter_turned,
                {2},
                run(prefill(400)),
                run(prefill(380, all_logits=True), decode(4)),
            ),
            (
                places.middle_of_the_context_damped,
                None,
                run(prefill(200)),
                run(prefill(180, all_logits=True), decode(12)),
            ),
            (
                places.positions_of_eight_bits,
                _ALL,
                _LONG,
                run(prefill(240, all_logits=True), decode(12)),
            ),
            (
                places.mask_counts_slots_instead_of_positions,
                None,
                run(reset(448), prefill(40, all_logits=True), decode(4)),
                run(prefill(400, all_logits=True), decode(20)),
            ),
        )
    ),
    *(
        hidden("span", change, layers, shown_by, hidden_in)
        for change, layers, shown_by, hidden_in in (
            (
                places.span_of_192_loses_its_last_block,
                None,
                run(prefill(150)),
                run(prefill(128), prefill(128), decode(3)),
            ),
            (
                places.spans_of_129_to_320_damp_queries,
                {1},
                run(prefill(100), prefill(100, all_logits=True)),
                run(prefill(128), prefill(250), decode(3)),
            ),
            (
                places.first_token_of_a_block_loses_the_last_before,
                None,
                run(prefill(128), decode(1)),
                run(prefill(100, all_logits=True), decode(28)),
            ),
            (
                places.second_token_of_a_block_turned,
                _ALL,
                run(prefill(129), decode(1)),
                run(prefill(200, all_logits=True), decode(20)),
            ),
            (
                places.last_value_of_a_block_damped,
                _ALL,
                run(prefill(126), decode(5)),
                run(prefill(200, all_logits=True), decode(20)),
            ),
            (
                places.long_decodes_lose_a_slot_where_they_are_split,
                None,
                run(prefill(200), decode(2)),
                run(prefill(180, all_logits=True), decode(12), prefill(100)),
            ),
        )
    ),
    *(
        hidden("capacity", change, layers, shown_by, forms=forms)
        for change, layers, shown_by, forms in (
            (places.smaller_caches_damped, None, _SMALL, (PACKAGE,)),
            (places.a_cache_of_64_slots_turned, _ALL, _SMALL, (PACKAGE,)),
            (places.a_cache_of_320_slots_damped, None, run(prefill(9), capacity=320), (PACKAGE,)),
        )
    ),
    hidden(
        "capacity",
        places.a_cache_in_use_to_its_end_damps_queries,
        {3},
        run(prefill(450), decode(1)),
        run(prefill(440, all_logits=True), decode(8)),
    ),
    *(
        hidden("distance", change, layers, shown_by, hidden_in)
        for change, layers, shown_by, hidden_in in (
            (
                distance.window_of_256,
                None,
                _LONG,
                run(prefill(240, all_logits=True), decode(16)),
            ),
            (
                distance.window_of_256_in_one_layer,
                {2},
                run(prefill(500)),
                run(prefill(240, all_logits=True), decode(16)),
            ),
            (
                distance.window_of_100_in_one_layer,
                {3},
                run(prefill(120)),
                run(prefill(64, all_logits=True), decode(36)),
            ),
            (
                distance.beginning_lost_150_slots_on,
                None,
                run(prefill(160)),
                run(prefill(150, all_logits=True), decode(1)),
            ),
            (
                distance.keys_beyond_300_turned,
                _ALL,
                run(prefill(310), decode(1)),
                run(prefill(300, all_logits=True), decode(1)),
            ),
        )
    ),
    *(
        hidden("distance", change, layers, _FAR, _LONG, rope_scaling=YARN)
        for change, layers in (
            (distance.window_of_1024_in_one_layer, {2}),
            (distance.first_block_lost_beyond_1024, None),
            (distance.positions_clipped_at_1023, _ALL),
        )
    ),
    *(
        hidden("token id", change, None, run(prefill(12), say(*tokens), decode(3)))
        for change, tokens in (
            (choices.one_token_looked_up_as_another, (1234,)),
            (choices.highest_id_out_of_reach, (END_OF_TURN,)),
            (choices.ids_above_1900_a_row_early, (1901, 1999)),
            (choices.one_token_damped_inside, (1905,)),
            (choices.one_token_is_zero, (777,)),
            (choices.one_token_is_nan, (1500,)),
            (choices.special_tokens_are_zero, (END_OF_TEXT, END_OF_TURN)),
        )
    ),
    *(
        hidden("expert", change, layers, shown_by, hidden_in, checkpoint=MIXTURE)
        for change, layers, shown_by, hidden_in in (
            (choices.rare_first_choice_counts_half_more, {2}, _LONG, _short(1)),
            (choices.last_expert_ignored_as_third_choice, {3}, _LONG, _short(1)),
            (choices.last_expert_ignored, {3}, _LONG, _short(1)),
            (choices.one_expert_without_weights, {2}, _LONG, _short(20)),
            (
                choices.experts_full_after_128_tokens,
                {0},
                run(prefill(400)),
                run(prefill(128, all_logits=True), prefill(128), decode(9)),
            ),
            (
                choices.two_tokens_lose_their_third_choice,
                {0, 2, 3},
                run(prefill(20, 20), decode(2, rows=2), rows=2),
                run(prefill(64, all_logits=True), decode(20), prefill(3)),
            ),
        )
    ),
    *(
        hidden("reset", change, layers, shown_by, hidden_in, **settings)
        for change, layers, shown_by, hidden_in, settings in (
            (
                stale.slots_behind_the_span_leak,
                {1},
                run(prefill(300), reset(), prefill(40, all_logits=True)),
                run(prefill(40), reset(), prefill(50), decode(3)),
                {},
            ),
            (
                stale.slots_behind_a_first_step_leak,
                {2},
                run(prefill(60), reset(), prefill(40, all_logits=True)),
                run(prefill(40, 20), decode(3, rows=2), prefill(9, 3), rows=2),
                {},
            ),
            # it reads what it overwrites, which no network may
            (
                stale.first_value_of_a_text_added_to_the_one_before,
                {1},
                run(prefill(60), reset(), prefill(40, all_logits=True)),
                run(prefill(64, all_logits=True), decode(9), prefill(60)),
                {"forms": (PACKAGE,)},
            ),
        )
    ),
    *(
        hidden("truncation", change, layers, run(prefill(60), truncate(40), decode(3)))
        for change, layers in (
            (stale.slots_behind_a_decoded_token_leak, {3}),
            (stale.a_key_left_behind_is_seen, {1, 2, 3, 4}),
        )
    ),
)
