"""What was judged of what the target allows: the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenport.validate.html.words import ranges, runs
from qwenport.wording import counted

SHOWN = 8  # parts of a list that are shown; all of them if the reader expands it


@dataclass(frozen=True)
class Row:
    """One quantity, judged in part or in full.

    Attributes:
        name, note: the quantity.
        judged: how much of it was judged, or which part.
        every: the whole list, if `judged` is only its beginning.
        allowed: the target's limit; empty if there is none.
    """

    name: str
    note: str
    judged: str
    allowed: str = ""
    every: str | None = None


def rows_of(coverage: dict[str, Any]) -> list[Row]:
    """The table of a report's `coverage`."""
    c = coverage
    positions, single = (
        sum(last - first + 1 for first, last in c[key]) for key in ("positions", "single_positions")
    )
    back = c["max_seq_len"] - 1
    return [
        _listed(
            "Step widths",
            "tokens of a row in one step",
            ranges(runs(c["step_widths"])),
            f"1 to {c['widest_step']:,}",
            counted(len(c["step_widths"]), "width"),
        ),
        Row("Steps, last logits", "one per row, as generation asks", f"{c['last_logits_steps']:,}"),
        Row("Steps, all logits", "of more than one token", f"{c['all_logits_steps']:,}"),
        Row("Steps of one token", "decoding", f"{c['single_steps']:,}"),
        _listed(
            "Batches", "rows of a step", ranges(runs(c["batches"])), f"1 to {c['max_batch']:,}"
        ),
        _listed(
            "Rows",
            "given tokens, and judged",
            ranges(runs(c["rows"])),
            _below(c["max_batch"]),
        ),
        _listed(
            "Spans",
            "slots of the cache that a step reads",
            [f"{span:,}" for span in c["spans"]],
            counted(c["all_spans"], "span"),
            f"{len(c['spans']):,} in all",
        ),
        _listed(
            "Cache capacities",
            "slots",
            [f"{slots:,}" for slots in c["capacities"]],
            f"{counted(c['all_capacities'], 'size')} up to {c['max_seq_len']:,}",
        ),
        _listed(
            "Positions",
            "logits of the whole model",
            ranges(c["positions"]),
            _below(c["max_seq_len"]),
            f"{positions:,} in all",
        ),
        _listed(
            "Positions, token by token",
            "of steps of one token",
            ranges(c["single_positions"]),
            _below(c["max_seq_len"]),
            f"{single:,} in all",
        ),
        Row(
            "Attention distance, whole model",
            "positions back",
            f"{c['distance']:,}",
            f"{back:,}",
        ),
        *(
            Row(f"Attention distance, {name} alone", "positions back", f"{far:,}", f"{back:,}")
            for name, far in c["layer_distance"].items()
        ),
        Row("Token ids, whole model", "", f"{c['token_ids']:,}", f"{c['vocab_size']:,}"),
        Row("Token ids, embedding", "", f"{c['embedded_ids']:,}", f"{c['vocab_size']:,}"),
        *_experts(c["experts"]),
        Row(
            "Half precision",
            "positions judged layer by layer",
            f"{c['rounding']:,}" if c["rounding"] else "not judged",
        ),
        Row("Budget and seed", "", f"{c['budget']}, {c['seed']:,}"),
    ]


def is_empty(coverage: dict[str, Any] | None) -> bool:
    """Whether nothing ran."""
    return coverage is None or not coverage["step_widths"]


def without_tokens(experts: Iterable[dict[str, Any]]) -> list[tuple[int, str]]:
    """(layer, its experts that received no token), for layers that have such experts."""
    return [
        (layer["layer"], ", ".join(ranges(runs(layer["without_tokens"]))))
        for layer in experts
        if layer["without_tokens"]
    ]


def _experts(experts: Sequence[dict[str, Any]]) -> list[Row]:
    if not experts:
        return []
    there = sum(layer["experts"] for layer in experts)
    missing = sum(len(layer["without_tokens"]) for layer in experts)
    return [
        Row(
            "Experts",
            "that received a token",
            f"{there - missing:,}",
            f"{there:,} in {counted(len(experts), 'layer')}",
        )
    ]


def _below(count: int) -> str:
    """For example "0 to 7"."""
    return ", ".join(ranges([(0, count - 1)]))


def _listed(
    name: str, note: str, parts: Sequence[str], allowed: str, count: str | None = None
) -> Row:
    if not parts:
        return Row(name, note, "none", allowed)
    every = ", ".join(parts)
    said = f" ({count})" if count and len(parts) > 1 else ""
    if len(parts) <= SHOWN + 1:
        return Row(name, note, every + said, allowed)
    return Row(name, note, f"{', '.join(parts[:SHOWN])}, …{said}", allowed, every)
