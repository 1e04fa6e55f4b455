"""Weights of signed codes in TensorRT's network: their values, and whether they are the package's.

Lowering makes signed codes, scales and corrections of what a package has. Here they are read again, by other code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch

from qwenport.contract import MODEL
from qwenport.engines.lowering import SignedWeight
from qwenport.exporter import CODES, SCALES, ZEROS, Package
from qwenport.validate.quantized_parts import Orders

FLOAT8 = ir.DataType.FLOAT8E4M3FN
ROWS = 256
"""Of a weight, in memory at once."""


def unpacked(data: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Values of 4 bits: uint8 [n] of two each, the low half first, to int8 [2n]; `signed` is two's complement."""
    halves = torch.stack([data & 15, data >> 4], dim=-1).reshape(-1).to(torch.int8)
    return (halves ^ 8) - 8 if signed else halves


def restored(values: torch.Tensor, weight: SignedWeight, dtype: torch.dtype) -> torch.Tensor:
    """What stands for a dequantized weight in exact arithmetic: the package's weight, plus what will be corrected.

    A package's weight is s (q - z), rounded. To round s (q - m) and c instead is the engine's arithmetic.

    Args:
        values: fp32 [N, digits * K], codes times scales, not rounded.
        weight: how it was made.
        dtype: the package's.

    Returns:
        fp32 [N, digits * K]; digits add up to the weight plus the correction of its block.
    """
    correction = weight.correction
    if correction is None:
        return values.to(dtype).float()
    parts = values.unflatten(1, (correction.digits, -1))
    exact = parts.sum(1)
    blocks = torch.from_numpy(correction.values())[: correction.blocks].T
    added = blocks.repeat_interleave(exact.shape[1] // correction.blocks, dim=1)
    parts = parts.clone()
    parts[:, 0] += (exact - added).to(dtype).float() + added - exact
    return parts.flatten(1)


def differing(
    weights: Mapping[str, SignedWeight],
    made: Mapping[str, torch.Tensor],
    package: Package,
    bytes_of: Any,
) -> Iterator[str]:
    """Names of the package's weights that the signed ones with their corrections are not, in exact arithmetic.

    Experts' columns must be in the order that the package has them in.

    Args:
        weights: by the name of their DequantizeLinear.
        made: the network's constants by name; codes of 4 bits as uint8 [n / 2].
        package: the package.
        bytes_of: a tensor of a file -> its bytes.
    """
    initializers = package.read_model().graph.initializers
    orders = Orders(onnx.load(package.path / MODEL, load_external_data=False), package.path)

    def of_package(name: str) -> torch.Tensor:
        tensor = initializers[name].const_value
        assert tensor is not None
        data = torch.from_numpy(bytes_of(tensor))
        shape = tuple(tensor.shape.numpy())
        if tensor.dtype == ir.DataType.UINT4:
            return unpacked(data, signed=False)[: shape[0] * shape[1]].view(shape)
        types = {ir.DataType.UINT8: torch.uint8, ir.DataType.FLOAT: torch.float32}
        types |= {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
        types |= {FLOAT8: torch.float8_e4m3fn}
        return data.view(types[tensor.dtype]).view(shape)

    for node, weight in weights.items():
        scales = made[f"{node}.scales"]
        codes = made[f"{node}.codes"]
        if codes.dtype == torch.uint8:
            codes = unpacked(codes, signed=True)
        codes, scales = codes.view(len(scales), -1), scales.view(len(scales), -1)
        correction = weight.correction
        corrections = None if correction is None else made[correction.name]
        if correction is not None and correction.of_experts:
            corrections = made[correction.name].flatten(1).T
        columns = None if weight.columns is None else made[weight.columns]
        at = 0
        for index, name in enumerate(weight.weights):
            if weight.dtype == FLOAT8:
                theirs8, factors = (of_package(f"{name}.{part}") for part in (CODES, SCALES))
                mine = slice(at, at + len(theirs8))
                at += len(theirs8)
                if not _equal_float8(theirs8, factors, codes[mine], scales[mine]):
                    yield name
                continue
            parts = [of_package(f"{name}.{part}") for part in (CODES, SCALES, ZEROS)]
            rows = len(parts[0])
            mine = slice(at, at + rows)
            theirs = None if corrections is None else corrections[:, mine].T
            at += rows
            if columns is not None:
                order = orders.of(f"{name}.{CODES}", columns.shape[1])
                wanted = torch.arange(columns.shape[1]) if order is None else order
                if not torch.equal(
                    columns[index * len(columns) // len(weight.weights)], wanted.int()
                ):
                    yield name
                    continue
            if not _equal(parts, codes[mine], scales[mine], theirs):
                yield name


def _equal_float8(
    package_codes: torch.Tensor,
    package_scales: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> bool:
    """Whether codes are the package's byte for byte, and scales [N, 1] have the values of its [N] or []."""
    same = torch.equal(package_codes.view(torch.uint8), codes.view(torch.uint8))
    wanted = package_scales.double().reshape(-1, 1).expand(scales.shape)
    return same and torch.equal(scales.double(), wanted)


def _equal(
    parts: list[torch.Tensor],
    codes: torch.Tensor,
    scales: torch.Tensor,
    corrections: torch.Tensor | None,
) -> bool:
    """Whether codes times scales are the package's weight plus a number per block, and the corrections that number."""
    package_codes, package_scales, zeros = parts
    rows, columns = package_codes.shape
    blocks = package_scales.shape[1]
    for start in range(0, rows, ROWS):
        some = slice(start, min(start + ROWS, rows))
        steps = package_codes[some].double().unflatten(1, (blocks, -1)) - zeros[some, :, None]
        wanted = steps * package_scales[some, :, None].double()
        count = scales.shape[1]
        found = codes[some].double().unflatten(1, (count, -1)) * scales[some, :, None].double()
        found = found.flatten(1).unflatten(1, (-1, columns)).sum(1).unflatten(1, (blocks, -1))
        added = found - wanted
        if not bool((added == added[:, :, :1]).all()):
            return False
        stored = torch.zeros(1) if corrections is None else corrections[some, :blocks]
        if not bool((added[:, :, 0].to(stored.dtype) == stored).all()):
            return False
    return corrections is None or not bool(corrections[:, blocks:].any())
