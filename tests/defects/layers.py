"""Whole layers, residuals and activations."""

from __future__ import annotations

import onnx_ir as ir

from defects.tools import given, insert, node, replace_uses


def skipped_layer(model: ir.Model) -> None:
    before = node(model, "model.layers.2.residual_2").outputs[0]
    after = node(model, "model.layers.3.residual_2").outputs[0]
    replace_uses(after, before, by=lambda user: True)


def swapped_layers(model: ir.Model) -> None:
    """Layers 1 and 2 have each other's weights: names put in another order than the layers'."""
    names = [n for n in model.graph.initializers if n.startswith("model.layers.1.")]
    assert names
    for name in names:
        other = name.replace("layers.1.", "layers.2.", 1)
        pair = [model.graph.initializers[n] for n in (name, other)]
        uses = [[*value.uses()] for value in pair]
        for users, value in zip(uses, reversed(pair), strict=True):
            for use in users:
                use.node.replace_input_with(use.idx, value)


def second_residual_from_the_layers_input(model: ir.Model) -> None:
    """One layer's MLP is added to what the layer was given, and its attention is lost on the way."""
    first, second = (node(model, f"model.layers.2.{name}") for name in ("residual_1", "residual_2"))
    assert second.inputs[0] is first.outputs[0]
    second.replace_input_with(0, first.inputs[0])


def residual_after_the_norm(model: ir.Model) -> None:
    """One layer's attention is added to the norm's result instead of the norm's input."""
    norm = node(model, "model.layers.3.input_layernorm.RMSNormalization")
    add = node(model, "model.layers.3.residual_1")
    assert add.inputs[0] is norm.inputs[0]
    add.replace_input_with(0, norm.outputs[0])


def gelu_for_silu(model: ir.Model) -> None:
    """The other activation, in every layer."""
    activations = [n for n in model.graph if n.name and n.name.endswith(".mlp.Sigmoid")]
    assert activations
    for sigmoid in activations:
        assert sigmoid.name is not None
        product = node(model, sigmoid.name.replace("Sigmoid", "Mul"))
        gelu = insert(
            model,
            product,
            "Gelu",
            [sigmoid.inputs[0]],
            f"{product.name}.defect",
            approximate="none",
        )
        replace_uses(product.outputs[0], gelu, by=lambda user: True)


def sigmoid_for_silu(model: ir.Model) -> None:
    """One layer's sigmoid(x) without the x before it."""
    product = node(model, "model.layers.2.mlp.Mul")
    replace_uses(product.outputs[0], given(product.inputs[1]), by=lambda user: True)
