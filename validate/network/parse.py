"""A lowered ONNX model -> TensorRT's network, with the weights left in place.

The parser gets addresses in memory-mapped files, so parsing a model of any size reads none of its weights.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qwenport.contract import BF16, DTYPES, FP16, FP32, MASKED, no_progress
from qwenport.engines import FLAVOURS, LoweringError
from qwenport.engines.apart import run_apart
from qwenport.engines.attention import attention_of
from qwenport.engines.lowering import (
    CODES_FILE,
    SignedWeight,
    change_attention,
    check_changed,
    check_graph,
    check_network,
    folded,
    for_tensorrt,
    write_tensors,
)
from qwenport.engines.targets import load_tensorrt
from qwenport.exporter import Package
from qwenport.validate.errors import NetworkError
from qwenport.validate.rope_check import TABLES, read_tables

FLAVOUR = "tensorrt-rtx"  # the one that installs anywhere; both share the parser's sources


def floating_types(trt: Any) -> dict[Any, torch.dtype]:
    """TensorRT's floating-point types -> torch's."""
    types = trt.DataType
    return {types.FLOAT: FP32.torch, types.HALF: FP16.torch, types.BF16: BF16.torch}


TORCH = {dtype.ir: dtype.torch for dtype in DTYPES.values()}
CODES = {
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT4: torch.uint8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
"""Types of signed codes -> what holds them: torch has none of 4 bits."""
INTEGERS = {ir.DataType.INT32: torch.int32}
"""Of the orders of columns that lowering makes."""


class WeightFiles:
    """Memory-mapped files, whose pages can be released."""

    def __init__(self, folder: Path, made: Path | None = None) -> None:
        """Take a folder, and another that holds what lowering has made."""
        self._folder, self._made = folder, made
        self._maps: dict[str, tuple[mmap.mmap, Any]] = {}

    def bytes_of(self, tensor: ir.ExternalTensor) -> Any:
        """The tensor's bytes, uint8 [n]; not read until they are used."""
        name = str(tensor.location)
        if name not in self._maps:
            folder = self._made if name == CODES_FILE and self._made else self._folder
            with (folder / name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[name] = (mapped, np.frombuffer(mapped, dtype=np.uint8))
        start, length = tensor.offset or 0, tensor.length
        assert length is not None
        return self._maps[name][1][start : start + length]

    def release(self) -> None:
        """Release the memory of all pages read so far; the next use reads them again."""
        for mapped, _ in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class ParsedNetwork:
    """TensorRT's network of a model.

    Attributes:
        trt: the module it comes from.
        network: the INetworkDefinition.
        dtype: the model's, "bf16", "fp16" or "fp32"; None if unknown.
        constants: name -> tensor of every floating-point initializer, of signed codes: int8 or FP8, or those of 4 bits
            as uint8 of two each, and of orders of columns: int32.
        files: the files that hold the large ones.
        owners: objects that must live as long as the network.
        complaints: what `build` would refuse in it.
        scaled: as in `Changed`.
        signed: quantized weights by the name of what is dequantized.
        made: the initializers that lowering made of the package's, by name.
    """

    trt: Any
    network: Any
    dtype: str | None
    constants: dict[str, torch.Tensor]
    files: WeightFiles
    owners: tuple[Any, ...]
    complaints: tuple[str, ...] = ()
    scaled: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    signed: Mapping[str, SignedWeight] = field(default_factory=dict)
    made: Mapping[str, ir.ExternalTensor] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[Any, str]]:
        """Every layer and the name of its kind.

        The kind is read here: once a layer is cast to its interface, `type` may be one of its own parameters.
        """
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            yield layer, layer.type.name


def parse_package(package: Package, capacity: int, form: str = MASKED) -> ParsedNetwork:
    """Lower a package as `build` does, let TensorRT parse it, and change its attention.

    Args:
        package: the package to parse.
        capacity: cache slots of a session.
        form: of attention; one of ATTENTIONS.

    Raises:
        MissingExtraError: tensorrt-rtx is not installed.
        NetworkError: TensorRT's parser refuses the model; the message is the parser's.
    """
    model, codes = for_tensorrt(
        package.read_model(),
        dtype=package.dtype,
        capacity=attention_of(form, capacity).slots,
        rope_rows=package.config.rope_rows(package.max_seq_len),
        kv_heads=package.config.num_key_value_heads,
    )
    complaints = _complaints(check_graph, model)
    folder = None
    if codes.tensors:
        folder = tempfile.TemporaryDirectory()
        write_tensors(Path(folder.name) / CODES_FILE, codes.tensors, no_progress)
    parsed = parse_model(
        model, package.path, package.dtype, made=None if folder is None else Path(folder.name)
    )
    parsed = replace(
        parsed,
        owners=(*parsed.owners, folder),
        signed={weight.node: weight for weight in codes.weights},
        made=_made(model),
    )
    complaints += _complaints(check_network, parsed.network, parsed.trt)
    try:
        changed = change_attention(parsed.network, parsed.trt, form)
    except LoweringError as error:
        return replace(parsed, complaints=(*complaints, str(error)))
    complaints += _complaints(check_changed, parsed.network, parsed.trt, form)
    return replace(
        parsed,
        complaints=complaints,
        owners=(*parsed.owners, changed.constants),
        scaled=changed.scaled,
    )


def _made(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {
        str(tensor.name): tensor
        for tensor in tensors
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == CODES_FILE
    }


def with_exact_tables(parsed: ParsedNetwork, package: Package) -> ParsedNetwork:
    """The same network with unrounded rope tables (lowering rounds them to the model's dtype).

    Raises:
        NetworkError: the package's graph has no such tables.
    """
    try:
        tables = read_tables(package)
    except KeyError as error:
        raise NetworkError(f"the graph has no table {error.args[0]}") from error
    constants = dict(parsed.constants)
    for name, table in zip(TABLES, tables, strict=True):
        constants[folded(name)] = torch.from_numpy(np.array(table))
    return replace(parsed, constants=constants)


def _complaints(check: Callable[..., None], *arguments: Any) -> tuple[str, ...]:
    try:
        check(*arguments)
    except LoweringError as error:
        return (str(error),)
    return ()


def parse_model(
    model: ir.Model, folder: Path, dtype: str | None = None, *, made: Path | None = None
) -> ParsedNetwork:
    """Let TensorRT parse a lowered model of `dtype` whose external data is below `folder`, and its new data in `made`.

    Raises:
        MissingExtraError, NetworkError: see `parse_package`.
    """
    return run_apart(lambda: _parse(model, WeightFiles(folder, made), dtype))


def _parse(model: ir.Model, files: WeightFiles, dtype: str | None) -> ParsedNetwork:
    trt = load_tensorrt(FLAVOURS[FLAVOUR], "parse the network")
    from polygraphy.backend.trt import get_trt_logger  # of the flavour just chosen
    from polygraphy.logger import G_LOGGER

    constants, kept = {}, []
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # the parser keeps its errors
        logger = get_trt_logger()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        loaded = parser.load_model_proto(ir.to_proto(model).SerializeToString(), None)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if loaded and isinstance(tensor, ir.ExternalTensor):
                data = files.bytes_of(tensor)
                kept.append(data)
                loaded = parser.load_initializer(name, data.ctypes.data, data.nbytes)
            if tensor is not None and tensor.dtype in (*TORCH, *CODES, *INTEGERS):
                constants[name] = _tensor(tensor, files)
        if not (loaded and parser.parse_model_proto()):
            raise NetworkError(f"TensorRT's parser refuses the model: {_first_error(parser)}")
    return ParsedNetwork(trt, network, dtype, constants, files, (parser, builder, logger, kept))


def _tensor(tensor: ir.TensorProtocol, files: WeightFiles) -> torch.Tensor:
    dtype = {**TORCH, **CODES, **INTEGERS}[tensor.dtype]
    shape = tuple(tensor.shape.numpy()) if dtype is not torch.uint8 else (-1,)
    if isinstance(tensor, ir.ExternalTensor):
        data = files.bytes_of(tensor)
    else:
        data = np.frombuffer(bytearray(tensor.tobytes()), dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it gave no reason"
    error = parser.get_error(0)
    where = f" ({error.node_operator()} node {error.node_name()})" if error.node_name() else ""
    return " ".join(str(error.desc()).split()) + where
