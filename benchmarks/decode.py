"""Decoding and prefill on the CPU in fp32, compared with the limit of the machine's memory and with peers.

    python benchmarks/decode.py
    python benchmarks/decode.py --quick

A decode step at batch size 1 reads every weight once, so the memory's read bandwidth bounds it. That bandwidth
is measured here, in turns with the contenders. Each contender is a separate process, one at a time, with all
cores.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from exporters import genai, install, make_model, make_shape, ours
from report import GB, Bar, Columns, Report, Result, benchmark, figure, middle, table
from shapes import config_of, matrices

SHAPE = "qwen2.5-0.5b-instruct"
SHORT, LONG = 1024, 32768  # capacities; both hold the same few tokens
CONTEXT, WARMUP, TOKENS = 128, 4, 48  # decoding with 132 to 180 tokens in the cache
PROMPT, PREFILLS = 512, 4  # the first prefill warms up
OURS, OURS_LONG = f"qwenport, capacity {SHORT}", f"qwenport, capacity {LONG}"
TRANSFORMERS = "transformers"
BANDWIDTH = "memory reads"
PRODUCTS = "weight products alone"
BUFFER_BYTES, READS = 2 << 30, 5
FP32_BYTES = 4
RATE = "decode_tokens_per_second"


@dataclass(frozen=True)
class Contender:
    """A contender that decodes."""

    name: str
    python: str | Path
    script: str
    model: Path | str  # a directory, or why there is none
    capacity: int
    own: bool = True


def contenders(report: Report, checkpoint: Path) -> list[Contender]:
    """Every contender, with its model made."""
    work = report.work
    package = make_model(f"{checkpoint.name}-bf16", ours(checkpoint), work, True)
    if isinstance(package, str):
        raise click.ClickException(f"our export failed: {package}")
    own = partial(Contender, python=sys.executable, script="ours_decode.py", model=package)
    found = [own(OURS, capacity=SHORT)]
    if not report.quick:
        found.append(own(OURS_LONG, capacity=LONG))
    if not report.peers:
        return found
    script = "transformers_decode.py"
    found.append(Contender(TRANSFORMERS, sys.executable, script, checkpoint, SHORT))
    builder = install("genai", report)
    for precision in ("fp32", "int4"):
        name = f"onnxruntime-genai {precision}"
        command = genai(builder, checkpoint, work, precision, "cpu")
        folder = f"{checkpoint.name}-{name.replace(' ', '-')}-cpu"
        model = make_model(folder, command, work, False)
        found.append(Contender(name, builder.python, "genai_decode.py", model, SHORT, False))
    return found


def prompt_ids(vocab: int) -> list[int]:
    """The same tokens for everyone."""
    return [(13 + 7919 * index) % vocab for index in range(PROMPT)]


def run(contender: Contender, vocab: int, report: Report) -> None:
    """Decode and prefill in one process."""
    if isinstance(contender.model, str):
        report.add_run(contender.name, error=f"export: {contender.model}")
        return
    request = {
        "model": str(contender.model),
        "capacity": contender.capacity,
        "prompt": prompt_ids(vocab),
        "context": CONTEXT,
        "warmup": WARMUP,
        "tokens": 8 if report.quick else TOKENS,
        "prefills": 2 if report.quick else PREFILLS,
    }
    done = report.call(contender.name, contender.script, request, contender.python, contender.own)
    result = done.result
    report.add_run(
        contender.name,
        decode_tokens_per_second=_rate(len(result["decode"]), sum(result["decode"]))
        if result
        else None,
        prefill_tokens_per_second=_rate(PROMPT, middle(result["prefill"][1:])) if result else None,
        peak_rss_bytes=done.peak_rss if result else None,
        load=done.load,
        others=done.others,
        error=done.error,
        decode_seconds=[round(seconds, 5) for seconds in result.get("decode", [])],
        prefill_seconds=[round(seconds, 5) for seconds in result.get("prefill", [])],
        tokens=result.get("tokens", []),
    )


def run_bandwidth(report: Report) -> None:
    """Measure the memory bandwidth."""
    size, reads = (64 << 20, 2) if report.quick else (BUFFER_BYTES, READS)
    done = report.call(BANDWIDTH, "bandwidth.py", {"bytes": size, "repeats": reads})
    methods: dict[str, float] = done.result.get("bytes_per_second", {})
    best = max(methods, key=methods.__getitem__) if methods else None
    report.add_run(
        BANDWIDTH,
        bytes_per_second=methods[best] if best else None,
        method=best,
        load=done.load,
        others=done.others,
        error=done.error,
        methods={name: round(rate) for name, rate in methods.items()},
    )


def run_products(shapes: list[tuple[int, ...]], report: Report) -> None:
    """Measure the limit of onnxruntime's matmuls, with nothing in between."""
    request = {"matrices": shapes, "warmup": WARMUP, "tokens": TOKENS}
    done = report.call(PRODUCTS, "products.py", request)
    times = done.result.get("decode", [])
    report.add_run(
        PRODUCTS,
        decode_tokens_per_second=_rate(len(times), sum(times)),
        load=done.load,
        others=done.others,
        error=done.error,
        decode_seconds=[round(seconds, 5) for seconds in times],
    )


def _share(value: float | None, whole: float | None) -> float | None:
    return value / whole if value and whole else None


def _rate(count: int, seconds: float | None) -> float | None:
    return count / seconds if seconds else None


def summarise(report: Report, contender: Contender) -> dict[str, Any]:
    """A contender's medians, and how many of its greedy tokens agree with ours."""
    value = partial(report.values, contender.name)
    own, theirs = report.values(OURS, "tokens"), value("tokens")
    agreeing = 0
    if own and theirs:
        pairs = list(zip(own[0], theirs[0], strict=False))
        agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "contender": contender.name,
        "runs": len(value("decode_tokens_per_second")),
        "decode_tokens_per_second": middle(value("decode_tokens_per_second")),
        "prefill_tokens_per_second": middle(value("prefill_tokens_per_second")),
        "peak_rss_bytes": middle(value("peak_rss_bytes")),
        "tokens_agreeing": agreeing,
        "error": report.error(contender.name),
    }


def paired_ratio(report: Report, contender: str, weight_bytes: int) -> float | None:
    """A contender's steps relative to the memory speed just before and after them: the median over the turns.

    A virtual machine's memory speed varies over time.
    """
    ratios, runs = [], report.data["runs"]
    for before, run, after in zip(runs, runs[1:], runs[2:], strict=False):
        rate = run.get("decode_tokens_per_second")
        reads = [read.get("bytes_per_second") for read in (before, after)]
        if run["contender"] == contender and rate and all(reads):
            ratios.append(rate * weight_bytes / (sum(reads) / 2))
    return middle(ratios)


def bars(
    summary: list[dict[str, Any]],
    bandwidth: float | None,
    paired: float | None,
    weight_bytes: int,
) -> list[Bar]:
    """The bounds that our session must keep."""
    by_name = {row["contender"]: row for row in summary}

    def ratio(name: str, base: float | None, key: str = "decode_tokens_per_second") -> float | None:
        value = by_name.get(name, {}).get(key)
        return value / base if value and base else None

    ceiling = bandwidth / weight_bytes if bandwidth else None
    short = by_name[OURS]["decode_tokens_per_second"]
    found = [
        Bar(
            "decode to the bound, the best reads of all",
            ratio(OURS, ceiling),
            0.85,
            "at least",
            "x",
        ),
        Bar("decode to the bound, the reads around it", paired, 0.85, "at least", "x"),
        Bar(f"decode, capacity {LONG} to {SHORT}", ratio(OURS_LONG, short), 0.9, "at least", "x"),
    ]
    if TRANSFORMERS in by_name:
        key = "prefill_tokens_per_second"
        value = ratio(OURS, by_name[TRANSFORMERS][key], key)
        found.append(Bar("prefill to transformers'", value, 1.0, "at least", "x"))
    return found


def columns(bound: float | None) -> Columns:
    """The columns of the summary. `bound` is the highest rate that the memory allows, in tokens per second."""
    share: Columns = {"of the fp32 bound": figure(RATE, "{:.0%}", bound)} if bound else {}
    return {
        "contender": figure("contender"),
        "decode": figure(RATE, "{:.2f} tok/s"),
        **share,
        f"prefill of {PROMPT}": figure("prefill_tokens_per_second", "{:.0f} tok/s"),
        "peak RSS": figure("peak_rss_bytes", "{:.2f} GB", GB),
        "same tokens": figure("tokens_agreeing"),
    }


@benchmark("decode", repeats=5)
def main(report: Report) -> Result:
    """Time decoding and prefill on the CPU, by Qwenport and by its peers."""
    shape = "tiny" if report.quick else SHAPE
    config = config_of(shape)
    shapes = matrices(config)
    weight_bytes = sum(math.prod(shape) for shape in shapes) * FP32_BYTES
    sizes = {"context": CONTEXT, "tokens": TOKENS, "prompt": PROMPT, "weight_bytes": weight_bytes}
    report.settings |= sizes
    entrants = contenders(report, make_shape(shape, report.work, sparse=False))
    for _ in report.turns():
        run_bandwidth(report)
        for contender in entrants:
            if not report.error(contender.name):
                run(contender, config["vocab_size"], report)
            if contender.name == OURS and not report.quick:
                run_bandwidth(report)
                run_products(shapes, report)
                run_bandwidth(report)
    summary = [summarise(report, contender) for contender in entrants]
    bandwidth = max(report.values(BANDWIDTH, "bytes_per_second"), default=None)
    bound = bandwidth / weight_bytes if bandwidth else None
    report.data["bandwidth_bytes_per_second"] = bandwidth
    if bandwidth and bound:
        report.say(
            f"memory reads: {bandwidth / GB:.1f} GB/s, the best of all; bound {bound:.2f} tok/s"
        )
    paired = paired_ratio(report, OURS, weight_bytes)
    products = paired_ratio(report, PRODUCTS, weight_bytes)
    report.data["products"] = {
        "of_the_best_reads": _share(middle(report.values(PRODUCTS, RATE)), bound),
        "of_the_reads_around": products,
    }
    if not report.quick:
        report.say(
            "onnxruntime's products of the same weights alone: {of_the_best_reads:.2f} of the best reads, "
            "{of_the_reads_around:.2f} of the reads around them".format(**report.data["products"])
        )
    judged = [] if report.quick else bars(summary, bandwidth, paired, weight_bytes)
    tables = [table("CPU, batch 1, medians", columns(bound), summary)]
    return Result(tables, summary, judged, [OURS])


if __name__ == "__main__":
    main()
