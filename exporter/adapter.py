"""A LoRA adapter stored with a checkpoint, as peft saves it: which matrices it changes, and by how much.

A matrix W [out, in] becomes W + (alpha / r) B A, with A [r, in] and B [out, r]. An adapter that does anything else
(DoRA, rsLoRA, biases, trained embeddings, per-module ranks) is refused.

Source: peft, tuners/lora/layer.py (Linear.get_delta_weight).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from qwenport.contract import BY_SAFETENSORS
from qwenport.exporter.directory import sha256
from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.json_file import read_json
from qwenport.exporter.keys import short
from qwenport.exporter.safetensors_file import (
    TensorEntry,
    WeightFile,
    read_safetensors_header,
)

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft puts it before transformers' names
PARTS = regex.compile(r"(.+)\.lora_([AB])\.weight")
WITH_PEFT = "merge it with peft, and export the result"
HONOURED = {"bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "target_modules"}
# Keys that say how it was trained or where it came from; any other key must be empty.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Other initializations (PiSSA, OLoRA, LoftQ, ...) change the base weights.
MOST_ALPHA = 1e9
SECONDS = 2.0  # time limit for matching a pattern against all module names
BEGINNINGS = (None, True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class AdaptedMatrix:
    """The change to one matrix: scale * B A, with B [out, r] and A [r, in]."""

    a: TensorEntry
    b: TensorEntry
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits its checkpoint.

    Attributes:
        path: the directory.
        config_sha256: SHA-256 of adapter_config.json.
        file: the adapter's weights.
        rank: r.
        matrices: checkpoint tensor name -> the change added to it.
    """

    path: Path
    config_sha256: str
    file: WeightFile
    rank: int
    matrices: dict[str, AdaptedMatrix]

    def added(self, entry: TensorEntry, start: int, count: int) -> torch.Tensor:
        """The change added to elements start..start+count-1 of a tensor in row-major order; fp64 [count].

        In fp64 the order of additions, which differs between machines, does not survive rounding.
        """
        matrix, columns = self.matrices[entry.name], entry.shape[1]
        first, last = start // columns, (start + count - 1) // columns
        a = _rows(self.path, matrix.a, 0, self.rank)
        b = _rows(self.path, matrix.b, first, last + 1)
        offset = start - first * columns
        return (matrix.scale * (b @ a)).flatten()[offset : offset + count]

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for it."""
        return {
            "config_sha256": self.config_sha256,
            "sha256": sha256(self.path / ADAPTER_WEIGHTS),
            "matrices": len(self.matrices),
        }


def read_adapter(path: Path, tensors: Mapping[str, TensorEntry]) -> Adapter:
    """Read the adapter in a checkpoint directory and compare it with the checkpoint's tensors.

    Args:
        path: the checkpoint's directory, with adapter_config.json and adapter_model.safetensors in it.
        tensors: the checkpoint's tensors, under transformers' names.

    Raises:
        CheckpointError: there is no adapter, it does more than W + (alpha / r) B A, it does not fit, or a value is
            not finite.
    """
    config = _read_config(path / ADAPTER_CONFIG)
    rank, scale = _rank_and_scale(config)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{path}: no {ADAPTER_WEIGHTS} to merge (other formats are not read); --adapter ignore exports without it"
        )
    file, entries = read_safetensors_header(path / ADAPTER_WEIGHTS)
    found: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        parts = PARTS.fullmatch(entry.name)
        if parts is None or not entry.name.startswith(PREFIX):
            raise CheckpointError(
                f"{ADAPTER_WEIGHTS} has tensor {entry.name}, which is not part of a LoRA of linear layers; {WITH_PEFT}"
            )
        found.setdefault(parts[1].removeprefix(PREFIX), {})[parts[2]] = entry
    _check_targets(config["target_modules"], found, tensors)
    matrices = {}
    for module, pair in found.items():
        name = f"{module}.weight"
        rows, columns = tensors[name].shape
        for part, shape in ("A", (rank, columns)), ("B", (rows, rank)):
            if part not in pair:
                raise CheckpointError(
                    f"{ADAPTER_WEIGHTS} has no lora_{part} for {module}: it is incomplete"
                )
            if pair[part].shape != shape:
                raise CheckpointError(
                    f"{ADAPTER_WEIGHTS}: {pair[part].name} has shape {list(pair[part].shape)}; "
                    f"r = {rank} and the checkpoint imply {list(shape)}"
                )
            _rows(path, pair[part], 0, shape[0])  # refuses values that are not finite
        matrices[name] = AdaptedMatrix(pair["A"], pair["B"], scale)
    return Adapter(path, sha256(path / ADAPTER_CONFIG), file, rank, matrices)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent}: no {ADAPTER_CONFIG}, so there is no adapter to merge"
        )
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not the settings of an adapter ({error})") from error
    found: dict[str, Any] = config
    return found


def _rank_and_scale(config: dict[str, Any]) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{ADAPTER_CONFIG}: peft_type {short(config.get('peft_type'))}; only LORA can be merged here; {WITH_PEFT}"
        )
    for key in sorted(config.keys() - HONOURED - NEUTRAL):
        if config[key]:
            raise CheckpointError(
                f"{ADAPTER_CONFIG}: {key} {short(config[key])} is not supported here; {WITH_PEFT}"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{ADAPTER_CONFIG}: bias {short(config['bias'])}; {WITH_PEFT}")
    beginning = config.get("init_lora_weights")
    if not any(beginning is known for known in BEGINNINGS[:3]) and beginning not in BEGINNINGS[3:]:
        raise CheckpointError(
            f"{ADAPTER_CONFIG}: init_lora_weights {short(beginning)} may have changed the weights it is for; "
            f"{WITH_PEFT}"
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{ADAPTER_CONFIG}: r {short(rank)} is not a rank")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not -MOST_ALPHA < alpha < MOST_ALPHA:
        raise CheckpointError(f"{ADAPTER_CONFIG}: lora_alpha {short(alpha)} is not a number")
    if "target_modules" not in config:
        raise CheckpointError(f"{ADAPTER_CONFIG}: no target_modules")
    return rank, alpha / rank


def _check_targets(target: Any, found: Iterable[str], tensors: Mapping[str, TensorEntry]) -> None:
    """Check that the file adapts exactly the modules that target_modules names."""
    is_target = _matcher(target)
    modules = {
        name.removesuffix(".weight")
        for name, entry in tensors.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    } - {"model.embed_tokens"}
    named = {module for module in modules if is_target(module)}
    foreign, missing = sorted(set(found) - named), sorted(named - set(found))
    if foreign:
        why = (
            "target_modules does not name"
            if foreign[0] in modules
            else "the checkpoint has no matrix for"
        )
        raise CheckpointError(f"{ADAPTER_WEIGHTS} adapts {foreign[0]}, which {why}; {WITH_PEFT}")
    if missing:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} names {missing[0]}; {ADAPTER_WEIGHTS} does not adapt it; {WITH_PEFT}"
        )
    if not named:
        raise CheckpointError(f"{ADAPTER_CONFIG}: target_modules {short(target)} names no matrix")


def _matcher(target: Any) -> Any:
    """A test whether target_modules covers a module name, as peft reads it: a list of suffixes, or a pattern."""
    if target == "all-linear":
        return lambda module: module != "lm_head"
    try:
        if isinstance(target, str):
            return _pattern(target)
        ends = tuple(f".{name}" for name in target)
    except (regex.error, TypeError, RecursionError) as error:
        raise CheckpointError(f"{ADAPTER_CONFIG}: target_modules {target!r} ({error})") from error
    return lambda module: f".{module}".endswith(ends)


def _pattern(target: str) -> Any:
    pattern, until = regex.compile(target), time.monotonic() + SECONDS

    def matches(module: str) -> bool:
        try:
            left = max(0.001, until - time.monotonic())
            return pattern.fullmatch(module, timeout=left) is not None
        except TimeoutError as error:
            raise CheckpointError(
                f"{ADAPTER_CONFIG}: target_modules {target!r} takes too long to match"
            ) from error

    return matches


def _rows(path: Path, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Rows of a matrix in fp64, [stop - start, columns].

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    import torch

    width = entry.length // entry.shape[0]
    with (path / entry.file).open("rb") as stream:
        stream.seek(entry.offset + start * width)
        data = bytearray(stream.read((stop - start) * width))
    values = torch.frombuffer(data, dtype=BY_SAFETENSORS[entry.dtype].torch).double()
    if not torch.isfinite(values).all():
        raise CheckpointError(f"tensor {entry.name} of the adapter holds NaN or infinity")
    return values.view(stop - start, entry.shape[1])
