"""What TensorRT-RTX's builder makes of a shape, without a GPU: the kernels of its final layer list, and its workspace.

    python benchmarks/layers.py qwen2.5-7b-instruct --gpu sm89 --attention direct --layers 2 --max-batch 8

The checkpoint has zeros for weights and takes no disk space. With few layers it has all kinds of kernels that the whole
has, and the workspace of the whole, which layers share. Prints one JSON object; activation_bytes is the workspace at
the largest shapes that the engine takes. With dual chunk attention there are several profiles for prefill, each with
narrower steps than the one before, for longer spans.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from measure import ROOT
from shapes import SHAPES, make_checkpoint

sys.path.insert(0, str(ROOT / "tests" / "engines"))
from layer_list import layer_list

from qwenport import exporter
from qwenport.contract import ATTENTIONS, AUTO


@click.command(context_settings={"show_default": True})
@click.argument("shape", type=click.Choice(SHAPES))
@click.option("--gpu", default="sm89", help="The architectures to build for.")
@click.option("--attention", type=click.Choice((AUTO, *ATTENTIONS)), default=AUTO)
@click.option("--layers", type=click.IntRange(min=1), default=2, help="Decoder layers.")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, help="Rows.")
def main(shape: str, gpu: str, attention: str, layers: int, max_batch: int) -> None:
    """Build an engine of a SHAPE with few layers, and print what the builder says of it."""
    start = time.perf_counter()
    with TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        make_checkpoint(shape, checkpoint, sparse=True, layers=layers)
        package = exporter.export(checkpoint, Path(scratch) / "package")
        made = layer_list(package.path, gpu, attention, max_batch)
    names = ["decode", "prefill", *(f"prefill {number}" for number in range(2, len(made)))]
    report = {
        "shape": shape,
        "gpu": gpu,
        "attention": attention,
        "layers": layers,
        "max_batch": max_batch,
        "kernels": {name: len(found.layers) for name, found in zip(names, made, strict=True)},
        "activation_bytes": {
            name: found.activation_bytes for name, found in zip(names, made, strict=True)
        },
        "seconds": round(time.perf_counter() - start, 1),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
