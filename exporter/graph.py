"""ModelConfig + tensor locations -> the ONNX model. No weight is read; cost does not grow with width."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from qwenport import plugins
from qwenport.exporter import tracing
from qwenport.exporter.config import ModelConfig
from qwenport.exporter.decoder import DecoderLayer, Epilogue, Prologue

OPSET = 24
IR_VERSION = 11
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

COS_TABLE, SIN_TABLE = "rope.cos", "rope.sin"


def build_graph(
    config: ModelConfig,
    dtype: str,
    tensor: Callable[[str], ir.TensorProtocol],
    progress: Callable[[int], None] = lambda layer: None,
) -> ir.Model:
    """Build the model of DESIGN's bindings table.

    Args:
        config: the model.
        dtype: "bf16", "fp16" or "fp32", of weights, activations and KV cache.
        tensor: parameter name (the checkpoint's), or COS_TABLE/SIN_TABLE -> its ONNX tensor.
        progress: called after each decoder layer with its index.

    Raises:
        TracingError: the decoder uses an operator without translation (a defect here).
    """
    builder = tracing.GraphBuilder()
    float_type = tracing.IR_DTYPES[TORCH_DTYPES[dtype]]

    def weights(traced: tracing.Trace, prefix: str) -> dict[str, ir.Value]:
        names = {name: _checkpoint_name(config, prefix + name) for name in traced.parameters}
        return {name: builder.initializer(tensor(full)) for name, full in names.items()}

    def graph_input(name: str, element: ir.DataType, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(element), shape=ir.Shape(shape))

    int64 = ir.DataType.INT64
    input_ids = graph_input("input_ids", int64, ["batch", "seq"])
    position_ids = graph_input("position_ids", int64, ["batch", "seq"])
    write_indices = graph_input("write_indices", int64, ["batch"])
    key_positions = graph_input("key_positions", int64, ["span"])
    logits_indices = graph_input("logits_indices", int64, ["batch", "n"])
    inputs = [input_ids, position_ids, write_indices, key_positions, logits_indices]

    tables = [builder.initializer(tensor(name)) for name in (COS_TABLE, SIN_TABLE)]
    table_shape = tuple(tensor(COS_TABLE).shape.numpy())
    prologue, layer, epilogue = _trace_parts(config, TORCH_DTYPES[dtype], table_shape)
    hidden, mask, cos, sin = tracing.emit(
        prologue,
        builder,
        [
            input_ids,
            position_ids,
            key_positions,
            *tables,
        ],
        weights(prologue, "model."),
        "model",
    )
    outputs: list[ir.Value] = []
    cache_shape: list[int | str] = [
        "batch",
        config.num_key_value_heads,
        "capacity",
        config.head_dim,
    ]
    for index in range(config.num_hidden_layers):
        past = [
            graph_input(f"past_key_values.{index}.{part}", float_type, cache_shape)
            for part in ("key", "value")
        ]
        inputs += past
        prefix = f"model.layers.{index}"
        hidden, *present = tracing.emit(
            layer,
            builder,
            [hidden, cos, sin, position_ids, mask, write_indices, *past],
            weights(layer, prefix + "."),
            prefix,
        )
        for part, value in zip(("key", "value"), present, strict=True):
            value.name = f"present.{index}.{part}"
            value.shape = ir.Shape(cache_shape)
        outputs += present
        progress(index)
    (logits,) = tracing.emit(
        epilogue, builder, [hidden, logits_indices], weights(epilogue, "model."), "model"
    )
    logits.name, logits.shape = "logits", ir.Shape(["batch", "n", config.vocab_size])

    _name_dimensions(builder.nodes)
    graph = ir.Graph(
        inputs,
        [logits, *outputs],
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET, plugins.DOMAIN: plugins.rotary_embedding.VERSION},
        name=config.model_type,
    )
    function = plugins.rotary_embedding.function_body(OPSET)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="qwenport", functions=[function])


def _checkpoint_name(config: ModelConfig, name: str) -> str:
    """The checkpoint's name of a traced parameter; a tied head is the embedding."""
    if name == "model.lm_head.weight":
        return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return name


# Example sizes of the dynamic axes: distinct, so that none is taken for another.
BATCH, SEQ, SPAN, CAPACITY, WANTED = 2, 3, 5, 7, 4


def _trace_parts(
    config: ModelConfig, dtype: torch.dtype, table_shape: tuple[int, ...]
) -> tuple[tracing.Trace, tracing.Trace, tracing.Trace]:
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    span, capacity, wanted = (torch.export.Dim(name) for name in ("span", "capacity", "n"))

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)

    def cache() -> torch.Tensor:
        return torch.empty(
            BATCH, config.num_key_value_heads, CAPACITY, config.head_dim, dtype=dtype
        )

    def table(element: torch.dtype) -> torch.Tensor:
        return torch.empty(table_shape, dtype=element)

    def states() -> torch.Tensor:
        return torch.empty(BATCH, SEQ, config.hidden_size, dtype=dtype)

    tokens = {0: batch, 1: seq}
    with torch.device("meta"):
        prologue = tracing.trace(
            Prologue(config).to(dtype),
            [
                integers(BATCH, SEQ),
                integers(BATCH, SEQ),
                integers(SPAN),
                table(torch.float32),
                table(torch.float32),
            ],
            [tokens, tokens, {0: span}, {}, {}],
        )
        layer = tracing.trace(
            DecoderLayer(config).to(dtype),
            [
                states(),
                table(dtype),
                table(dtype),
                integers(BATCH, SEQ),
                torch.empty(BATCH, 1, SEQ, SPAN, dtype=torch.bool),
                integers(BATCH),
                cache(),
                cache(),
            ],
            [
                tokens,
                {},
                {},
                tokens,
                {0: batch, 2: seq, 3: span},
                {0: batch},
                {0: batch, 2: capacity},
                {0: batch, 2: capacity},
            ],
        )
        epilogue = tracing.trace(
            Epilogue(config).to(dtype),
            [states(), integers(BATCH, WANTED)],
            [tokens, {0: batch, 1: wanted}],
        )
    return prologue, layer, epilogue


def _name_dimensions(nodes: list[ir.Node]) -> None:
    """torch's symbols (s12, ...) mean nothing to a reader: drop inferred shapes that hold one."""
    for node in nodes:
        for value in node.outputs:
            if value.shape is not None and any(
                not isinstance(size, int) and str(size)[:1] == "s" and str(size)[1:].isdigit()
                for size in value.shape
            ):
                value.shape = None
