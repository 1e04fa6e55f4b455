"""A target's passes, in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import Sequential

from qwenport.engines.lowering.float32 import ComputeInFloat32


def for_onnxruntime(model: ir.Model, *, on_cpu: bool) -> ir.Model:
    """Lower a package's graph for onnxruntime; on the CPU it computes in fp32. Changes `model`."""
    if on_cpu:
        return Sequential(ComputeInFloat32())(model).model
    return model
