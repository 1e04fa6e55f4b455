"""Compares every quantized weight of a package or an engine with the checkpoint's, by a second implementation.

What model.onnx points at is dequantized by the definition of its operators, the checkpoint's tensors by the oracle's
code; every bit must agree, with the columns in the order in which the graph gives the activations. Memory holds a few
rows of one weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qwenport.contract import BY_SAFETENSORS, FP8, Progress
from qwenport.exporter import (
    CODES,
    INPUT_SCALE,
    PERMUTATION,
    SCALES,
    WHOLE,
    ZEROS,
    Checkpoint,
    TensorEntry,
    part_name,
    quantized_weights,
)
from qwenport.validate.errors import ValidationError
from qwenport.validate.quantized_parts import Cut, Middle, Orders, Part, StoredPart
from qwenport.validate.reference.dequantization import Quantization, read_quantization

WEIGHT = ".weight"
ROWS = 1024
_TORCH = {
    "I32": torch.int32,
    "I64": torch.int64,
    FP8: torch.float8_e4m3fn,
    **{name: dtype.torch for name, dtype in BY_SAFETENSORS.items()},
}

Rows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> rows start..stop-1 of a weight."""


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

    return _compare(checkpoint, parts_of, model, package, progress, in_fp32=False)


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
        product = products.get(names.get(CODES, ""))
        if product is not None:
            return _parts_of_product(product, initializers, engine)
        if ZEROS in names:
            return {}
        return {
            part: StoredPart(initializers[name], engine)
            for part, name in names.items()
            if name in initializers
        }

    return _compare(checkpoint, parts_of, model, engine, progress, in_fp32=True)


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
    model: onnx.ModelProto,
    folder: Path,
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
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    orders, stored = Orders(model, folder), StoredTensors.of(checkpoint)
    for done, (weight, (storage, shape)) in enumerate(weights.items(), 1):
        names = {
            part: part_name(weight, part) for part in storage.part_names if part != INPUT_SCALE
        }
        scale = f"{weight.removesuffix(WEIGHT)}.{INPUT_SCALE}"
        held = quantization.tensors(weight, shape, checkpoint.tensors)
        used = tuple(name for name in held if name in checkpoint.tensors and name != scale)
        if INPUT_SCALE in storage.part_names:
            for name in _equal_scales(initializers, folder, stored, weight, scale):
                found.tensors[name] = (*found.tensors.get(name, ()), scale)
        first = next(iter(names.values()))
        try:
            parts = parts_of(names)
            if parts.keys() != names.keys():
                continue  # its tensors count as unused
            own = (*names.values(), part_name(weight, PERMUTATION))
            found.tensors.update(dict.fromkeys(own, used))
            order = orders.of(names[CODES], shape[1]) if CODES in names else None
            count = _differing(parts, order, quantization, stored, weight, shape, in_fp32)
            if count:
                found.wrong[first] = f"{count} of {shape[0] * shape[1]} values differ"
        except (ValueError, ValidationError) as error:
            found.wrong[first] = str(error)
        progress("comparing quantized weights", done, len(weights))
    return found


def _equal_scales(
    initializers: Mapping[str, onnx.TensorProto],
    folder: Path,
    stored: StoredTensors,
    weight: str,
    scale: str,
) -> list[str]:
    """Tensors of the graph that have the value of an input scale: its own, or another linear's of its module."""
    module = weight.removesuffix(WEIGHT).rpartition(".")[0]
    wanted = stored.rows(scale, 0, 1).reshape(1)
    found = []
    for name, tensor in initializers.items():
        linear = name.removesuffix(f"{WEIGHT}.{INPUT_SCALE}")
        if linear == name or linear.rpartition(".")[0] != module:
            continue
        with contextlib.suppress(ValueError):  # no such tensor: the checkpoint's counts as unused
            made = StoredPart(tensor, folder).values()
            if torch.equal(made.double(), wanted.double()):
                found.append(name)
    return found


def _rows_of(parts: Mapping[str, Part], shape: tuple[int, int]) -> Rows:
    """A function (start, stop) -> those rows of the weight that the parts make.

    Raises:
        ValueError: they do not make a weight of that shape.
    """
    if WHOLE in parts:
        whole = parts[WHOLE]
        if not isinstance(whole, StoredPart) or whole.shape != shape or whole.dtype is None:
            raise ValueError(f"is no weight of shape {list(shape)}")
        return whole.rows
    return _of_integers(parts, shape) if ZEROS in parts else _of_float8(parts, shape)


def _of_integers(parts: Mapping[str, Part], shape: tuple[int, int]) -> Rows:
    codes, scales, zeros = parts[CODES], parts[SCALES], parts[ZEROS]
    blocks = scales.shape[1] if len(scales.shape) == 2 else 0
    if (
        codes.shape != shape
        or scales.shape[0] != shape[0]
        or zeros.shape != scales.shape
        or zeros.bits != codes.bits
        or blocks == 0
        or shape[1] % blocks
    ):
        raise ValueError(f"its parts make no weight of shape {list(shape)}")

    def made(start: int, stop: int) -> torch.Tensor:
        steps = codes.rows(start, stop).view(stop - start, blocks, -1)
        steps = steps - zeros.rows(start, stop)[:, :, None]
        scale = scales.rows(start, stop)
        return (steps.to(scale.dtype) * scale[:, :, None]).flatten(1)

    return made


def _of_float8(parts: Mapping[str, Part], shape: tuple[int, int]) -> Rows:
    codes, scales = parts[CODES], parts[SCALES]
    if not isinstance(codes, StoredPart) or not isinstance(scales, StoredPart):
        raise ValueError("its parts are not stored")
    if codes.shape != shape or codes.dtype != torch.float8_e4m3fn or scales.dtype is None:
        raise ValueError(f"its parts make no weight of shape {list(shape)}")
    if scales.shape not in ((), (shape[0],)):
        raise ValueError(f"its scales have shape {list(scales.shape)}")
    values = scales.values().expand(shape[0])[:, None]
    return lambda start, stop: codes.rows(start, stop).to(values.dtype) * values[start:stop]


def _differing(
    parts: Mapping[str, Part],
    order: torch.Tensor | None,
    quantization: Quantization,
    stored: StoredTensors,
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
    rows, count = _rows_of(parts, shape), 0
    for start in range(0, shape[0], ROWS):
        stop = min(start + ROWS, shape[0])
        wanted = quantization.rows(weight, shape, start, stop, stored)
        wanted = wanted if order is None else wanted[:, order]
        made = rows(start, stop)
        if made.dtype != (torch.float32 if in_fp32 else wanted.dtype):
            raise ValueError(f"is {made.dtype}, the checkpoint's is {wanted.dtype}")
        made = made.to(wanted.dtype)
        bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
        count += int((made.view(bits) != wanted.contiguous().view(bits)).sum())
    return count


class StoredTensors:
    """What the oracle's formats read of a checkpoint."""

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        """Look at tensors of the directory `path`."""
        self._path, self._entries = path, entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredTensors:
        """All that a checkpoint has."""
        return cls(checkpoint.path, {**checkpoint.tensors, **checkpoint.implied})

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(name, np.s_[start:stop])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(name, np.s_[:, start:stop])

    def _copied(self, name: str, where: Any) -> torch.Tensor:
        entry = self._entries[name]
        dtype = _TORCH[entry.dtype]
        integers = np.dtype(f"<i{dtype.itemsize}")
        shape = entry.shape or (1,)
        mapped = np.memmap(self._path / entry.file, integers, "r", entry.offset, shape)
        return torch.from_numpy(np.array(mapped[where])).view(dtype)
