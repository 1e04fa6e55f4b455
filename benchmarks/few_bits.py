"""Decoding on one CPU thread with weights in 8 and 4 bits, in CPU time: our engines and onnxruntime-genai's int4.

    python benchmarks/few_bits.py
    python benchmarks/few_bits.py --quick

Every run is a process of its own; contenders take turns. A ratio is of two contenders in one turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
from exporters import Command, genai, install, make_model, make_shape, ours
from measure import read_once
from report import GB, Bar, Columns, Report, Result, benchmark, figure, middle, table

SHAPE = "qwen2.5-0.5b-instruct"
FP32, INT8, INT4, INT4_WIDE = (
    "qwenport fp32",
    "qwenport int8",
    "qwenport int4",
    "qwenport int4 g128",
)
OWN: Mapping[str, tuple[str, ...]] = {
    FP32: (),
    INT8: ("--quantize", "int8"),
    INT4: ("--quantize", "int4"),
    INT4_WIDE: ("--quantize", "int4", "--group", "128"),
}
GENAI = "onnxruntime-genai int4"
# Activations in int8, as ours have them.
GENAI_OPTIONS = ("--extra_options", "int4_accuracy_level=4")
PROMPT, NEW, CAPACITY = 128, 64, 1024
WARMUP, PREFILLS = 4, 3  # of the peer; `engines.measure` has its own
CPU = "decode_cpu_seconds"
FIGURES = (CPU, "decode_tokens_per_second", "prefill_cpu_seconds", "loaded_bytes")
COLUMNS: Columns = {
    "who": figure("contender"),
    "decode, CPU ms": figure(CPU, "{:.1f}", 1e-3),
    "tok/s": figure("decode_tokens_per_second", "{:.1f}"),
    "prefill, CPU s": figure("prefill_cpu_seconds", "{:.2f}"),
    "loaded, GB": figure("loaded_bytes", "{:.2f}", GB),
    "weights, GB": figure("weight_bytes", "{:.2f}", GB),
}


def engine_of(name: str, options: tuple[str, ...], checkpoint: Path, report: Report) -> Path:
    """Our onnxruntime engine."""

    def made(kind: str, command: Command) -> Path:
        found = make_model(f"{checkpoint.name}-{name}-{kind}", command, report.work, True)
        if isinstance(found, str):
            raise click.ClickException(f"{name}: our {kind} failed: {found}")
        return found

    package = made("package", ours(checkpoint, "--max-seq-len", str(CAPACITY), *options))
    build = [sys.executable, "-m", "qwenport", "build", "--quiet", package]
    return made("engine", lambda output: [*build, output, "--target", "onnxruntime"])


def peer_of(checkpoint: Path, report: Report) -> Path | str:
    """onnxruntime-genai's model, for one thread; or why there is none."""
    peer = install("genai", report)
    command = genai(peer, checkpoint, report.work, "int4", "cpu")
    name = f"{checkpoint.name}-genai-int4-cpu"
    found = make_model(name, lambda out: [*command(out), *GENAI_OPTIONS], report.work, False)
    if isinstance(found, Path):
        file = found / "genai_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
        file.write_text(json.dumps(config), encoding="utf-8")
    return found


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's large files."""
    return sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".data")
    )


def run(contender: str, model: Path | str, vocab: int, turn: int, report: Report) -> None:
    """Load, prefill and decode in one process."""
    if isinstance(model, str):
        report.add_run(contender, error=f"export: {model}")
        return
    prompt, new = (32, 8) if report.quick else (PROMPT, NEW)
    if contender == GENAI:
        request = {
            "model": str(model),
            "capacity": CAPACITY,
            "prompt": [(13 + 7919 * index) % vocab for index in range(prompt)],
            "context": prompt,
            "warmup": WARMUP,
            "tokens": new,
            "prefills": PREFILLS,
        }
        python = report.work / "envs" / "genai" / "bin" / "python"
        done = report.call(contender, "genai_decode.py", request, python, own=False)
    else:
        sizes = {"prompt_tokens": prompt, "new_tokens": new, "threads": 1}
        request = {"target": str(model), "cache": True, "imports": ["onnxruntime"], **sizes}
        done = report.call(contender, "ours_bench.py", request)
    result: Mapping[str, Any] = done.result
    if "decode_cpu" in result:
        result = {
            **result,
            CPU: mean(result["decode_cpu"]),
            "decode_tokens_per_second": 1 / median(result["decode"]),
            "prefill_cpu_seconds": median(result["prefill_cpu"][1:]),
        }
    report.add_run(
        contender,
        turn=turn,
        **{key: result.get(key) for key in FIGURES},
        weight_bytes=weight_bytes(model),
        load=done.load,
        others=done.others,
        error=done.error,
    )


def ratio(report: Report, one: str, other: str) -> float | None:
    """One contender's CPU time of a step divided by another's in the same turn: the median over the turns."""
    of_turn: dict[str, dict[int, float]] = {one: {}, other: {}}
    for made in report.data["runs"]:
        if made["contender"] in of_turn and made.get(CPU):
            of_turn[made["contender"]][made["turn"]] = made[CPU]
    turns = of_turn[one].keys() & of_turn[other].keys()
    return middle([of_turn[one][turn] / of_turn[other][turn] for turn in turns])


@benchmark("few_bits", repeats=3)
def main(report: Report) -> Result:
    """Time decoding on one thread with weights in 8 and 4 bits."""
    shape = "tiny" if report.quick else SHAPE
    report.settings |= {"shape": shape, "prompt": PROMPT, "tokens": NEW, "threads": 1}
    checkpoint = make_shape(shape, report.work, sparse=False)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    groups = {INT4_WIDE} if report.quick else set()  # the tiny shape has no such groups
    models: dict[str, Path | str] = {
        name: engine_of(name.replace(" ", "-"), options, checkpoint, report)
        for name, options in OWN.items()
        if name not in groups
    }
    if report.peers:
        models[GENAI] = peer_of(checkpoint, report)
    for model in models.values():
        if isinstance(model, Path):
            read_once(model)
    for turn in report.turns():
        for contender, model in models.items():
            if not report.error(contender):
                run(contender, model, config["vocab_size"], turn, report)
    summary = [
        {
            "contender": contender,
            "runs": len(report.values(contender, CPU)),
            **{key: middle(report.values(contender, key)) for key in (*FIGURES, "weight_bytes")},
            "error": report.error(contender),
        }
        for contender in models
    ]
    bars = [
        Bar("fp32's CPU time to int4's", ratio(report, FP32, INT4), 4.0, "at least", "x"),
        Bar("fp32's CPU time to int8's", ratio(report, FP32, INT8), 2.2, "at least", "x"),
        Bar(f"{GENAI}'s CPU time to int4's", ratio(report, GENAI, INT4), 1.0, "at least", "x"),
    ]
    own = [name for name in models if name != GENAI]
    return Result(
        [table("Decoding, batch 1, one thread, medians", COLUMNS, summary)], summary, bars, own
    )


if __name__ == "__main__":
    main()
