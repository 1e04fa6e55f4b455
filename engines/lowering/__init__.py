"""Graph passes that lower a package's graph for a target. `for_onnxruntime` and `for_tensorrt` list their passes.

A pass changes one thing, is one class with one `call`, and has its own test.
"""

from qwenport.engines.lowering.attention import DecomposeAttention
from qwenport.engines.lowering.attention_forms import Changed, change_attention
from qwenport.engines.lowering.capacity import StaticCapacity
from qwenport.engines.lowering.checks import check_changed, check_graph, check_network
from qwenport.engines.lowering.constants import DropCasts, FoldConstants
from qwenport.engines.lowering.experts import SplitExperts
from qwenport.engines.lowering.few_bits import (
    DequantizeAtLoad,
    UseMatMulNBits,
    repeated_zero_points,
    rounds_activations,
)
from qwenport.engines.lowering.float8 import DequantizeFloat8AtLoad
from qwenport.engines.lowering.float8_products import MultiplyByFloat8
from qwenport.engines.lowering.float32 import ComputeInFloat32
from qwenport.engines.lowering.fused_matmul import FuseTransposedMatMul
from qwenport.engines.lowering.made_tensors import FILE as CODES_FILE
from qwenport.engines.lowering.made_tensors import (
    Correction,
    MadeFile,
    SignedWeight,
    write_tensors,
)
from qwenport.engines.lowering.moved_inputs import MoveRoundedInputs
from qwenport.engines.lowering.read_experts_once import ReadExpertsOnce
from qwenport.engines.lowering.rope_tables import CutRopeTables, FoldRopeTables, folded
from qwenport.engines.lowering.rounded import RoundResults
from qwenport.engines.lowering.signed_codes import UseSignedCodes
from qwenport.engines.lowering.stored import ALIGNMENT, KEPT, StoredWeight, StoreWeights
from qwenport.engines.lowering.targets import (
    for_onnxruntime,
    for_onnxruntime_engine,
    for_onnxruntime_int8,
    for_onnxruntime_moved,
    for_onnxruntime_rounded,
    for_tensorrt,
)
from qwenport.engines.lowering.use_plugins import UsePlugins, plugin_layers

__all__ = [
    "ALIGNMENT",
    "CODES_FILE",
    "KEPT",
    "Changed",
    "ComputeInFloat32",
    "Correction",
    "CutRopeTables",
    "DecomposeAttention",
    "DequantizeAtLoad",
    "DequantizeFloat8AtLoad",
    "DropCasts",
    "FoldConstants",
    "FoldRopeTables",
    "FuseTransposedMatMul",
    "MadeFile",
    "MoveRoundedInputs",
    "MultiplyByFloat8",
    "ReadExpertsOnce",
    "RoundResults",
    "SignedWeight",
    "SplitExperts",
    "StaticCapacity",
    "StoreWeights",
    "StoredWeight",
    "UseMatMulNBits",
    "UsePlugins",
    "UseSignedCodes",
    "change_attention",
    "check_changed",
    "check_graph",
    "check_network",
    "folded",
    "for_onnxruntime",
    "for_onnxruntime_engine",
    "for_onnxruntime_int8",
    "for_onnxruntime_moved",
    "for_onnxruntime_rounded",
    "for_tensorrt",
    "plugin_layers",
    "repeated_zero_points",
    "rounds_activations",
    "write_tensors",
]
