"""The custom operators as TensorRT plugins, where the kernels support them; see plugins/<op>/lowering.py."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.plugins.as_plugin import is_plugin
from qwenport.plugins.operator import operators


class UsePlugins(InPlacePass):
    """Every operator that has a plugin -> nodes of that plugin."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        used = [operator.plugin.use(model) for operator in operators() if operator.plugin]
        return PassResult(model, any(used))


def plugin_names() -> tuple[str, ...]:
    """The names of the plugins in a library."""
    return tuple(operator.plugin.name for operator in operators() if operator.plugin)


def plugin_layers(model: ir.Model) -> dict[str, int]:
    """The number of uses of each plugin in a lowered graph."""
    used = Counter(node.op_type for node in model.graph if is_plugin(node))
    return {name: used[name] for name in plugin_names() if used[name]}
