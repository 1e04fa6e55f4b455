"""Graph passes that lower a package's graph for a target. `for_onnxruntime` and `for_tensorrt` list their passes.

A pass changes one thing, is one class with one `call`, and has its own test.
"""

from qwenport.engines.lowering.attention import DecomposeAttention
from qwenport.engines.lowering.capacity import StaticCapacity
from qwenport.engines.lowering.checks import check_graph, check_network
from qwenport.engines.lowering.experts import SplitExperts
from qwenport.engines.lowering.float32 import ComputeInFloat32
from qwenport.engines.lowering.fused_matmul import FuseTransposedMatMul
from qwenport.engines.lowering.rope_tables import FoldRopeTables, folded
from qwenport.engines.lowering.targets import for_onnxruntime, for_tensorrt
from qwenport.engines.lowering.use_plugins import UsePlugins, plugin_layers

__all__ = [
    "ComputeInFloat32",
    "DecomposeAttention",
    "FoldRopeTables",
    "FuseTransposedMatMul",
    "SplitExperts",
    "StaticCapacity",
    "UsePlugins",
    "check_graph",
    "check_network",
    "folded",
    "for_onnxruntime",
    "for_tensorrt",
    "plugin_layers",
]
