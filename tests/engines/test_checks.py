"""What the parser would drop or misread is an error that names the node."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from qwenport.engines import LoweringError
from qwenport.engines.lowering import check_graph, check_network, for_tensorrt


def info(name, *shape, kind=TensorProto.FLOAT16):
    return helper.make_tensor_value_info(name, kind, list(shape))


def attention_graph(inputs: list[str], outputs: list[str], **attributes) -> onnx.ModelProto:
    """One Attention over 2 heads of 32, 64 keys, with the given inputs connected."""
    known = {
        "q": info("q", 1, 2, 1, 32),
        "k": info("k", 1, 2, 64, 32),
        "v": info("v", 1, 2, 64, 32),
        "mask": info("mask", 1, 1, 1, 64, kind=TensorProto.BOOL),
        "past_k": info("past_k", 1, 2, 8, 32),
        "past_v": info("past_v", 1, 2, 8, 32),
        "nonpad": info("nonpad", 1, kind=TensorProto.INT64),
    }
    shapes = {"y": info("y", 1, 2, 1, 32)}
    node = helper.make_node("Attention", inputs, outputs, name="layer.7.attention", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [known[name] for name in inputs if name],
        [shapes.get(name, info(name, 1, 2, 64, 32)) for name in outputs if name],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes", "complaint"),
    [
        (["q", "k", "v"], ["y"], {}, "without an explicit mask"),
        (["q", "k", "v", ""], ["y"], {}, "without an explicit mask"),
        (["q", "k", "v", "mask"], ["y"], {"is_causal": 1}, "is_causal"),
        (["q", "k", "v", "mask", "", "", "nonpad"], ["y"], {}, "drops"),
        (["q", "k", "v", "mask", "past_k", "past_v"], ["y"], {}, "drops"),
        (["q", "k", "v", "mask"], ["y", "present_k", "present_v"], {}, "one output"),
    ],
)
def test_attention_that_the_parser_misreads_is_refused_by_name(
    inputs, outputs, attributes, complaint
):
    model = ir.from_proto(attention_graph(inputs, outputs, **attributes))
    with pytest.raises(LoweringError, match=complaint) as caught:
        check_graph(model)
    assert "layer.7.attention" in str(caught.value)


def test_attention_with_its_mask_alone_is_accepted():
    check_graph(ir.from_proto(attention_graph(["q", "k", "v", "mask"], ["y"], is_causal=0)))


def test_an_operator_nobody_defines_is_refused_by_name():
    node = helper.make_node("Mystery", ["q"], ["y"], name="odd", domain="elsewhere")
    graph = helper.make_graph([node], "g", [info("q", 1)], [info("y", 1)])
    with pytest.raises(LoweringError, match=r"odd: elsewhere\.Mystery"):
        check_graph(ir.from_proto(helper.make_model(graph)))


class Parsed:
    """A network made by TensorRT's own parser."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.builder = trt.Builder(self.logger)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(flags)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.accepted = self.parser.parse(model.SerializeToString())


def test_the_parser_accepts_and_drops_nonpad_kv_seqlen_and_we_do_not():
    """The trap itself: the network parses, and nothing in it depends on the lengths."""
    parsed = Parsed(attention_graph(["q", "k", "v", "mask", "", "", "nonpad"], ["y"]))
    assert parsed.accepted
    with pytest.raises(LoweringError, match="nonpad is read by no layer"):
        check_network(parsed.network, trt)


def test_a_causal_attention_is_refused_after_parsing_too():
    parsed = Parsed(attention_graph(["q", "k", "v"], ["y"], is_causal=1))
    assert parsed.accepted
    with pytest.raises(LoweringError, match="explicit mask"):
        check_network(parsed.network, trt)


def cache_graph(in_place: bool) -> onnx.ModelProto:
    """present.0.key as TensorScatter of its past, or of a copy of it."""
    past = "past_key_values.0.key"
    nodes = [helper.make_node("TensorScatter", [past, "k", "at"], ["present.0.key"], axis=2)]
    if not in_place:
        nodes = [
            helper.make_node(
                "TensorScatter", ["past_key_values.1.key", "k", "at"], ["other"], axis=2
            ),
            helper.make_node("Add", ["other", past], ["present.0.key"]),
        ]
    shape = (1, 2, 64, 32)
    inputs = [info(past, *shape), info("k", 1, 2, 1, 32), info("at", 1, kind=TensorProto.INT64)]
    inputs += [] if in_place else [info("past_key_values.1.key", *shape)]
    graph = helper.make_graph(nodes, "g", inputs, [info("present.0.key", *shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_a_cache_that_is_not_updated_in_place_is_refused():
    check_network(Parsed(cache_graph(in_place=True)).network, trt)
    parsed = Parsed(cache_graph(in_place=False))
    assert parsed.accepted
    with pytest.raises(LoweringError, match=r"present\.0\.key is not an in-place update"):
        check_network(parsed.network, trt)


def with_weights(model: ir.Model, package_path) -> bytes:
    """The model with its external tensors inside, for a parser that is given bytes."""
    proto = ir.to_proto(model)
    for tensor, value in zip(
        proto.graph.initializer, model.graph.initializers.values(), strict=True
    ):
        const = value.const_value
        if isinstance(const, ir.ExternalTensor):
            loaded = ir.ExternalTensor(
                const.location,
                const.offset,
                const.length,
                const.dtype,
                shape=const.shape,
                name=const.name,
                base_dir=package_path,
            )
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = loaded.tobytes()
    return proto


def test_a_real_package_passes_every_check(package_of: Callable):
    package = package_of("fp16")
    model, _ = for_tensorrt(
        ir.load(package.model),
        dtype="fp16",
        capacity=128,
        rope_rows=128,
        kv_heads=package.config.num_key_value_heads,
    )
    check_graph(model)
    parsed = Parsed(with_weights(model, package.path))
    assert parsed.accepted
    check_network(parsed.network, trt)
