"""Make the quantized checkpoints beside this script from the tiny ones: one in each format that `export` reads.

    python examples/quantized/make.py

They are rounded to nearest by the tests' own writers of the formats, and the same on every machine.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
sys.path.insert(0, str(EXAMPLES.parent / "tests"))

from fine_grained_fp8 import write_fine_grained_fp8  # noqa: E402
from float_quantized import write_float_quantized  # noqa: E402
from quantized import write_pack_quantized  # noqa: E402
from quantized_words import write_awq, write_gptq  # noqa: E402

DENSE, MIXTURE = "tiny-qwen2.5", "tiny-qwen2-moe"
Write = Callable[[Path, Path], Path]
"""(checkpoint, directory to create) -> the directory."""

FORMATS: Mapping[str, tuple[str, int, Write]] = {
    "awq": (DENSE, 5, write_awq),
    "gptq-act-order": (DENSE, 5, partial(write_gptq, act_order=True)),
    "gptq-mixture": (MIXTURE, 2, partial(write_gptq, kept=("gate.",), dynamic={r"-:.*gate$": {}})),
    "w4a16": (DENSE, 5, partial(write_pack_quantized, symmetric=False)),
    "w8a16": (DENSE, 4, partial(write_pack_quantized, bits=8, group=None)),
    "fp8-dynamic": (DENSE, 4, partial(write_float_quantized, activations="dynamic")),
    "fp8-blocks": (DENSE, 4, write_fine_grained_fp8),
}
"""Name -> the checkpoint that it is made of, how many of its decoder layers, and how."""


def first_layers(source: Path, layers: int, target: Path) -> Path:
    """A checkpoint with only the first decoder layers of another."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": layers, "max_window_layers": layers}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def make(name: str, target: Path) -> Path:
    """Make one of FORMATS in a directory that does not exist."""
    source, layers, write = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        return write(first_layers(EXAMPLES / source, layers, Path(folder) / "source"), target)


@click.command()
def main() -> None:
    """Make all of them anew."""
    for name in FORMATS:
        shutil.rmtree(HERE / name, ignore_errors=True)
        made = make(name, HERE / name)
        size = sum(file.stat().st_size for file in made.iterdir())
        click.echo(f"{name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
