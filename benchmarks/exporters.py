"""How each contender exports a checkpoint, and models made once for the other benchmarks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click
from measure import ROOT, child_environment, measure
from peers import Peer, ensure
from report import Report

Command = Callable[[Path], list[str | Path]]
"""Output directory -> command line."""


def make_shape(shape: str, work: Path, sparse: bool, quantized: str | None = None) -> Path:
    """The checkpoint of a shape, made in a child process: it needs torch, and this process must stay small."""
    name = shape if quantized is None else f"{shape}-{quantized}"
    directory = work / "checkpoints" / name
    script = ROOT / "benchmarks" / "shapes.py"
    flags = ["--sparse"] if sparse else []
    flags += [] if quantized is None else ["--quantized", quantized]
    if not (directory / "config.json").is_file():
        done = measure(
            [sys.executable, script, shape, directory, *flags], work / "logs" / f"{name}.log"
        )
        if done.code:
            raise click.ClickException(f"cannot make the {shape} checkpoint: {done.error}")
    return directory


def ours(checkpoint: Path, *options: str) -> Command:
    """`qwenport export`."""
    start: list[str | Path] = [sys.executable, "-m", "qwenport", "export", "--quiet", *options]
    return lambda output: [*start, checkpoint, output]


def genai(peer: Peer, checkpoint: Path, work: Path, precision: str, provider: str) -> Command:
    """onnxruntime-genai's model builder."""
    builder: list[str | Path] = [peer.python, "-m", "onnxruntime_genai.models.builder"]
    kind = ["-p", precision, "-e", provider]
    cache = work / "hugging-face"
    return lambda output: [*builder, "-i", checkpoint, "-o", output, *kind, "-c", cache]


def optimum(peer: Peer, checkpoint: Path, *options: str) -> Command:
    """optimum-onnx's exporter."""
    program: list[str | Path] = [peer.command("optimum-cli"), "export", "onnx"]
    task = ["--task", "text-generation-with-past"]
    return lambda output: [*program, "--model", checkpoint, *task, *options, output]


def install(name: str, report: Report) -> Peer:
    """A peer's environment, its versions recorded."""
    peer = ensure(name, report.work)
    report.add_versions(name, peer.python)
    return peer


def export_commands(report: Report, checkpoint: Path) -> dict[str, tuple[Command, bool]]:
    """Contender -> its command and whether it is ours. Installs the peers."""
    found: dict[str, tuple[Command, bool]] = {"qwenport": (ours(checkpoint), True)}
    if report.peers:
        builder, exporter = install("genai", report), install("optimum", report)
        for precision in ("fp16", "bf16"):
            name = f"onnxruntime-genai {precision} cuda"
            found[name] = (genai(builder, checkpoint, report.work, precision, "cuda"), False)
        found["optimum-onnx fp32"] = (optimum(exporter, checkpoint), False)  # its default
        found["optimum-onnx fp16"] = (optimum(exporter, checkpoint, "--dtype", "fp16"), False)
    return found


def export_anew(checkpoint: Path, package: Path, report: Report, *options: str) -> Path:
    """Our export, made even if the package exists."""
    shutil.rmtree(package, ignore_errors=True)
    package.parent.mkdir(parents=True, exist_ok=True)
    done = measure(ours(checkpoint, *options)(package), report.log("export"))
    if done.code:
        raise click.ClickException(f"cannot export {checkpoint.name}: {done.error}")
    return package


def make_model(name: str, command: Command, work: Path, own: bool) -> Path | str:
    """Run an exporter once and keep its output; if it fails, return its last line of output."""
    directory = work / "models" / name
    done_mark = directory.with_name(f"{name}.done")  # a shape's name has dots
    if done_mark.is_file() and not own:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    done = measure(command(directory), work / "logs" / f"{name}.log", child_environment(own))
    if done.code:
        return done.error or "failed"
    done_mark.touch()
    return directory
