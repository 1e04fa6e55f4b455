"""`qwenport build`: a package becomes an engine directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenport.commands._common import (
    PATH,
    force_clean_option,
    limits,
    note,
    output_options,
    print_json,
    runnable_kind,
    runtime_of,
    whole_or_interrupted,
)
from qwenport.commands._progress import progress_bar
from qwenport.contract import ATTENTIONS, AUTO, ONNXRUNTIME, PROOF, TARGETS, Progress
from qwenport.wording import size

if TYPE_CHECKING:
    from qwenport.engines import Engine, Proof
    from qwenport.exporter import Package


@click.command("build")
@click.argument("package", type=PATH)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    required=True,
    help="onnxruntime runs on any CPU; tensorrt-rtx builds anywhere, for GPUs; tensorrt builds on the GPU that the "
    "engine is for.",
)
@click.option(
    "--gpu",
    "gpus",
    metavar="sm86,sm89",
    help="Architectures that a TensorRT engine should run on, comma-separated.",
    show_default="tensorrt-rtx: all that can run the model; tensorrt: the local GPU",
)
@click.option(
    "--plugins",
    type=PATH,
    metavar="LIBRARY",
    help="Compute RoPE and MoE with the CUDA plugins in LIBRARY, of `qwenport plugins build`; tensorrt only.",
    show_default="without plugins, from their definitions in ONNX",
)
@click.option(
    "--attention",
    type=click.Choice((AUTO, *ATTENTIONS)),
    default=AUTO,
    help="How a TensorRT engine attends to its cache: direct and split read it in place on sm89, sm120 and sm121, "
    "chunked reads it in place for single tokens on any GPU, masked copies it and is what fp32 gets. auto moves the "
    "fewest bytes; if a GPU decodes slowly with direct, measure split.",
)
@limits("the package")
@force_clean_option
@output_options
def command(
    package: Path,
    engine_dir: Path,
    target: str,
    gpus: str | None,
    plugins: Path | None,
    attention: str,
    max_seq_len: int | None,
    max_batch: int | None,
    force_clean: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build an engine of PACKAGE, which `qwenport export` wrote.

    ENGINE_DIR is created and must not exist. It holds TensorRT's plan, or for onnxruntime a graph and
    fp32 weights that load as they are; a manifest; and the tokenizer. What TensorRT would drop or misread in
    the graph fails the build and is named. It carries the package's proof, which `qwenport selftest` runs; if
    the package has none, and making it takes less than a minute, it is made now.

    A C++ program runs TensorRT engines in a library compiled with the headers of the same flavour: see
    `qwenport cpp install`.

    \b
    Examples:
      qwenport build qwen.package qwen.engine --target onnxruntime
      qwenport build qwen.package qwen.engine --target tensorrt-rtx
      qwenport build qwen.package qwen.engine --target tensorrt-rtx --gpu sm86,sm89,sm120
      qwenport build qwen.package qwen.engine --target tensorrt-rtx --gpu sm89 --attention split
      qwenport build qwen.package small.engine --target tensorrt --max-seq-len 4096 --max-batch 1
      qwenport build qwen.package fast.engine --target tensorrt --plugins libqwenport_plugins.so
    """
    runnable_kind(package)
    from qwenport import engines

    start = time.perf_counter()
    with whole_or_interrupted(engine_dir):
        with progress_bar("reading the package", quiet) as progress:
            engine = engines.build(
                package,
                engine_dir,
                target=target,
                gpus=gpus,
                max_seq_len=max_seq_len,
                max_batch=max_batch,
                plugins=plugins,
                attention=attention,
                force_clean=force_clean,
                make_proof=lambda opened: _proof(opened, quiet, progress),
                progress=progress,
                note=lambda text: note(text, quiet),
            )
        report = _report(engine, time.perf_counter() - start)
        if as_json:
            print_json(report)
            return
        click.echo(
            f"{engine_dir}: {runtime_of(engine.manifest)}; {report['dtype']}, "
            f"{report['max_seq_len']} positions, batch {report['max_batch']}\n"
            + _contents(report)
            + f", built in {report['seconds']:.1f} s"
        )


def _proof(package: Package, quiet: bool, progress: Progress) -> Proof | None:
    """The package's proof, which is made and kept if that does not take long."""
    from qwenport.validate import PROOF_SECONDS, keep_proof

    kept = keep_proof(package, seconds=PROOF_SECONDS, progress=progress)
    note(kept.note, quiet)
    return kept.proof


def _contents(report: dict[str, Any]) -> str:
    if "plan_bytes" in report:
        return (
            f"plan: {size(report['plan_bytes'])} from {size(report['weight_bytes'])} of weights, "
            f"{report['network_layers']} layers"
        )
    return (
        f"weights: {size(report['engine_weight_bytes'])} from {size(report['weight_bytes'])}, "
        f"graph of {report['network_layers']} nodes"
    )


def _report(engine: Engine, seconds: float) -> dict[str, Any]:
    manifest = engine.manifest
    same = (
        "flavour",
        "runtime_version",
        "gpus",
        "dtype",
        "max_seq_len",
        "max_batch",
        "plugin_layers",
    )
    return {
        "engine": str(engine.path),
        **{key: manifest[key] for key in same},
        **(
            {"engine_weight_bytes": manifest["weights"]["bytes"]}
            if engine.flavour == ONNXRUNTIME
            else {"plan_bytes": engine.plan.stat().st_size}
        ),
        "weight_bytes": manifest["package"]["weight_bytes"],
        "network_layers": manifest["layers"],
        "proof": PROOF in manifest["files"],
        "seconds": round(seconds, 3),
    }
