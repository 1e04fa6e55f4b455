"""Load a package in onnxruntime's CPU session: as it is, or with each layer's experts stacked.

    python experts_load.py '{"package": ..., "capacity": 1024, "stacked": false}'

Stacked is our session without the splitting of experts: onnxruntime then joins single experts as it loads the model,
as any runtime must that has only the operator's function body. Prints the seconds of the load alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import onnx_ir as ir
from onnx_ir.passes import Sequential

from qwenport.engines import OnnxRuntimeSession, lowering
from qwenport.exporter import load_package


def stacked(model: ir.Model, *, on_cpu: bool) -> ir.Model:
    """Our session's lowering except for the experts."""
    assert on_cpu
    passes = Sequential(lowering.ComputeInFloat32(), lowering.FuseTransposedMatMul())
    return passes(model).model


def main() -> None:
    """Load and print."""
    request = json.loads(sys.argv[1])
    lower = stacked if request["stacked"] else lowering.for_onnxruntime
    with patch.object(lowering, "for_onnxruntime", lower):
        start = time.perf_counter()
        package = load_package(Path(request["package"]))
        package.check_graph()
        OnnxRuntimeSession(package, capacity=request["capacity"])
        print(json.dumps({"load": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
