"""Right in exact arithmetic, and rounded where the model's authors do not round: all in the package's own bf16.

`ROUNDED` says for each of them between which values of the graph the operator lies that is computed more coarsely.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from defects.facts import Facts, given_producer
from defects.sites import attention, following, hidden, layers, real, rope, take_place
from defects.tables import PLAIN
from defects.tools import constant, given, node, nodes
from qwenport.exporter.rope.default import Default
from qwenport.plugins import moe_router

Between = tuple[
    tuple[str, ...], str
]  # the values that an operator is given, and what it makes of them

# ---- products summed in pieces


def query_projection_in_8_pieces(model: ir.Model) -> None:
    """One layer's. A piece of the inner dimension at a time, and the sum of the pieces in bf16."""
    _in_pieces(model, node(model, "model.layers.1.self_attn.q_proj.MatMul"), 8)


def down_projection_in_16_pieces(model: ir.Model) -> None:
    _in_pieces(model, node(model, "model.layers.2.mlp.down_proj.MatMul"), 16)


def head_in_16_pieces(model: ir.Model) -> None:
    _in_pieces(model, node(model, "model.lm_head.MatMul"), 16)


def every_product_of_a_layer_in_4_pieces(model: ir.Model) -> None:
    products = [n for n in nodes(model, "MatMul") if (n.name or "").startswith("model.layers.3.")]
    assert len(products) == 7
    for product in products:
        _in_pieces(model, product, 4)


def router_product_in_8_pieces(model: ir.Model) -> None:
    """In every sparse layer."""
    for router in nodes(model, moe_router.NAME):
        _in_pieces(model, given_producer(router.inputs[0]), 8)


def _in_pieces(model: ir.Model, product: ir.Node, pieces: int) -> None:
    x, weight = (given(value) for value in product.inputs)
    facts = _facts(model, product)
    stored = given_producer(weight).inputs[0]  # [out, in]
    shape = given(stored).shape
    assert shape is not None
    size = int(shape.numpy()[1])
    assert size % pieces == 0
    total = None
    for start in range(0, size, size // pieces):
        bounds = [_numbers(model, start), _numbers(model, start + size // pieces)]
        part = facts.op("Slice", x, *bounds, _numbers(model, -1))
        rows = facts.op("Slice", weight, *bounds, _numbers(model, 0))
        made = facts.op("MatMul", part, rows)
        total = made if total is None else facts.op("Add", total, made)
    take_place(facts, product.outputs[0], given(total))


# ---- attention written out


def softmax_in_bf16(model: ir.Model) -> None:
    """One layer's scores, their exponentials and the sum of those are bf16."""
    _write_out(model, attention(model, 1), _softmax)


def softmax_in_bf16_in_every_layer(model: ir.Model) -> None:
    for target in nodes(model, "Attention"):
        _write_out(model, target, _softmax)


def weights_divided_after_the_values(model: ir.Model) -> None:
    """One layer mixes values by exponentials in bf16 and divides by their sum in bf16 at the end."""

    def mix(facts: Facts, scores: ir.Value, values: ir.Value) -> ir.Value:
        powers, total = _powers(facts, scores)
        return facts.op("Div", facts.op("MatMul", powers, values), total)

    _write_out(model, attention(model, 2), mix)


def scores_rounded_before_they_are_scaled(model: ir.Model) -> None:
    """One layer's products of queries and keys are bf16, then scaled in bf16; the softmax is fp32 inside."""

    def mix(facts: Facts, scores: ir.Value, values: ir.Value) -> ir.Value:
        return facts.op("MatMul", facts.op("Softmax", scores, axis=-1), values)

    _write_out(model, attention(model, 2), mix)


def _softmax(facts: Facts, scores: ir.Value, values: ir.Value) -> ir.Value:
    powers, total = _powers(facts, scores)
    return facts.op("MatMul", facts.op("Div", powers, total), values)


def _powers(facts: Facts, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
    """exp(scores - the greatest) and its sum over keys."""
    last = _numbers(facts.model, -1)
    greatest = facts.op("ReduceMax", scores, last, keepdims=1)
    powers = facts.op("Exp", facts.op("Sub", scores, greatest))
    return powers, facts.op("ReduceSum", powers, last, keepdims=1)


def _write_out(
    model: ir.Model, target: ir.Node, mix: Callable[[Facts, ir.Value, ir.Value], ir.Value]
) -> None:
    """Scores as products of grouped heads, scaled and masked; `mix` makes the rest of scores and values."""
    q, k, v, mask = (given(value) for value in target.inputs)
    facts = _facts(model, target)
    heads, groups = (_size(value, 1) for value in (q, k))
    two = _numbers(model, 2)
    split = _numbers(model, 0, groups, heads // groups, -1, _size(q, 3))
    grouped = facts.op("Reshape", q, split)
    columns = facts.op("Transpose", facts.op("Unsqueeze", k, two), perm=[0, 1, 2, 4, 3])
    scale = _exact(facts, target.attributes["scale"].as_float(), q)
    scores = facts.op("Mul", facts.op("MatMul", grouped, columns), scale)
    assert q.dtype is not None
    lowest = real(model, -(2.0**120), q.dtype)
    seen = facts.op("Unsqueeze", mask, two)
    scores = facts.op("Where", seen, scores, lowest, dtype=q.dtype)
    mixed = mix(facts, scores, facts.op("Unsqueeze", v, two))
    whole = facts.op("Reshape", mixed, _numbers(model, 0, heads, -1, _size(q, 3)))
    take_place(facts, target.outputs[0], whole)
    model.graph.remove(target, safe=True)


# ---- norms


def norm_in_bf16(model: ir.Model) -> None:
    """One norm: squares, their sum, 16 at a time, the mean, the root, its reciprocal and both products are rounded."""
    _norm(model, node(model, "model.layers.2.post_attention_layernorm.RMSNormalization"))


def every_norm_in_bf16(model: ir.Model) -> None:
    for norm in nodes(model, "RMSNormalization"):
        _norm(model, norm)


def _norm(model: ir.Model, norm: ir.Node) -> None:
    x, weight = (given(value) for value in norm.inputs)
    facts = _facts(model, norm)
    size, last = _size(weight, 0), _numbers(model, -1)
    squares, total = facts.op("Mul", x, x), None
    for start in range(0, size, 16):
        bounds = [_numbers(model, n) for n in (start, start + 16)]
        part = facts.op("ReduceSum", facts.op("Slice", squares, *bounds, last), last, keepdims=1)
        total = part if total is None else facts.op("Add", total, part)
    mean = facts.op("Div", given(total), _exact(facts, size, x))
    epsilon = _exact(facts, norm.attributes["epsilon"].as_float(), x)
    root = facts.op("Sqrt", facts.op("Add", mean, epsilon))
    normal = facts.op("Mul", x, facts.op("Reciprocal", root))
    take_place(facts, norm.outputs[0], facts.op("Mul", normal, weight))


# ---- rotary embeddings


def rotation_by_three_products(model: ir.Model) -> None:
    """A complex product with one multiplication fewer: its sums and products are bf16, and some cancel."""
    _rotate(model, lambda facts, table, positions: facts.op("Gather", table, positions, axis=0))


def rope_angles_in_bf16(model: ir.Model) -> None:
    """Position times frequency is bf16 before its cosine and sine are taken, in every layer."""
    settings = Default(original_max_position_embeddings=512, **PLAIN)
    frequencies = settings.inverse_frequencies(512).numpy()
    cos = rope(model, 0, "queries").inputs[1]

    def look_up(facts: Facts, table: ir.Value, positions: ir.Value) -> ir.Value:
        exact = constant(model, "defect.frequencies", frequencies, np.float32)
        assert table.dtype is not None
        narrow = [
            facts.op("Cast", x, dtype=table.dtype, to=int(table.dtype)) for x in (positions, exact)
        ]
        column = facts.op("Unsqueeze", narrow[0], _numbers(model, -1))
        angles = facts.op("Mul", column, narrow[1])
        return facts.op("Cos" if table is cos else "Sin", angles)

    _rotate(model, look_up)


def _rotate(model: ir.Model, look_up: Callable[[Facts, ir.Value, ir.Value], ir.Value]) -> None:
    pairs = [(layer, which) for layer in layers(model) for which in ("queries", "keys")]
    for rotary in [rope(model, *pair) for pair in pairs]:
        x, cos_table, sin_table, positions = (given(value) for value in rotary.inputs)
        facts = _facts(model, rotary)
        one, half, last = (_numbers(model, n) for n in (1, _size(x, 3) // 2, -1))
        cos, sin = (
            facts.op("Unsqueeze", look_up(facts, table, positions), one)
            for table in (cos_table, sin_table)
        )
        a = facts.op("Slice", x, _numbers(model, 0), half, last)
        b = facts.op("Slice", x, half, _numbers(model, _size(x, 3)), last)
        both = facts.op("Mul", cos, facts.op("Add", a, b))
        first = facts.op("Sub", both, facts.op("Mul", b, facts.op("Add", cos, sin)))
        second = facts.op("Add", both, facts.op("Mul", a, facts.op("Sub", sin, cos)))
        take_place(facts, rotary.outputs[0], facts.op("Concat", first, second, axis=-1))
        model.graph.remove(rotary, safe=True)


# ---- coarser values


def residual_stream_scaled_and_back(model: ir.Model) -> None:
    """What one layer is given is multiplied by 3, 5, 7 and 11, and divided by them again."""
    stream = hidden(model, 3)
    facts = Facts(model, following(model, stream))
    assert stream.dtype is not None
    scaled = stream
    for kind in ("Mul", "Div"):
        for number in (3.0, 5.0, 7.0, 11.0):
            scaled = facts.op(kind, scaled, real(model, number, stream.dtype))
    take_place(facts, stream, scaled)


def hidden_states_of_6_bits(model: ir.Model) -> None:
    """x + 4x - 4x costs x two bits of its eight, before one layer."""
    _six_bits(model, hidden(model, 2))


def cached_keys_of_6_bits(model: ir.Model) -> None:
    """One layer's keys lose two bits before they are written."""
    _six_bits(model, rope(model, 3, "keys").outputs[0])


def _six_bits(model: ir.Model, value: ir.Value) -> None:
    facts = Facts(model, following(model, value))
    assert value.dtype is not None
    more = facts.op("Mul", value, real(model, 4.0, value.dtype))
    take_place(facts, value, facts.op("Sub", facts.op("Add", value, more), more))


# ---- functions


def silu_by_exp(model: ir.Model) -> None:
    """x - x / (1 + exp(x)) in bf16, in every layer: below zero the difference of two numbers that are nearly one."""
    for sigmoid in [n for n in nodes(model, "Sigmoid") if (n.name or "").endswith(".mlp.Sigmoid")]:
        x = given(sigmoid.inputs[0])
        (product,) = [use.node for use in sigmoid.outputs[0].uses()]
        facts = _facts(model, product)
        assert x.dtype is not None
        rest = facts.op("Add", facts.op("Exp", x), real(model, 1.0, x.dtype))
        quotient = facts.op("Div", x, rest)
        take_place(facts, product.outputs[0], facts.op("Sub", x, quotient))


def router_softmax_in_bf16(model: ir.Model) -> None:
    """Probabilities are bf16 before the largest are chosen, in every sparse layer."""
    for router in nodes(model, moe_router.NAME):
        logits = given(router.inputs[0])
        weights, chosen = router.outputs
        facts = _facts(model, router)
        likely = facts.op("Softmax", logits, axis=-1)
        count = _numbers(model, router.attributes["k"].as_int())
        largest = ir.node(
            "TopK", [likely, count], attributes={"axis": -1}, num_outputs=2, name=f"{router.name}.k"
        )
        model.graph.insert_before(facts.before, largest)
        for value, like in zip(largest.outputs, (logits, chosen), strict=True):
            value.type = like.type
            value.name = f"{largest.name}.{value.index()}"
        assert weights.dtype is not None
        wide = facts.op("Cast", largest.outputs[0], dtype=weights.dtype, to=int(weights.dtype))
        facts.made.add(largest)
        take_place(facts, weights, wide)
        take_place(facts, chosen, largest.outputs[1])
        model.graph.remove(router, safe=True)


# ---- helpers, and where to look


def _facts(model: ir.Model, target: ir.Node) -> Facts:
    """Nodes are written behind this one."""
    return Facts(model, following(model, target.outputs[0]))


def _numbers(model: ir.Model, *values: int) -> ir.Value:
    return constant(model, "defect.numbers_" + "_".join(map(str, values)), [*values])


def _exact(facts: Facts, value: float, like: ir.Value) -> ir.Value:
    """A number in a value's dtype, not as an initializer of it: exact arithmetic would be given that rounded."""
    assert like.dtype is not None
    stored = constant(facts.model, f"defect.exact_{value}", value, np.float32)
    return facts.op("Cast", stored, dtype=like.dtype, to=int(like.dtype))


def _size(value: ir.Value, axis: int) -> int:
    shape = value.shape
    assert shape is not None
    return int(shape[axis])  # type: ignore[call-overload]


def _names(*values: ir.Value | None) -> tuple[str, ...]:
    names = tuple(given(value).name or "" for value in values)
    assert all(names)
    return names


def _of(target: ir.Node, *inputs: int) -> Between:
    return _names(*(target.inputs[i] for i in inputs)), _names(target.outputs[0])[0]


def _product(name: str) -> Callable[[ir.Model], Between]:
    return lambda model: _of(node(model, f"model.{name}.MatMul"), 0)


def _attention(layer: int) -> Callable[[ir.Model], Between]:
    return lambda model: _of(attention(model, layer), 0, 1, 2, 3)


def _norm_of(name: str) -> Callable[[ir.Model], Between]:
    return lambda model: _of(node(model, f"model.{name}.RMSNormalization"), 0)


def _router(model: ir.Model) -> Between:
    router = nodes(model, moe_router.NAME)[0]
    return _names(router.inputs[0]), _names(router.outputs[0])[0]


def _router_product(model: ir.Model) -> Between:
    return _of(given_producer(nodes(model, moe_router.NAME)[0].inputs[0]), 0)


def _silu(model: ir.Model) -> Between:
    sigmoid = node(model, "model.layers.1.mlp.Sigmoid")
    (product,) = [use.node for use in sigmoid.outputs[0].uses()]
    return _of(sigmoid, 0)[0], _names(product.outputs[0])[0]


def _sum_before(layer: int) -> Callable[[ir.Model], Between]:
    return lambda model: _of(given_producer(hidden(model, layer)), 0, 1)


def _rope(layer: int, which: str) -> Callable[[ir.Model], Between]:
    return lambda model: _of(rope(model, layer, which), 0, 3)


ROUNDED: dict[Callable[[ir.Model], None], Callable[[ir.Model], Between]] = {
    query_projection_in_8_pieces: _product("layers.1.self_attn.q_proj"),
    down_projection_in_16_pieces: _product("layers.2.mlp.down_proj"),
    head_in_16_pieces: _product("lm_head"),
    every_product_of_a_layer_in_4_pieces: _product("layers.3.mlp.up_proj"),
    router_product_in_8_pieces: _router_product,
    softmax_in_bf16: _attention(1),
    softmax_in_bf16_in_every_layer: _attention(4),
    weights_divided_after_the_values: _attention(2),
    scores_rounded_before_they_are_scaled: _attention(2),
    norm_in_bf16: _norm_of("layers.2.post_attention_layernorm"),
    every_norm_in_bf16: _norm_of("norm"),
    rotation_by_three_products: _rope(1, "queries"),
    rope_angles_in_bf16: _rope(2, "keys"),
    residual_stream_scaled_and_back: _sum_before(3),
    hidden_states_of_6_bits: _sum_before(2),
    cached_keys_of_6_bits: _rope(3, "keys"),
    silu_by_exp: _silu,
    router_softmax_in_bf16: _router,
}
