"""Each translated operator: traced in a mini module, run by onnxruntime, held against torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import nn
from torch.nn import functional

from qwenport.exporter import TracingError, emission, tracing
from qwenport.exporter.decoder import Experts, tensor_scatter
from qwenport.exporter.dual_chunk_attention import dual_chunk_attention
from qwenport.exporter.families import MoEConfig
from qwenport.plugins import moe_router, rotary_embedding
from qwenport.plugins.operator import operators

F32, I64, BOOL = torch.float32, torch.int64, torch.bool
EXAMPLE_SIZES = {"b": 2, "s": 3, "t": 5, "c": 7, "n": 4}
Tensors = Sequence[torch.Tensor]


class Mini(nn.Module):
    """A module of a function of one to four tensors, with what it needs as submodules."""

    def __init__(self, function: Callable[..., Any], parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)


class Mini1(Mini):
    def forward(self, a: torch.Tensor) -> Any:
        return self.function(self, a)


class Mini2(Mini):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        return self.function(self, a, b)


class Mini3(Mini):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        return self.function(self, a, b, c)


class Mini4(Mini):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> Any:
        return self.function(self, a, b, c, d)


class Mini6(Mini):
    def forward(self, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        return self.function(self, a, b, c, d, e, f)


MINIS = {1: Mini1, 2: Mini2, 3: Mini3, 4: Mini4, 6: Mini6}


@dataclass(frozen=True)
class Case:
    """A function of inputs of such shapes (names are dynamic) and dtypes.

    `fill` makes integer inputs valid: it is given the inputs and the drawn sizes.
    """

    function: Callable[..., Any]
    inputs: tuple[tuple[torch.dtype, tuple[int | str, ...]], ...]
    parts: dict[str, nn.Module] = field(default_factory=dict)
    fill: Callable[[list[torch.Tensor], dict[str, int], torch.Generator], None] | None = None


def x(*shape: int | str, dtype: torch.dtype = F32) -> tuple[torch.dtype, tuple[int | str, ...]]:
    return dtype, shape


def below(index: int, bound: int | str) -> Callable[..., None]:
    """Fill an integer input with numbers in [0, bound)."""

    def fill(tensors: list[torch.Tensor], sizes: dict[str, int], g: torch.Generator) -> None:
        top = sizes[bound] if isinstance(bound, str) else bound
        tensors[index] = torch.randint(0, top, tensors[index].shape, generator=g)

    return fill


def both_below_five(*arguments: Any) -> None:
    below(0, 5)(*arguments)
    below(1, 5)(*arguments)


def cache_slots(tensors: list[torch.Tensor], sizes: dict[str, int], g: torch.Generator) -> None:
    """past grows so that every drawn update fits at a drawn slot."""
    past, update, _ = tensors
    room = past.shape[2]
    tensors[0] = torch.randn(*past.shape[:2], room + update.shape[2], past.shape[3], generator=g)
    tensors[2] = torch.randint(0, room + 1, (past.shape[0],), generator=g)


def attend_something(tensors: list[torch.Tensor], sizes: dict[str, int], g: Any) -> None:
    tensors[3][..., 0] = True


def positions(tensors: list[torch.Tensor], sizes: dict[str, int], g: torch.Generator) -> None:
    tensors[3] = torch.randint(0, 9, tensors[3].shape, generator=g)


def attend(m: nn.Module, q: Any, k: Any, v: Any, mask: Any, **changes: Any) -> torch.Tensor:
    settings = {"attn_mask": mask, "scale": 0.3, "enable_gqa": True, **changes}
    return functional.scaled_dot_product_attention(q, k, v, **settings)


QKVM = (x("b", 4, "s", 8), x("b", 2, "t", 8), x("b", 2, "t", 8), x("b", 1, "s", "t", dtype=BOOL))

CASES: dict[str, Case] = {
    "linear with bias": Case(lambda m, a: m.part(a), (x("b", "s", 6),), {"part": nn.Linear(6, 5)}),
    "linear without bias": Case(
        lambda m, a: m.part(a), (x("b", "s", 6),), {"part": nn.Linear(6, 5, bias=False)}
    ),
    "view into heads": Case(lambda m, a: a.view(a.shape[0], a.shape[1], 2, 3), (x("b", "s", 6),)),
    "view with -1 in a static place": Case(
        lambda m, a: a.view(a.shape[0], a.shape[1], -1), (x("b", "s", 2, 3),)
    ),
    "reshape out of heads": Case(
        lambda m, a: a.transpose(1, 2).reshape(a.shape[0], a.shape[2], 8), (x("b", 2, "s", 4),)
    ),
    "transpose": Case(lambda m, a: a.transpose(1, 2), (x("b", 4, "s", 3),)),
    "transpose of negative axes": Case(lambda m, a: a.transpose(-1, 0), (x("b", 4, "s"),)),
    "slice to another's size": Case(
        lambda m, a, b: a[:, :, : b.shape[-1]], (x("b", 2, "c", 3), x("b", 1, "t"))
    ),
    "two slices to one size": Case(
        lambda m, a, b, c: (a[:, : c.shape[1]], b[:, : c.shape[1]]),
        (x("b", "c"), x("b", "c"), x("b", "t")),
    ),
    "silu": Case(lambda m, a: functional.silu(a), (x("b", "s", 6),)),
    "rms norm": Case(lambda m, a: m.part(a), (x("b", "s", 6),), {"part": nn.RMSNorm(6, eps=1e-3)}),
    "attention": Case(attend, QKVM, fill=attend_something),
    "attention of as many heads": Case(
        attend,
        (x("b", 2, "s", 8), x("b", 2, "t", 8), x("b", 2, "t", 8), QKVM[3]),
        fill=attend_something,
    ),
    "expand": Case(lambda m, a: a.expand(-1, -1, 6), (x("b", "s", 1),)),
    "gather": Case(
        lambda m, a, i: a.gather(1, i.unsqueeze(-1).expand(-1, -1, 6)),
        (x("b", "s", 6), x("b", "n", dtype=I64)),
        fill=below(1, "s"),
    ),
    "unsqueeze in front and behind": Case(
        lambda m, a: a.unsqueeze(0).unsqueeze(-1).unsqueeze(2), (x("b", "s"),)
    ),
    "cast to fp16": Case(lambda m, a: a.to(torch.float16), (x("b", "s"),)),
    "cast to bf16 and back": Case(lambda m, a: a.to(torch.bfloat16).to(F32), (x("b", "s"),)),
    "cast to what it is": Case(lambda m, a: a.to(F32) + a, (x("b", "s"),)),
    "cast of integers": Case(
        lambda m, a: a.to(F32), (x("b", "s", dtype=I64),), fill=below(0, 1000)
    ),
    "embedding": Case(
        lambda m, a: m.part(a),
        (x("b", "s", dtype=I64),),
        {"part": nn.Embedding(11, 6)},
        below(0, 11),
    ),
    "less or equal": Case(
        lambda m, a, b: a <= b.unsqueeze(1).unsqueeze(-1),
        (x("t", dtype=I64), x("b", "s", dtype=I64)),
        fill=both_below_five,
    ),
    "dual chunk attention": Case(
        lambda m, q, k, v, mask, same, previous: dual_chunk_attention(
            (q, q + q, q * q), k, v, mask, same, previous, 0.3
        ),
        (*QKVM, *(x("b", 1, "s", "t", dtype=BOOL) for _ in range(2))),
        fill=attend_something,
    ),
    "div": Case(lambda m, a: a / 3.0, (x("b", "s", 6),)),
    "floor division": Case(
        lambda m, a: torch.div(a, 5, rounding_mode="floor"),
        (x("b", "s", dtype=I64),),
        fill=below(0, 99),
    ),
    "remainder": Case(
        lambda m, a: torch.remainder(a, 5), (x("b", "s", dtype=I64),), fill=below(0, 99)
    ),
    "clamp": Case(
        lambda m, a: (a.clamp(max=7), a.clamp(min=2), a.clamp(min=2, max=7)),
        (x("b", "s", dtype=I64),),
        fill=below(0, 9),
    ),
    "log": Case(lambda m, a: torch.log(a * a + 1.0), (x("b", "s", 6),)),
    "add": Case(lambda m, a, b: a + b, (x("b", "s", 6), x("b", "s", 6))),
    "add with broadcasting": Case(lambda m, a, b: a + b, (x("b", "s", 6), x(6))),
    "mul": Case(lambda m, a, b: a * b, (x("b", "s", 6), x("b", "s", 6))),
    "tensor scatter": Case(
        lambda m, a, b, c: tensor_scatter(a, b, c),
        (x("b", 2, "c", 4), x("b", 2, "s", 4), x("b", dtype=I64)),
        fill=cache_slots,
    ),
    "rotary embedding": Case(
        lambda m, a, b, c, d: rotary_embedding.rotary_embedding(a, b, c, d),
        (x("b", 2, "s", 8), x(9, 4), x(9, 4), x("b", "s", dtype=I64)),
        fill=positions,
    ),
    "sigmoid": Case(lambda m, a: torch.sigmoid(a), (x("b", "s", 6),)),
    "router": Case(lambda m, a: moe_router.moe_router(a, k=2), (x("b", "s", 5),)),
    "router whose weights sum to 1": Case(
        lambda m, a: moe_router.moe_router(a, k=3, normalize=True), (x("b", "s", 5),)
    ),
    "router whose results go separate ways": Case(
        lambda m, a: (lambda weights, indices: (indices + indices, a, weights * weights))(
            *moe_router.moe_router(a + a, k=2)
        ),
        (x("b", "s", 5),),
    ),
    "experts": Case(
        lambda m, a, i, w: m.part(a, i, w),
        (x("b", "s", 6), x("b", "s", 2, dtype=I64), x("b", "s", 2)),
        {"part": Experts(6, MoEConfig(5, 2, 3, False, None, (0,)))},
        below(1, 5),
    ),
    "one tensor given back twice over": Case(lambda m, a: (a + a, a * a), (x("b", "s"),)),
}


def sizes_of(case: Case) -> list[str]:
    return sorted({size for _, shape in case.inputs for size in shape if isinstance(size, str)})


def fill(case: Case, sizes: dict[str, int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for dtype, shape in case.inputs:
        drawn = torch.randn(
            [sizes[n] if isinstance(n, str) else n for n in shape], generator=generator
        )
        tensors.append(drawn > 0 if dtype is BOOL else (3 * drawn).to(dtype))
    if case.fill:
        case.fill(tensors, sizes, generator)
    return tensors


def module_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    module = MINIS[len(case.inputs)](case.function, copy.deepcopy(case.parts))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def traced(case: Case) -> tracing.Trace:
    examples = [
        torch.empty(
            [EXAMPLE_SIZES[n] if isinstance(n, str) else n for n in shape],
            dtype=dtype,
            device="meta",
        )
        for dtype, shape in case.inputs
    ]
    dynamic = [
        {axis: n for axis, n in enumerate(shape) if isinstance(n, str)} for _, shape in case.inputs
    ]
    return tracing.trace(module_of(case).to("meta"), examples, dynamic)


def onnx_model(case: Case) -> ir.Model:
    builder = emission.GraphBuilder()
    inputs = [
        ir.Value(
            name=f"input_{number}",
            type=ir.TensorType(from_torch_dtype(dtype)),
            shape=ir.Shape(shape),
        )
        for number, (dtype, shape) in enumerate(case.inputs)
    ]
    parameters = {
        name: builder.initializer(ir.tensor(parameter.detach().numpy(), name=name))
        for name, parameter in module_of(case).named_parameters()
    }
    outputs = emission.emit(traced(case), builder, inputs, parameters, "mini")
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": 24, "qwenport": 1},
        name="mini",
    )
    functions = [operator.function_body(24) for operator in operators()]
    return ir.Model(graph, ir_version=11, functions=functions)


def session_of(case: Case) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.serde.serialize_model(onnx_model(case)).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def assert_runs_as_torch(case: Case, session: Any, sizes: dict[str, int], seed: int) -> None:
    tensors = fill(case, sizes, seed)
    with torch.no_grad():
        expected = module_of(case)(*tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session.run(None, {f"input_{i}": t.numpy() for i, t in enumerate(tensors)})
    assert len(found) == len(expected)
    for ours, torchs in zip(found, expected, strict=True):
        assert ours.shape == tuple(torchs.shape)
        torch.testing.assert_close(torch.from_numpy(np.array(ours)), torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_translation_computes_what_torch_does(name: str) -> None:
    case = CASES[name]
    session = session_of(case)

    @settings(max_examples=12)
    @given(
        sizes=st.fixed_dictionaries({size: st.integers(1, 6) for size in sizes_of(case)}),
        seed=st.integers(0, 99),
    )
    def check(sizes: dict[str, int], seed: int) -> None:
        assert_runs_as_torch(case, session, sizes, seed)

    check()


def test_every_translation_is_tried_by_a_case_above() -> None:
    tried = {call.function for case in CASES.values() for call in traced(case).calls}
    assert emission.HANDLERS.keys() - tried == set()


# --- translated right, or refused


def buffered() -> nn.Module:
    part = nn.Module()
    part.register_buffer("scale", torch.arange(6.0))
    return part


UNUSUAL: dict[str, Case] = {
    "slice from the front": Case(lambda m, a: a[:, 1:], (x("b", "s"),)),
    "slice of a static end": Case(lambda m, a: a[:, :2], (x("b", 6),)),
    "slice of a negative end": Case(lambda m, a: a[:, :-1], (x("b", "s"),)),
    "slice with a step": Case(lambda m, a: a[:, ::2], (x("b", 6),)),
    "slice in the middle": Case(lambda m, a: a[:, 1:3], (x("b", 6),)),
    "slice of everything": Case(lambda m, a: a[:, :] + a, (x("b", "s"),)),
    "slice to a computed size": Case(lambda m, a, b: a[:, : b.shape[1] - 1], (x("b", "n"), x("b", "t"))),
    "flatten of dynamic axes": Case(lambda m, a: a.reshape(-1, 6), (x("b", "s", 6),)),
    "view that swaps dynamic axes": Case(
        lambda m, a: a.view(a.shape[1], a.shape[0], 6), (x("b", "s", 6),)
    ),
    "view that splits a dynamic axis": Case(
        lambda m, a: a.view(a.shape[0], 1, a.shape[1], 6), (x("b", "s", 6),)
    ),
    "expand to a dynamic size": Case(
        lambda m, a, b: a.expand(-1, b.shape[1]), (x("b", 1), x("b", "s"))
    ),
    "expand with a new axis": Case(lambda m, a: a.expand(3, -1, -1), (x("b", "s"),)),
    "attention with dropout": Case(
        functools.partial(attend, dropout_p=0.9), QKVM, fill=attend_something
    ),
    "attention without mask": Case(
        lambda m, q, k, v, mask: attend(m, q, k, v, None), QKVM, fill=attend_something
    ),
    "causal attention": Case(
        lambda m, q, k, v, mask: attend(m, q, k, v, None, is_causal=True),
        QKVM,
        fill=attend_something,
    ),
    "attention of its own scale": Case(
        functools.partial(attend, scale=None), QKVM, fill=attend_something
    ),
    "add with a factor": Case(
        lambda m, a, b: torch.add(a, b, alpha=3), (x("b", "s"), x("b", "s"))
    ),
    "add of a number": Case(lambda m, a: a + 3, (x("b", "s"),)),
    "mul of a number": Case(lambda m, a: a * 3, (x("b", "s"),)),
    "comparison with a number": Case(lambda m, a: a <= 0, (x("b", "s"),)),
    "rms norm without weight": Case(
        lambda m, a: functional.rms_norm(a, (6,), eps=1e-3), (x("b", "s", 6),)
    ),
    "rms norm of the default epsilon": Case(
        lambda m, a: m.part(a), (x("b", "s", 6),), {"part": nn.RMSNorm(6)}
    ),
    "rms norm over two axes": Case(
        lambda m, a: m.part(a), (x("b", 3, 6),), {"part": nn.RMSNorm((3, 6), eps=1e-3)}
    ),
    "embedding with padding": Case(
        lambda m, a: m.part(a),
        (x("b", "s", dtype=I64),),
        {"part": nn.Embedding(11, 6, padding_idx=0)},
        below(0, 11),
    ),
    "a buffer": Case(lambda m, a, b: a * m.part.scale + b, (x("b", "s", 6),) * 2, {"part": buffered()}),
    "an input that is given back": Case(lambda m, a: (a, a + a), (x("b", "s"),)),
    "an input that is not used": Case(lambda m, a, b: a + a, (x("b", "s"), x("b", "s"))),
    "cast to float64": Case(lambda m, a: a.to(torch.float64).to(F32), (x("b", "s"),)),
    "linear of a transposed weight": Case(
        lambda m, a: functional.linear(a, m.part.weight.t()), (x("b", 5),), {"part": nn.Linear(6, 5)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_use_is_translated_right_or_refused(name: str) -> None:
    case = UNUSUAL[name]
    try:
        session = session_of(case)
    except TracingError:
        return
    for sizes in (
        dict(zip(sizes_of(case), (2, 3, 4), strict=False)),
        dict(zip(sizes_of(case), (1, 4, 5), strict=False)),
    ):
        assert_runs_as_torch(case, session, sizes, 0)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, a: torch.relu(a), "relu"),
        (lambda m, a: torch.softmax(a, -1), "softmax"),
        (lambda m, a: functional.gelu(a), "gelu"),
        (lambda m, a: a.cumsum(1), "cumsum"),
        (lambda m, a: a - a.mean(), "mean"),
    ],
)
def test_an_operator_without_translation_is_named(function: Any, name: str) -> None:
    with pytest.raises(TracingError, match=name):
        onnx_model(Case(function, (x("b", "s"),)))


def test_one_tensor_as_two_examples_is_two_inputs() -> None:
    """torch.export takes it for one input: cos for sin, key for value."""
    module = module_of(CASES["add"]).to("meta")
    tensor = torch.empty(2, 3, 6, device="meta")
    (call,) = tracing.trace(module, [tensor, tensor], [{}, {}]).calls
    assert call.args == (tracing.Ref(0), tracing.Ref(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, a: a + a if a.shape[1] > 1100 else a * a,
        lambda m, a: a.view(a.shape[0], a.shape[1] // 2 * 2),
        lambda m, a: a.expand(a.shape[1], -1, -1).transpose(0, a.shape[1] % 2),
        lambda m, a: functional.rms_norm(a, (6,), eps=1 / a.shape[1]),
    ],
)
def test_what_depends_on_the_value_of_a_dynamic_size_is_refused(function: Any) -> None:
    with pytest.raises(TracingError):
        onnx_model(Case(function, (x("b", "s"),)))


def test_inferred_shapes_carry_the_names_of_the_axes() -> None:
    case = CASES["attention"]
    assert traced(case).types[-1].shape == ("b", 4, "s", 8)


def test_an_axis_that_torch_would_fix_is_a_tracing_error() -> None:
    case = Case(lambda m, a: a + torch.ones(3, device=a.device), (x("b", "s"),))
    with pytest.raises(TracingError):
        traced(case)


def test_a_module_stamped_twice_has_no_name_twice() -> None:
    case = CASES["linear with bias"]
    builder = emission.GraphBuilder()
    value = ir.Value(name="a", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 6]))
    once = traced(case)
    for scope in ("first", "second", "second"):
        weights = {
            name: builder.initializer(ir.tensor(p.detach().numpy(), name=f"{scope}.{name}"))
            for name, p in module_of(case).named_parameters()
        }
        emission.emit(once, builder, [value], weights, scope)
    names = [output.name for node in builder.nodes for output in node.outputs]
    assert len(names) == len(set(names)) == 3 * 3
    assert len(builder.initializers) == 2 * 2
