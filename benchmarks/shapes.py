"""Checkpoints in the shape of real models: their config.json, and meaningless weights.

    python benchmarks/shapes.py qwen2.5-0.5b-instruct DIRECTORY
    python benchmarks/shapes.py qwen2.5-72b-instruct DIRECTORY --sparse
    python benchmarks/shapes.py qwen2.5-72b-instruct DIRECTORY --quantized gptq

Layout, tensor names, dtype and sharding are the published checkpoints'. Weights are bf16 random numbers with
a fixed seed or, for shapes that would fill a disk, holes in sparse files: programs that read only headers
cannot tell the difference. Quantized checkpoints are sparse too.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"
TOKENIZER = HERE.parent / "examples" / "tiny-qwen2.5"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

SHAPES = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
BYTES = 2  # bf16
# As in the published checkpoints: 37 shards for 72B, 191 for 405B.
MAX_SHARD_BYTES = {"qwen2": 4_000_000_000, "qwen2_moe": 4_000_000_000, "llama": 5_000_000_000}
SEED = 2025
SPREAD = 0.02  # the models' initializer_range
CHUNK_ELEMENTS = 1 << 24

QUANTIZED: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": True,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
    },
    "pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 128,
                    "symmetric": True,
                },
            }
        },
    },
}
"""Format -> quantization_config: 4 bits in groups of 128."""
ITEM_BYTES = {"I32": 4, "I64": 8}
"""Of the dtypes in quantized checkpoints that are not bf16."""

Shapes = dict[str, tuple[int, ...]]


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{shape}.json").read_text(encoding="utf-8"))
    return config


def tensors_of(config: dict[str, Any]) -> Shapes:
    """Name -> shape of every tensor, in the order in which transformers saves them."""
    from qwenport.exporter import parse_config
    from qwenport.exporter.expected import expected_tensors

    shapes = expected_tensors(parse_config(config))
    return {name: shapes[name] for name in sorted(shapes, key=_saving_order)}


def integers_of(config: dict[str, Any]) -> dict[str, str]:
    """Name -> dtype of the tensors that are not bf16."""
    from qwenport.exporter import parse_config
    from qwenport.exporter.expected import quantized_weights

    return {
        f"{weight.removesuffix('.weight')}.{suffix}": dtype
        for weight, (storage, _) in quantized_weights(parse_config(config)).items()
        for suffix, dtype in storage.integers.items()
    }


def _saving_order(name: str) -> tuple[int, int, int]:
    """Embedding, layers (attention, MLP, norms), last norm, head."""
    _, part, *rest = name.split(".")
    if part != "layers":
        return (0 if part == "embed_tokens" else 2 if part == "norm" else 3, 0, 0)
    return (1, int(rest[0]), ("self_attn", "mlp").index(rest[1]) if "norm" not in rest[1] else 2)


def matrices(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """[out, in] of the weights that one decode step reads: every matrix once, the vocabulary's as lm_head.

    The embedding table is only looked up, one row per token; norms and biases are not counted.
    """
    shapes = tensors_of(config)
    head = "lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight"
    return [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and (name != "model.embed_tokens.weight" or name == head)
    ]


def shards(tensors: Shapes, limit: int, integers: Mapping[str, str]) -> list[Shapes]:
    """Split tensors, in order, into shards of at most `limit` bytes, as transformers does."""
    result: list[Shapes] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * _item_bytes(name, integers)
        if result[-1] and filled + size > limit:
            result.append({})
            filled = 0
        result[-1][name] = shape
        filled += size
    return result


def make_checkpoint(
    shape: str,
    directory: Path,
    sparse: bool,
    *,
    layers: int | None = None,
    quantized: str | None = None,
) -> Path:
    """Write the checkpoint of a shape, or return the existing one.

    Args:
        shape: one of SHAPES.
        directory: where to write it.
        sparse: leave holes in place of the weights.
        layers: fewer than the shape has.
        quantized: one of QUANTIZED; such a checkpoint is sparse.
    """
    config = config_of(shape)
    if quantized is not None:
        config["quantization_config"] = QUANTIZED[quantized]
    if layers is not None:
        config["num_hidden_layers"] = config["max_window_layers"] = layers
    if (directory / "config.json").is_file():  # written last
        return directory
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    integers = integers_of(config)
    parts = shards(tensors_of(config), MAX_SHARD_BYTES[config["model_type"]], integers)
    weight_map: dict[str, str] = {}
    for index, part in enumerate(parts):
        name = f"model-{index + 1:05}-of-{len(parts):05}.safetensors"
        file = directory / ("model.safetensors" if len(parts) == 1 else name)
        weight_map.update(dict.fromkeys(part, file.name))
        seed = None if sparse or quantized is not None else SEED + index
        _write_shard(file, part, integers, seed)
    if len(parts) > 1:
        total = sum(
            math.prod(shape) * _item_bytes(name, integers)
            for part in parts
            for name, shape in part.items()
        )
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index_json)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, directory / name)
    _write_json(directory / "config.json", config)
    return directory


def _item_bytes(name: str, integers: Mapping[str, str]) -> int:
    return ITEM_BYTES[integers[name]] if name in integers else BYTES


def _write_shard(
    file: Path, tensors: Shapes, integers: Mapping[str, str], seed: int | None
) -> None:
    """Write one safetensors file; if `seed` is None, with holes but for `_checked_values`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + math.prod(tensors[name]) * _item_bytes(name, integers)
        dtype = integers.get(name, "BF16")
        header[name] = {"dtype": dtype, "shape": tensors[name], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            stream.truncate(8 + len(text) + end)
            for name in tensors:
                stream.seek(8 + len(text) + header[name]["data_offsets"][0])
                stream.write(_checked_values(name, tensors))
            return
        for chunk in _random_weights(tensors, seed):
            stream.write(chunk)


def _checked_values(name: str, tensors: Shapes) -> bytes:
    """Of tensors whose values an export compares: GPTQ's act-order, with the columns of a group anywhere, and the shape
    of a packed weight. Of others nothing.
    """
    linear, _, suffix = name.rpartition(".")
    if suffix == "g_idx":
        (columns,) = tensors[name]
        groups = columns // int(QUANTIZED["gptq"]["group_size"])
        return struct.pack(f"<{columns}i", *(column % groups for column in range(columns)))
    if suffix == "weight_shape":
        rows, words = tensors[f"{linear}.weight_packed"]
        return struct.pack("<2q", rows, words * 8)
    return b""


def _random_weights(tensors: Shapes, seed: int) -> Iterator[memoryview]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        left = math.prod(tensors[name])
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        while left:
            count = min(left, CHUNK_ELEMENTS)
            values = torch.randn(count, generator=generator).mul_(SPREAD).add_(mean)
            yield values.to(torch.bfloat16).view(torch.uint8).numpy().data
            left -= count


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.argument("shape", type=click.Choice(SHAPES))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--sparse", is_flag=True, help="Holes in place of weights: takes no disk space.")
@click.option("--quantized", type=click.Choice([*QUANTIZED]), help="4 bits; implies --sparse.")
def main(shape: str, directory: Path, sparse: bool, quantized: str | None) -> None:
    """Write a checkpoint in the shape of a published model."""
    make_checkpoint(shape, directory, sparse, quantized=quantized)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    files = len(list(directory.glob("*.safetensors")))
    click.echo(f"{directory}: {size / 1e9:.1f} GB of weights in {files} files")


if __name__ == "__main__":
    main()
