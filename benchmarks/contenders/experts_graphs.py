"""One layer's experts as ONNX graphs, with their fp32 weights in separate files: our operator, and two alternatives.

Inputs are x [tokens, hidden] and the router's choice, indices and weights [tokens, k]; the output y has x's shape.
Nothing here imports torch: a graph's process holds only what the graph needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

OPSET, IR_VERSION = 24, 11  # those of our packages
MICROSOFT = "com.microsoft"
GATE_UP, INTERLEAVED, DOWN = "gate_up", "gate_up_interleaved", "down"  # NAME.bin in the folder
FUNCTION = "function.pb"  # the operator's body, next to them


@dataclass(frozen=True)
class Sizes:
    """A layer's number of experts, the number of experts per token, and each expert's sizes."""

    experts: int
    k: int
    hidden: int
    inner: int

    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """Name -> shape of the weight files."""
        gate_up = (self.experts, 2 * self.inner, self.hidden)
        return {
            GATE_UP: gate_up,
            INTERLEAVED: gate_up,
            DOWN: (self.experts, self.hidden, self.inner),
        }


def operator(sizes: Sizes, folder: Path) -> ModelProto:
    """qwenport.MoEExperts with its model-local function, as in a package."""
    inputs = ["x", "indices", "weights", GATE_UP, DOWN]
    node = helper.make_node("MoEExperts", inputs, ["y"], domain="qwenport", name="experts")
    model = _model(sizes, [node], (GATE_UP, DOWN))
    model.functions.add().ParseFromString((folder / FUNCTION).read_bytes())
    return model


def every_expert(sizes: Sizes) -> ModelProto:
    """All experts for all tokens as batched matmuls, then weighted: most weights are 0."""
    op = helper.make_node
    nodes = [
        op("Unsqueeze", ["x", "first"], ["shared"]),
        op("FusedMatMul", ["shared", GATE_UP], ["both"], domain=MICROSOFT, transB=1),
        op("Split", ["both"], ["gate", "up"], axis=2, num_outputs=2),
        op("Sigmoid", ["gate"], ["sigmoid"]),
        op("Mul", ["gate", "sigmoid"], ["silu"]),
        op("Mul", ["silu", "up"], ["active"]),
        op(
            "FusedMatMul", ["active", DOWN], ["parts"], domain=MICROSOFT, transB=1
        ),  # [E, tokens, H]
        op("OneHot", ["indices", "count", "off_on"], ["chosen"], axis=-1),
        op("Unsqueeze", ["weights", "last"], ["factors"]),
        op("Mul", ["chosen", "factors"], ["placed"]),
        op("ReduceSum", ["placed", "second"], ["by_token"], keepdims=0),  # [tokens, E]
        op("Transpose", ["by_token"], ["by_expert"], perm=[1, 0]),
        op("Unsqueeze", ["by_expert", "last"], ["columns"]),
        op("Mul", ["parts", "columns"], ["weighted"]),
        op("ReduceSum", ["weighted", "first"], ["y"], keepdims=0),
    ]
    constants = [
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        helper.make_tensor("second", TensorProto.INT64, [1], [1]),
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("count", TensorProto.INT64, [], [sizes.experts]),
        helper.make_tensor("off_on", TensorProto.FLOAT, [2], [0.0, 1.0]),
    ]
    return _model(sizes, nodes, (GATE_UP, DOWN), constants)


def fused_operator(sizes: Sizes) -> ModelProto:
    """com.microsoft.MoE: it takes the router's logits and chooses the experts itself."""
    node = helper.make_node(
        "MoE",
        ["x", "logits", INTERLEAVED, "", DOWN],
        ["y"],
        domain=MICROSOFT,
        k=sizes.k,
        activation_type="swiglu",
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_fusion=1,  # rows of the first weight: gate, up, gate, up
        swiglu_limit=1e30,  # the operator's own clips
        normalize_routing_weights=0,
    )
    return _model(sizes, [node], (INTERLEAVED, DOWN))


def _model(
    sizes: Sizes,
    nodes: list[NodeProto],
    stacks: Sequence[str],
    constants: Sequence[TensorProto] = (),
) -> ModelProto:
    known = {
        "x": _input("x", TensorProto.FLOAT, sizes.hidden),
        "indices": _input("indices", TensorProto.INT64, sizes.k),
        "weights": _input("weights", TensorProto.FLOAT, sizes.k),
        "logits": _input("logits", TensorProto.FLOAT, sizes.experts),
    }
    read = {name for node in nodes for name in node.input}
    shapes = sizes.stacks()
    graph = helper.make_graph(
        nodes,
        "experts",
        [value for name, value in known.items() if name in read],
        [_input("y", TensorProto.FLOAT, sizes.hidden)],
        [*constants, *(_stored(name, shapes[name]) for name in stacks)],
    )
    versions = {"": OPSET, MICROSOFT: 1, "qwenport": 1}
    domains = {"", *(node.domain for node in nodes)}
    imports = [helper.make_opsetid(name, versions[name]) for name in sorted(domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def _input(name: str, kind: int, width: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["tokens", width])


def _stored(name: str, shape: tuple[int, ...]) -> TensorProto:
    """A stack of weights stored as one file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": f"{name}.bin", "offset": 0, "length": 4 * math.prod(shape)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
