"""Mixtures of experts: one layer's experts on the CPU against alternatives, and the cost of stacking single experts.

    python benchmarks/experts.py
    python benchmarks/experts.py --quick

A layer's experts, in fp32 on the CPU: a token reads only the weights of its own k experts, while a plain export
multiplies it by all. Then a checkpoint whose experts are single tensors, exported by reference or packed: export,
load and build. Every run is a separate process; contenders take turns.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from decode import BANDWIDTH, run_bandwidth
from exporters import make_shape, ours
from measure import CONTENDERS, measure, read_once, written_bytes
from report import GB, MB, Bar, Columns, Report, Result, benchmark, figure, middle, scaled, table

OURS, BODY = "qwenport", "qwenport, function body"
EVERY = "every expert for every token"
PEERS = (EVERY, "com.microsoft.MoE", "transformers eager", "transformers grouped_mm")
WARMUP = 4  # single tokens
PREFILLS = 6  # the first one warms up
SEED = 2025
TOLERANCE = 1e-5  # rel-L2 to transformers' eager loop; another summation order stays below 2e-6
FP32_BYTES = 4

SHAPE, LARGE = "qwen1.5-moe-1-layer", "qwen2-57b-a14b-instruct"
WEIGHTS = ("link", "pack")
CAPACITY = 1024
GPUS, MAX_SEQ_LEN = "sm86,sm89,sm120", 4096
LARGE_EXPORT = f"export, {LARGE}"
MS = 1e-3
STACKING_COLUMNS: Columns = {
    "run": figure("contender"),
    "wall": figure("seconds", "{:.2f} s"),
    "of it, load": figure("load_seconds", "{:.2f} s"),
    "peak RSS": figure("peak_rss_bytes", "{:.2f} GB", GB),
    "written": figure("written_bytes", "{:.1f} MB", MB),
    "engine": figure("plan_bytes", "{:.3f} GB", GB),
    "/ weights": figure("plan_to_weights", "{:.3f}"),
}


@dataclass(frozen=True)
class Layer:
    """One layer's experts: their number, the number per token, and each expert's sizes.

    `tokens` single tokens are timed, then `prompt` tokens at once.
    """

    name: str
    experts: int
    k: int
    hidden: int
    inner: int
    tokens: int = 60
    prompt: int = 512

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the weights."""
        return {name: getattr(self, name) for name in ("experts", "k", "hidden", "inner")}

    @property
    def token_bytes(self) -> int:
        """Bytes that one token must read: the weights of k experts in fp32."""
        return self.k * 3 * self.hidden * self.inner * FP32_BYTES


@dataclass(frozen=True)
class Stacking:
    """An export, a load or a build of a checkpoint whose experts are single tensors.

    Attributes:
        name: name in the report.
        kind: "export", "session", "stacked session" (joined by onnxruntime as it loads) or "build".
        weights: how the package stores them: "link" (single) or "pack" (stacked).
        checkpoint: the checkpoint's directory.
    """

    name: str
    kind: str
    weights: str
    checkpoint: Path

    def command(self, package: Path, engine: Path) -> list[str | Path]:
        """The command: an export makes `package`, a build makes `engine` from it."""
        if self.kind == "export":
            return ours(self.checkpoint, "--weights", self.weights)(package)
        if self.kind == "build":
            start: list[str | Path] = [sys.executable, "-m", "qwenport", "build", package, engine]
            limits = ["--gpu", GPUS, "--max-seq-len", str(MAX_SEQ_LEN)]
            return [*start, "--target", "tensorrt-rtx", *limits, "--json", "--quiet"]
        stacked = self.kind == "stacked session"
        request = {"package": str(package), "capacity": CAPACITY, "stacked": stacked}
        return [sys.executable, CONTENDERS / "experts_load.py", json.dumps(request)]


LAYERS = (
    Layer("qwen1.5-moe", experts=60, k=4, hidden=2048, inner=1408),
    Layer("qwen3-30b-a3b", experts=128, k=8, hidden=2048, inner=768),
)
TINY = Layer("tiny", experts=6, k=2, hidden=64, inner=48, tokens=8, prompt=32)


def title(layer: Layer, contender: str) -> str:
    """A contender's name in the report."""
    return f"{layer.name}: {contender}"


def make_weights(layer: Layer, report: Report) -> Path:
    """The layer's weights, tokens and expected outputs, made in a child process if they do not exist yet."""
    folder = report.work / "experts" / layer.name
    request = {
        "folder": str(folder),
        "sizes": layer.sizes,
        "seed": SEED,
        "tokens": WARMUP + layer.tokens,
        "prompt": layer.prompt,
    }
    done = report.call(f"weights {layer.name}", "experts_weights.py", request)
    if done.code:
        raise click.ClickException(f"cannot make the {layer.name} experts: {done.error}")
    return folder


def run_layer(
    layer: Layer, contenders: Sequence[str], folder: Path, turn: int, report: Report
) -> None:
    """One turn: the memory bandwidth, then every contender."""
    read_once(folder)
    run_bandwidth(report)
    reads = report.data["runs"][-1]["bytes_per_second"]
    bound = layer.token_bytes / reads if reads else None
    for contender in contenders:
        if not report.error(title(layer, contender)):
            run_contender(layer, contender, folder, turn, bound, report)


def run_contender(
    layer: Layer, contender: str, folder: Path, turn: int, bound: float | None, report: Report
) -> None:
    """Many tokens, then single ones, in one process. `bound` is the minimum time for one token."""
    request = {
        "contender": contender,
        "folder": str(folder),
        "sizes": layer.sizes,
        "warmup": WARMUP,
        "prefills": PREFILLS,
    }
    name = title(layer, contender)
    done = report.call(name, "experts_layer.py", request)
    result = done.result
    error, distance = done.error, result.get("rel_l2")
    if distance is not None and not distance <= TOLERANCE:
        error = f"its output is {distance:.1e} (rel-L2) away from transformers eager's"
    seconds = None if error else middle(result["decode"])
    report.add_run(
        name,
        turn=turn,
        shape=layer.name,
        decode_median_seconds=seconds,
        prefill_median_seconds=None if error else middle(result["prefill"][1:]),
        of_the_bound=bound / seconds if bound and seconds else None,
        rel_l2=distance,
        load_seconds=None if error else round(result["load"], 3),
        peak_rss_bytes=None if error else done.peak_rss,
        load=done.load,
        others=done.others,
        error=error,
        decode_seconds=[round(value, 7) for value in result.get("decode", [])],
        prefill_seconds=[round(value, 6) for value in result.get("prefill", [])],
    )


def stackings(checkpoint: Path, large: Path | None) -> list[Stacking]:
    """All runs of the second part, in order."""
    kinds = ("export", "session", "stacked session", "build")
    found = [
        Stacking(f"{kind}, {weights}", kind, weights, checkpoint)
        for kind in kinds
        for weights in WEIGHTS
    ]
    if large is not None:
        found.append(Stacking(LARGE_EXPORT, "export", "link", large))
    return found


def run_stacking(entrant: Stacking, turn: int, report: Report) -> None:
    """Export, load or build once. A package is kept for later runs of the turn, an engine is not."""
    folder = report.work / "experts"
    package = folder / "packages" / f"{entrant.checkpoint.name}-{entrant.weights}"
    engine = folder / "engine"
    shutil.rmtree(engine, ignore_errors=True)
    if entrant.kind == "export":
        shutil.rmtree(package, ignore_errors=True)
        package.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # so that the previous run's writes do not slow this one down
    done = measure(entrant.command(package, engine), report.log(entrant.name))
    exported = entrant.kind == "export" and not done.code
    result = {} if exported else done.result
    report.add_run(
        entrant.name,
        turn=turn,
        shape=entrant.checkpoint.name,
        seconds=None if done.code else round(done.seconds, 3),
        peak_rss_bytes=None if done.code else done.peak_rss,
        written_bytes=written_bytes(package, entrant.checkpoint) if exported else None,
        load_seconds=round(result["load"], 3) if "load" in result else None,
        plan_bytes=result.get("plan_bytes"),
        weight_bytes=result.get("weight_bytes"),
        layers=result.get("network_layers"),
        load=done.load,
        others=done.others,
        error=done.error,
    )
    shutil.rmtree(engine, ignore_errors=True)


def summarise_layer(report: Report, layer: Layer, contender: str) -> dict[str, Any]:
    """A contender's medians with one layer's experts."""
    name = title(layer, contender)
    value = partial(report.values, name)
    error = report.error(name)
    keys = (
        "decode_median_seconds",
        "prefill_median_seconds",
        "of_the_bound",
        "load_seconds",
        "peak_rss_bytes",
    )
    return {
        "contender": name,
        "part": "layer",
        "shape": layer.name,
        "runs": len(value("decode_median_seconds")),
        **{key: middle(value(key)) if not error else None for key in keys},
        "rel_l2": max(value("rel_l2"), default=None),
        "error": error,
    }


def summarise_stacking(report: Report, entrant: Stacking) -> dict[str, Any]:
    """The medians of one export, load or build."""
    value = partial(report.values, entrant.name)
    error = report.error(entrant.name)
    keys = ("seconds", "peak_rss_bytes", "written_bytes", "load_seconds", "plan_bytes")
    found = {key: middle(value(key)) if not error else None for key in keys}
    weights = middle(value("weight_bytes"))
    return {
        "contender": entrant.name,
        "part": "stacking",
        "shape": entrant.checkpoint.name,
        "runs": len(value("seconds")),
        **found,
        "plan_to_weights": found["plan_bytes"] / weights
        if found["plan_bytes"] and weights
        else None,
        "error": error,
    }


def ratio(
    report: Report, layer: Layer, key: str, over: Sequence[str], under: Sequence[str]
) -> float | None:
    """The minimum time of `over` divided by the minimum of `under`, per turn: the median over the turns."""
    turns: dict[int, dict[str, float]] = {}
    for run in report.data["runs"]:
        if run.get(key) is not None and not report.error(run["contender"]):
            turns.setdefault(run["turn"], {})[run["contender"]] = run[key]
    ratios = []
    for times in turns.values():
        above, below = (
            [times[title(layer, name)] for name in names if title(layer, name) in times]
            for names in (over, under)
        )
        if above and below:
            ratios.append(min(above) / min(below))
    return middle(ratios)


def bars(report: Report, layers: Sequence[Layer], stacking: list[dict[str, Any]]) -> list[Bar]:
    """The bounds that our experts must keep; `layers` are those that peers have run too."""
    found = []
    decode, prefill = "decode_median_seconds", "prefill_median_seconds"
    for layer in layers:
        every = ratio(report, layer, decode, [EVERY], [OURS])
        best = ratio(report, layer, decode, [OURS], [BODY, *PEERS])
        many = ratio(report, layer, prefill, [EVERY], [OURS])
        found += [
            Bar(f"{layer.name}: decode, every expert's time to ours", every, 5.0, "at least", "x"),
            Bar(f"{layer.name}: decode, our time to the best other's", best, 1.0, "at most", "x"),
            Bar(f"{layer.name}: prefill, every expert's time to ours", many, 2.0, "at least", "x"),
        ]
    by_name = {row["contender"]: row for row in stacking}
    for weights in WEIGHTS:
        value = by_name[f"build, {weights}"]["plan_to_weights"]
        found.append(Bar(f"engine to weights' bytes, {weights}", value, 1.05, "at most", "x"))
    large = by_name[LARGE_EXPORT]
    rss, written = scaled(large["peak_rss_bytes"], GB), scaled(large["written_bytes"], MB)
    return [
        *found,
        Bar("57B shape, export", large["seconds"], 30, "at most", "s"),
        Bar("57B shape, peak RSS", rss, 1.5, "at most", "GB"),
        Bar("57B shape, written", written, 200, "at most", "MB"),
    ]


def layer_columns(prompt: int) -> Columns:
    """The columns of the first part."""
    return {
        "contender": figure("contender"),
        "decode": figure("decode_median_seconds", "{:.2f} ms", MS),
        "of the bound": figure("of_the_bound", "{:.0%}"),
        f"prefill of {prompt}": figure("prefill_median_seconds", "{:.1f} ms", MS),
        "load": figure("load_seconds", "{:.2f} s"),
        "peak RSS": figure("peak_rss_bytes", "{:.2f} GB", GB),
        "rel-L2": figure("rel_l2", "{:.1e}"),
    }


@benchmark("experts", repeats=3, quick_peers=True)
def main(report: Report) -> Result:
    """Time one layer's experts on the CPU, and what stacking single experts costs."""
    layers = (TINY,) if report.quick else LAYERS
    sizes = {layer.name: {**asdict(layer), "token_bytes": layer.token_bytes} for layer in layers}
    report.settings |= {"gpus": GPUS, "layers": sizes}
    contenders = (OURS, BODY, *PEERS) if report.peers else (OURS, BODY)
    folders = {layer.name: make_weights(layer, report) for layer in layers}
    checkpoint = make_shape("tiny-moe" if report.quick else SHAPE, report.work, sparse=False)
    large = None if report.quick else make_shape(LARGE, report.work, sparse=True)
    entrants = stackings(checkpoint, large)
    for turn in report.turns("one layer's experts, "):
        for layer in layers:
            run_layer(layer, contenders, folders[layer.name], turn, report)
    read_once(checkpoint)
    for turn in report.turns("single experts and stacks, "):
        for entrant in entrants:
            if not report.error(entrant.name):
                run_stacking(entrant, turn, report)
    shutil.rmtree(report.work / "experts" / "packages", ignore_errors=True)
    bandwidth = max(report.values(BANDWIDTH, "bytes_per_second"), default=None)
    report.data["bandwidth_bytes_per_second"] = bandwidth
    per_layer = [summarise_layer(report, layer, name) for layer in layers for name in contenders]
    stacking = [summarise_stacking(report, entrant) for entrant in entrants]
    judged = [] if report.quick else bars(report, layers if report.peers else (), stacking)
    tables = [
        table(
            "One layer's experts, fp32 on the CPU, medians",
            layer_columns(layers[0].prompt),
            per_layer,
        ),
        table(
            "Single experts, stacked when loaded or built or beforehand, medians",
            STACKING_COLUMNS,
            stacking,
        ),
    ]
    own = [title(layer, name) for layer in layers for name in (OURS, BODY)]
    own += [entrant.name for entrant in entrants]
    return Result(tables, [*per_layer, *stacking], judged, own)


if __name__ == "__main__":
    main()
