"""Every row of rope tables, a package's or an onnxruntime engine's, against transformers' rotary module: all positions,
no model run.

A check cannot fill a cache of 131,072 slots, but it can compare the last row of cos and sin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import COS_TABLE, SIN_TABLE
from qwenport.exporter import Package, as_dual_chunk
from qwenport.validate.report import Check
from qwenport.validate.thresholds import ROPE_ABSOLUTE, ROPE_RELATIVE_TO_ANGLE

if TYPE_CHECKING:
    from qwenport.engines import Engine
    from qwenport.validate.reference import Reference

ROWS_AT_ONCE = 8192
TABLES = (COS_TABLE, SIN_TABLE)

Float32 = NDArray[np.float32]


def read_tables(source: Package | Engine) -> tuple[Float32, Float32]:
    """(cos, sin) as stored for model.onnx, memory-mapped; fp32 [rows, head_dim / 2].

    Raises:
        KeyError: the graph has no such initializer.
    """
    import onnx_ir as ir

    initializers = ir.load(source.model).graph.initializers
    tables = []
    for name in TABLES:
        tensor = initializers[name].const_value
        if tensor is None:
            raise KeyError(name)
        tables.append(_values(tensor, source.path))
    return tables[0], tables[1]


def _values(tensor: Any, folder: Path) -> Float32:
    """The tensor's values. onnx-ir itself refuses to read a hard-linked file."""
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype != ir.DataType.FLOAT:
        inline: Float32 = tensor.numpy()
        return inline
    shape = tensor.shape.numpy()
    file = folder / tensor.location
    return np.memmap(file, dtype="<f4", mode="r", offset=tensor.offset or 0, shape=shape)


def check_tables(
    source: Package | Engine, reference: Reference, rows_at_once: int = ROWS_AT_ONCE
) -> tuple[Check, ...]:
    """Compare the tables' length with the manifest's, and every value with transformers'.

    The error is in units of what rounding explains: ROPE_ABSOLUTE plus ROPE_RELATIVE_TO_ANGLE times the
    angle, since an angle of 100,000 radians in fp32 is itself only accurate to 0.01. It must not exceed 1.
    """
    try:
        cos, sin = read_tables(source)
    except KeyError as error:
        return (Check(f"table {error.args[0]}", 0, "==", 1, "absent from the graph"),)
    manifest = source.manifest
    length, half = manifest["max_seq_len"], manifest["model"]["head_dim"] // 2
    if chunks := manifest["model"].get("dual_chunk"):
        length = as_dual_chunk(chunks).rope_rows
    shapes = [
        Check(f"{what} of {name}", found, "==", wanted)
        for name, table in zip(TABLES, (cos, sin), strict=True)
        for what, found, wanted in (
            ("rows", table.shape[0], length),
            ("columns", table.shape[1], half),
        )
    ]
    if not all(check.passed for check in shapes):
        return tuple(shapes)
    worst = dict.fromkeys(TABLES, (-1.0, 0))
    for start in range(0, length, rows_at_once):
        stop = min(start + rows_at_once, length)
        want_cos, want_sin, angles = reference.rope_tables(start, stop)
        allowed = ROPE_ABSOLUTE + ROPE_RELATIVE_TO_ANGLE * angles
        for name, table, wanted in ((TABLES[0], cos, want_cos), (TABLES[1], sin, want_sin)):
            excess = (np.abs(table[start:stop] - wanted) / allowed).max(axis=1)
            excess[np.isnan(excess)] = np.inf
            row = int(excess.argmax())
            worst[name] = max(worst[name], (float(excess[row]), start + row))
    return (
        *shapes,
        *(
            Check(
                f"error of {name}, in units of rounding",
                error,
                "<=",
                1.0,
                f"worst at position {row}",
            )
            for name, (error, row) in worst.items()
        ),
    )
