"""The C++ runtime: choosing a token, an engine on the CPU against Python and peers, decode steps on a GPU.

    python benchmarks/embedded.py
    python benchmarks/embedded.py --engine tiny.engine     # where there is a GPU and TensorRT
    python benchmarks/embedded.py --quick

Compiles the C++ library and examples/cpp/bench (`make cpp` installs what that needs). Every run is a separate process;
contenders take turns.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
from exporters import genai, install, make_model, make_shape, ours
from measure import ROOT, Run, child_environment, measure, read_once
from report import GB, Bar, Columns, Report, Result, benchmark, figure, middle, table

sys.path.insert(0, str(ROOT / "tests" / "cpp"))
from builds import BuildError, built, built_example

VOCAB = 151_936  # of Qwen2.5
SETTINGS = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "temperature": {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    "top-p": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}
SAMPLERS = ("C++", "Python", "transformers")
RUNTIMES = ("C++, CUDA graphs", "C++, without graphs", "Python")
CONTEXT, STEPS = 128, 10_000
STEP_COLUMNS: Columns = {
    "what: who": figure("contender"),
    "per step": figure("median_seconds", "{:.0f} us", 1e-6),
    "steps per second": figure("steps_per_second", "{:.0f}"),
    "device memory grew by": figure("device_growth_bytes", "{} bytes"),
}

SHAPE, SMOLLM2 = "qwen2.5-0.5b-instruct", "smollm2-135m"
PROMPT, NEW = 512, 64
WARMUP, PREFILLS, CAPACITY = 4, 4, 1024  # of peers; `engines.measure` has its own, equal ones
FAST_STEPS, FAST_START = "C++, fast_steps", "C++, fast_start"
PYTHON_ENGINE, PYTHON_PACKAGE = "Python, engine", "Python, package"
OWN = (FAST_STEPS, FAST_START, PYTHON_ENGINE, PYTHON_PACKAGE)
TRANSFORMERS, GENAI = "transformers", "onnxruntime-genai fp32"
FIGURES = (
    "load_seconds",
    "load_cpu_seconds",
    "prefill_tokens_per_second",
    "prefill_cpu_seconds",
    "decode_tokens_per_second",
    "decode_cpu_seconds",
    "loaded_bytes",
    "peak_bytes",
)
MODEL_COLUMNS: Columns = {
    "model: who": figure("contender"),
    "load, s": figure("load_seconds", "{:.2f}"),
    "CPU s": figure("load_cpu_seconds", "{:.2f}"),
    "prefill, tok/s": figure("prefill_tokens_per_second", "{:.0f}"),
    "CPU s ": figure("prefill_cpu_seconds", "{:.2f}"),
    "decode, tok/s": figure("decode_tokens_per_second", "{:.1f}"),
    "CPU ms": figure("decode_cpu_seconds", "{:.1f}", 1e-3),
    "loaded, GB": figure("loaded_bytes", "{:.2f}", GB),
    "peak, GB": figure("peak_bytes", "{:.2f}", GB),
    "same tokens": figure("tokens_agreeing"),
}


# --- single steps: sampling, and decoding on a GPU


def run_steps(
    script: str, contender: str, facts: dict[str, Any], turn: int, report: Report
) -> None:
    """Run one process; `contender` and `facts` go into its request."""
    request = {"contender": contender.partition(": ")[2], **facts}
    done = report.call(contender, f"{script}.py", request)
    seconds = done.result.get("seconds", [])
    report.add_run(
        contender,
        turn=turn,
        median_seconds=middle(seconds),
        steps=len(seconds),
        device_growth_bytes=done.result.get("device_growth"),
        tokens=done.result.get("tokens"),
        load=done.load,
        others=done.others,
        error=done.error,
    )


def summarise_steps(report: Report, contender: str) -> dict[str, Any]:
    """A contender's medians."""
    times = report.values(contender, "median_seconds")
    return {
        "contender": contender,
        "part": "steps",
        "runs": len(times),
        "median_seconds": middle(times),
        "steps_per_second": 1 / median(times) if times else None,
        "device_growth_bytes": max(report.values(contender, "device_growth_bytes"), default=None),
        "error": report.error(contender),
    }


# --- whole models on the CPU


@dataclass(frozen=True)
class Model:
    """A checkpoint and what was made of it. A peer's model is a folder, or why there is none."""

    name: str
    vocab: int
    checkpoint: Path
    package: Path
    engine: Path
    genai: Path | str | None = None

    @property
    def contenders(self) -> list[str]:
        """The contenders' names in the report, ours first."""
        peers = (TRANSFORMERS, GENAI) if self.genai else ()
        return [f"{self.name}: {who}" for who in (*OWN, *peers)]


def make(name: str, checkpoint: Path, work: Path) -> Model:
    """Export a checkpoint in bf16 and build its engine for onnxruntime."""

    def made(kind: str, command: Any) -> Path:
        found = make_model(f"{name}-{kind}", command, work, True)
        if isinstance(found, str):
            raise click.ClickException(f"{name}: our {kind} failed: {found}")
        return found

    package = made("package", ours(checkpoint, "--dtype", "bf16"))
    build = [sys.executable, "-m", "qwenport", "build", "--quiet", package]
    engine = made("engine", lambda output: [*build, output, "--target", "onnxruntime"])
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return Model(name, config["vocab_size"], checkpoint, package, engine)


def models(report: Report) -> list[Model]:
    """What is measured: the 0.5B shape, and SmolLM2-135M if its package can be fetched."""
    if report.quick:
        return [make("tiny", make_shape("tiny", report.work, sparse=False), report.work)]
    found = [make(SHAPE, make_shape(SHAPE, report.work, sparse=False), report.work)]
    folder = report.work / SMOLLM2
    script = ROOT / "benchmarks" / "smollm2.py"
    done = measure([sys.executable, script, folder], report.log(SMOLLM2))
    if done.code:
        report.say(f"without {SMOLLM2}: {done.error}")
    else:
        found.append(make(SMOLLM2, folder, report.work))
    if report.peers:
        peer = install("genai", report)
        found = [
            replace(
                model,
                genai=make_model(
                    f"{model.name}-{GENAI.replace(' ', '-')}-cpu",
                    genai(peer, model.checkpoint, report.work, "fp32", "cpu"),
                    report.work,
                    False,
                ),
            )
            for model in found
        ]
    return found


def onnxruntime_library() -> Path:
    """The library in onnxruntime's wheel, which the Python sessions run on too."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise click.ClickException("onnxruntime is missing: pip install 'qwenport[cpu]'")
    return next((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))


def start(model: Model, contender: str, program: Path, report: Report) -> Run:
    """Run one contender's process."""
    who, prompt, new = contender.partition(": ")[2], PROMPT, NEW
    if report.quick:
        prompt, new = 64, 8
    if who in (FAST_STEPS, FAST_START):
        command = [program, model.engine, "--prompt-tokens", prompt, "--new-tokens", new, "--json"]
        command += ["--fast-start"] if who == FAST_START else []
        environment = child_environment() | {"QWENPORT_ONNXRUNTIME": str(onnxruntime_library())}
        return measure([str(word) for word in command], report.log(contender), environment)
    if who in (PYTHON_ENGINE, PYTHON_PACKAGE):
        engine = who == PYTHON_ENGINE
        return report.call(
            contender,
            "ours_bench.py",
            {
                "target": str(model.engine if engine else model.package),
                "cache": engine,
                "imports": ["onnxruntime"] if engine else ["onnxruntime", "torch"],
                "prompt_tokens": prompt,
                "new_tokens": new,
            },
        )
    request = {
        "model": str(model.checkpoint if who == TRANSFORMERS else model.genai),
        "capacity": CAPACITY,
        "prompt": [(13 + 7919 * index) % model.vocab for index in range(prompt)],
        "context": prompt,
        "warmup": WARMUP,
        "tokens": new,
        "prefills": PREFILLS,
    }
    if who == TRANSFORMERS:
        return report.call(contender, "transformers_decode.py", request)
    python = report.work / "envs" / "genai" / "bin" / "python"
    return report.call(contender, "genai_decode.py", request, python, own=False)


def figures_of_peer(result: Mapping[str, Any], prompt: int) -> dict[str, Any]:
    """A peer's figures as `engines.measure` has them; the first prefill is the first request."""
    return {
        **result,
        "prefill_tokens_per_second": prompt / median(result["prefill"][1:]),
        "prefill_cpu_seconds": median(result["prefill_cpu"][1:]),
        "decode_tokens_per_second": 1 / median(result["decode"]),
        "decode_cpu_seconds": mean(result["decode_cpu"]),
        "token_ids": result["tokens"],
    }


def run_model(model: Model, contender: str, program: Path, turn: int, report: Report) -> None:
    """Load, prefill and decode in one process."""
    if contender.endswith(GENAI) and isinstance(model.genai, str):
        report.add_run(contender, error=f"export: {model.genai}")
        return
    done = start(model, contender, program, report)
    result: Mapping[str, Any] = done.result
    if "prefill" in result:
        result = figures_of_peer(result, PROMPT)
    report.add_run(
        contender,
        turn=turn,
        **{key: result.get(key) for key in FIGURES},
        tokens=result.get("token_ids"),
        load=done.load,
        others=done.others,
        error=done.error,
    )


def summarise_model(report: Report, model: Model, contender: str) -> dict[str, Any]:
    """A contender's medians, and how many of its tokens agree with our C++ engine's."""
    expected = report.values(f"{model.name}: {FAST_STEPS}", "tokens")
    tokens = report.values(contender, "tokens")
    agreeing = None
    if expected and tokens:
        pairs = list(zip(expected[0], tokens[0], strict=False))
        agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "contender": contender,
        "part": "models",
        "runs": len(report.values(contender, "load_seconds")),
        **{key: middle(report.values(contender, key)) for key in FIGURES},
        "tokens_agreeing": agreeing,
        "error": report.error(contender),
    }


def ratio(report: Report, model: str, key: str, one: str, other: str) -> float | None:
    """One contender's figure divided by another's in the same turn: the median over the turns."""
    of_turn: dict[str, dict[int, float]] = {one: {}, other: {}}
    for run in report.data["runs"]:
        who = run["contender"].removeprefix(f"{model}: ")
        if who in of_turn and run.get(key):
            of_turn[who][run["turn"]] = run[key]
    turns = of_turn[one].keys() & of_turn[other].keys()
    return middle([of_turn[one][turn] / of_turn[other][turn] for turn in turns])


def bars(report: Report) -> list[Bar]:
    """The bounds that the C++ library must keep on the 0.5B shape."""
    rate, load = "decode_tokens_per_second", "load_seconds"
    started = middle(report.values(f"{SHAPE}: {FAST_START}", load))
    return [
        Bar(
            "decode in C++ to Python's on the same engine",
            ratio(report, SHAPE, rate, FAST_STEPS, PYTHON_ENGINE),
            1.0,
            "at least",
            "x",
        ),
        Bar(
            "load in fast_steps to Python's of the bf16 package",
            ratio(report, SHAPE, load, FAST_STEPS, PYTHON_PACKAGE),
            0.55,
            "at most",
            "x",
        ),
        Bar("load in fast_start", started, 0.5, "at most", "s"),
    ]


@benchmark("embedded", repeats=3)
@click.option(
    "--engine",
    type=click.Path(exists=True, path_type=Path, file_okay=False),
    help="A `tensorrt` engine directory for the local GPU; without it decoding on a GPU is not measured.",
)
def main(report: Report, engine: Path | None) -> Result:
    """Time the C++ runtime: sampling, loading and running an engine on the CPU, decode steps on a GPU."""
    try:
        build, program = built("release"), built_example("bench")
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    draws, steps = (3, 50) if report.quick else (50, STEPS)
    report.settings |= {"vocab": VOCAB, "draws": draws, "engine": engine is not None}
    report.settings |= {"prompt": PROMPT, "tokens": NEW}
    samplers = SAMPLERS if report.peers else SAMPLERS[:2]
    drawing = {f"{name}: {who}": name for name in SETTINGS for who in samplers}
    decoding = [f"decode: {who}" for who in RUNTIMES] if engine else []
    entrants = [(model, contender) for model in models(report) for contender in model.contenders]
    os.sync()  # what was made just now would be written back during the first turn
    for model in {model.name: model for model, _ in entrants}.values():
        for folder in (model.checkpoint, model.package / "weights", model.engine):
            read_once(folder)
    for turn in report.turns():
        for contender, name in drawing.items():
            facts: dict[str, Any] = {**SETTINGS[name], "vocab": VOCAB, "draws": draws}
            facts["repetition_penalty"] = 1.0
            facts["library"] = str(build / "libqwenport_stand_in.so")
            run_steps("sampling", contender, facts, turn, report)
        for contender in decoding:
            facts = {"engine": str(engine), "context": CONTEXT, "steps": steps}
            facts["library"] = str(build / "runtime" / "libqwenport.so")
            facts["tests"] = str(ROOT / "tests")
            run_steps("embedded_decode", contender, facts, turn, report)
        for model, contender in entrants:
            if not report.error(contender):
                run_model(model, contender, program, turn, report)
    for name in SETTINGS:
        ours_, theirs = (report.values(f"{name}: {who}", "tokens") for who in SAMPLERS[:2])
        if ours_ != theirs:
            raise click.ClickException(f"{name}: C++ and Python drew different tokens")
    single = [summarise_steps(report, contender) for contender in (*drawing, *decoding)]
    whole = [summarise_model(report, model, contender) for model, contender in entrants]
    summary = [*single, *whole]
    peers = (TRANSFORMERS, GENAI)
    own = [row["contender"] for row in summary if not row["contender"].endswith(peers)]
    tables = [
        table("Single steps, medians", STEP_COLUMNS, single),
        table("Models on the CPU, batch 1, medians", MODEL_COLUMNS, whole),
    ]
    return Result(tables, summary, bars(report), own)


if __name__ == "__main__":
    main()
