"""Compares a checkpoint that `export --quantize` wrote with the one that it was made from, value by value.

A dequantized value must be within half a step of the original's, unless it is the outermost of its group: scales may be
so small that the largest values are clipped. All other tensors are the original's bytes. Memory holds a few rows of one
weight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwenport.contract import Progress
from qwenport.exporter import Checkpoint, TensorEntry, chunks, open_checkpoint, quantized_weights
from qwenport.validate.errors import ValidationError
from qwenport.validate.quantized_identity import ROWS, StoredTensors
from qwenport.validate.reference.dequantization import Quantization, read_quantization
from qwenport.validate.reference.stored import STACKS
from qwenport.validate.report import Check, ScenarioResult, Status
from qwenport.validate.target import Target

QUANTIZATION = "quantization"
SUMMARY = (
    "Every quantized weight against the checkpoint that it was rounded from, and all other tensors"
)
NOT_GIVEN = "needs the checkpoint that was quantized; give it as --reference"
MOST_CLIPPED = 0.5
"""The largest part of a group's range by which a scale may miss its outermost values."""


@dataclass
class _Found:
    """What the comparison has found so far: counts of values, the first weight that is wrong, and sums of squares."""

    far: int = 0
    first: str | None = None
    error: float = 0.0
    size: float = 0.0

    def add(self, name: str, original: torch.Tensor, made: torch.Tensor, far: torch.Tensor) -> None:
        """Count some rows of a weight; `far` marks values that are too far from the original's."""
        count = int(far.sum())
        self.far += count
        if count and self.first is None:
            self.first = name
        self.error += float((made - original).square().sum())
        self.size += float(original.square().sum())


def quantization_row(
    target: Target, checkpoint: Path, original: Path | None, progress: Progress
) -> ScenarioResult | None:
    """The report's row; None for a target that `export` did not quantize.

    Args:
        target: the target to judge.
        checkpoint: the quantized checkpoint.
        original: the checkpoint that it was made from, if it was given.
        progress: called with (what, weights done, weights in all).
    """
    if target.source["quantized"] is None:
        return None
    if original is None:
        return ScenarioResult(QUANTIZATION, SUMMARY, "not run", reason=NOT_GIVEN)
    begun = time.perf_counter()
    opened = [
        open_checkpoint(path, target.rope_scaling, max_seq_len=target.rope_length)
        for path in (original, checkpoint)
    ]
    checks = compare_with_origin(opened[0], opened[1], progress)
    status: Status = "passed" if all(check.passed for check in checks) else "failed"
    seconds = round(time.perf_counter() - begun, 3)
    return ScenarioResult(QUANTIZATION, SUMMARY, status, checks, seconds=seconds)


def compare_with_origin(
    original: Checkpoint, quantized: Checkpoint, progress: Progress
) -> tuple[Check, ...]:
    """Compare all tensors.

    Args:
        original: what was rounded.
        quantized: what came of it.
        progress: called with (what, weights done, weights in all).

    Raises:
        ValidationError: the quantized checkpoint states what the oracle does not dequantize.
    """
    quantization = read_quantization(quantized.path)
    assert quantization is not None
    weights = quantized_weights(quantized.config)
    found, used, other = _Found(), set(), []
    for done, (weight, (_, shape)) in enumerate(weights.items(), 1):
        source = source_of(original, weight, shape)
        used.add(source.name)
        _compare(quantization, quantized, weight, shape, original.path, source, found)
        progress("comparing with the original", done, len(weights))
    for name, entry in original.tensors.items():
        if name not in used and not _same(original.path, entry, quantized, name):
            other.append(name)
    relative = (found.error / found.size) ** 0.5 if found.size else 0.0
    where = f"of {len(weights)} weights, which differ by {relative:.1e}"
    if found.first is not None:
        where += f"; first in {found.first}"
    return (
        Check("other tensors that differ", len(other), "==", 0, other[0] if other else None),
        Check("values farther than half a step", found.far, "==", 0, where),
    )


def source_of(original: Checkpoint, weight: str, shape: tuple[int, int]) -> TensorEntry:
    """Where the original has a weight, which may be a part of a stack of experts.

    Raises:
        ValidationError: nowhere.
    """
    entry = original.tensors.get(weight)
    if entry is None and ".experts." in weight:
        prefix, _, rest = weight.partition(".experts.")
        expert, projection, _ = rest.split(".")
        (kind,) = (kind for kind, parts in STACKS.items() if projection in parts)
        stack = original.tensors.get(f"{prefix}.experts.{kind}")
        if stack is not None:
            parts = STACKS[kind]
            place = int(expert) * len(parts) + parts.index(projection)
            length = stack.length // (stack.shape[0] * len(parts))
            entry = replace(stack, shape=shape, offset=stack.offset + place * length, length=length)
    if entry is None or entry.shape != shape:
        raise ValidationError(f"{original.path} has no weight {weight} of shape {list(shape)}")
    return entry


def _compare(
    quantization: Quantization,
    quantized: Checkpoint,
    weight: str,
    shape: tuple[int, int],
    original: Path,
    source: TensorEntry,
    found: _Found,
) -> None:
    held = StoredTensors.of(quantized)
    before = StoredTensors(original, {source.name: source})
    for start in range(0, shape[0], ROWS):
        stop = min(start + ROWS, shape[0])
        stored = quantization.rows(weight, shape, start, stop, held)
        scale = held.rows(f"{weight}_scale", start, stop).double()[:, :, None]
        wanted = before.rows(source.name, start, stop).double()
        wanted = wanted.unflatten(1, (scale.shape[1], -1))
        made = stored.double().unflatten(1, (scale.shape[1], -1))
        far = too_far(wanted, made, scale, torch.finfo(stored.dtype).eps)
        found.add(weight, wanted, made, far)


def too_far(
    original: torch.Tensor, made: torch.Tensor, scale: torch.Tensor, eps: float
) -> torch.Tensor:
    """Which values rounding cannot have made of the original's.

    Args:
        original, made: fp64 [N, groups, group], the values before, and dequantized.
        scale: fp64 [N, groups, 1].
        eps: of the dtype that dequantized values were rounded to.
    """
    error = original - made
    half = scale / 2 * (1 + 1e-6) + made.abs() * (eps / 2)
    low, high = original.amin(2, keepdim=True), original.amax(2, keepdim=True)
    spread = high.clamp(min=0) - low.clamp(max=0)
    beyond = ((made == made.amax(2, keepdim=True)) & (error > 0)) | (
        (made == made.amin(2, keepdim=True)) & (error < 0)
    )
    allowed = torch.where(beyond, half + MOST_CLIPPED * spread, half)
    return ~(error.abs() <= allowed)  # NaN is too far as well


def _same(path: Path, entry: TensorEntry, quantized: Checkpoint, name: str) -> bool:
    other = quantized.tensors.get(name)
    if other is None or (other.dtype, other.shape) != (entry.dtype, entry.shape):
        return False
    pairs = zip(chunks(path, entry), chunks(quantized.path, other), strict=True)
    return all(one == two for one, two in pairs)
