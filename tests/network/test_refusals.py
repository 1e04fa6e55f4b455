"""Kinds and attributes that are not in the table; what TensorRT's parser refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper

from qwenport.validate import ValidationError
from qwenport.validate.errors import NetworkError
from qwenport.validate.network import Interpreter

from .models import (
    Array,
    evaluate,
    int64,
    one,
    parse,
    proto,
    random_array,
    same,
)
from .refused_nets import ROW, network_of

X = random_array(1, (1, 4, 4, 4))


def test_a_network_error_is_one_of_validate() -> None:
    assert issubclass(NetworkError, ValidationError)


# --- kinds and attributes that are not in the table


@pytest.mark.parametrize(
    ("operator", "operands", "constant", "attributes", "kind"),
    [
        ("Resize", {"x": X, "": None, "s": np.float32([1, 1, 2, 2])}, ["s"], {}, "RESIZE"),
        ("Conv", {"x": X, "w": X}, ["w"], {}, "CONVOLUTION"),
        ("MaxPool", {"x": X}, [], {"kernel_shape": [2, 2]}, "POOLING"),
        ("LayerNormalization", {"x": X, "s": ROW}, [], {}, "NORMALIZATION"),
        ("InstanceNormalization", {"x": X, "s": ROW, "b": ROW}, [], {}, "NORMALIZATION"),
        ("Einsum", {"x": X}, [], {"equation": "abcd->abdc"}, "EINSUM"),
        ("PRelu", {"x": X, "s": X}, [], {}, "PARAMETRIC_RELU"),
        ("ReverseSequence", {"x": X[0, 0], "l": int64(1, 2, 3, 4)}, [], {}, "REVERSE_SEQUENCE"),
        ("GridSample", {"x": X, "g": X[..., :2]}, [], {}, "GRID_SAMPLE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kind_of_layer_that_is_not_in_the_table(
    operator: str,
    operands: dict[str, Array | None],
    constant: list[str],
    attributes: dict[str, Any],
    kind: str,
) -> None:
    """Nothing of such a network is evaluated, not even what the layer has no part in."""
    parsed = parse(one(operator, operands, constant=constant, **attributes))
    with pytest.raises(NetworkError, match=f"layer node.* is of kind {kind}, which is not known"):
        Interpreter(parsed)


def test_loops_and_branches_are_refused() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["before", "x"], ["after"]),
            helper.make_node("Identity", ["on"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [4]),
        ],
    )
    loop = helper.make_node("Loop", ["n", "c", "x"], ["y"], body=body, name="node")
    inputs = {"x": ROW, "n": np.array(3), "c": np.array(True)}
    with pytest.raises(NetworkError, match="which is not known here"):
        Interpreter(parse(proto([loop], inputs, ["y"])))

    def branch(operator: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
        return helper.make_graph([helper.make_node(operator, ["x"], ["z"])], operator, [], [result])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("Exp"), else_branch=branch("Neg"), name="node"
    )
    inputs = {"c": np.array(True), "x": ROW}
    with pytest.raises(NetworkError, match="which is not known here"):
        Interpreter(parse(proto([node], inputs, ["y"])))


FEW = int64(1, 0)


@pytest.mark.parametrize(
    ("operator", "operands", "constant", "attributes", "what"),
    [
        ("Tan", {"x": ROW}, [], {}, "the operation TAN"),
        ("Sinh", {"x": ROW}, [], {}, "the operation SINH"),
        ("LeakyRelu", {"x": ROW}, [], {}, "the activation LEAKY_RELU"),
        ("Elu", {"x": ROW}, [], {}, "the activation ELU"),
        ("Softplus", {"x": ROW}, [], {}, "the activation SOFTPLUS"),
        ("HardSigmoid", {"x": ROW}, [], {}, "the activation HARD_SIGMOID"),
        (
            "Clip",
            {"x": ROW, "low": np.float32(0), "high": np.float32(1)},
            ["low", "high"],
            {},
            "the activation CLIP",
        ),
        ("ReduceProd", {"x": ROW}, [], {}, "the reduction PROD"),
        ("MatMul", {"x": ROW, "z": ROW}, [], {}, "a product with a vector"),
        ("Tile", {"x": ROW, "n": int64(2)}, ["n"], {}, "slicing in mode WRAP"),
        ("Pad", {"x": ROW, "n": FEW}, ["n"], {"mode": "reflect"}, "slicing in mode REFLECT"),
        ("Pad", {"x": ROW, "n": FEW}, ["n"], {"mode": "edge"}, "slicing in mode CLAMP"),
        ("GatherND", {"x": X, "i": FEW[:, None] * 0}, [], {}, "gathering in mode ND"),
        ("ScatterND", {"x": ROW, "i": FEW[:, None], "u": ROW[:2]}, [], {}, "scattering in mode ND"),
        ("RandomNormalLike", {"x": ROW}, [], {}, "filling with RANDOM_NORMAL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_operation_or_a_mode_that_is_not_in_the_table(
    operator: str,
    operands: dict[str, Array],
    constant: list[str],
    attributes: dict[str, Any],
    what: str,
) -> None:
    parsed = parse(one(operator, operands, constant=constant, **attributes))
    interpreter = Interpreter(parsed)
    with pytest.raises(NetworkError, match=f"layer node: {what} is not something"):
        interpreter.program(interpreter.inputs, ["y"])


@pytest.mark.parametrize("to", [TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
def test_a_type_that_is_not_known(to: int) -> None:
    interpreter = Interpreter(parse(one("Cast", {"x": ROW}, to=to)))
    with pytest.raises(NetworkError, match=r"tensor y has type .*, not known here"):
        interpreter.program(["x"], ["y"])


def refused(parsed: Any, tensor: Any, what: str) -> None:
    interpreter = Interpreter(parsed)
    with pytest.raises(NetworkError, match=what):
        interpreter.program(interpreter.inputs, [tensor.name])


def test_parameters_that_onnx_has_no_words_for_are_refused_too() -> None:
    x, i = random_array(1, (2, 3, 4)), np.zeros((2, 2), np.int64)
    parsed, (tensor, indices) = network_of(x=x, i=i)
    trt = parsed.trt
    gather = parsed.network.add_gather(tensor, indices, 1)
    gather.num_elementwise_dims = 1
    refused(parsed, gather.get_output(0), "gathering in mode DEFAULT")
    parsed, (heads,) = network_of(x=random_array(1, (1, 2, 3, 4)))
    attention = parsed.network.add_attention(
        heads, heads, heads, trt.AttentionNormalizationOp.NONE, False
    )
    refused(parsed, attention.get_output(0), "attention normalised by NONE")
    parsed, (heads, lengths) = network_of(
        x=random_array(1, (1, 2, 3, 4)), n=np.array([3], np.int32)
    )
    softmax_op = trt.AttentionNormalizationOp.SOFTMAX
    upper_left = trt.CausalMaskKind.UPPER_LEFT
    attention = parsed.network.add_attention_v2(heads, heads, heads, softmax_op, upper_left)
    attention.key_value_lengths = lengths
    refused(parsed, attention.get_output(0), "attention with lengths")


def test_quantizing_with_a_zero_point_or_several_scales_is_refused() -> None:
    parsed, (x, scale, zero) = network_of(
        x=random_array(1, (2, 4)), s=np.float32(1), z=np.float32(0)
    )
    network, types = parsed.network, parsed.trt.DataType
    layer = network.add_quantize(x, scale, types.FP8)
    layer.set_input(2, zero)
    refused(parsed, layer.get_output(0), "quantizing with a zero point or to another type")
    parsed, (x, scale) = network_of(x=random_array(1, (2, 4)), s=np.ones(2, np.float32))
    layer = parsed.network.add_quantize(x, scale, types.FP8)
    layer.axis = 0
    refused(parsed, layer.get_output(0), "quantizing with more than one scale")


def test_a_squeeze_without_axes_is_right_or_refused() -> None:
    inputs = {"x": random_array(1, (1, 3, 1))}
    model = one("Squeeze", inputs)
    try:
        (got,) = evaluate(parse(model), inputs, ["y"])
    except NetworkError:
        return
    same(got, inputs["x"].reshape(3))


# --- what TensorRT's parser refuses


def test_an_operator_without_body_or_plugin_is_refused_in_the_parsers_words() -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], domain="test", name="strange")
    model = proto([node], {"x": ROW}, ["y"])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(NetworkError, match=r"TensorRT's parser refuses .*[Pp]lugin.*strange") as e:
        parse(model)
    assert "\n" not in str(e.value)


def test_an_operator_with_a_body_is_its_body() -> None:
    body = helper.make_function(
        "test",
        "Known",
        ["a"],
        ["c"],
        [helper.make_node("Exp", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])],
        [helper.make_opsetid("", 24)],
    )
    node = helper.make_node("Known", ["x"], ["y"], domain="test", name="node")
    model = proto([node], {"x": ROW}, ["y"], functions=[body])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    (got,) = evaluate(parse(model), {"x": ROW}, ["y"])
    same(got, -np.exp(ROW), rtol=1e-6)


def test_a_model_that_is_wrong_is_refused() -> None:
    inputs = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((4, 5), np.float32)}
    model = one("Add", inputs)
    with pytest.raises(NetworkError, match="TensorRT's parser refuses"):
        parse(model)
