"""model.onnx on disk: its tensors, where they point, and which of them are used. No data file is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qwenport.validate.failures import reported

_INTEGERS = {
    onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.UINT16, onnx.TensorProto.INT16,
    onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64,
    onnx.TensorProto.BOOL, onnx.TensorProto.STRING, onnx.TensorProto.UINT4, onnx.TensorProto.INT4,
}  # fmt: skip
MAX_INTEGERS = 64  # in a constant of the graph, such as a target shape


@dataclass(frozen=True)
class Place:
    """An external tensor's location: bytes from the start of a file; `length` None means up to its end."""

    location: str
    offset: int
    length: int | None


def read_model(file: Path) -> onnx.ModelProto:
    """Read model.onnx.

    Raises:
        ValidationError: it is not an ONNX model, or has no graph.
    """
    model = onnx.ModelProto()
    with reported(file, "not an ONNX model"):
        model.ParseFromString(file.read_bytes())
        if not model.graph.node:
            raise ValueError("it has no graph")
        ir.from_proto(model)  # refuses duplicate names and unknown types
    return model


def check_places(model: onnx.ModelProto, package: Path) -> None:
    """Check that every external tensor lies completely in an existing file; files outside the package are skipped.

    Raises:
        ValidationError: a tensor is not.
    """
    with reported(package / "model.onnx", "damaged"):
        for tensor in (*model.graph.initializer, *inner_tensors(model)):
            place = place_of(tensor)
            if place is None or not is_inside(package, place.location):
                continue
            file = package / place.location
            if not file.is_file():
                raise ValueError(
                    f"tensor {tensor.name} lies in {place.location}, which does not exist"
                )
            if place.offset + (place.length or 0) > file.stat().st_size:
                raise ValueError(f"tensor {tensor.name} reaches past the end of {place.location}")


def is_floating(data_type: int) -> bool:
    """Whether an ONNX element type holds anything but integers, booleans and strings."""
    return data_type not in _INTEGERS


def place_of(tensor: onnx.TensorProto) -> Place | None:
    """Where a tensor points; None if its values are in model.onnx.

    Raises:
        ValueError: its location is given twice, or not in numbers.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or "location" not in entries:
        raise ValueError(f"tensor {tensor.name} does not say where it lies, or says it twice")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError:
        raise ValueError(f"tensor {tensor.name} has no number for its offset or length") from None
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"tensor {tensor.name} has a negative offset or length")
    return Place(entries["location"], offset, length)


def is_inside(package: Path, location: str) -> bool:
    """Whether a relative path stays inside the package when links are followed."""
    parts = Path(location).parts
    if not parts or Path(location).is_absolute() or ".." in parts or "\\" in location:
        return False
    try:
        return (package / location).resolve().is_relative_to(package.resolve())
    except (OSError, ValueError, RuntimeError):  # a symlink loop, or an impossible file name
        return False


def inner_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors except the graph's initializers: in attributes, subgraphs and functions, and sparse ones."""
    yield from _sparse(model.graph.sparse_initializer)
    yield from _of_nodes(model.graph.node)
    for function in model.functions:
        yield from _of_nodes(function.node)
        for attribute in function.attribute_proto:
            yield from _of_attribute(attribute)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _sparse(graph.sparse_initializer)
    yield from _of_nodes(graph.node)


def _sparse(tensors: Any) -> Iterator[onnx.TensorProto]:
    for tensor in tensors:
        yield from (tensor.values, tensor.indices)


def _of_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _of_attribute(attribute)


def _of_attribute(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    yield from _sparse((attribute.sparse_tensor, *attribute.sparse_tensors))
    if attribute.HasField("g"):
        yield from _of_graph(attribute.g)
    for graph in attribute.graphs:
        yield from _of_graph(graph)
    if len(attribute.floats) > 1:
        yield onnx.TensorProto(
            name=attribute.name, data_type=onnx.TensorProto.FLOAT, dims=[len(attribute.floats)]
        )


def used_values(graph: onnx.GraphProto) -> set[str]:
    """Names of all values used by a node (including in subgraphs) or a graph output."""
    used = {output.name for output in graph.output}
    for node in graph.node:
        used.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    used |= used_values(inner)
    return used
