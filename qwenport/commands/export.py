"""`qwenport export`: a checkpoint becomes a package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenport.commands._common import (
    PATH,
    bytes_of,
    force_clean_option,
    limits,
    note,
    output_options,
    print_json,
    whole_or_interrupted,
)
from qwenport.commands._progress import progress_bar
from qwenport.contract import (
    ADAPTERS,
    DEFAULT_MAX_BATCH,
    DTYPES,
    GROUPS,
    QUANTIZE,
    WEIGHT_MODES,
)
from qwenport.wording import size

if TYPE_CHECKING:
    from qwenport.exporter import Package, Recipe


@click.command("export")
@click.argument("checkpoint", type=PATH)
@click.argument("package", type=PATH)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Of weights, activations and KV cache.",
    show_default="the checkpoint's",
)
@limits("the checkpoint", DEFAULT_MAX_BATCH)
@click.option(
    "--rope-scaling",
    metavar="KIND:FACTOR",
    help="Extend the context of a checkpoint that does not scale its positions: yarn, linear or "
    "dynamic, and by how much.",
    show_default="what config.json says",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHT_MODES),
    default=WEIGHT_MODES[0],
    help="link: refer to the checkpoint's files (hard links, no bytes written). "
    "copy: a package that can be moved. pack: link, and write each layer's experts as one tensor "
    "(mixtures of experts; loads faster where experts are used as a stack).",
)
@click.option(
    "--adapter",
    type=click.Choice(ADAPTERS),
    help="What to do with an adapter (LoRA) next to the weights: ignore it, or merge it into them. "
    "Without this option it is refused.",
)
@click.option(
    "--ignore-sparse-attention",
    is_flag=True,
    help="Export exact attention where config.json asks for sparse attention, its approximation (Qwen2.5-1M). Without "
    "this option it is refused.",
)
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZE),
    help="Round the weights of attention, MLP and experts to 8 or 4 bits; embedding and head to 8 bits per row. Norms, "
    "biases and routers stay. int8 costs next to no quality and half the bytes; int4 a quarter of the bytes, and some "
    "quality. The package then holds the quantized checkpoint, as compressed-tensors has them.",
    show_default="weights stay as they are",
)
@click.option(
    "--group",
    type=click.Choice([str(size) for size in GROUPS]),
    help="With --quantize int4: weights that share a scale. Small groups are closer to the checkpoint, and add "
    "2 bytes each.",
    show_default=str(GROUPS[0]),
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="With --quantize: whether zero is the middle of every group's codes. Asymmetric is closer to the checkpoint "
    "at 4 bits; TensorRT's products are fastest with symmetric.",
    show_default="symmetric",
)
@click.option(
    "--check-values",
    is_flag=True,
    help="Read every weight and refuse NaN and infinity. Weights that are converted or stacked are always checked.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse keys of config.json that neither transformers nor Qwenport reads, instead of naming them.",
)
@force_clean_option
@output_options
def command(
    checkpoint: Path,
    package: Path,
    dtype: str | None,
    max_seq_len: int | None,
    max_batch: int,
    rope_scaling: str | None,
    weights: str,
    adapter: str | None,
    ignore_sparse_attention: bool,
    quantize: str | None,
    group: str | None,
    symmetric: bool | None,
    check_values: bool,
    strict: bool,
    force_clean: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint directory CHECKPOINT (Hugging Face layout, safetensors) as an ONNX package.

    PACKAGE is created and must not exist. It holds model.onnx, a manifest, the tokenizer, and the
    weights by reference; the checkpoint itself is never written to.

    \b
    Examples:
      qwenport export Qwen2.5-0.5B-Instruct qwen.package
      qwenport export Qwen2.5-7B-Instruct long.package --rope-scaling yarn:4
      qwenport export Llama-3.1-8B small.package --dtype fp16 --max-seq-len 8192
      qwenport export Qwen2.5-7B-Instruct int4.package --quantize int4
    """
    from qwenport.exporter import export

    recipe = _recipe(quantize, group, symmetric)
    start = time.perf_counter()
    with whole_or_interrupted(package):
        with progress_bar("tracing the model", quiet) as progress:
            written = export(
                checkpoint,
                package,
                dtype=dtype,
                max_seq_len=max_seq_len,
                max_batch=max_batch,
                rope_scaling=rope_scaling,
                weights=weights,
                adapter=adapter,
                ignore_sparse_attention=ignore_sparse_attention,
                quantize=recipe,
                check_values=check_values,
                strict=strict,
                force_clean=force_clean,
                progress=progress,
                note=lambda text: note(text, quiet),
            )
        _print(_report(written, time.perf_counter() - start), quiet, as_json)


def _recipe(quantize: str | None, group: str | None, symmetric: bool | None) -> Recipe | None:
    """The recipe of the three options.

    Raises:
        click.UsageError: the other two without the first.
    """
    from qwenport.exporter import make_recipe

    if quantize is None:
        for option, value in (("--group", group), ("--symmetric/--asymmetric", symmetric)):
            if value is not None:
                raise click.UsageError(f"{option} needs --quantize")
        return None
    size = None if group is None else int(group)
    return make_recipe(quantize, group=size, symmetric=symmetric)


def _print(report: dict[str, Any], quiet: bool, as_json: bool) -> None:
    for text in report["notes"]:
        note(text, quiet)
    if as_json:
        print_json(report)
        return
    weight_bytes = size(report["weight_bytes"])
    mode = "quantized" if report["quantized"] else _MODES[report["weights"]]
    click.echo(
        f"{report['package']}: {report['model_type']}, {report['layers']} layers, {report['dtype']}, "
        f"{report['max_seq_len']} positions, batch {report['max_batch']}\n"
        f"weights: {weight_bytes} {mode}; {size(report['bytes_written'])} written "
        f"in {report['seconds']:.1f} s"
    )
    if report["quantized"] is not None:
        click.echo(
            f"quantized: linears {_told(report['quantized']['linears'])}; embedding and head "
            f"{_told(report['quantized']['vocabulary'])}"
        )
    for kind, count in report["converted"].items():
        click.echo(f"converted: {count} tensor{'s' if count > 1 else ''}, {kind}")


def _told(how: dict[str, Any]) -> str:
    zero = "symmetric" if how["symmetric"] else "with zero points"
    scale = "per row" if how["group"] is None else f"in groups of {how['group']}"
    return f"{how['bits']} bits {scale}, {zero}"


_MODES = {
    "link": "by reference",
    "copy": "copied",
    "pack": "by reference, experts stacked",
    "convert": "converted",
}


def _report(package: Package, seconds: float) -> dict[str, Any]:
    weights = package.manifest["weights"]
    sources = {f"weights/{file['name']}" for file in package.manifest["source"]["files"]}
    own = (
        package.manifest["source"]["quantized"] is not None
    )  # the links are to a checkpoint within
    linked = sum(
        file["bytes"]
        for name, file in weights["files"].items()
        if name in sources and weights["mode"] in ("link", "pack") and not own
    )
    return {
        "package": str(package.path),
        "model_type": package.config.model_type,
        "layers": package.config.num_hidden_layers,
        "dtype": package.dtype,
        "max_seq_len": package.max_seq_len,
        "max_batch": package.max_batch,
        "weights": weights["mode"],
        "converted": package.manifest["source"]["converted"],
        "quantized": package.manifest["source"]["quantized"],
        "weight_bytes": weights["bytes"],
        "bytes_written": bytes_of(package.path) - linked,
        "seconds": round(seconds, 3),
        "notes": notes_on(package),
    }


def notes_on(package: Package) -> list[str]:
    """What a user of the package should know about its source and its context length."""
    config, length = package.config, package.max_seq_len
    notes = list(package.manifest["source"]["notes"])
    if config.context_note:
        notes.append(config.context_note)
    rope = config.rope
    if rope.depends_on_length and length > rope.original_max_position_embeddings:
        notes.append(
            f"rope type {rope.kind!r} changes with the length of the text; this package has its "
            f"frequencies for {length} positions, also for shorter texts"
        )
    return notes
