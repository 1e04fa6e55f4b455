"""The tables of `qwenport inspect`, at most 80 columns wide."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qwenport.contract import TENSORRT, TENSORRT_RTX, is_past, is_present, is_query

GPU_TARGETS = (TENSORRT_RTX, TENSORRT)
NUMBERS = ("in all", "a layer", "memory", "context")


def show(facts: dict[str, Any]) -> None:
    """Print the tables for these facts: bindings, operators, GPUs."""
    console = Console(highlight=False)
    if "bindings" in facts:
        console.print(_bindings(facts["bindings"], facts.get("profiles", [])))
    if "operators" in facts:
        console.print(_operators(facts["operators"]))
    if "gpus" in facts:
        console.print(_gpus(facts))


def _table(title: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in NUMBERS else "left")
    return table


def _bindings(bindings: dict[str, Any], profiles: list[dict[str, Any]]) -> Table:
    """One row per binding, and one for the caches, or the queries, of all layers. An engine's sizes are ranges."""
    table = _table("Bindings", "", "name", "dtype", "shape")
    for side, values in bindings.items():
        alike: dict[str, list[str]] = {}
        for value in values:
            alike.setdefault(_kind(value["name"]), []).append(value["name"])
        for value in values:
            kind = _kind(value["name"])
            name, *others = alike[kind]
            if value["name"] != name:
                continue
            if others:
                name = f"{kind}.* ({len(others) + 1})"
            ranges = [profile[value["name"]] for profile in profiles if value["name"] in profile]
            shape = _ranges(ranges) if ranges else value["shape"]
            table.add_row(side[:-1], name, value["dtype"], " x ".join(map(str, shape)))
    return table


def _kind(name: str) -> str:
    """What all layers have is shown once: its name without the layer."""
    return name.partition(".")[0] if is_past(name) or is_present(name) or is_query(name) else name


def _ranges(ranges: list[dict[str, list[int]]]) -> list[str]:
    """The sizes that a binding may have in some profile."""
    least = map(min, zip(*(one["min"] for one in ranges), strict=True))
    most = map(max, zip(*(one["max"] for one in ranges), strict=True))
    pairs = zip(least, most, strict=True)
    return [str(low) if low == high else f"{low}..{high}" for low, high in pairs]


def _operators(operators: dict[str, Any]) -> Table:
    alike = "" if operators["layers_alike"] else " (the first; the layers differ)"
    title = (
        f"Operators: {operators['nodes']}, {operators['nodes_per_layer']} a decoder layer{alike}"
    )
    table = _table(title, "", "in all", "a layer")
    for name, count in operators["total"].items():
        table.add_row(name, str(count), str(operators["per_layer"].get(name, "")))
    return table


def _gpus(facts: dict[str, Any]) -> Table:
    usable = f"{facts['usable_gpu_memory']:.0%}"
    what = "the engine" if facts["kind"] == "engine" else "the weights"
    table = _table(
        f"GPUs, and the context of one text that fits {usable} of their memory beside {what}",
        *("", "--gpu", "memory", *GPU_TARGETS, "context"),
    )
    for gpu in facts["gpus"]:
        table.add_row(
            gpu["name"],
            gpu["architecture"],
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB",
            *("yes" if target in gpu["targets"] else "-" for target in GPU_TARGETS),
            "all" if gpu["fits"] else str(gpu["max_context"] or "none"),
        )
    return table
