"""A target's passes, in order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import PassBase, PassError, Sequential

from qwenport.contract import Dtype
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.attention import DecomposeAttention
from qwenport.engines.lowering.capacity import StaticCapacity
from qwenport.engines.lowering.constants import DropCasts, FoldConstants
from qwenport.engines.lowering.experts import SplitExperts
from qwenport.engines.lowering.few_bits import DequantizeAtLoad, UseMatMulNBits
from qwenport.engines.lowering.float8 import DequantizeFloat8AtLoad
from qwenport.engines.lowering.float8_products import MultiplyByFloat8
from qwenport.engines.lowering.float32 import ComputeInFloat32
from qwenport.engines.lowering.fused_matmul import FuseTransposedMatMul
from qwenport.engines.lowering.made_tensors import MadeFile
from qwenport.engines.lowering.moved_inputs import MoveRoundedInputs
from qwenport.engines.lowering.read_experts_once import ReadExpertsOnce
from qwenport.engines.lowering.rope_tables import CutRopeTables, FoldRopeTables
from qwenport.engines.lowering.rounded import RoundResults
from qwenport.engines.lowering.signed_codes import UseSignedCodes
from qwenport.engines.lowering.stored import StoredWeight, StoreWeights
from qwenport.engines.lowering.use_plugins import UsePlugins


def for_onnxruntime(model: ir.Model, *, on_cpu: bool) -> ir.Model:
    """Lower a package's graph for onnxruntime; on the CPU it computes in fp32. Changes `model`.

    Quantized weights are what DequantizeLinear makes of them, to the last bit, and activations stay in fp32.
    """
    if on_cpu:
        passes = (
            SplitExperts(),
            UseMatMulNBits(exact=True),
            ComputeInFloat32(),
            DequantizeAtLoad(),
            DequantizeFloat8AtLoad(model),
            FuseTransposedMatMul(),
        )
        return _lowered(model, passes)
    return model


def for_onnxruntime_rounded(model: ir.Model, dtype: Dtype) -> ir.Model:
    """Lower a package's graph for onnxruntime's CPU, with each result rounded to bf16 or fp16. Changes `model`."""
    rounded = RoundResults(model, dtype)
    passes = (
        SplitExperts(),
        UseMatMulNBits(exact=True),
        ComputeInFloat32(),
        DequantizeAtLoad(),
        DequantizeFloat8AtLoad(model),
        rounded,
    )
    return _lowered(model, passes)


def for_onnxruntime_moved(model: ir.Model, share: float) -> ir.Model:
    """Lower a package's graph for onnxruntime's CPU, with inputs moved before they are rounded to FP8. Changes `model`.

    Args:
        model: the package's graph.
        share: see `MoveRoundedInputs`.
    """
    passes = (
        SplitExperts(),
        UseMatMulNBits(exact=True),
        ComputeInFloat32(),
        DequantizeAtLoad(),
        DequantizeFloat8AtLoad(model),
        MoveRoundedInputs(share),
        FuseTransposedMatMul(),
    )
    return _lowered(model, passes)


def for_onnxruntime_int8(model: ir.Model) -> ir.Model:
    """Lower a package's graph for onnxruntime's CPU as for an engine: products by quantized weights round to int8.

    Changes `model`.
    """
    passes = (
        SplitExperts(),
        UseMatMulNBits(exact=False),
        ComputeInFloat32(),
        FuseTransposedMatMul(),
    )
    return _lowered(model, passes)


def for_onnxruntime_engine(
    model: ir.Model, *, rope_rows: int, file: str | None
) -> tuple[ir.Model, tuple[StoredWeight, ...]]:
    """Lower a package's graph to one that onnxruntime's CPU provider runs as it is, in fp32. Changes `model`.

    Products by weights of integers round activations to int8; weights in FP8 are dequantized when it is loaded.

    Args:
        model: the package's graph.
        rope_rows: rows that the rope tables keep.
        file: name of the weight file, which the graph refers to and the caller writes; None leaves the weights where
            the package, which must be in fp32, has them.

    Returns:
        The graph, and what the file must hold.
    """
    from onnx_ir.passes.common import InlinePass, RemoveUnusedOpsetsPass

    stored = None if file is None else StoreWeights(file)
    float8 = DequantizeFloat8AtLoad(model)
    passes = (
        SplitExperts(),
        InlinePass(),
        CutRopeTables(rope_rows),
        UseMatMulNBits(exact=False),
        *(() if stored is None else (stored,)),
        ComputeInFloat32(),
        float8,
        FuseTransposedMatMul(),
        FoldConstants(),
        DropCasts(),
        RemoveUnusedOpsetsPass(),
    )
    lowered = _lowered(model, passes)
    return lowered, () if stored is None else stored.weights


def for_tensorrt(
    model: ir.Model,
    *,
    dtype: str,
    capacity: int,
    rope_rows: int,
    kv_heads: int,
    plugins: bool = False,
) -> tuple[ir.Model, MadeFile]:
    """Lower a package's graph for TensorRT or TensorRT-RTX. Changes `model`.

    Args:
        model: the package's graph.
        dtype: the package's; fused attention exists for "bf16" and "fp16".
        capacity: cache slots of the engine.
        rope_rows: rows of its rope tables.
        kv_heads: the model's num_key_value_heads.
        plugins: whether the custom operators become plugins.

    Returns:
        The graph, and what became of quantized weights.
    """
    made = MadeFile()
    passes: list[PassBase] = [
        StaticCapacity(capacity),
        FoldRopeTables(rope_rows),
        UseSignedCodes(made),
        MultiplyByFloat8(made),
    ]
    if dtype == "fp32":
        passes.append(DecomposeAttention(kv_heads))
    if plugins:
        passes.append(UsePlugins())
    passes.append(ReadExpertsOnce())
    return _lowered(model, passes), made


def _lowered(model: ir.Model, passes: Sequence[PassBase]) -> ir.Model:
    """Run passes; their LoweringError is raised as it is, which onnx_ir would wrap."""
    try:
        return Sequential(*passes)(model).model
    except PassError as error:
        if isinstance(error.__cause__, LoweringError):
            raise error.__cause__ from None
        raise
