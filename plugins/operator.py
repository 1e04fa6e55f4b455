"""A custom operator's description of itself: one `OPERATOR` per folder. There is no list of operators.

The exporter translates their torch operators into graph nodes, packages carry their function bodies, and an engine
with CUDA plugins is lowered by each operator's own pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir as ir


class Emitter(Protocol):
    """The interface that `Operator.emit` uses to write the nodes for one call."""

    def ops(self, op_type: str, *inputs: Any, domain: str, **attributes: Any) -> Sequence[ir.Value]:
        """Append a node with all of the call's results; `inputs` as in the call, or values."""
        ...

    def rounds(self, weight: Any) -> bool:
        """Whether the input of products by a weight is rounded."""
        ...

    def input_scales(self, down: Any) -> ir.Value | None:
        """The scales of experts' inputs, [E, 3], with their stacked down projections; None if there are none."""
        ...

    def rounded(self, x: Any, weight: Any) -> ir.Value:
        """An input of products by a weight as it is multiplied."""
        ...


@dataclass(frozen=True)
class Plugin:
    """An operator's CUDA plugin.

    Attributes:
        name: the name in TensorRT's registry.
        use: turns an operator's nodes in a graph into nodes of the plugin, if the kernels support all of them, and
            removes the operator's function; returns whether it did.
    """

    name: str
    use: Callable[[ir.Model], bool]


@dataclass(frozen=True)
class Operator:
    """One custom operator.

    Attributes:
        name: the name in a graph, in domain `contract.DOMAIN`.
        torch_name: the torch operator that computes it, torch.ops.qwenport.NAME.
        schema: creates its ONNX schema.
        function_body: creates its body in standard ONNX for a version of ai.onnx.
        emit: (emitter, the torch operator's arguments) -> its results' values in a graph.
        plugin: its CUDA plugin, if there is one.
    """

    name: str
    torch_name: str
    schema: Callable[[], onnx.defs.OpSchema]
    function_body: Callable[[int], ir.Function]
    emit: Callable[..., Sequence[ir.Value]]
    plugin: Plugin | None = None

    @property
    def torch(self) -> Any:
        """The torch operator."""
        import torch  # here, since sessions of engines need none

        return getattr(torch.ops.qwenport, self.torch_name).default


@cache
def operators() -> tuple[Operator, ...]:
    """All operators, found in the folders next to this file."""
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/schema.py"))
    return tuple(import_module(f"{__package__}.{name}").OPERATOR for name in names)
