"""The constants of TensorRT's network against the package's initializers, byte for byte.

The interpreter takes bf16 values from the model by name, since TensorRT's Python API does not expose them; whether
TensorRT holds the same bytes is checked here. A constant at the address of the mapped initializer is the initializer.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qwenport.contract import DTYPES
from qwenport.engines.lowering import folded
from qwenport.exporter import CHUNK_BYTES, SCALES, Package
from qwenport.validate.network.parse import CODES, INTEGERS, TORCH, ParsedNetwork, floating_types
from qwenport.validate.network.quantized import differing
from qwenport.validate.report import Check, ScenarioResult
from qwenport.validate.rope_check import TABLES, read_tables

NAME = "constants"
SUMMARY = "Every weight in TensorRT's network, byte for byte, against the package's"
MAX_ELEMENTS = 64  # of a floating-point constant that is not a weight: function scalars, epsilons

Bytes = NDArray[np.uint8]
_Wanted = tuple[torch.dtype, tuple[int, ...], Bytes]


@dataclass(frozen=True)
class _Constant:
    """One constant layer; `data` is None if TensorRT's Python API does not expose it."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    elements: int
    data: Bytes | None


def check_constants(parsed: ParsedNetwork, package: Package, exact: bool) -> ScenarioResult:
    """Compare every floating-point constant of a package's network with the package's initializers.

    Rope tables are compared as lowering folds them: cast to the model's dtype. Constants that are not initializers
    must have at most 64 elements.

    Args:
        parsed: the network of `package`.
        package: the package it was parsed from.
        exact: it was parsed for exact arithmetic: the interpreter replaces the folded tables by the fp32 ones that it
            will compute with, so those are compared; TensorRT's own stay in the model's dtype.
    """
    begun = time.perf_counter()
    weights = dict(_initializers(package, parsed)) | dict(_made(parsed))
    wanted = weights | _tables(package, DTYPES[package.dtype].torch)
    layers = list(_constants(parsed))
    found = dict(layers)
    missing = [name for name in wanted if name not in found]
    different, unread = [], []
    for name, (dtype, shape, data) in wanted.items():
        if name not in found:
            continue
        constant = found[name]
        stated = (constant.dtype, constant.shape, constant.elements)
        if stated != (dtype, shape, math.prod(shape)):
            different.append(f"{name}: {dtype} {list(shape)} became {stated[0]} {list(stated[1])}")
        elif constant.data is None:
            unread.append(name)
        elif not _equal(constant.data, data):
            different.append(name)
    foreign = [n for n, c in layers if n not in wanted and c.elements > MAX_ELEMENTS]
    computed = list(
        _computed_with(parsed, wanted, _tables(package, torch.float32) if exact else {})
    )
    checks = (
        _none("weights that the network lacks", missing),
        _none("constants that differ", different),
        _none(f"other constants of more than {MAX_ELEMENTS} numbers", foreign),
        _none("constants that are evaluated with other values", computed),
        *_quantized(parsed, package),
        Check("weights compared", sum(name in wanted for name, _ in layers), "==", len(wanted)),
    )
    reason = None
    if unread:
        reason = (
            f"TensorRT's Python does not show the values of {len(unread)} constants ({unread[0]} first); "
            "their dtypes, shapes and sizes were compared"
        )
    passed = all(check.passed for check in checks)
    seconds = round(time.perf_counter() - begun, 3)
    return ScenarioResult(
        NAME, SUMMARY, "passed" if passed else "failed", checks, None, reason, seconds
    )


def _none(metric: str, names: list[str]) -> Check:
    return Check(metric, len(names), "==", 0, f"first: {names[0]}" if names else None)


def _quantized(parsed: ParsedNetwork, package: Package) -> Iterator[Check]:
    """Whether the signed weights with their corrections are the package's; nothing if it has none."""
    if parsed.signed:
        made = {name: parsed.constants[name] for name in parsed.made}
        wrong = list(differing(parsed.signed, made, package, parsed.files.bytes_of))
        yield _none("quantized weights with other values", wrong)


def _made(parsed: ParsedNetwork) -> Iterator[tuple[str, _Wanted]]:
    """The same of what lowering made of them."""
    for name, tensor in parsed.made.items():
        dtype = {**TORCH, **CODES, **INTEGERS}[tensor.dtype]
        yield name, (dtype, tuple(tensor.shape.numpy()), parsed.files.bytes_of(tensor))


def _initializers(package: Package, parsed: ParsedNetwork) -> Iterator[tuple[str, _Wanted]]:
    """Name -> (dtype, shape, bytes) of every floating-point initializer of model.onnx except the rope tables.

    Scales of quantized weights are not among them: lowering makes others.
    """
    files = parsed.files
    replaced = {f"{name}.{SCALES}" for made in parsed.signed.values() for name in made.weights}
    for name, value in package.read_model().graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in TORCH or name in TABLES or name in replaced:
            continue
        if isinstance(tensor, ir.ExternalTensor):
            data = files.bytes_of(tensor)
        else:
            data = np.frombuffer(tensor.tobytes(), dtype=np.uint8)
        yield name, (TORCH[tensor.dtype], tuple(tensor.shape.numpy()), data)


def _tables(package: Package, dtype: torch.dtype) -> dict[str, _Wanted]:
    """The rope tables in a dtype, under the names that lowering gives them."""
    return {
        folded(name): (
            dtype,
            tuple(table.shape),
            torch.from_numpy(np.array(table)).to(dtype).view(-1).view(torch.uint8).numpy(),
        )
        for name, table in zip(TABLES, read_tables(package), strict=True)
    }


def _constants(parsed: ParsedNetwork) -> Iterator[tuple[str, _Constant]]:
    """Every floating-point constant of the network by its layer's name, and those that are codes or int32."""
    trt = parsed.trt
    types = {**floating_types(trt), trt.DataType.INT4: CODES[ir.DataType.INT4]}
    types[trt.DataType.FP8] = CODES[ir.DataType.FLOAT8E4M3FN]
    for layer, kind in parsed.layers():
        if kind != "CONSTANT":
            continue
        layer.__class__ = trt.IConstantLayer
        weights = layer.weights
        if not isinstance(weights, np.ndarray):
            dtype, data = types.get(weights.dtype), _bytes_of(trt, weights)
        elif weights.dtype in (np.int8, np.int32) or np.issubdtype(weights.dtype, np.floating):
            flat = weights.reshape(-1)
            dtype, data = torch.from_numpy(flat[:0]).dtype, flat.view(np.uint8)
        else:
            continue  # other integers and booleans
        yield layer.name, _Constant(dtype, tuple(layer.shape), int(weights.size), data)


def _computed_with(
    parsed: ParsedNetwork, wanted: dict[str, _Wanted], tables: dict[str, _Wanted]
) -> Iterator[str]:
    """Names whose values in the interpreter differ from the package's."""
    for name, (dtype, shape, data) in {**wanted, **tables}.items():
        values = parsed.constants.get(name)
        if (
            values is None
            or values.dtype != dtype
            or (tuple(values.shape) != shape and dtype != CODES[ir.DataType.INT4])
            or not _equal(values.contiguous().view(-1).view(torch.uint8).numpy(), data)
        ):
            yield name


def _equal(found: Bytes, wanted: Bytes) -> bool:
    if found.nbytes != wanted.nbytes:
        return False
    if found.ctypes.data == wanted.ctypes.data:
        return True  # the same memory
    return all(
        np.array_equal(found[start : start + CHUNK_BYTES], wanted[start : start + CHUNK_BYTES])
        for start in range(0, found.nbytes, CHUNK_BYTES)
    )


def _bytes_of(trt: Any, weights: Any) -> Bytes | None:
    """The memory of a trt.Weights that NumPy has no type for; None if this build does not let us find it.

    Python sees only its type and size. The object behind it is nvinfer1::Weights: type, address, count. It is read
    through /proc/self/mem, where a wrong address is an error and not a crash, and only if the same method, applied to a
    Weights made here, returns the address that it was made from.
    """
    if not _layout_is_known(trt):
        return None
    seen = _read_weights(weights)
    if seen is None or (seen[0], seen[2]) != (int(weights.dtype), int(weights.size)):
        return None
    half = weights.dtype == trt.DataType.INT4  # of a byte, for which `nbytes` is nonsense
    size = -(-int(weights.size) // 2) if half else int(weights.nbytes)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(seen[1]))


@functools.cache
def _layout_is_known(trt: Any) -> bool:
    memory = np.arange(7, dtype=np.uint16)
    made = trt.Weights(trt.DataType.BF16, memory.ctypes.data, memory.size)
    return _read_weights(made) == (int(trt.DataType.BF16), memory.ctypes.data, memory.size)


def _read_weights(weights: Any) -> tuple[int, int, int] | None:
    """(type, address, count) of the nvinfer1::Weights behind a trt.Weights; pybind11 keeps its address first."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            header = object.__basicsize__
            (address,) = struct.unpack("<Q", os.pread(memory.fileno(), 8, id(weights) + header))
            return struct.unpack("<i4xQq", os.pread(memory.fileno(), 24, address))
    except (OSError, OverflowError, struct.error):
        return None
