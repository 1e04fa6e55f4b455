"""What a decode step has to move, and how fast that can be at a GPU's memory bandwidth. Nothing here is measured.

    python benchmarks/roofline.py        # writes results/roofline.json and the table in docs/gpu.md

The bytes of a step are those of every weight matrix (the vocabulary's once, as lm_head) and of the cache, multiplied by
what the form of attention moves of it, which the layer lists of TensorRT's builder show. Activations are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
from measure import ROOT
from shapes import BYTES, config_of, matrices, tensors_of

from qwenport.contract import CHUNK, CHUNKED, DIRECT, MASKED, SPLIT

SHAPES = ("qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct")
CONTEXTS = (1024, 32768)
RESULTS = ROOT / "benchmarks" / "results" / "roofline.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- from benchmarks/roofline.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory in bytes and its bandwidth in bytes per second, and where NVIDIA states them."""

    name: str
    architecture: str
    memory: float
    bandwidth: float
    source: str


GPUS = (
    Gpu("GeForce RTX 4090", "sm89", 24e9, 1.008e12, "NVIDIA Ada GPU Architecture, whitepaper"),
    Gpu("H100 SXM", "sm90", 80e9, 3.35e12, "NVIDIA H100 Tensor Core GPU, data sheet"),
    Gpu("Jetson AGX Orin 64GB", "sm87", 64e9, 204.8e9, "NVIDIA Jetson AGX Orin Series, data sheet"),
)


def _masked(config: dict[str, Any]) -> float:
    """The cache's active part is read, written as a copy, and read again."""
    return 3.0


def _direct(config: dict[str, Any]) -> float:
    """Attention reads the cache itself."""
    return 1.0


def _chunked(config: dict[str, Any]) -> float:
    """The cache is read once; its scores and their exponentials, and each chunk's sum, are fp32, written and read."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    per_key = heads // groups * (2 * 2 * 4 + 2 * 4 * head_dim / CHUNK)
    return 1.0 + per_key / (2 * head_dim * BYTES)


FORMS: dict[str, Callable[[dict[str, Any]], float]] = {
    MASKED: _masked,
    DIRECT: _direct,
    CHUNKED: _chunked,
    SPLIT: _chunked,  # its decode is the same
}
"""Form of attention -> the bytes moved in a decode step over those of the cache's active part."""
SHOWN = (MASKED, DIRECT, CHUNKED)


@dataclass(frozen=True)
class Step:
    """One decode step by form and by GPU.

    Attributes:
        weight_bytes: of all matrices, once.
        stored_bytes: of all weights, the embedding table included.
        cache_bytes: of the active part of all rows' caches.
        bytes: form -> bytes moved.
        steps_per_second: GPU -> form -> the bound; a GPU that has no memory for weights and cache is left out.
    """

    shape: str
    context: int
    rows: int
    weight_bytes: int
    stored_bytes: int
    cache_bytes: int
    bytes: dict[str, int]
    steps_per_second: dict[str, dict[str, float]]


def step(shape: str, context: int, rows: int) -> Step:
    """The bytes of a step of `rows` rows with `context` tokens each in the cache, and the bounds."""
    config = config_of(shape)
    weights = sum(math.prod(matrix) for matrix in matrices(config)) * BYTES
    stored = sum(math.prod(tensor) for tensor in tensors_of(config).values()) * BYTES
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * BYTES
    cache = rows * context * token
    moved = {form: int(weights + cache * factor(config)) for form, factor in FORMS.items()}
    bounds = {
        gpu.name: {form: round(gpu.bandwidth / size, 1) for form, size in moved.items()}
        for gpu in GPUS
        if stored + cache <= gpu.memory
    }
    return Step(shape, context, rows, weights, stored, cache, moved, bounds)


def steps() -> list[Step]:
    """Every step of the table."""
    return [
        step(shape, context, rows) for shape in SHAPES for context in CONTEXTS for rows in (1, 8)
    ]


def lines(found: list[Step]) -> Iterator[str]:
    """The tables of docs/gpu.md."""
    yield f"| model, context, rows | weights + cache | {' | '.join(SHOWN)} |"
    yield "|---" * (2 + len(SHOWN)) + "|"
    for one in found:
        ideal = one.weight_bytes + one.cache_bytes
        sizes = " | ".join(f"{one.bytes[form] / ideal:.2f}" for form in SHOWN)
        yield f"| {_title(one)} | {ideal / 1e9:.2f} GB | {sizes} |"
    yield ""
    yield f"| steps per second at most | {' | '.join(f'{gpu.name} ({gpu.architecture.upper()})' for gpu in GPUS)} |"
    yield "|---" * (1 + len(GPUS)) + "|"
    for one in found:
        bounds = (one.steps_per_second.get(gpu.name) for gpu in GPUS)
        cells = (
            " / ".join(
                f"{bound[form]:.0f}" if bound[form] >= 20 else f"{bound[form]:.1f}"
                for form in SHOWN
            )
            if bound
            else "does not fit"
            for bound in bounds
        )
        yield f"| {_title(one)} | {' | '.join(cells)} |"
    yield ""
    yield "| model, context, rows | weights | caches | together |"
    yield "|---" * 4 + "|"
    for one in found:
        if one.context == max(CONTEXTS):
            sizes = (one.stored_bytes, one.cache_bytes, one.stored_bytes + one.cache_bytes)
            yield f"| {_title(one)} | {' | '.join(f'{size / 1e9:.2f} GB' for size in sizes)} |"


def _title(one: Step) -> str:
    size = one.shape.removeprefix("qwen2.5-").removesuffix("-instruct").upper()
    return f"{size}, {one.context // 1024}K, {one.rows}"


def written(found: list[Step]) -> str:
    """The JSON."""
    data = {"gpus": [asdict(gpu) for gpu in GPUS], "steps": [asdict(one) for one in found]}
    return json.dumps(data, indent=1) + "\n"


def with_tables(page: str, found: list[Step]) -> str:
    """The page with its tables replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise click.ClickException(f"{PAGE.name}: no {BEGIN.strip()} before {END.strip()}")
    return before + BEGIN + "\n".join(lines(found)) + "\n" + END + after


@click.command()
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing; exit with 1 if the files are not what this would write.",
)
def main(check: bool) -> None:
    """Compute the bounds of decode steps, and write them to results/roofline.json and docs/gpu.md."""
    found = steps()
    files = {RESULTS: written(found), PAGE: with_tables(PAGE.read_text(encoding="utf-8"), found)}
    for path, text in files.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise click.ClickException(f"{path.name} is not what benchmarks/roofline.py writes")
    click.echo("\n".join(lines(found)))


if __name__ == "__main__":
    main()
