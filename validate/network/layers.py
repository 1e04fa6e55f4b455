"""What each kind of TensorRT layer computes, in torch. The table is closed: a kind that is not in it is an error.

A reader takes a layer and returns a function of the layer's inputs (tensors; None for an absent input). It reads
every parameter that changes the result, and raises for a value it does not support. Floating-point arithmetic is
done in fp32: `interpreter` widens the inputs and rounds the outputs to the layer's declared type.
Source: the class documentation of TensorRT 10 and TensorRT-RTX 1.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwenport.validate.errors import NetworkError

Compute = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]

SCORES_AT_ONCE = 1 << 25  # attention scores in memory at once: 128 MB


@dataclass(frozen=True)
class Context:
    """What a reader may use.

    Attributes:
        trt: TensorRT's module.
        round: rounds an intermediate to the layer's type.
        rounds: whether that changes anything.
    """

    trt: Any
    round: Callable[[torch.Tensor], torch.Tensor]
    rounds: bool = True


@dataclass(frozen=True)
class Kind:
    """A layer kind: its interface in TensorRT's module, its reader, and whether it only moves values.

    Kinds that move values work on their stored type; the others get fp32 for bf16 and fp16.
    """

    interface: str
    read: Callable[[Context, Any], Compute]
    moves: bool = False


def refuse(layer: Any, what: str) -> NetworkError:
    """The error for a layer that uses something not supported here."""
    return NetworkError(f"layer {layer.name}: {what} is not something that can be evaluated here")


def _name(value: Any) -> str:
    name: str = value.name
    return name


def axes_of(mask: int) -> tuple[int, ...]:
    """TensorRT's bit mask of axes -> the axes."""
    return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)


def _given(layer: Any, index: int) -> bool:
    """Whether a parameter comes as an input; then its attribute must not be read."""
    return layer.num_inputs > index and layer.get_input(index) is not None


def _dims(layer: Any, attribute: str, index: int) -> list[int] | None:
    """Sizes given as an attribute; None if input `index` has them, or if there are none at all."""
    if _given(layer, index):
        return None
    try:
        return [int(value) for value in getattr(layer, attribute)]
    except (TypeError, ValueError):  # TensorRT's Python raises for Dims that are not set
        return None


def _listed(tensor: torch.Tensor) -> list[int]:
    values: list[int] = tensor.reshape(-1).tolist()
    return values


def _identity(context: Context, layer: Any) -> Compute:
    return lambda x: x


def _shape(context: Context, layer: Any) -> Compute:
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


def _shuffle(context: Context, layer: Any) -> Compute:
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    fixed, zero_copies = _dims(layer, "reshape_dims", 1), layer.zero_is_placeholder

    def compute(x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        x = x.permute(first[: x.ndim])
        sizes = fixed if target is None else _listed(target)
        if sizes is not None:
            if zero_copies:
                sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
            x = x.reshape(tuple(sizes))
        return x.permute(second[: x.ndim])

    return compute


_ARITHMETIC: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "POW": torch.pow,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "DIV": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
}


def _elementwise(context: Context, layer: Any) -> Compute:
    operation = _ARITHMETIC.get(_name(layer.op))
    if operation is None:
        raise refuse(layer, f"the operation {_name(layer.op)}")
    return operation


_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ROUND": torch.round,
    "ERF": torch.erf,
    "SIGN": torch.sign,
    "NOT": torch.logical_not,
    "ISNAN": torch.isnan,
    "ISINF": torch.isinf,
}


def _unary(context: Context, layer: Any) -> Compute:
    operation = _UNARY.get(_name(layer.op))
    if operation is None:
        raise refuse(layer, f"the operation {_name(layer.op)}")
    return operation


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "RELU": torch.relu,
    "GELU_ERF": torch.nn.functional.gelu,
    "GELU_TANH": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def _activation(context: Context, layer: Any) -> Compute:
    operation = _ACTIVATIONS.get(_name(layer.type))
    if operation is None:
        raise refuse(layer, f"the activation {_name(layer.type)}")
    return operation


def _reduce(context: Context, layer: Any) -> Compute:
    axes, keep, operation = axes_of(layer.axes), layer.keep_dims, _name(layer.op)

    def compute(x: torch.Tensor) -> torch.Tensor:
        if operation == "SUM":
            return x.sum(axes, keepdim=keep, dtype=x.dtype)
        if operation == "AVG":
            return x.mean(axes, keepdim=keep)
        if operation == "MAX":
            return x.amax(axes, keepdim=keep)
        return x.amin(axes, keepdim=keep)

    if operation not in ("SUM", "AVG", "MAX", "MIN"):
        raise refuse(layer, f"the reduction {operation}")
    return compute


def _softmax(context: Context, layer: Any) -> Compute:
    axes = axes_of(layer.axes)
    if len(axes) != 1:
        raise refuse(layer, "a softmax over several axes")
    return lambda x: torch.softmax(x, axes[0])


def _matrix_multiply(context: Context, layer: Any) -> Compute:
    sides = (_name(layer.op0), _name(layer.op1))
    if "VECTOR" in sides:
        raise refuse(layer, "a product with a vector")

    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = (
            x.transpose(-1, -2) if side == "TRANSPOSE" else x
            for x, side in zip((a, b), sides, strict=True)
        )
        if b.ndim == a.ndim == 3 and len(b) == 1:
            b = b[0]  # one matrix for all rows: torch then runs one matmul
        return a @ b

    return compute


def _slice(context: Context, layer: Any) -> Compute:
    fills = _name(layer.mode) == "FILL"
    if not fills and _name(layer.mode) != "STRICT_BOUNDS":
        raise refuse(layer, f"slicing in mode {_name(layer.mode)}")
    names = ("start", "shape", "stride")
    parameters = [_dims(layer, name, index) for index, name in enumerate(names, start=1)]
    fixed_axes, name = _dims(layer, "axes", 5), layer.name

    def compute(
        x: torch.Tensor,
        start: torch.Tensor | None = None,
        shape: torch.Tensor | None = None,
        stride: torch.Tensor | None = None,
        fill: torch.Tensor | None = None,
        axes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        starts, counts, steps = (
            (fixed or []) if tensor is None else _listed(tensor)
            for fixed, tensor in zip(parameters, (start, shape, stride), strict=True)
        )
        chosen = fixed_axes if axes is None else _listed(axes)
        if not chosen:
            chosen = list(range(x.ndim))
        for axis, first, count, step in zip(chosen, starts, counts, steps, strict=True):
            size = x.shape[axis]
            last = first + (count - 1) * step
            if fills:
                x = _filled(x, axis, first, count, step, 0.0 if fill is None else float(fill))
                continue
            if count and not (0 <= first < size and 0 <= last < size):
                raise NetworkError(
                    f"layer {name}: slots {first} to {last} of an axis of {size} are outside it"
                )
            if step > 0:
                x = x.narrow(axis, first, last + 1 - first) if count else x.narrow(axis, 0, 0)
                x = x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
            else:
                x = x.index_select(axis, torch.arange(count) * step + first)
        return x

    return compute


def _filled(
    x: torch.Tensor, axis: int, first: int, count: int, step: int, fill: float
) -> torch.Tensor:
    """Slots of an axis, some of which may be outside of it."""
    slots = torch.arange(count) * step + first
    inside = (slots >= 0) & (slots < x.shape[axis])
    made = x.new_full((*x.shape[:axis], count, *x.shape[axis + 1 :]), fill)
    return made.index_copy_(
        axis, torch.nonzero(inside).reshape(-1), x.index_select(axis, slots[inside])
    )


def _concatenation(context: Context, layer: Any) -> Compute:
    axis = layer.axis
    return lambda *parts: torch.cat(parts, axis)


def _gather(context: Context, layer: Any) -> Compute:
    axis, mode = layer.axis, _name(layer.mode)
    if mode == "ELEMENT":
        return lambda x, indices: torch.gather(x, axis, indices.to(torch.int64))
    if mode != "DEFAULT" or layer.num_elementwise_dims:
        raise refuse(layer, f"gathering in mode {mode}")

    def compute(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        rows = x.index_select(axis, indices.reshape(-1))
        return rows.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))

    return compute


def _select(context: Context, layer: Any) -> Compute:
    return torch.where


def _unsqueeze(context: Context, layer: Any) -> Compute:
    def compute(x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(value % rank for value in _listed(axes)):
            x = x.unsqueeze(axis)
        return x

    return compute


def _squeeze(context: Context, layer: Any) -> Compute:
    if not _given(layer, 1):
        raise refuse(layer, "a squeeze of axes that are not named")

    def compute(x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        wanted = {value % x.ndim for value in _listed(axes)}
        if any(x.shape[axis] != 1 for axis in wanted):
            raise NetworkError(f"squeeze of axes {sorted(wanted)} of a tensor {tuple(x.shape)}")
        return x.reshape([size for axis, size in enumerate(x.shape) if axis not in wanted])

    return compute


def _topk(context: Context, layer: Any) -> Compute:
    axes, largest = axes_of(layer.axes), _name(layer.op) == "MAX"
    fixed = 0 if _given(layer, 1) else layer.k
    if len(axes) != 1:
        raise refuse(layer, "the largest over several axes")

    def compute(
        x: torch.Tensor, count: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k = fixed if count is None else int(count)
        # stable: among equals the lowest index first, as ONNX requires; torch.topk guarantees nothing
        values, indices = torch.sort(x, dim=axes[0], descending=largest, stable=True)
        return values.narrow(axes[0], 0, k), indices.narrow(axes[0], 0, k)

    return compute


def _fill(context: Context, layer: Any) -> Compute:
    if _name(layer.operation) != "LINSPACE":
        raise refuse(layer, f"filling with {_name(layer.operation)}")
    fixed = _dims(layer, "shape", 0)
    alpha = None if _given(layer, 1) else layer.alpha
    beta = None if _given(layer, 2) else layer.beta

    def compute(
        shape: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sizes = fixed if shape is None else _listed(shape)
        assert sizes is not None
        first = torch.tensor(alpha) if start is None else start.reshape(())
        deltas = [torch.tensor(beta)] if steps is None else list(steps.reshape(-1))
        result = first
        for axis, (size, delta) in enumerate(zip(sizes, deltas, strict=True)):
            along = torch.arange(size).to(delta.dtype) * delta
            result = result + along.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
        return result

    return compute


def _scatter(context: Context, layer: Any) -> Compute:
    if _name(layer.mode) != "ELEMENT":
        raise refuse(layer, f"scattering in mode {_name(layer.mode)}")
    axis = layer.axis
    return lambda x, indices, updates: x.scatter(axis, indices.to(torch.int64), updates)


def _cumulative(context: Context, layer: Any) -> Compute:
    if _name(layer.op) != "SUM":
        raise refuse(layer, f"accumulating with {_name(layer.op)}")
    exclusive, reverse = layer.exclusive, layer.reverse

    def compute(x: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
        along = int(axis)
        y = x.flip(along) if reverse else x
        total = torch.cumsum(y, along, dtype=x.dtype)
        if exclusive:  # the sum before the slot, not the sum minus the slot: 1e10 + 1 - 1e10 is 0
            first = torch.zeros_like(y.narrow(along, 0, min(1, y.shape[along])))
            total = torch.cat([first, total.narrow(along, 0, max(0, y.shape[along] - 1))], along)
        return total.flip(along) if reverse else total

    return compute


def _rotary(context: Context, layer: Any) -> Compute:
    interleaved, part = layer.interleaved, layer.rotary_embedding_dim

    def compute(
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        size = part or x.shape[-1]
        if position_ids is not None:
            # not by indexing: a negative position is out of range, not a row from the end
            cos, sin = (torch.embedding(table, position_ids) for table in (cos, sin))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # one for all heads
        turned, rest = x[..., :size], x[..., size:]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        first, second = a * cos - b * sin, b * cos + a * sin
        if interleaved:
            turned = torch.stack([first, second], dim=-1).flatten(-2)
        else:
            turned = torch.cat([first, second], dim=-1)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    if len(layer.get_input(0).shape) != 4:
        raise refuse(layer, "a rotary embedding of a tensor without an axis of heads")
    return compute


def _kv_cache_update(context: Context, layer: Any) -> Compute:
    if _name(layer.cache_mode) != "LINEAR" or _name(layer.update_form) != "PADDED_BHND":
        raise refuse(layer, "this form of cache")
    if layer.update_lengths is not None:
        raise refuse(layer, "a cache update with lengths")

    def compute(
        cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor
    ) -> torch.Tensor:
        # in place; a slot outside the cache is dropped silently, as in an engine
        capacity, count = cache.shape[2], update.shape[2]
        for row, first in enumerate(_listed(write_indices)):
            begin, end = max(first, 0), min(first + count, capacity)
            if begin < end:
                cache[row, :, begin:end] = update[row, :, begin - first : end - first]
        return cache

    return compute


LARGEST_FLOAT8 = 448.0


def _quantize(context: Context, layer: Any) -> Compute:
    """To FP8 with one scale, saturating; the quotient is not rounded before."""
    if _given(layer, 2) or layer.get_output(0).dtype != context.trt.DataType.FP8:
        raise refuse(layer, "quantizing with a zero point or to another type than FP8")
    if math.prod(layer.get_input(1).shape) != 1:
        raise refuse(layer, "quantizing with more than one scale")

    def compute(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        steps = x / scale.reshape(())
        return steps.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)

    return compute


def _dequantize(context: Context, layer: Any) -> Compute:
    axis = layer.axis
    if _given(layer, 2):
        raise refuse(layer, "a zero point")

    def compute(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if scales.numel() == 1:
            return codes.float() * scales.reshape(())
        if scales.ndim == 1:
            scales = scales.reshape([-1 if a == axis else 1 for a in range(codes.ndim)])
        for along, (count, size) in enumerate(zip(scales.shape, codes.shape, strict=True)):
            if count not in (1, size):  # a scale is for a block
                scales = scales.repeat_interleave(size // count, dim=along)
        return codes.float() * scales

    return compute


def _attention(context: Context, layer: Any) -> Compute:
    attention, name = layer.attention, layer.name
    causal = _name(attention.causal_kind)
    if _name(attention.norm_op) != "SOFTMAX":
        raise refuse(layer, f"attention normalised by {_name(attention.norm_op)}")
    forms = {_name(attention.query_form), _name(attention.key_value_form)}
    if forms != {"PADDED_BHND"} or attention.query_lengths is not None:
        raise refuse(layer, "packed attention, or attention with lengths of queries,")
    if attention.key_value_lengths is not None and (
        attention.mask is not None or causal == "UPPER_LEFT"
    ):
        raise refuse(layer, "attention with lengths and another mask than aligned lower right")
    if attention.normalization_quantize_scale is not None:
        raise refuse(layer, "quantized attention")

    def compute(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        quantize_scale: None = None,
        query_lengths: None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if lengths is None:
            return attend(causal, q, k, v, mask)
        longest = int(lengths.max())
        if int(lengths.min()) < 1 or longest > k.shape[2]:
            raise NetworkError(
                f"layer {name}: lengths of {lengths.min()} to {longest} over {k.shape[2]} keys"
            )
        ends = lengths.to(torch.int64)[:, None, None, None]
        if causal == "LOWER_RIGHT":  # the last query is at the end of its own row
            ends = ends - q.shape[2] + 1 + torch.arange(q.shape[2])[:, None]
        seen = torch.arange(longest) < ends
        if not bool(seen.any(-1).all()):
            raise NetworkError(f"layer {name}: a query without a key")
        return attend("NONE", q, k[:, :, :longest], v[:, :, :longest], seen)

    def attend(
        causal: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if (
            causal == "NONE"
            and mask is not None
            and mask.dtype == torch.bool
            and not context.rounds
        ):
            # without an intermediate to round, the whole is one function, and torch's is faster
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True
            )
        batch, heads, queries, size = q.shape
        kv_heads, keys = k.shape[1], k.shape[2]
        # a group of query heads shares one key and value head: their queries are stacked
        group = heads // kv_heads
        grouped = q.reshape(batch, kv_heads, group, queries, size)
        columns = k.transpose(-1, -2)
        shaped = mask
        if mask is not None:  # [batch, 1 or kv_heads, 1 or group, queries, keys]
            by_head = mask.shape[1] == heads and heads != 1
            sizes = (kv_heads, -1) if by_head else (mask.shape[1], 1)
            shaped = mask.reshape(mask.shape[0], *sizes, *mask.shape[2:])
        at_once = max(1, SCORES_AT_ONCE // (batch * heads * keys))
        pieces = []
        for start in range(0, queries, at_once):
            rows = slice(start, min(start + at_once, queries))
            below = grouped[..., rows, :].reshape(batch, kv_heads, -1, size)
            scores = (below @ columns).reshape(batch, kv_heads, group, -1, keys)
            if causal != "NONE":
                offset = 0 if causal == "UPPER_LEFT" else keys - queries
                order = torch.arange(queries)[rows, None]
                scores.masked_fill_(torch.arange(keys) > order + offset, -torch.inf)
            if shaped is not None:
                seen = shaped if shaped.shape[-2] == 1 else shaped[..., rows, :]
                if seen.dtype == torch.bool:
                    scores.masked_fill_(~seen, -torch.inf)
                else:
                    scores = scores + seen
            weights = context.round(torch.softmax(scores, -1))
            made = weights.reshape(batch, kv_heads, -1, keys) @ v
            pieces.append(made.reshape(batch, kv_heads, group, -1, v.shape[-1]))
        mixed = torch.cat(pieces, dim=-2) if len(pieces) != 1 else pieces[0]
        return mixed.reshape(batch, heads, queries, v.shape[-1])

    return compute


KINDS = {
    "SHAPE": Kind("IShapeLayer", _shape, moves=True),
    "CAST": Kind("ICastLayer", _identity, moves=True),  # the output's type is the cast
    "IDENTITY": Kind("IIdentityLayer", _identity, moves=True),
    "SHUFFLE": Kind("IShuffleLayer", _shuffle, moves=True),
    "ELEMENTWISE": Kind("IElementWiseLayer", _elementwise),
    "UNARY": Kind("IUnaryLayer", _unary),
    "ACTIVATION": Kind("IActivationLayer", _activation),
    "REDUCE": Kind("IReduceLayer", _reduce),
    "SOFTMAX": Kind("ISoftMaxLayer", _softmax),
    "MATRIX_MULTIPLY": Kind("IMatrixMultiplyLayer", _matrix_multiply),
    "SLICE": Kind("ISliceLayer", _slice, moves=True),
    "CONCATENATION": Kind("IConcatenationLayer", _concatenation, moves=True),
    "GATHER": Kind("IGatherLayer", _gather, moves=True),
    "SELECT": Kind("ISelectLayer", _select, moves=True),
    "UNSQUEEZE": Kind("IUnsqueezeLayer", _unsqueeze, moves=True),
    "SQUEEZE": Kind("ISqueezeLayer", _squeeze, moves=True),
    "TOPK": Kind("ITopKLayer", _topk, moves=True),
    "FILL": Kind("IFillLayer", _fill),
    "SCATTER": Kind("IScatterLayer", _scatter, moves=True),
    "CUMULATIVE": Kind("ICumulativeLayer", _cumulative),
    "QUANTIZE": Kind("IQuantizeLayer", _quantize),
    "DEQUANTIZE": Kind("IDequantizeLayer", _dequantize),
    "ROTARY_EMBEDDING": Kind("IRotaryEmbeddingLayer", _rotary),
    "KV_CACHE_UPDATE": Kind("IKVCacheUpdateLayer", _kv_cache_update, moves=True),
    "ATTENTION_INPUT": Kind("IAttentionInputLayer", _attention),
    "ATTENTION_OUTPUT": Kind("IAttentionOutputLayer", _identity, moves=True),
}


def inputs_of(layer: Any) -> Sequence[Any]:
    """The layer's input tensors; None for an absent one."""
    return [layer.get_input(index) for index in range(layer.num_inputs)]
