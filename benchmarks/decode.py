"""Decoding and prefill on the CPU in fp32, against what the machine's memory allows and against peers.

    python benchmarks/decode.py
    python benchmarks/decode.py --quick

A decode step of a batch of one reads every weight once, so the memory's read bandwidth bounds it. That is
measured here, in turns with the contenders. Each contender is a process of its own, one at a time, with
all cores.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from exporters import genai, make_model, make_shape, ours
from measure import CONTENDERS, Run, child_environment, measure
from peers import ensure
from report import Bar, Report, middle, options, output_path
from rich.table import Table
from shapes import config_of, matrices

SHAPE = "qwen2.5-0.5b-instruct"
SHORT, LONG = 1024, 32768  # capacities; both hold the same few tokens
CONTEXT, WARMUP, TOKENS = 128, 4, 48  # decoding from 132 to 180 tokens held
PROMPT, PREFILLS = 512, 4  # the first prefill warms up
OURS, OURS_LONG = f"qwenport, capacity {SHORT}", f"qwenport, capacity {LONG}"
TRANSFORMERS = "transformers"
BANDWIDTH = "memory reads"
PRODUCTS = "weight products alone"
BUFFER_BYTES, READS = 2 << 30, 5
FP32_BYTES = 4
GB = 1e9
RATE = "decode_tokens_per_second"


@dataclass(frozen=True)
class Contender:
    """Something that decodes."""

    name: str
    python: str | Path
    script: str
    model: Path | str  # a directory, or why there is none
    capacity: int
    own: bool = True


def contenders(
    report: Report, work: Path, checkpoint: Path, quick: bool, peers: bool
) -> list[Contender]:
    """Everything that is to run, with its model made."""
    package = make_model(f"{checkpoint.name}-bf16", ours(checkpoint), work, True)
    if isinstance(package, str):
        raise click.ClickException(f"our export failed: {package}")
    own = partial(Contender, python=sys.executable, script="ours_decode.py", model=package)
    found = [own(OURS, capacity=SHORT)]
    if not quick:
        found.append(own(OURS_LONG, capacity=LONG))
    if not peers:
        return found
    script = "transformers_decode.py"
    found.append(Contender(TRANSFORMERS, sys.executable, script, checkpoint, SHORT))
    builder = ensure("genai", work)
    report.add_versions("genai", builder.python)
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


def run(contender: Contender, vocab: int, quick: bool, work: Path, report: Report) -> None:
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
        "tokens": 8 if quick else TOKENS,
        "prefills": 2 if quick else PREFILLS,
    }
    done = _child(contender.name, contender.python, contender.script, request, work, contender.own)
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


def run_bandwidth(quick: bool, work: Path, report: Report) -> None:
    """Measure the memory."""
    request = {"bytes": (64 << 20) if quick else BUFFER_BYTES, "repeats": 2 if quick else READS}
    done = _child(BANDWIDTH, sys.executable, "bandwidth.py", request, work, own=True)
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


def run_products(shapes: list[tuple[int, ...]], work: Path, report: Report) -> None:
    """Measure what onnxruntime's matrix products allow, without anything between them."""
    request = {"matrices": shapes, "warmup": WARMUP, "tokens": TOKENS}
    done = _child(PRODUCTS, sys.executable, "products.py", request, work, own=True)
    times = done.result.get("decode", [])
    report.add_run(
        PRODUCTS,
        decode_tokens_per_second=_rate(len(times), sum(times)),
        load=done.load,
        others=done.others,
        error=done.error,
        decode_seconds=[round(seconds, 5) for seconds in times],
    )


def _child(
    name: str, python: str | Path, script: str, request: dict[str, Any], work: Path, own: bool
) -> Run:
    log = work / "logs" / f"decode-{name.replace(' ', '-').replace(',', '')}.log"
    command = [python, CONTENDERS / script, json.dumps(request)]
    return measure(command, log, child_environment(own))


def _share(value: float | None, whole: float | None) -> float | None:
    return value / whole if value and whole else None


def _rate(count: int, seconds: float | None) -> float | None:
    return count / seconds if seconds else None


def summarise(report: Report, contender: Contender) -> dict[str, Any]:
    """A contender's medians, and how far its greedy tokens agree with ours."""
    value = partial(report.values, contender.name)
    own, theirs = report.values(OURS, "tokens"), value("tokens")
    agreeing = 0
    if own and theirs:
        pairs = list(zip(own[0], theirs[0], strict=False))  # type: ignore[call-overload]
        agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "contender": contender.name,
        "runs": len(value("decode_tokens_per_second")),
        "decode_tokens_per_second": middle(value("decode_tokens_per_second")),
        "prefill_tokens_per_second": middle(value("prefill_tokens_per_second")),
        "peak_rss_bytes": middle(value("peak_rss_bytes")),
        "tokens_agreeing": agreeing,
        "error": next(iter(value("error")), None),
    }


def paired_ratio(report: Report, contender: str, weight_bytes: int) -> float | None:
    """A contender's steps against the memory just before and just after them: the median over the turns.

    A virtual machine's memory is not equally fast all the time.
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
    """What our session is to keep."""
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


def table(summary: list[dict[str, Any]], bound: float | None) -> Table:
    """The medians, for people."""
    columns = (
        "contender",
        "decode",
        "of the fp32 bound",
        f"prefill of {PROMPT}",
        "peak RSS",
        "same tokens",
    )
    made = Table(*columns, title="CPU, batch 1, medians")
    for row in summary:
        if row["error"]:
            made.add_row(row["contender"], "failed")
            continue
        rate = row["decode_tokens_per_second"]
        made.add_row(
            row["contender"],
            f"{rate:.2f} tok/s",
            f"{rate / bound:.0%}" if bound else "",
            f"{row['prefill_tokens_per_second']:.0f} tok/s",
            f"{row['peak_rss_bytes'] / GB:.2f} GB",
            str(row["tokens_agreeing"]),
        )
    return made


@click.command(context_settings={"show_default": True})
@options("decode", repeats=5)
def main(quick: bool, no_peers: bool, repeats: int, work: Path, output: Path | None) -> None:
    """Decode and prefill on the CPU, with Qwenport and with its peers."""
    peers, repeats = not (no_peers or quick), 1 if quick else repeats
    shape = "tiny" if quick else SHAPE
    config = config_of(shape)
    shapes = matrices(config)
    weight_bytes = sum(math.prod(shape) for shape in shapes) * FP32_BYTES
    settings = {"repeats": repeats, "peers": peers, "context": CONTEXT, "tokens": TOKENS}
    report = Report("decode", quick, {**settings, "prompt": PROMPT, "weight_bytes": weight_bytes})
    checkpoint = make_shape(shape, work, sparse=False)
    entrants = contenders(report, work, checkpoint, quick, peers)
    for turn in range(repeats):
        report.say(f"turn {turn + 1} of {repeats}")
        run_bandwidth(quick, work, report)
        for contender in entrants:
            if not report.failed(contender.name):
                run(contender, config["vocab_size"], quick, work, report)
            if contender.name == OURS and not quick:
                run_bandwidth(quick, work, report)
                run_products(shapes, work, report)
                run_bandwidth(quick, work, report)
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
    if not quick:
        report.say(
            "onnxruntime's products of the same weights alone: {of_the_best_reads:.2f} of the best reads, "
            "{of_the_reads_around:.2f} of the reads around them".format(**report.data["products"])
        )
    judged = [] if quick else bars(summary, bandwidth, paired, weight_bytes)
    report.finish(
        table(summary, bound), summary, judged, output_path("decode", quick, work, output)
    )
    if report.failed(OURS):
        raise click.ClickException("our session failed")


if __name__ == "__main__":
    main()
