"""The weight matmuls of one decode step and nothing else, on onnxruntime's CPU provider: the limit of its kernels.

python products.py '{"matrices": [[896, 896], ...], "warmup": 4, "tokens": 48}'

Every matrix [out, in] is multiplied once per step by a vector, with the operator that our session uses for it.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def main() -> None:
    """Time and print."""
    request = json.loads(sys.argv[1])
    matrices = request["matrices"]
    rng = np.random.default_rng(0)
    feeds = {
        f"x{size}": rng.standard_normal((1, size), dtype=np.float32)
        for size in sorted({columns for _, columns in matrices})
    }
    weights = {
        f"w{i}": rng.standard_normal(shape, dtype=np.float32) for i, shape in enumerate(matrices)
    }
    nodes = [
        helper.make_node(
            "FusedMatMul",
            [f"x{columns}", f"w{i}"],
            [f"y{i}"],
            domain="com.microsoft",
            transB=1,
        )
        for i, (_, columns) in enumerate(matrices)
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in feeds.items()],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, rows])
            for i, (rows, _) in enumerate(matrices)
        ],
    )
    options = onnxruntime.SessionOptions()
    for name, array in weights.items():
        tensor = graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="given below")
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    times = []
    for step in range(request["warmup"] + request["tokens"]):
        start = time.perf_counter()
        session.run(None, feeds)
        if step >= request["warmup"]:
            times.append(time.perf_counter() - start)
    print(json.dumps({"decode": times}))


if __name__ == "__main__":
    main()
