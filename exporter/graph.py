"""ModelConfig + tensor locations -> the ONNX model. No weight is read; the cost does not depend on width."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from qwenport import contract
from qwenport.contract import (
    COS_TABLE,
    DTYPES,
    INPUT_IDS,
    KEY_POSITIONS,
    LOGITS_INDICES,
    POSITION_IDS,
    REQUEST_LENGTHS,
    SIN_TABLE,
    WRITE_INDICES,
)
from qwenport.exporter import emission, tracing
from qwenport.exporter.config import ModelConfig, MoEConfig
from qwenport.exporter.decoder import (
    DecoderLayer,
    DualChunkPrologue,
    Epilogue,
    Prologue,
    checkpoint_name,
)
from qwenport.exporter.expected import DOWN, GATE_UP, expert_parts
from qwenport.exporter.quantization import (
    CODES,
    DYNAMIC,
    INPUT_SCALE,
    PERMUTATION,
    SCALES,
    STATIC,
    WEIGHT,
    ZEROS,
    Storage,
    part_name,
)
from qwenport.exporter.rounded_activations import Rounding
from qwenport.plugins import moe_experts
from qwenport.plugins.operator import operators

_Input = tuple[torch.dtype, tuple[int | str, ...]]
"""The dtype and shape of a traced module's input; a name is a dynamic axis."""

OPSET = 24
IR_VERSION = 11


def build_graph(
    config: ModelConfig,
    dtype: str,
    tensor: Callable[[str], ir.TensorProtocol | None],
    progress: Callable[[int], None] = lambda layer: None,
) -> ir.Model:
    """Build the model; docs/architecture.md has the table of its inputs and outputs.

    Args:
        config: the model.
        dtype: dtype of weights, activations and KV cache: "bf16", "fp16" or "fp32".
        tensor: the checkpoint's parameter name, or COS_TABLE/SIN_TABLE -> its ONNX tensor. None for a
            stack of experts that the checkpoint stores one by one, and for the permutation of a weight whose columns
            are in their own order.
        progress: called with its index after each decoder layer.

    Raises:
        TracingError: the decoder uses an operator without translation (a bug here).
    """
    builder = emission.GraphBuilder()
    float_type = DTYPES[dtype].ir

    def stored(name: str) -> ir.Value:
        found = tensor(name)
        assert found is not None, name
        return builder.initializer(found)

    dequantized: dict[str, ir.Value] = {}
    inverses: dict[ir.Value, ir.Value] = {}

    def matrix(name: str) -> ir.Value:
        storage = config.storage(name)
        if storage is None or storage.is_whole:
            return stored(name)
        if name in dequantized:
            return dequantized[name]
        made = dequantized[name] = _dequantized(builder, name, storage, stored)
        permutation = tensor(part_name(name, PERMUTATION))
        if permutation is not None:
            builder.permutations[made] = builder.initializer(permutation)
        return made

    def in_own_order(name: str) -> ir.Value:
        made = matrix(name)
        permutation = builder.permutations.get(made)
        if permutation is None:
            return made
        if permutation not in inverses:
            inverses[permutation] = _inverse(builder, permutation)
        return builder.add(
            "Gather",
            [made, inverses[permutation]],
            f"{name.removesuffix(WEIGHT)}.Gather",
            dtype=made.dtype or float_type,
            shape=made.shape,
            attributes={"axis": 1},
        )

    def weight(name: str, shape: tracing.Shape) -> ir.Value:
        if not name.endswith((GATE_UP, DOWN)) or tensor(name) is not None:
            return matrix(name)
        experts, rows, columns = (int(size) for size in shape)
        parts = [in_own_order(part) for part in expert_parts(name, experts)]
        stack = _stack(builder, name, parts, (experts, rows, columns))
        storage = config.storage(expert_parts(name, experts)[0])
        if storage is not None and storage.activations == STATIC:
            if name.endswith(DOWN):
                builder.input_scales[stack] = _input_scales(builder, name, experts, stored)
        elif parts[0] in builder.roundings:  # of all, as the checkpoint was checked for
            builder.roundings[stack] = builder.roundings[parts[0]]
        return stack

    def weights(traced: tracing.Trace, prefix: str) -> dict[str, ir.Value]:
        types = traced.types[traced.num_inputs :]
        return {
            name: weight(checkpoint_name(config, prefix + name), kind.shape)
            for name, kind in zip(traced.parameters, types, strict=False)
        }

    def graph_input(name: str, element: ir.DataType, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(element), shape=ir.Shape(shape))

    int64 = ir.DataType.INT64
    input_ids = graph_input(INPUT_IDS, int64, ["batch", "seq"])
    position_ids = graph_input(POSITION_IDS, int64, ["batch", "seq"])
    write_indices = graph_input(WRITE_INDICES, int64, ["batch"])
    key_positions = graph_input(KEY_POSITIONS, int64, ["span"])
    logits_indices = graph_input(LOGITS_INDICES, int64, ["batch", "n"])
    inputs = [input_ids, position_ids, write_indices, key_positions, logits_indices]
    lengths = [graph_input(REQUEST_LENGTHS, int64, ["batch"])] if config.scales_by_length else []
    inputs += lengths

    tables = [stored(name) for name in (COS_TABLE, SIN_TABLE)]
    assert tables[0].shape is not None
    table_shape = tuple(tables[0].shape.numpy())
    prologue, layers, epilogue = _trace_parts(config, DTYPES[dtype].torch, table_shape)
    hidden, *shared = emission.emit(
        prologue,
        builder,
        [
            input_ids,
            position_ids,
            key_positions,
            *tables,
            *lengths,
        ],
        weights(prologue, "model."),
        "model",
    )
    if config.dual_chunk is None:
        mask, cos, sin = shared
        shared = [cos, sin, position_ids, mask]
    outputs: list[ir.Value] = []
    cache_shape: list[int | str] = [
        "batch",
        config.num_key_value_heads,
        contract.CAPACITY,
        config.head_dim,
    ]
    for index in range(config.num_hidden_layers):
        past = [
            graph_input(contract.past(cache), float_type, cache_shape)
            for cache in contract.caches(index)
        ]
        inputs += past
        prefix, layer = f"model.layers.{index}", layers[config.moe_of(index)]
        hidden, *present = emission.emit(
            layer,
            builder,
            [hidden, *shared, write_indices, *past],
            weights(layer, prefix + "."),
            prefix,
        )
        for cache, value in zip(contract.caches(index), present, strict=True):
            value.name = contract.present(cache)
            value.shape = ir.Shape(cache_shape)
        outputs += present
        progress(index)
    (logits,) = emission.emit(
        epilogue, builder, [hidden, logits_indices], weights(epilogue, "model."), "model"
    )
    logits.name, logits.shape = contract.LOGITS, ir.Shape(["batch", "n", config.vocab_size])

    graph = ir.Graph(
        inputs,
        [logits, *outputs],
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET, contract.DOMAIN: contract.DOMAIN_VERSION},
        name=config.model_type,
    )
    used = {node.op_type: node for node in graph if node.domain == contract.DOMAIN}
    known = {operator.name: operator for operator in operators()}
    functions = [known[name].function_body(OPSET) for name in used]
    if (experts := used.get(contract.MOE_EXPERTS)) is not None:
        functions[list(used).index(contract.MOE_EXPERTS)] = moe_experts.function_body(
            OPSET,
            round_inner="round_inner" in experts.attributes,
            input_scales=len(experts.inputs) > len(moe_experts.INPUTS),
        )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="qwenport", functions=functions)


def _dequantized(
    builder: emission.GraphBuilder,
    name: str,
    storage: Storage,
    stored: Callable[[str], ir.Value],
) -> ir.Value:
    """The weight [N, K] of its parts, made once, wherever it is used, in the order of the codes' columns.

    Its linear's input is rounded as the storage says.
    """
    codes, scales = (stored(part_name(name, part)) for part in (CODES, SCALES))
    assert codes.shape is not None and scales.shape is not None and scales.dtype is not None
    inputs, attributes = [codes, scales], {}
    if len(scales.shape) == 2:
        (_, columns), (_, blocks) = codes.shape.numpy(), scales.shape.numpy()
        inputs.append(stored(part_name(name, ZEROS)))
        attributes = {"axis": 1, "block_size": columns // blocks}
    elif len(scales.shape) == 1:
        attributes = {"axis": 0}
    weight = builder.add(
        "DequantizeLinear",
        inputs,
        f"{name.removesuffix(WEIGHT)}.DequantizeLinear",
        dtype=scales.dtype,
        shape=codes.shape,
        attributes=attributes,
    )
    if storage.activations == STATIC:
        builder.roundings[weight] = Rounding(stored(part_name(name, INPUT_SCALE)))
    elif storage.activations == DYNAMIC:
        builder.roundings[weight] = Rounding(None)
    return weight


def _inverse(builder: emission.GraphBuilder, permutation: ir.Value) -> ir.Value:
    """The inverse of a permutation [K]: the order that sorts it."""
    shape, int64 = permutation.shape, ir.DataType.INT64
    assert shape is not None
    _, inverse = builder.add_many(
        "TopK",
        [permutation, builder.constant(shape.numpy())],
        f"{permutation.name}.TopK",
        [(int64, shape), (int64, shape)],
        attributes={"largest": 0},
    )
    return inverse


def _input_scales(
    builder: emission.GraphBuilder, down: str, experts: int, stored: Callable[[str], ir.Value]
) -> ir.Value:
    """The scales of experts' inputs, [E, 3] in the order gate, up, down."""
    downs = expert_parts(down, experts)
    halves = expert_parts(down.removesuffix(DOWN) + GATE_UP, experts)
    parts = [
        stored(part_name(weight, INPUT_SCALE))
        for gate, up, last in zip(halves[::2], halves[1::2], downs, strict=True)
        for weight in (gate, up, last)
    ]
    dtype, name = parts[0].dtype, f"{down.removesuffix(DOWN)}experts.input_scales"
    assert dtype is not None
    flat = builder.add(
        "Concat",
        parts,
        f"{name}.Concat",
        dtype=dtype,
        shape=ir.Shape([len(parts)]),
        attributes={"axis": 0},
    )
    shape = (experts, 3)
    return builder.add(
        "Reshape", [flat, builder.constant(shape)], name, dtype=dtype, shape=ir.Shape(shape)
    )


def _stack(
    builder: emission.GraphBuilder, name: str, parts: list[ir.Value], shape: tuple[int, int, int]
) -> ir.Value:
    """Stack single experts' matrices into one tensor [experts, rows, columns]; builders constant-fold it."""
    experts, rows, columns = shape
    dtype = parts[0].dtype
    assert dtype is not None
    flat = builder.add(
        "Concat",
        parts,
        f"{name}.Concat",
        dtype=dtype,
        shape=ir.Shape([experts * rows, columns]),
        attributes={"axis": 0},
    )
    target = builder.constant(shape)
    return builder.add("Reshape", [flat, target], name, dtype=dtype, shape=ir.Shape(shape))


def _trace_parts(
    config: ModelConfig, dtype: torch.dtype, table_shape: tuple[int, ...]
) -> tuple[tracing.Trace, dict[MoEConfig | None, tracing.Trace], tracing.Trace]:
    """Trace the prologue, each kind of decoder layer (dense: None) and the epilogue.

    A name in a shape is a dynamic axis.
    """

    def traced(module: torch.nn.Module, *inputs: _Input) -> tracing.Trace:
        return tracing.trace(
            module.to(dtype),
            [torch.empty([1 if isinstance(n, str) else n for n in s], dtype=t) for t, s in inputs],
            [{i: n for i, n in enumerate(s) if isinstance(n, str)} for _, s in inputs],
        )

    tokens: _Input = (torch.int64, ("batch", "seq"))
    states = (dtype, ("batch", "seq", config.hidden_size))
    cache = (dtype, ("batch", config.num_key_value_heads, "capacity", config.head_dim))
    mask: _Input = (torch.bool, ("batch", 1, "seq", "span"))
    tables: list[_Input] = [(dtype, table_shape)] * 2
    lengths: list[_Input] = [(torch.int64, ("batch",))] if config.scales_by_length else []
    shared: list[_Input] = [*tables, tokens, mask]
    if config.dual_chunk is not None:
        factor: list[_Input] = [(dtype, ("batch", 1, 1, 1))] * len(lengths)
        shared = [*tables, tokens, tokens, tokens, mask, mask, mask, *factor]
    with torch.device("meta"):
        prologue = traced(
            Prologue(config) if config.dual_chunk is None else DualChunkPrologue(config),
            tokens,
            tokens,
            (torch.int64, ("span",)),
            (torch.float32, table_shape),
            (torch.float32, table_shape),
            *lengths,
        )
        layers = {
            moe: traced(
                DecoderLayer(config, moe), states, *shared, (torch.int64, ("batch",)), cache, cache
            )
            for moe in dict.fromkeys(map(config.moe_of, range(config.num_hidden_layers)))
        }
        epilogue = traced(Epilogue(config), states, (torch.int64, ("batch", "n")))
    return prologue, layers, epilogue
