"""Compares every quantized weight of a package or an engine with the checkpoint's, by a second implementation.

What model.onnx points at is dequantized by the definition of its operators, the checkpoint's tensors by the oracle's
code; every bit must agree, with the columns in the order in which the graph gives the activations. Memory holds a few
rows of one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qwenport.contract import BY_SAFETENSORS, Progress
from qwenport.exporter import CODES, PERMUTATION, SCALES, ZEROS, Checkpoint, quantized_weights
from qwenport.validate.errors import ValidationError
from qwenport.validate.quantized_parts import Cut, Middle, Orders, Part, StoredPart
from qwenport.validate.reference.dequantization import Quantization, read_quantization

WEIGHT = ".weight"
ROWS = 1024
_TORCH = {
    "I32": torch.int32,
    "I64": torch.int64,
    **{name: dtype.torch for name, dtype in BY_SAFETENSORS.items()},
}


@dataclass(frozen=True)
class QuantizedWeights:
    """What was found.

    Attributes:
        wrong: tensor of the graph -> how it differs.
        tensors: tensor of the graph -> the checkpoint's tensors that it is part of.
    """

    wrong: dict[str, str]
    tensors: dict[str, tuple[str, ...]]


def compare_quantized(
    model: onnx.ModelProto, package: Path, checkpoint: Checkpoint, progress: Progress
) -> QuantizedWeights:
    """Compare every quantized weight of a package with the checkpoint.

    Args:
        model: the package's model.onnx.
        package: its directory. Locations outside it are not read: such weights count as differing.
        checkpoint: the checkpoint that the package claims as its source.
        progress: called with (what, weights done, weights in all).
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def parts_of(names: Mapping[str, str]) -> dict[str, Part]:
        return {
            part: StoredPart(initializers[name], package)
            for part, name in names.items()
            if name in initializers
        }

    return _compare(checkpoint, parts_of, Orders(model, package), progress, in_fp32=False)


def compare_quantized_engine(
    model: onnx.ModelProto, engine: Path, checkpoint: Checkpoint, progress: Progress
) -> QuantizedWeights:
    """Compare every quantized weight of an onnxruntime engine with the checkpoint, as `compare_quantized`.

    Scales are in fp32 there, and a product's dequantized weights are not rounded: they are rounded here, to the
    checkpoint's dtype, to be compared.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {node.input[1]: node for node in model.graph.node if node.op_type == "MatMulNBits"}

    def parts_of(names: Mapping[str, str]) -> dict[str, Part]:
        if names[CODES] not in products:
            return {}
        return _parts_of_product(products[names[CODES]], initializers, engine)

    return _compare(checkpoint, parts_of, Orders(model, engine), progress, in_fp32=True)


def _parts_of_product(
    node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto], engine: Path
) -> dict[str, Part]:
    """The parts that a MatMulNBits multiplies by.

    Raises:
        ValueError: they are no such parts.
    """
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    n, k, bits, block = (given.get(key, 0) for key in ("N", "K", "bits", "block_size"))
    names = [*node.input[1:], ""][:3]
    if any(name not in initializers for name in names if name) or bits not in (4, 8) or block < 1:
        raise ValueError(f"{node.name} multiplies by something else than stored weights")
    blocks = k // block
    codes, scales = (initializers[name] for name in names[:2])
    parts: dict[str, Part] = {
        CODES: StoredPart(codes, engine, shape=(n, k), bits=bits),
        SCALES: StoredPart(scales, engine),
        ZEROS: Middle((n, blocks), bits),
    }
    if names[2]:
        whole_bytes = -(-blocks * bits // 8) * 8 // bits
        zeros = StoredPart(initializers[names[2]], engine, shape=(n, whole_bytes), bits=bits)
        parts[ZEROS] = Cut(zeros, blocks)
    return parts


def _compare(
    checkpoint: Checkpoint,
    parts_of: Callable[[Mapping[str, str]], Mapping[str, Part]],
    orders: Orders,
    progress: Progress,
    *,
    in_fp32: bool,
) -> QuantizedWeights:
    """Compare every quantized weight; `parts_of` finds its parts in a graph, by what they are called.

    With `in_fp32` the scales are in fp32 whatever the checkpoint's are.
    """
    weights = quantized_weights(checkpoint.config)
    found = QuantizedWeights({}, {})
    quantization = read_quantization(checkpoint.path) if weights else None
    if quantization is None:
        return found
    stored = _Stored(checkpoint)
    for done, (weight, (_, shape)) in enumerate(weights.items(), 1):
        names = {part: f"{weight}.{part}" for part in (CODES, SCALES, ZEROS)}
        held = quantization.tensors(weight, shape, checkpoint.tensors)
        used = tuple(name for name in held if name in checkpoint.tensors)
        try:
            parts = parts_of(names)
            if parts.keys() != names.keys():
                continue  # its tensors count as unused
            own = (*names.values(), f"{weight}.{PERMUTATION}")
            found.tensors.update(dict.fromkeys(own, used))
            order = orders.of(names[CODES], shape[1])
            count = _differing(parts, order, quantization, stored, weight, shape, in_fp32)
            if count:
                found.wrong[names[CODES]] = f"{count} of {shape[0] * shape[1]} values differ"
        except (ValueError, ValidationError) as error:
            found.wrong[names[CODES]] = str(error)
        progress("comparing quantized weights", done, len(weights))
    return found


def _differing(
    parts: Mapping[str, Part],
    order: torch.Tensor | None,
    quantization: Quantization,
    stored: _Stored,
    weight: str,
    shape: tuple[int, int],
    in_fp32: bool,
) -> int:
    """How many values of a weight differ in any bit.

    Args:
        order: the weight's column that each column of the codes is; None for its own order.
        in_fp32: see `_compare`.

    Raises:
        ValueError: the parts do not make a weight of that shape.
    """
    codes, scales, zeros = parts[CODES], parts[SCALES], parts[ZEROS]
    blocks = scales.shape[1]
    if (
        codes.shape != shape
        or scales.shape[0] != shape[0]
        or zeros.shape != scales.shape
        or zeros.bits != codes.bits
        or blocks == 0
        or shape[1] % blocks
    ):
        raise ValueError(f"its parts make no weight of shape {list(shape)}")
    count = 0
    for start in range(0, shape[0], ROWS):
        stop = min(start + ROWS, shape[0])
        wanted = quantization.rows(weight, shape, start, stop, stored)
        wanted = wanted if order is None else wanted[:, order]
        steps = codes.rows(start, stop).view(stop - start, blocks, -1)
        steps = steps - zeros.rows(start, stop)[:, :, None]
        scale = scales.rows(start, stop)
        made = (steps.to(scale.dtype) * scale[:, :, None]).flatten(1)
        if made.dtype != (torch.float32 if in_fp32 else wanted.dtype):
            raise ValueError(f"is {made.dtype}, the checkpoint's is {wanted.dtype}")
        made = made.to(wanted.dtype)
        bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
        count += int((made.view(bits) != wanted.contiguous().view(bits)).sum())
    return count


class _Stored:
    """What a format reads of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._entries = {**checkpoint.tensors, **checkpoint.implied}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(name, np.s_[start:stop])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(name, np.s_[:, start:stop])

    def _copied(self, name: str, where: Any) -> torch.Tensor:
        entry = self._entries[name]
        dtype = _TORCH[entry.dtype]
        integers = np.dtype(f"<i{dtype.itemsize}")
        mapped = np.memmap(self._path / entry.file, integers, "r", entry.offset, entry.shape)
        return torch.from_numpy(np.array(mapped[where])).view(dtype)
