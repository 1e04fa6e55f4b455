"""Rope tables in the model's dtype and no longer than the cache.

The package stores them in fp32 for every position, followed by a Cast. An engine needs as many rows as its
cache has slots, and a Cast left to the builder keeps both dtypes in the engine or runs in every step.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import COS_TABLE, FP32, ROTARY_EMBEDDING, SIN_TABLE


def folded(name: str) -> str:
    """The name of the table that `FoldRopeTables` makes from `name`."""
    return f"{name}.folded"


class FoldRopeTables(InPlacePass):
    """Cut every RotaryEmbedding's tables to `rows` rows and cast them (to nearest even) here."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        done: dict[ir.Value, ir.Value] = {}
        for node in model.graph:
            if node.op_type != ROTARY_EMBEDDING:
                continue
            for index in (1, 2):
                table = node.inputs[index]
                assert table is not None
                if table not in done:
                    done[table] = self._fold(table)
                node.replace_input_with(index, done[table])
        for table, constant in done.items():
            model.graph.initializers[constant.name or ""] = constant
            producer = table.producer()
            if producer is not None:
                source = producer.inputs[0]
                model.graph.remove(producer, safe=True)
            else:
                source = table
            if source is not None and not source.uses():
                del model.graph.initializers[source.name or ""]
        return PassResult(model, bool(done))

    def _fold(self, table: ir.Value) -> ir.Value:
        producer = table.producer()
        source = table if producer is None else producer.inputs[0]
        assert source is not None and source.const_value is not None and table.dtype is not None
        rows = source.const_value.numpy()[: self.rows].astype(table.dtype.numpy())
        name = folded(source.name or "")
        tensor = ir.Tensor(rows, dtype=table.dtype, name=name)
        return ir.Value(
            name=name,
            type=ir.TensorType(table.dtype),
            shape=ir.Shape(rows.shape),
            const_value=tensor,
        )


class CutRopeTables(InPlacePass):
    """Keep the first `rows` rows of the stored fp32 tables; nothing is read or written."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        for name in (COS_TABLE, SIN_TABLE):
            value = model.graph.initializers[name]
            table = value.const_value
            assert isinstance(table, ir.ExternalTensor)
            rows, columns = self.rows, table.shape.numpy()[1]
            value.shape = ir.Shape((rows, columns))
            value.const_value = ir.ExternalTensor(
                table.location,
                table.offset,
                rows * columns * FP32.itemsize,
                table.dtype,
                shape=ir.Shape((rows, columns)),
                name=name,
                base_dir=table.base_dir,
            )
        return PassResult(model, True)
