"""A Hugging Face checkpoint directory: config.json and the safetensors headers, compared with each other.

Every tensor is used, or named in a note that says why it is not. Weights are read only where values must be compared:
a head that repeats the embedding, a duplicated tensor, rotary frequency buffers. Pickled weights are refused: loading
them runs code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenport.contract import BY_SAFETENSORS, MANIFEST
from qwenport.exporter.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, read_adapter
from qwenport.exporter.config import ModelConfig, parse_config, read_config_json
from qwenport.exporter.dual_chunk import CONFIG, SPARSE_FILE
from qwenport.exporter.errors import CheckpointError, ConfigError
from qwenport.exporter.expected import (
    DOWN,
    GATE_UP,
    compare,
    compare_types,
    expected_tensors,
    expert_parts,
    name_some,
    parameters,
    quantized_weights,
    some,
)
from qwenport.exporter.json_file import read_json
from qwenport.exporter.manifest import why_no_directory
from qwenport.exporter.names import HEAD, rotary_buffers, understood
from qwenport.exporter.quantization import SCALES, WEIGHT, ZEROS, ByReference
from qwenport.exporter.safetensors_file import (
    CHUNK_BYTES,
    TensorEntry,
    WeightFile,
    chunks,
    read_safetensors_header,
)
from qwenport.wording import cut

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in which every tensor is known and has the shape that config.json implies.

    Attributes:
        path: the directory.
        config: what its config.json means.
        dtype: that of a quantized checkpoint's scales; else config.json's, or the embedding's if config.json names
            none.
        tensors: name -> location. Names are those of transformers' model, whatever the files call them; dtypes may
            differ.
        files: the files that hold them.
        prefix: the decoder tensors' name prefix in the files: "model." as published.
        notes: what was skipped, one sentence each.
        adapter: the adapter to merge into the weights, if requested.
        implied: tensors of quantized weights that repeat what config.json says; the others are in `tensors`.
    """

    path: Path
    config: ModelConfig
    dtype: str
    tensors: dict[str, TensorEntry]
    files: tuple[WeightFile, ...]
    prefix: str = "model."
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = None
    implied: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def has_adapter(self) -> bool:
        """Whether the directory also holds an adapter."""
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def has_sparse_attention(self) -> bool:
        """Whether the directory asks, in config.json or beside it, for an approximation of attention."""
        return self.config.sparse_attention is not None or (self.path / SPARSE_FILE).is_file()

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.length for tensor in self.tensors.values())


def open_checkpoint(
    path: Path | str,
    rope_scaling: str | None = None,
    *,
    max_seq_len: int | None = None,
    merged: bool = False,
) -> Checkpoint:
    """Read config.json and all safetensors headers, and compare them.

    Args:
        path: checkpoint directory in Hugging Face layout.
        rope_scaling: "KIND:FACTOR" to add to a checkpoint without rope scaling.
        max_seq_len: positions requested; by default all that the rope settings allow.
        merged: read the adapter in the directory and merge it; it is ignored otherwise.

    Raises:
        ConfigError: config.json is missing, not supported, or not understood.
        CheckpointError: files are missing, damaged or pickled; a tensor is missing, extra or misshapen (named).
    """
    path = Path(path)
    refuse_what_is_no_checkpoint(path)
    raw = read_config_json(path)
    config = parse_config(raw, rope_scaling, max_seq_len)
    found = _read_headers(path)
    notes = list(found.notes)
    if config.unread_keys:
        notes.append(
            f"config.json has keys that neither transformers nor Qwenport reads: {', '.join(config.unread_keys)}"
        )
    notes += _on_sparse_attention(path, config, raw)
    prefix, tensors = understood(found.tensors)
    if prefix != "model.":
        notes.append(f"tensor names begin with {prefix!r} instead of 'model.'")
    buffers = rotary_buffers(path, parse_config(raw, None, max_seq_len), tensors)
    if buffers:
        notes.append(
            f"{len(buffers)} {'buffer' if len(buffers) == 1 else 'buffers'} of rotary frequencies (inv_freq): as "
            "config.json has them, not needed"
        )
        tensors = {name: entry for name, entry in tensors.items() if name not in buffers}
    given, tensors = tensors, _without_tied_copy(path, config, tensors)
    if len(tensors) < len(given):
        notes.append("lm_head.weight repeats the embedding, which is tied to it: not used")
    given, tensors = tensors, _without_zero_biases(path, config, tensors)
    if len(tensors) < len(given):
        idle = sorted(given.keys() - tensors.keys())
        notes.append(f"{name_some(idle)}: zero, where the model has no bias; not needed")
    compare(expected_tensors(config, tensors), tensors)
    compare_types(config, tensors)
    implied: dict[str, TensorEntry] = {}
    quantized = quantized_weights(config)
    _refuse_rounded_inputs(config)
    notes += dict.fromkeys(s.note for s, _ in quantized.values() if s.note is not None)
    for weight, (storage, shape) in quantized.items():
        for name in storage.check(weight.removesuffix(WEIGHT), shape, path, tensors):
            implied[name] = tensors[name]
    tensors = {name: entry for name, entry in tensors.items() if name not in implied}
    dtype = (
        _dtype_of_scales(config, tensors)
        or config.dtype
        or BY_SAFETENSORS[tensors["model.embed_tokens.weight"].dtype].name
    )
    adapter = read_adapter(path, tensors) if merged else None
    if adapter is not None:
        if (at := next((name for name in adapter.matrices if name in quantized), None)) is not None:
            raise CheckpointError(f"the adapter changes {cut(at)}, which is quantized")
        count, rank = len(adapter.matrices), adapter.rank
        notes.append(
            f"the adapter next to the weights (rank {rank}) is merged into {count} of them"
        )
    return Checkpoint(
        path, config, dtype, tensors, found.files, prefix, tuple(notes), adapter, implied
    )


def _on_sparse_attention(path: Path, config: ModelConfig, raw: dict[str, Any]) -> list[str]:
    """What others approximate where a package's attention is exact."""
    found = []
    if config.sparse_attention is not None:
        found.append(
            f"config.json asks for sparse attention ({config.sparse_attention}), an approximation, which is ignored "
            "(--ignore-sparse-attention): attention is exact"
        )
    if raw.get(CONFIG) is not None and (path / SPARSE_FILE).is_file():
        found.append(
            f"vLLM reads {SPARSE_FILE} and approximates attention in long prompts, which a package does not: its "
            "logits there are those of exact attention"
        )
    return found


def _refuse_rounded_inputs(config: ModelConfig) -> None:
    """Raises ConfigError: experts' inputs are not all rounded in one way, or a tied head's is rounded.

    compressed-tensors would round the latter, but an embedding has no scales.
    """
    experts = {
        name: None if (storage := config.storage(name)) is None else storage.activations
        for name, _ in parameters(config)
        if ".experts." in name
    }
    if len(set(experts.values())) > 1:
        raise ConfigError(
            "quantization_config: some experts' activations are rounded to FP8, and others' are not, or otherwise"
        )
    head = config.storage(HEAD)
    if config.tie_word_embeddings and head is not None and head.activations is not None:
        raise ConfigError(
            "quantization_config: rounds the input of a head that is tied to the embedding, which has no scales for "
            "it; name lm_head in ignore"
        )


def refuse_what_is_no_checkpoint(path: Path) -> None:
    """Raise an error for a path that is not a checkpoint directory, saying what it is and what to do.

    Raises:
        CheckpointError: it is not a checkpoint directory.
    """
    if (wrong := why_no_directory(path)) is not None:
        raise CheckpointError(wrong)
    if (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: a package or engine of Qwenport's, not a checkpoint; give the directory that it was made from"
        )
    if (path / "config.json").is_file():
        return
    found = [file for file in sorted(path.iterdir()) if file.suffix == ".gguf"]
    if found:
        raise CheckpointError(why_no_directory(found[0]))
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path}: an adapter without its model; merge it into the model with peft, and export the result"
        )


def expert_stacks(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Stacked tensor -> the checkpoint's tensors that make it up, in order; empty if it already has the stacks."""
    moe, stacks = checkpoint.config.moe, {}
    for layer in () if moe is None else moe.layers:
        for kind in (GATE_UP, DOWN):
            name = f"model.layers.{layer}.mlp.{kind}"
            if moe is not None and name not in checkpoint.tensors:
                stacks[name] = expert_parts(name, moe.num_experts)
    return stacks


def stacked_shape(checkpoint: Checkpoint, name: str, parts: list[TensorEntry]) -> tuple[int, ...]:
    """The shape of a package's tensor `name` made up of `parts`: the tensor itself, or single experts."""
    if len(parts) == 1 and parts[0].name == name:
        return parts[0].shape
    moe = checkpoint.config.moe
    assert moe is not None, name
    rows, columns = parts[0].shape
    return (moe.num_experts, rows * len(parts) // moe.num_experts, columns)


@dataclass
class _Found:
    """The contents of the headers."""

    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorEntry]
    notes: list[str] = field(default_factory=list)


def _read_headers(path: Path) -> _Found:
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _read_index(index)
        if single.is_file() and SINGLE_FILE not in weight_map.values():
            raise CheckpointError(
                f"{path}: has both {SINGLE_FILE} and shards that {INDEX_FILE} names; "
                "remove the one that is not meant"
            )
        names = sorted(set(weight_map.values()))
    elif single.is_file():
        names = [SINGLE_FILE]
    else:
        raise CheckpointError(_without_weights(path))
    found = _Found((), {})
    places: dict[str, list[TensorEntry]] = {}
    for name in names:
        file = path / name
        if not file.is_file():
            wrong = "no file" if os.path.lexists(file) else "missing"
            raise CheckpointError(f"{path}: shard {name} is named in {INDEX_FILE} and is {wrong}")
        weight_file, entries = read_safetensors_header(file)
        found.files += (weight_file,)
        for entry in entries:
            places.setdefault(entry.name, []).append(entry)
    if index.is_file():
        _as_indexed(path, weight_map, places, found)
    else:
        found.tensors = {name: entries[0] for name, entries in places.items()}
    return found


def _as_indexed(
    path: Path, weight_map: dict[str, str], places: dict[str, list[TensorEntry]], found: _Found
) -> None:
    """Let the index decide which duplicate counts and which tensors are strays."""
    again: list[str] = []
    for tensor, shard in weight_map.items():
        entries = {entry.file: entry for entry in places.get(tensor, ())}
        if shard not in entries:
            raise CheckpointError(f"{INDEX_FILE} puts tensor {tensor} in {shard}; it is not there")
        for other in entries.values():
            if other.file == shard:
                continue
            if not _same_bytes(path, entries[shard], other):
                raise CheckpointError(
                    f"tensor {cut(tensor)} is in two shards, and differs: {cut(shard)} and {cut(other.file)}; remove "
                    "the one that is not meant"
                )
            again.append(tensor)
        found.tensors[tensor] = entries[shard]
    if again:
        found.notes.append(f"{name_some(again)} twice in the shards, the same bytes")
    unlisted = sorted(
        file.name
        for file in path.glob("*.safetensors")
        if file.name not in weight_map.values() and file.name != ADAPTER_WEIGHTS
    )
    if unlisted:
        found.notes.append(
            f"{some('file', unlisted)} beside the shards that {INDEX_FILE} names: not used"
        )
    strays = sorted(places.keys() - weight_map.keys())
    if strays:
        found.notes.append(f"{name_some(strays)} in the shards but not in {INDEX_FILE}: not used")


def _without_weights(path: Path) -> str:
    """Say what the directory holds in place of safetensors files."""
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{path}: only pickled weights ({pickled[0]}); loading those can run code, so they are "
            "refused. Convert the checkpoint to safetensors first"
        )
    return f"{path}: no {SINGLE_FILE} and no {INDEX_FILE}"


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = read_json(index, unique=True)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map that names tensors and their files")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error})") from error
    items = weight_map.items()
    for tensor, shard in items:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: {tensor} points outside the checkpoint: {shard!r}")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {tensor} is in {shard!r}, which is not a safetensors file"
            )
    return dict(items)


def _without_tied_copy(
    path: Path, config: ModelConfig, tensors: dict[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Drop a tied checkpoint's redundant lm_head.weight, if it really equals the embedding."""
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return tensors
    if not _same_values(path, head, embedding):
        raise CheckpointError(
            "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight: remove the "
            "tensor, or say false in config.json"
        )
    return {name: entry for name, entry in tensors.items() if name != "lm_head.weight"}


def _without_zero_biases(
    path: Path, config: ModelConfig, tensors: dict[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Drop biases that tools write for every quantized linear, where the model has none and they are zero.

    Raises:
        CheckpointError: one of them is not zero.
    """
    if config.quantization is None:
        return tensors
    known = {name for name, _ in parameters(config)}
    found = {f"{weight.removesuffix(WEIGHT)}.bias" for weight in quantized_weights(config)}
    idle = {name for name in found - known if name in tensors}
    for name in sorted(idle):
        if any(any(chunk) for chunk in chunks(path, tensors[name])):
            raise CheckpointError(
                f"tensor {cut(name)} is not zero, and the model has no bias there; its config.json is not the one "
                "that it was made with"
            )
    return {name: entry for name, entry in tensors.items() if name not in idle}


def _dtype_of_scales(config: ModelConfig, tensors: dict[str, TensorEntry]) -> str | None:
    """The dtype that integer codes are dequantized to: that of the first weight's scales."""
    for weight, (storage, shape) in quantized_weights(config).items():
        if ZEROS not in storage.part_names:
            continue
        part = storage.parts(weight.removesuffix(WEIGHT), shape, tensors, "")[SCALES]
        stored = part.entry.dtype if isinstance(part, ByReference) else part.dtype
        return BY_SAFETENSORS[stored].name
    return None


def _same_bytes(path: Path, a: TensorEntry, b: TensorEntry) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        one == other for one, other in zip(chunks(path, a), chunks(path, b), strict=True)
    )


def _same_values(path: Path, a: TensorEntry, b: TensorEntry) -> bool:
    """As `_same_bytes`, but across two dtypes: every number is equal."""
    if a.dtype == b.dtype or a.shape != b.shape:
        return _same_bytes(path, a, b)
    import torch

    def numbers(entry: TensorEntry) -> Iterator[torch.Tensor]:
        """The values in fp32, in chunks of equal count for both tensors."""
        dtype = BY_SAFETENSORS[entry.dtype]
        size = dtype.itemsize
        with (path / entry.file).open("rb") as stream:
            stream.seek(entry.offset)
            for start in range(0, entry.length // size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, entry.length // size - start)
                data = bytearray(stream.read(count * size))
                yield torch.frombuffer(data, dtype=dtype.torch).float()

    return all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))
