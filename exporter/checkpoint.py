"""A Hugging Face checkpoint directory, read by its safetensors HEADERS only.

A safetensors file is 8 bytes of header length, a JSON header, then raw row-major bytes, so the place of
every tensor is known without reading a weight. Pickled weights are refused: loading them runs code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenport.exporter.config import ModelConfig, MoEConfig, parse_config, read_config_json
from qwenport.exporter.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 1 << 24  # of weights in memory at a time
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself enforces

# safetensors dtype -> bytes per element, for the dtypes a supported checkpoint can hold
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
# a sparse layer's experts as two tensors; each expert's gate projection lies before its up projection
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
DTYPE_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset` and `length` in bytes from the start of `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its name in the checkpoint, its real path, its size and its header's hash."""

    name: str
    path: Path
    size: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every tensor is known and has the shape its config.json promises."""

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    dtype: str
    tensors: dict[str, TensorEntry]
    files: tuple[WeightFile, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.length for tensor in self.tensors.values())


def open_checkpoint(path: Path, rope_scaling: str | None = None) -> Checkpoint:
    """Read config.json and all safetensors headers, and hold them against each other.

    Args:
        path: checkpoint directory in Hugging Face layout.
        rope_scaling: "KIND:FACTOR" to add to a checkpoint without rope scaling.

    Raises:
        ConfigError: config.json is missing, not supported, or not understood.
        CheckpointError: files are missing, damaged or pickled; a tensor is missing, extra, misshapen or of
            another dtype (named).
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    raw = read_config_json(path)
    config = parse_config(raw, rope_scaling)
    files, tensors = _read_headers(path)
    expected = expected_tensors(config, tensors)
    tensors = _without_tied_copy(path, config, tensors)
    _compare(expected, tensors)
    dtype = _one_dtype(config, tensors)
    return Checkpoint(path, config, raw, dtype, tensors, files)


def expected_tensors(
    config: ModelConfig, present: Container[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config must hold, and no other.

    A sparse layer's experts are a tensor each, as published, unless its stacked tensors are among `present`.
    """
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns, bias in (
            ("self_attn.q_proj", queries, hidden, config.qkv_bias),
            ("self_attn.k_proj", keys, hidden, config.qkv_bias),
            ("self_attn.v_proj", keys, hidden, config.qkv_bias),
            ("self_attn.o_proj", hidden, queries, config.output_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        moe = config.moe_of(layer)
        if moe is None:
            shapes |= _swiglu(prefix + "mlp.", hidden, config.intermediate_size, config.mlp_bias)
        else:
            shapes |= _sparse_mlp(prefix + "mlp.", hidden, moe, present)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _swiglu(prefix: str, hidden: int, inner: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        shapes[f"{prefix}{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def _sparse_mlp(
    prefix: str, hidden: int, moe: MoEConfig, present: Container[str]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {prefix + "gate.weight": (moe.num_experts, hidden)}
    stacks = {
        prefix + GATE_UP: (moe.num_experts, 2 * moe.expert_size, hidden),
        prefix + DOWN: (moe.num_experts, hidden, moe.expert_size),
    }
    if any(name in present for name in stacks):
        shapes |= stacks
    else:
        for expert in range(moe.num_experts):
            shapes |= _swiglu(f"{prefix}experts.{expert}.", hidden, moe.expert_size, False)
    if moe.shared_expert_size is not None:
        shapes |= _swiglu(f"{prefix}shared_expert.", hidden, moe.shared_expert_size, False)
        shapes[prefix + "shared_expert_gate.weight"] = (1, hidden)
    return shapes


def expert_parts(name: str, experts: int) -> list[str]:
    """The tensors of single experts that, one after the other, are the stacked tensor `name`.

    Args:
        name: "...mlp.experts.gate_up_proj" or "...mlp.experts.down_proj".
        experts: how many there are.
    """
    prefix, _, kind = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return [f"{prefix}.{expert}.{part}.weight" for expert in range(experts) for part in parts]


def expert_stacks(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Stacked tensor -> the checkpoint's tensors that it consists of, in order; none if it has the stacks."""
    moe, stacks = checkpoint.config.moe, {}
    for layer in () if moe is None else moe.layers:
        for kind in (GATE_UP, DOWN):
            name = f"model.layers.{layer}.mlp.{kind}"
            if moe is not None and name not in checkpoint.tensors:
                stacks[name] = expert_parts(name, moe.num_experts)
    return stacks


def stacked_shape(checkpoint: Checkpoint, name: str, parts: list[TensorEntry]) -> tuple[int, ...]:
    """The shape of a package's tensor `name` that consists of `parts`: itself, or single experts."""
    if len(parts) == 1 and parts[0].name == name:
        return parts[0].shape
    moe = checkpoint.config.moe
    assert moe is not None, name
    rows, columns = parts[0].shape
    return (moe.num_experts, rows * len(parts) // moe.num_experts, columns)


def _read_headers(path: Path) -> tuple[tuple[WeightFile, ...], dict[str, TensorEntry]]:
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if index.is_file():
        weight_map = _read_index(index)
        if single.is_file() and SINGLE_FILE not in weight_map.values():
            raise CheckpointError(
                f"{path}: has both {SINGLE_FILE} and shards that {INDEX_FILE} names; "
                "remove the one that is not meant"
            )
        names = sorted(set(weight_map.values()))
    elif single.is_file():
        weight_map = None
        names = [SINGLE_FILE]
    else:
        pickled = sorted(
            p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        if pickled:
            raise CheckpointError(
                f"{path}: only pickled weights ({pickled[0]}); loading those can run code, so they are "
                "refused. Convert the checkpoint to safetensors first"
            )
        raise CheckpointError(f"{path}: no {SINGLE_FILE} and no {INDEX_FILE}")
    files: list[WeightFile] = []
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: shard {name} is named in {INDEX_FILE} but missing")
        weight_file, entries = read_safetensors_header(file)
        files.append(weight_file)
        for entry in entries:
            if entry.name in tensors:
                raise CheckpointError(
                    f"tensor {entry.name} is in two shards: {tensors[entry.name].file} and {name}"
                )
            tensors[entry.name] = entry
    if weight_map is not None:
        for tensor, shard in weight_map.items():
            if tensor not in tensors or tensors[tensor].file != shard:
                raise CheckpointError(
                    f"{INDEX_FILE} puts tensor {tensor} in {shard}; it is not there"
                )
        for tensor in tensors.keys() - weight_map.keys():
            raise CheckpointError(
                f"tensor {tensor} is in {tensors[tensor].file} but not in {INDEX_FILE}"
            )
    return tuple(files), tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map).items()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error})") from error
    for tensor, shard in items:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: {tensor} points outside the checkpoint: {shard!r}")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {tensor} is in {shard!r}, which is not a safetensors file"
            )
    return dict(items)


def read_safetensors_header(file: Path) -> tuple[WeightFile, list[TensorEntry]]:
    """Read one safetensors header and check that it accounts for the whole file.

    Raises:
        CheckpointError: truncated, corrupt, or holding a dtype that no supported model has.
    """
    real = Path(os.path.realpath(file))  # a Hugging Face cache holds symbolic links
    size = real.stat().st_size
    with real.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: not a safetensors file, or truncated inside its header")
        header_bytes = stream.read(length)
    try:
        header = json.loads(header_bytes)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header ({error})") from error
    header.pop("__metadata__", None)
    entries = [_entry(file, name, fields, 8 + length) for name, fields in header.items()]
    end = 8 + length
    for entry in sorted(entries, key=lambda e: (e.offset, e.length)):
        if entry.offset != end:
            raise CheckpointError(
                f"{file}: corrupt safetensors header (a gap or overlap at {entry.name})"
            )
        end += entry.length
    if end != size:
        raise CheckpointError(
            f"{file}: truncated or corrupt: the header describes {end} bytes, the file has {size}"
        )
    digest = hashlib.sha256(prefix + header_bytes).hexdigest()
    return WeightFile(file.name, real, size, digest), entries


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a shape or offset is not a natural number")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: corrupt safetensors header at tensor {name} ({error})"
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPE_BYTES)}"
        )
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: corrupt safetensors header: {name} does not fill its byte range"
        )
    return TensorEntry(name, file.name, dtype, shape, data_start + begin, end - begin)


def _without_tied_copy(
    path: Path, config: ModelConfig, tensors: dict[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Drop a tied checkpoint's spare lm_head.weight, if it really is the embedding again."""
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return tensors
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and all(
        a == b for a, b in zip(_chunks(path, head), _chunks(path, embedding), strict=True)
    )
    if not same:
        raise CheckpointError(
            "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight"
        )
    return {name: entry for name, entry in tensors.items() if name != "lm_head.weight"}


def _chunks(path: Path, entry: TensorEntry, size: int = CHUNK_BYTES) -> Any:
    with (path / entry.file).open("rb") as stream:
        stream.seek(entry.offset)
        for start in range(0, entry.length, size):
            yield stream.read(min(size, entry.length - start))


def _compare(expected: dict[str, tuple[int, ...]], tensors: dict[str, TensorEntry]) -> None:
    missing = [name for name in expected if name not in tensors]
    extra = sorted(tensors.keys() - expected.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_name_some(missing)}, which its config.json implies"
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint has {_name_some(extra)}, which its config.json does not account for"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensors[name].shape)}; config.json implies {list(shape)}"
            )


def _name_some(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{rest}"


def _one_dtype(config: ModelConfig, tensors: dict[str, TensorEntry]) -> str:
    stated = config.dtype
    dtype = stated or DTYPE_NAMES[tensors["model.embed_tokens.weight"].dtype]
    for entry in tensors.values():
        if DTYPE_NAMES[entry.dtype] != dtype:
            source = "config.json says" if stated else "model.embed_tokens.weight has"
            raise CheckpointError(
                f"tensor {entry.name} has dtype {DTYPE_NAMES[entry.dtype]}, where {source} {dtype}"
            )
    return dtype
