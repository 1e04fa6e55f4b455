"""Quantized linears on onnxruntime's CPU: products with the codes as they lie in the package.

A package has a quantized weight [N, K] as DequantizeLinear of codes, scales and zero points, in blocks along K.
com.microsoft.MatMulNBits multiplies by the same bytes. Its blocks are powers of two from 16, and others are split into
such blocks. It computes (code - zero point) * scale in fp32, without DequantizeLinear's rounding to the scales' dtype,
and 8 bits are slow unless activations become int8. So where a result must be DequantizeLinear's own, weights of half
precision or 8 bits are dequantized when the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import FP32, HALF, SYMMETRIC_ZEROS
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.float8 import dequantizes_float8
from qwenport.engines.lowering.fused_matmul import DOMAIN
from qwenport.engines.lowering.lookup import is_lookup, look_up
from qwenport.plugins.nodes import append_node, initializer

BITS = {ir.DataType.UINT4: 4, ir.DataType.UINT8: 8}
"""The types of codes and zero points."""
LEAST_BLOCK, MOST_BLOCK = 16, 128
"""The least that MatMulNBits has; and the most here, since int8 activations have a scale per block."""
EXACT, INT8 = 1, 4
"""Values of accuracy_level: activations in fp32, or rounded to int8 in each block."""

Bytes = npt.NDArray[np.uint8]


class RepeatedBlocks(ir.LazyTensor):
    """Scales or zero points of blocks that were split: each value of `source` several times along the last axis.

    Zero points are packed by row, as MatMulNBits wants them. The source is read when the values are needed.

    Attributes:
        source: the tensor of the package, [N, blocks].
        repeats: how many blocks each of its blocks was split into.
    """

    def __init__(self, source: ir.ExternalTensor, repeats: int, *, name: str) -> None:
        rows, blocks = source.shape.numpy()
        bits = BITS.get(source.dtype)
        width = blocks * repeats if bits is None else _row_bytes(blocks * repeats, bits)
        self.source, self.repeats = source, repeats
        super().__init__(
            self._read,
            dtype=source.dtype if bits is None else ir.DataType.UINT8,
            shape=ir.Shape((rows, width)),
            name=name,
        )

    def _read(self) -> ir.Tensor:
        source = self.source
        with open(source.path, "rb") as stream:  # onnx_ir reads no file that has several links
            stream.seek(source.offset or 0)
            data = stream.read(source.nbytes)
        if len(data) != source.nbytes:
            raise LoweringError(f"{source.path}: shorter than the graph says")
        rows, columns = self.shape.numpy()
        if source.dtype in BITS:
            shape = rows, source.shape.numpy()[1]
            values: Any = repeated_zero_points(data, BITS[source.dtype], shape, self.repeats)
        else:
            values = np.repeat(np.frombuffer(data, source.dtype.numpy()), self.repeats)
        return ir.Tensor(values.reshape(rows, columns), dtype=self.dtype, name=self.name)


def repeated_zero_points(data: bytes, bits: int, shape: tuple[int, int], repeats: int) -> Bytes:
    """Zero points of split blocks as MatMulNBits wants them: every row begins with a byte of its own.

    Args:
        data: the package's; those of 4 bits lie without gaps between rows, the low half of a byte first.
        bits: 4 or 8.
        shape: the package's, [rows, blocks].
        repeats: how many blocks each block was split into.

    Returns:
        uint8 [rows, ceil(blocks * repeats * bits / 8)].
    """
    values: Bytes = np.frombuffer(data, np.uint8)
    if bits == 4:
        values = np.stack([values & np.uint8(15), values >> np.uint8(4)], axis=1).reshape(-1)
        values = values[: shape[0] * shape[1]]  # without the half that fills the last byte
    blocks: Bytes = np.repeat(values.reshape(shape), repeats, axis=1)
    if bits == 8:
        return blocks
    even: Bytes = np.pad(blocks, ((0, 0), (0, blocks.shape[1] % 2)))
    packed: Bytes = even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
    return packed


class UseMatMulNBits(InPlacePass):
    """MatMul(x, Transpose(DequantizeLinear(codes, scales, zeros))) -> com.microsoft.MatMulNBits(x, ...).

    Rows of a quantized embedding are looked up in the same codes, by GatherBlockQuantized.
    """

    def __init__(self, *, exact: bool) -> None:
        """Choose the arithmetic.

        Args:
            exact: products in fp32, and only of weights that MatMulNBits computes as DequantizeLinear does: 4 bits with
                scales in fp32. All others stay. Otherwise every weight is lowered, for activations in int8.
        """
        super().__init__()
        self.exact = exact

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: a weight that cannot be multiplied so, unless `exact` is set.
        """
        graph, modified = model.graph, False
        laid_out: dict[ir.Value, tuple[int, int]] = {}
        for node in [*graph]:
            if not dequantizes_integers(node):
                continue
            try:
                weight = quantized_weight(node)
                if self.exact and not (weight.bits == 4 and weight.scales.dtype == FP32.ir):
                    continue
                products, lookups = uses_of(node)
                if self.exact and lookups:
                    continue
                inputs = _laid_out(weight, node, laid_out)
            except LoweringError:
                if self.exact:
                    continue
                raise
            for product in products:
                _multiply(graph, product, weight, inputs, EXACT if self.exact else INT8)
            for lookup in lookups:
                look_up(graph, lookup, inputs, bits=weight.bits)
            _remove(graph, node)
            modified = True
        if modified:
            model.opset_imports[DOMAIN] = 1
        return PassResult(model, modified)


def rounds_activations(model: ir.Model) -> bool:
    """Whether some product of a lowered graph rounds its activations to int8."""
    return any(
        node.op_type == "MatMulNBits" and node.attributes["accuracy_level"].as_int() == INT8
        for node in model.graph.all_nodes()
    )


class DequantizeAtLoad(InPlacePass):
    """DequantizeLinear -> arithmetic in fp32 and its rounding, which onnxruntime folds when it loads the model.

    For a graph that computes in fp32 already. onnxruntime may fuse a DequantizeLinear with a product, and round
    activations to int8 then; and its CPU provider has none in bf16.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: what is dequantized is no weight.
        """
        found = [node for node in model.graph if dequantizes_integers(node)]
        for node in found:
            _dequantize(model.graph, node)
        return PassResult(model, bool(found))


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight.

    Attributes:
        codes, scales, zeros: initializers, [N, K] and twice [N, K / block].
        rounded: the dtype of its dequantized values.
        n, k: its rows and columns.
        bits: of a code.
        block: values along K with one scale.
    """

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value
    rounded: ir.DataType
    n: int
    k: int
    bits: int
    block: int


def quantized_weight(node: ir.Node) -> QuantizedWeight:
    """What a DequantizeLinear is given.

    Raises:
        LoweringError: it is not a weight in blocks along its second axis.
    """
    given = [_stored(value) for value in node.inputs]
    codes, scales, zeros = given if len(given) == 3 else (None, None, None)
    if codes is None or scales is None or zeros is None or codes.dtype not in BITS:
        raise LoweringError(
            f"{node.name}: only weights of 4 or 8 bits with scales and zero points are supported here"
        )
    assert codes.shape is not None and scales.shape is not None and scales.dtype is not None
    axis, block = (node.attributes.get(key) for key in ("axis", "block_size"))
    if len(codes.shape) == 2 and block is not None and axis is not None and axis.as_int() == 1:
        (n, k), size = codes.shape.numpy(), block.as_int()
        if size > 0 and k % size == 0:
            shape = (n, k // size)
            if all(v.shape is not None and tuple(v.shape) == shape for v in (scales, zeros)):
                return QuantizedWeight(
                    codes, scales, zeros, scales.dtype, n, k, BITS[codes.dtype], size
                )
    raise LoweringError(f"{node.name}: its weight is not in blocks along the second of two axes")


def dequantizes_integers(node: ir.Node) -> bool:
    """Whether a node is DequantizeLinear, and not of FP8."""
    is_any = node.op_type == "DequantizeLinear" and node.domain == ""
    return is_any and not dequantizes_float8(node)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, or is cast from."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def uses_of(node: ir.Node) -> tuple[list[ir.Node], list[ir.Node]]:
    """The products by a dequantized weight, and the lookups of its rows.

    Raises:
        LoweringError: it is used in another way.
    """
    products, lookups = [], []
    for transpose, operand in node.outputs[0].uses():
        if is_lookup(transpose, operand):
            lookups.append(transpose)
            continue
        by = [use.node for use in transpose.outputs[0].uses() if use.idx == 1]
        multiplied = by and len(by) == len(transpose.outputs[0].uses())
        perm = transpose.attributes.get("perm")
        if (
            transpose.op_type != "Transpose"
            or perm is None
            or tuple(perm.as_ints()) != (1, 0)
            or not multiplied
            or any(n.op_type != "MatMul" or n.domain != "" for n in by)
        ):
            raise LoweringError(
                f"{node.name}: used by {transpose.name}; a quantized weight can only be looked up in, or "
                "transposed and multiplied by"
            )
        products += by
    return products, lookups


def _laid_out(
    weight: QuantizedWeight, node: ir.Node, known: dict[ir.Value, tuple[int, int]]
) -> list[ir.Value]:
    """The inputs of MatMulNBits after the first; the initializers change their types and shapes.

    Args:
        weight: the weight.
        node: its DequantizeLinear.
        known: initializer -> (block, repeats) of those that have changed.

    Raises:
        LoweringError: there are no such blocks, or an initializer is part of two weights of different blocks.
    """
    block = min(weight.block & -weight.block, MOST_BLOCK)
    if block < LEAST_BLOCK:
        raise LoweringError(
            f"{node.name}: blocks of {weight.block} values; onnxruntime needs a multiple of {LEAST_BLOCK}"
        )
    blocks, repeats = weight.k // block, weight.block // block
    values = [weight.codes, weight.scales]
    if not is_symmetric(weight.zeros):
        values.append(weight.zeros)
    for value in values:
        if known.get(value, (block, repeats)) != (block, repeats):
            raise LoweringError(f"{node.name}: {value.name} is part of another weight too")
        if not isinstance(value.const_value, ir.ExternalTensor) and value not in known:
            raise LoweringError(f"{node.name}: {value.name} is not stored in a file")
    for value in values:
        if value in known:
            continue
        known[value] = (block, repeats)
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        if value is weight.codes:
            _replace(value, _as_bytes(tensor, (weight.n, blocks, block * weight.bits // 8)))
        elif repeats > 1 or (value is weight.zeros and blocks * weight.bits % 8):
            _replace(value, RepeatedBlocks(tensor, repeats, name=str(value.name)))
        elif value is weight.zeros:
            _replace(value, _as_bytes(tensor, (weight.n, _row_bytes(blocks, weight.bits))))
    return values


def is_symmetric(zeros: ir.Value) -> bool:
    """Whether all zero points are the middle code, which MatMulNBits assumes where it is given none.

    The file says so, because lowering reads no weight.
    """
    tensor = zeros.const_value
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == SYMMETRIC_ZEROS


def _as_bytes(tensor: ir.ExternalTensor, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """The same bytes as UINT8 of another shape."""
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        ir.DataType.UINT8,
        shape=ir.Shape(shape),
        name=str(tensor.name),
        base_dir=tensor.base_dir,
    )


def _replace(value: ir.Value, tensor: ir.ExternalTensor | RepeatedBlocks) -> None:
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
    value.type = ir.TensorType(tensor.dtype)


def _row_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _multiply(
    graph: ir.Graph, product: ir.Node, weight: QuantizedWeight, inputs: list[ir.Value], level: int
) -> None:
    made = ir.node(
        "MatMulNBits",
        [product.inputs[0], *inputs],
        domain=DOMAIN,
        attributes={
            "K": weight.k,
            "N": weight.n,
            "bits": weight.bits,
            "block_size": min(weight.block & -weight.block, MOST_BLOCK),
            "accuracy_level": level,
        },
        name=product.name,
    )
    (old,), (new,) = product.outputs, made.outputs
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(product, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    transpose = product.inputs[1].producer() if product.inputs[1] is not None else None
    graph.remove(product, safe=True)
    if transpose is not None and not transpose.outputs[0].uses():
        graph.remove(transpose, safe=True)


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a DequantizeLinear, and the zero points that nothing uses any more."""
    inputs = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in inputs:
        if value.is_initializer() and not value.uses():
            del graph.initializers[str(value.name)]


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    weight = quantized_weight(node)
    (old,) = node.outputs
    name = str(old.name)
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        dtype = ir.DataType(attributes.get("to", int(FP32.ir)))
        results = [(dtype, None)]
        made = f"{name}.{op_type}_{len(nodes)}"
        return append_node(nodes, op_type, inputs, made, results, attributes=attributes)[0]

    def shape(*sizes: int) -> ir.Value:
        tensor = ir.tensor(
            np.array(sizes, dtype=np.int64), name=f"blocks.{'_'.join(map(str, sizes))}"
        )
        return initializer(graph.initializers, tensor)

    def single(value: ir.Value) -> ir.Value:
        return op("Cast", value, to=int(FP32.ir))

    blocks = weight.k // weight.block
    codes, zeros = single(weight.codes), single(weight.zeros)
    scales = node.inputs[1]
    assert scales is not None
    per_block = shape(weight.n, blocks, 1)
    codes = op("Reshape", codes, shape(weight.n, blocks, weight.block))
    centred = op("Sub", codes, op("Reshape", zeros, per_block))
    made = op("Mul", centred, op("Reshape", scales, per_block))
    made = op("Reshape", made, shape(weight.n, weight.k))
    if weight.rounded in [dtype.ir for dtype in HALF]:
        made = single(op("Cast", made, to=int(weight.rounded)))
    made.shape = old.shape
    graph.insert_before(node, nodes)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
