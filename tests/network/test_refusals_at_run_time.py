"""What only shows when a network runs, what the parser drops, and programs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch.overrides import TorchFunctionMode

from qwenport.validate.errors import NetworkError
from qwenport.validate.network import Interpreter

from .models import (
    BF16,
    FP32,
    Array,
    evaluate,
    int64,
    one,
    parse,
    proto,
    random_array,
    run_onnxruntime,
    same,
    seeds,
    to_torch,
)
from .refused_nets import ROW, network_of

# --- what only shows when it runs


def failing(model: onnx.ModelProto, inputs: dict[str, Array]) -> str:
    with pytest.raises(NetworkError) as caught:
        evaluate(parse(model), inputs, [output.name for output in model.graph.output])
    return str(caught.value)


@pytest.mark.parametrize("bad", [4, 100, -1, -5])
@pytest.mark.parametrize("operator", ["Gather", "GatherElements"])
def test_an_index_outside_of_the_axis(operator: str, bad: int) -> None:
    """Negative ones are among them: TensorRT does not say that it counts from the end."""
    inputs = {"x": ROW, "i": int64(0, bad, 1)}
    assert "layer node" in failing(one(operator, inputs, axis=0), inputs)


@pytest.mark.parametrize("bad", [4, -1])
def test_an_update_outside_of_the_axis(bad: int) -> None:
    inputs = {"x": ROW, "i": int64(0, bad), "u": ROW[:2]}
    assert "layer node" in failing(one("ScatterElements", inputs, axis=0), inputs)


@pytest.mark.parametrize("bad", [9, -1])
def test_a_position_outside_of_the_tables(bad: int) -> None:
    inputs = {
        "x": random_array(1, (1, 2, 3, 4)),
        "cos": random_array(2, (9, 2)),
        "sin": random_array(3, (9, 2)),
        "p": int64(0, bad, 1)[None],
    }
    assert "layer node" in failing(one("RotaryEmbedding", inputs), inputs)


def test_a_slice_outside_of_the_axis() -> None:
    parsed, (x, start, size) = network_of(x=ROW, s=np.array([0]), n=np.array([1]))
    layer = parsed.network.add_slice(x, (0,), (1,), (1,))
    layer.name = "cut"
    layer.set_input(1, start)
    layer.set_input(2, size)
    name = layer.get_output(0).name
    program = Interpreter(parsed).program(["x", "s", "n"], [name])

    def cut(first: int, count: int) -> Any:
        given_ = {"x": ROW, "s": int64(first), "n": int64(count)}
        return program.run({key: to_torch(value) for key, value in given_.items()})[name]

    assert cut(1, 3).tolist() == [1, 2, 3]
    assert cut(9, 0).tolist() == []  # nothing is outside
    for first, count in ((1, 4), (-1, 1), (4, 1), (0, 5)):
        with pytest.raises(NetworkError, match=r"layer cut: .* of an axis of 4 are outside it"):
            cut(first, count)
    with pytest.raises(NetworkError, match="layer cut"):
        cut(2, -1)


@pytest.mark.parametrize("k", [5, -1])
def test_more_of_the_largest_than_there_are(k: int) -> None:
    inputs = {"x": ROW, "k": int64(k)}
    model = one("TopK", inputs, outputs=["y", "i"])
    assert "layer node" in failing(model, inputs)


def test_an_integer_divided_by_zero() -> None:
    inputs = {"a": int64(1), "b": int64(0)}
    assert "layer node" in failing(one("Div", inputs), inputs)


def test_a_result_of_another_shape_than_tensorrt_states() -> None:
    inputs = {"a": random_array(1, (2, 3))}
    parsed = parse(one("Neg", inputs))
    program = Interpreter(parsed).program(["a"], ["y"])
    message = r"layer node: its output is \[2, 4\], and TensorRT states \[2, 3\]"
    with pytest.raises(NetworkError, match=message):
        program.run({"a": torch.zeros(2, 4)})


def test_a_tensor_that_nobody_makes() -> None:
    interpreter = Interpreter(parse(one("Neg", {"x": ROW})))
    assert interpreter.inputs == ("x",)
    assert interpreter.has("y") and not interpreter.has("z")
    with pytest.raises(NetworkError, match="tensor z is made by no layer and was not given"):
        interpreter.program(["x"], ["z"])
    with pytest.raises(NetworkError, match="tensor x is made by no layer and was not given"):
        interpreter.program([], ["y"])


def test_what_is_not_asked_for_may_be_unknown() -> None:
    """Only the layers on the way are read: an operation outside of the table elsewhere is no obstacle."""
    nodes = [
        helper.make_node("Neg", ["x"], ["y"]),
        helper.make_node("Tan", ["x"], ["z"], name="other"),
    ]
    parsed = parse(proto(nodes, {"x": ROW}, ["y", "z"]))
    (got,) = evaluate(parsed, {"x": ROW}, ["y"])
    same(got, -ROW)
    with pytest.raises(NetworkError, match="layer other"):
        Interpreter(parsed).program(["x"], ["z"])


# --- what TensorRT's parser drops or aligns in its own way


def attention_operands(queries: int, keys: int) -> dict[str, Array]:
    count = {"q": queries, "k": keys, "v": keys}
    return {
        name: random_array(seed, (2, 3, count[name], 8), spread=1)
        for seed, name in enumerate("qkv")
    }


def reference_evaluator(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    result: Array = onnx.reference.ReferenceEvaluator(model).run(None, inputs)[0]
    return result


def test_the_parser_drops_nonpad_kv_seqlen_and_the_interpreter_shows_it() -> None:
    """The network has an input that no layer reads, and attends to keys that are padding."""
    operands: dict[str, Array | None] = {**attention_operands(3, 5)}
    operands |= {"m": None, "pk": None, "pv": None, "lengths": int64(2, 5)}
    inputs = {name: value for name, value in operands.items() if value is not None}
    model = one("Attention", operands, scale=0.5)
    parsed = parse(model)
    read = {
        layer.get_input(index).name
        for layer, _ in parsed.layers()
        for index in range(layer.num_inputs)
        if layer.get_input(index) is not None
    }
    assert {*inputs} - read == {"lengths"}
    assert "lengths" in Interpreter(parsed).inputs
    (got,) = evaluate(parsed, inputs, ["y"])
    # what TensorRT has is the same attention without the operand
    without = {name: inputs[name] for name in "qkv"}
    same(got, run_onnxruntime(one("Attention", without, scale=0.5), without)[0], atol=1e-5)
    meant = run_onnxruntime(model, inputs)[0]
    np.testing.assert_allclose(meant, reference_evaluator(model, inputs), atol=1e-5)
    np.testing.assert_allclose(got[1], meant[1], atol=1e-5)  # its keys are all real
    assert np.abs(got[0] - meant[0]).max() > 0.1


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (3, 5), (4, 4)])
def test_causal_attention_over_a_longer_text_is_aligned_upper_left(queries: int, keys: int) -> None:
    """As ONNX has it without a past; over a cache it would hide what was just said."""
    inputs = attention_operands(queries, keys)
    (got,) = evaluate(parse(one("Attention", inputs, is_causal=1, scale=0.5)), inputs, ["y"])

    def masked(seen: Array) -> Array:
        scores = np.where(seen, 0.5 * inputs["q"] @ inputs["k"].swapaxes(-1, -2), -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        result: Array = powers / powers.sum(-1, keepdims=True) @ inputs["v"]
        return result

    rows, columns = np.arange(queries)[:, None], np.arange(keys)
    np.testing.assert_allclose(got, masked(columns <= rows), atol=1e-5)
    lower_right = masked(columns <= rows + keys - queries)
    assert (np.abs(got - lower_right).max() > 0.1) == (queries != keys)


# --- programs


def test_a_program_is_run_again_as_if_it_were_new() -> None:
    """Weights are prepared once; nothing of the first run is in the second."""
    w = random_array(9, (4, 4))
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["x", "wt"], ["a"]),
        helper.make_node("Shape", ["a"], ["s"]),
        helper.make_node("Reshape", ["a", "s"], ["b"]),
        helper.make_node("Softmax", ["b"], ["y"], axis=-1),
    ]
    drawn = [random_array(seed, (rows, 4)) for seed, rows in enumerate((3, 1, 5))]
    parsed = parse(proto(nodes, {"x": drawn[0]}, ["y"], constants={"w": w}, stated=[("x", 1)]))
    interpreter = Interpreter(parsed)
    kept = interpreter.program(["x"], ["y", "wt"])
    for release in (False, True):
        for x in (*drawn, *drawn):
            fresh = interpreter.program(["x"], ["y", "wt"]).run({"x": to_torch(x)})
            again = kept.run({"x": to_torch(x)})
            for name, value in fresh.items():
                assert torch.equal(value, again[name])
            if release:
                kept.release()


def test_two_interpreters_of_one_network() -> None:
    """One exact, one as declared: neither changes what the other sees."""
    x = random_array(1, (3, 4)).astype(BF16)
    inputs = {"x": x, "axes": int64(1)}
    parsed = parse(one("ReduceSum", inputs, constant=["axes"]))
    for _ in range(2):
        (declared,) = evaluate(parsed, {"x": x}, ["y"])
        (exact,) = evaluate(parsed, {"x": x.astype(np.float32)}, ["y"], exact=True)
        assert (declared.dtype, exact.dtype) == (BF16, FP32)
        same(exact.astype(BF16), declared)


def test_what_is_known_is_never_computed_again() -> None:
    """Of a layer with two outputs one is given, and is not what the layer would have made."""
    x, k = random_array(1, (2, 6)), int64(3)
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["values", "indices"]),
        helper.make_node("Neg", ["values"], ["y"]),
    ]
    parsed = parse(proto(nodes, {"x": x}, ["y", "indices"], constants={"k": k}))
    known = {"x": x, "values": np.zeros((2, 3), np.float32)}
    for wanted in (["y", "indices"], ["indices", "y"], ["indices", "values", "y"]):
        got = dict(zip(wanted, evaluate(parsed, known, wanted), strict=True))
        same(got["y"], np.zeros((2, 3), np.float32))
        same(got["indices"], np.argsort(-x, axis=1)[:, :3])
        same(got.get("values", known["values"]), known["values"])


def test_what_follows_from_something_given_is_not_a_constant() -> None:
    """A constant's place is taken by a given tensor, another one each time."""
    w, k = random_array(1, (2, 6)), int64(3)
    nodes = [
        helper.make_node("TopK", ["w", "k"], ["values", "indices"]),
        helper.make_node("Neg", ["values"], ["y"]),
    ]
    parsed = parse(proto(nodes, {}, ["y", "indices"], constants={"k": k, "w": w}))
    for wanted in (["y", "indices"], ["indices", "y"]):
        program = Interpreter(parsed).program(["values"], wanted)
        for number in (1.0, 2.0):
            got = program.run({"values": torch.full((2, 3), number)})
            assert (got["y"] == -number).all()


def test_a_cache_is_read_as_it_was_where_the_model_reads_it_before_the_update() -> None:
    past, update = random_array(1, (1, 2, 4, 3)), random_array(2, (1, 2, 1, 3))
    inputs = {"past": past, "update": update, "first": int64(1)}
    nodes = [
        helper.make_node("Transpose", ["past"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("TensorScatter", ["past", "update", "first"], ["present"], axis=2),
        helper.make_node("Neg", ["turned"], ["y"]),
        helper.make_node("Neg", ["past"], ["z"]),
    ]
    model = proto(nodes, inputs, ["y", "z", "present"])
    for wanted in (["y", "z", "present"], ["present", "z", "y"], ["present", "y", "z"]):
        try:
            got = dict(zip(wanted, evaluate(parse(model), inputs, wanted), strict=True))
        except NetworkError:
            continue  # to refuse such a model is right, too
        same(got["present"][:, :, 1:2], update)
        same(got["y"], -past.swapaxes(2, 3))
        same(got["z"], -past)


OPERATIONS = {
    "Add": np.add,
    "Mul": np.multiply,
    "Max": np.maximum,
    "Neg": np.negative,
    "Floor": np.floor,
}


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[str, str, list[str]]]:
    """(name, operator, operands) in an order in which they can be computed."""
    names, nodes = ["x0", "x1", "w"], []
    for index in range(draw(st.integers(1, 12))):
        operator = draw(st.sampled_from(sorted(OPERATIONS)))
        operands = [draw(st.sampled_from(names)) for _ in range(OPERATIONS[operator].nin)]
        nodes.append((f"t{index}", operator, operands))
        names.append(f"t{index}")
    return nodes


def computed(nodes: Any, values: dict[str, Array]) -> dict[str, Array]:
    """Every tensor from what is given; what is given stays."""
    values = dict(values)
    for name, operator, operands in nodes:
        if name not in values and all(operand in values for operand in operands):
            values[name] = OPERATIONS[operator](*(values[operand] for operand in operands))
    return values


@given(graphs(), st.data(), seeds)
@settings(max_examples=60)
def test_any_tensors_from_any_others(nodes: Any, data: st.DataObject, seed: int) -> None:
    """Wanted and given are anywhere. What is freed on the way is not needed, and what is constant is kept rightly."""
    inputs = {name: random_array(seed + i, (2, 3)) for i, name in enumerate(["x0", "x1"])}
    w = random_array(seed + 2, (2, 3))
    names = [name for name, _, _ in nodes]
    parsed = parse(
        proto(
            [helper.make_node(operator, o, [name], name=name) for name, operator, o in nodes],
            inputs,
            names,
            constants={"w": w},
        )
    )
    cut = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    wanted = data.draw(st.lists(st.sampled_from([*names, "x0"]), min_size=1, unique=True))
    program = Interpreter(parsed).program([*inputs, *cut], wanted)
    for run in range(3):
        known = {name: random_array(seed + 10 * run + i, (2, 3)) for i, name in enumerate(cut)}
        known |= {name: value + run for name, value in inputs.items()}
        given_ = {name: to_torch(value) for name, value in known.items()}
        got = program.run(given_)
        assert set(got) == set(wanted) and set(given_) == set(known)
        expected = computed(nodes, {**known, "w": w})
        for name in wanted:
            same(got[name].numpy(), expected[name])
        for name, value in known.items():
            same(given_[name].numpy(), value)
        if run == 1:
            program.release()


class Counting(TorchFunctionMode):
    """How many of the results of torch's functions live, counted after each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.neg:
            self.made.append(weakref.ref(result))
            self.alive.append(sum(made() is not None for made in self.made))
        return result


def test_a_program_frees_what_it_no_longer_needs() -> None:
    """In a long chain an operand and its result live, and one tensor that is wanted."""
    names = ["x", *(f"t{index}" for index in range(30))]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
    wanted = ["t3", names[-1]]
    program = Interpreter(parse(proto(nodes, {"x": ROW}, wanted))).program(["x"], wanted)
    with Counting() as counting:
        program.run({"x": to_torch(ROW)})
    assert len(counting.alive) == 30
    assert max(counting.alive) == 3
