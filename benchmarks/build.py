"""TensorRT-RTX builds, without a GPU: time, memory, engine size and layers, ours and the peers'.

    python benchmarks/build.py
    python benchmarks/build.py --quick

Ours is `qwenport build`. A peer's ONNX of the same checkpoint is built with the same TensorRT-RTX for the
same GPUs, also strongly typed, also with one dynamic profile of the same limits (contenders/trt_build.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from exporters import genai, install, make_model, make_shape, optimum, ours
from measure import CONTENDERS, file_bytes, measure, without_paths
from report import GB, Bar, Columns, Report, Result, benchmark, figure, middle, table
from shapes import config_of

SHAPE = "qwen2.5-0.5b-instruct"
OURS = "qwenport bf16"
GPUS = "sm80,sm86,sm89,sm120,sm121"  # all that TensorRT-RTX has bf16 kernels for
BATCH, TOKENS, TYPICAL = 8, 2048, 1024  # our builder's profile, also used for the peers
COLUMNS: Columns = {
    "contender": figure("contender"),
    "build": figure("seconds", "{:.1f} s"),
    "engine": figure("plan_bytes", "{:.3f} GB", GB),
    "/ checkpoint": figure("plan_to_checkpoint", "{:.3f}"),
    "layers": figure("layers", "{:.0f}"),
    "/ decoder layer": figure("layers_per_decoder_layer", "{:.0f}"),
    "peak RSS": figure("peak_rss_bytes", "{:.2f} GB", GB),
}


@dataclass(frozen=True)
class Contender:
    """A model to build, or why there is none."""

    name: str
    model: Path | str
    command: Callable[[Path], list[str | Path]]  # takes the output directory
    plan: str  # the plan's path in it


def contenders(
    report: Report, checkpoint: Path, config: dict[str, Any], gpus: str
) -> list[Contender]:
    """Every model, exported first if it does not exist yet."""
    work = report.work
    found = [_ours(make_model(f"{checkpoint.name}-bf16", ours(checkpoint), work, True), gpus)]
    if not report.peers:
        return found
    exporter, builder = install("optimum", report), install("genai", report)
    commands = {
        "optimum-onnx fp16": optimum(exporter, checkpoint, "--dtype", "fp16"),
        "optimum-onnx fp32": optimum(exporter, checkpoint),
        "onnxruntime-genai fp16 cuda": genai(builder, checkpoint, work, "fp16", "cuda"),
        "onnxruntime-genai bf16 NvTensorRtRtx": genai(
            builder, checkpoint, work, "bf16", "NvTensorRtRtx"
        ),
    }
    for name, command in commands.items():
        model = make_model(f"{checkpoint.name}-{name.replace(' ', '-')}", command, work, False)
        found.append(_plain(name, model, gpus, config["max_position_embeddings"]))
    return found


def _ours(package: Path | str, gpus: str) -> Contender:
    if isinstance(package, str):
        raise click.ClickException(f"our export failed: {package}")
    start: list[str | Path] = [sys.executable, "-m", "qwenport", "build", package]
    flags = ["--target", "tensorrt-rtx", "--gpu", gpus, "--json", "--quiet"]
    return Contender(OURS, package, lambda output: [*start, output, *flags], "engine.plan")


def _plain(name: str, model: Path | str, gpus: str, capacity: int) -> Contender:
    def command(output: Path) -> list[str | Path]:
        output.mkdir()
        request = {
            "model": str(Path(model) / "model.onnx"),
            "plan": str(output / "engine.plan"),
            "gpus": gpus.split(","),
            "batch": BATCH,
            "tokens": TOKENS,
            "capacity": capacity,
            "typical": TYPICAL,
        }
        return [sys.executable, CONTENDERS / "trt_build.py", json.dumps(request)]

    return Contender(name, model, command, "engine.plan")


def run(contender: Contender, report: Report) -> None:
    """Build once; the engine is removed."""
    if isinstance(contender.model, str):
        report.add_run(contender.name, error=f"export: {contender.model}")
        return
    output = report.work / "engines" / contender.name.replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # so that the previous run's writes do not slow this one down
    done = measure(contender.command(output), report.log(contender.name))
    result = done.result
    error = done.error or result.get("error")
    plan = output / contender.plan
    report.add_run(
        contender.name,
        seconds=None if error else round(done.seconds, 3),
        peak_rss_bytes=None if error else done.peak_rss,
        plan_bytes=None if error else plan.stat().st_size,
        layers=result.get("network_layers", result.get("layers")),
        load=done.load,
        others=done.others,
        error=without_paths(error) if error else None,
    )
    shutil.rmtree(output, ignore_errors=True)


def summarise(report: Report, contender: Contender, weights: int, depth: int) -> dict[str, Any]:
    """A contender's medians, and how they relate to the checkpoint."""
    value = partial(report.values, contender.name)
    plan, layers = middle(value("plan_bytes")), middle(value("layers"))
    rss = middle(value("peak_rss_bytes"))
    return {
        "contender": contender.name,
        "runs": len(value("seconds")),
        "seconds": middle(value("seconds")),
        "peak_rss_bytes": rss,
        "peak_rss_to_checkpoint": rss / weights if rss else None,
        "plan_bytes": plan,
        "plan_to_checkpoint": plan / weights if plan else None,
        "layers": layers,
        "layers_per_decoder_layer": layers / depth if layers else None,
        "error": report.error(contender.name),
    }


def bars(ours: dict[str, Any]) -> list[Bar]:
    """The bounds that our build must keep."""
    return [
        Bar("engine to checkpoint bytes", ours["plan_to_checkpoint"], 1.03, "at most", "x"),
        Bar("layers per decoder layer", ours["layers_per_decoder_layer"], 160, "at most", "layers"),
        Bar("peak RSS to checkpoint bytes", ours["peak_rss_to_checkpoint"], 4.0, "at most", "x"),
    ]


@benchmark("build", repeats=3)
@click.option("--gpus", default=GPUS, help="Architectures that the engines are for.")
def main(report: Report, gpus: str) -> Result:
    """Build TensorRT-RTX engines of one checkpoint, from Qwenport's package and from its peers' ONNX."""
    report.settings["gpus"] = gpus
    shape = "tiny" if report.quick else SHAPE
    config = config_of(shape)
    checkpoint = make_shape(shape, report.work, sparse=False)
    weights = file_bytes(checkpoint, "*.safetensors")
    entrants = contenders(report, checkpoint, config, gpus)
    for _ in report.turns():
        for contender in entrants:
            if not report.error(contender.name):
                run(contender, report)
    depth = config["num_hidden_layers"]
    summary = [summarise(report, contender, weights, depth) for contender in entrants]
    judged = [] if report.quick else bars(summary[0])
    tables = [table("TensorRT-RTX builds, medians", COLUMNS, summary)]
    return Result(tables, summary, judged, [OURS])


if __name__ == "__main__":
    main()
