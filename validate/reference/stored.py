"""Loads weights from a checkpoint's safetensors files directly into transformers' modules, one module at a time.

The files are memory-mapped, and the pages read count as this process's memory until the file is closed. So none
stays open longer than a module needs it, or beyond OPEN_BYTES read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference.adapter import MergedAdapter
from qwenport.validate.reference.dequantization import Quantization
from qwenport.validate.reference.files import (
    BUFFERS,
    DECODER,
    known_name,
    opened,
    tensor_files,
)
from qwenport.validate.reference.rounded_inputs import RoundsExperts, RoundsInput
from qwenport.wording import cut

# transformers' stacks of experts -> the projections of one expert that are stacked in them
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
OPEN_BYTES = 1 << 28  # bytes read from files before they are closed and reopened
ROWS_AT_ONCE = 4096  # of a matrix: 134 MB for the widest published head

Index = EllipsisType | tuple[int, slice]


class StoredWeights:
    """The tensors of a checkpoint directory, by name."""

    def __init__(
        self,
        path: Path,
        rounded_to: torch.dtype | None,
        prefix: str = DECODER,
        adapter: MergedAdapter | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        """Read the names and shapes.

        Args:
            path: directory with one model.safetensors, or shards and their index.
            rounded_to: round every tensor to this dtype before it is cast; None leaves them unchanged.
            prefix: the files' prefix of the decoder's tensors in place of "model.".
            adapter: the adapter to add to the tensors.
            quantization: how the weights are quantized that are; they are dequantized as they are read.

        Raises:
            ValidationError: a file is missing or damaged.
        """
        self._adapter = adapter
        self._quantization = quantization
        self._path = path
        self._rounded_to = rounded_to
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored_names: dict[str, str] = {}
        for stored, file, shape in tensor_files(path):
            if stored.endswith(BUFFERS):
                continue
            name = known_name(stored, prefix)
            self._stored_names[name], self._files[name], self._shapes[name] = stored, file, shape
        self._quantized = set() if quantization is None else quantization.quantized(self._files)

    def check(self, prefix: str, module: torch.nn.Module) -> None:
        """Compare the tensors whose names start with `prefix` with the parameters of `module`.

        Raises:
            ValidationError: a tensor is missing, has another shape, or is unused.
        """
        used: set[str] = set()
        for name, parameter in module.state_dict().items():
            for part, where in parts_of(prefix + name, parameter.shape, self._files):
                used |= self._checked(part, tuple(parameter[where].shape), _kind(module))
        for name in sorted(self._files):
            if name.startswith(prefix) and name not in used and not self._is_zero_bias(name):
                raise ValidationError(
                    f"{cut(self._path)}: transformers' {_kind(module)} has no place for tensor {cut(name)}"
                )

    def _checked(self, weight: str, shape: tuple[int, ...], kind: str) -> set[str]:
        """The tensors that hold a weight of that shape, after comparing their shapes."""
        held = {weight: shape}
        if (quantization := self._quantization_of(weight)) is not None:
            held = quantization.tensors(weight, shape, self._files)
        self._compare(held, kind)
        return set(held)

    def _compare(self, expected: Mapping[str, tuple[int, ...]], kind: str) -> None:
        for name, shape in expected.items():
            if name not in self._files:
                raise ValidationError(
                    f"{cut(self._path)} has no tensor {cut(name)}, which transformers' {kind} needs"
                )
            one = {self._shapes[name], shape} <= {(), (1,)}  # number
            if self._shapes[name] != shape and not one:
                raise ValidationError(
                    f"{cut(self._path)}: tensor {cut(name)} has shape {list(self._shapes[name])}; "
                    f"transformers' {kind} needs {list(shape)}"
                )

    def _is_zero_bias(self, name: str) -> bool:
        """Whether it is a bias of a quantized weight, and zero: tools write one where the model has none."""
        linear = name.removesuffix(".bias")
        if linear == name or f"{linear}.weight" not in self._quantized:
            return False
        with _Reader() as reader:
            return not reader.tensor(*self.place(name)).any()

    def _quantization_of(self, weight: str) -> Quantization | None:
        """None if the weight is stored as it is."""
        return self._quantization if weight in self._quantized else None

    def blocks(self, prefix: str, module: torch.nn.Module) -> dict[str, int]:
        """Parameter of `module` -> columns that share a scale, for those that are quantized.

        Args:
            prefix: of its parameters' names.
            module: a stack of experts is one parameter.
        """
        found = {}
        for name, parameter in module.named_parameters():
            weight, _ = parts_of(prefix + name, parameter.shape, self._files)[0]
            if (quantization := self._quantization_of(weight)) is not None:
                found[name] = quantization.group(weight) or parameter.shape[-1]
        return found

    @property
    def names(self) -> list[str]:
        """transformers' names of the stored tensors."""
        return sorted(self._files)

    def dequantized(self, parameters: Container[str]) -> dict[str, torch.Tensor]:
        """Every tensor in the dtype it is stored in, quantized weights in that of their scales.

        What belongs to no weight is among them under its own name, but for biases of zeros beyond `parameters`.

        Raises:
            ValidationError: a quantized weight's tensor is missing or misshapen.
        """
        tensors: dict[str, torch.Tensor] = {}
        rest = set(self._files)
        with _Reader() as reader:
            for weight in sorted(self._quantized):
                assert self._quantization is not None
                shape = self._quantization.shape(weight, _Tensors(self, reader))
                rest -= self._checked(weight, shape, "Linear")
                if weight in rest:
                    raise ValidationError(f"{cut(self._path)}: {cut(weight)} is stored twice")
                tensors[weight] = self._stored_rows(weight, shape, 0, shape[0], reader)
            rest -= {n for n in rest if n not in parameters and self._is_zero_bias(n)}
            for name in rest:
                tensors[name] = reader.tensor(self._files[name], self._stored_names[name])
        return tensors

    def round_inputs(self, model: torch.nn.Module) -> bool:
        """Register the hooks of linears of `model` that round their input; returns whether there are any.

        Raises:
            ValidationError: a scale is missing, or the model has no such linear.
        """
        found, experts = False, dict[torch.nn.Module, dict[str, RoundsInput]]()
        with _Reader() as reader:
            for weight in sorted(self._quantized):
                assert self._quantization is not None
                hook = self._quantization.rounds_input(weight, _Tensors(self, reader))
                if hook is None:
                    continue
                name, _, one_of = weight.removesuffix(".weight").partition(".experts.")
                try:
                    module = model.get_submodule(f"{name}.experts" if one_of else name)
                except AttributeError as error:
                    raise ValidationError(
                        f"{cut(self._path)}: {cut(weight)} is no linear of transformers' model, whose input could be "
                        "rounded"
                    ) from error
                found = True
                if one_of:
                    experts.setdefault(module, {})[one_of] = hook
                else:
                    module.register_forward_pre_hook(hook)
        for module, roundings in experts.items():
            RoundsExperts(roundings).register(module)
        return found

    @contextlib.contextmanager
    def loaded(
        self, prefix: str, module: torch.nn.Module, dtype: torch.dtype
    ) -> Iterator[torch.nn.Module]:
        """Give `module`, on the meta device, the tensors under `prefix` in `dtype` while the context lasts.

        Raises:
            ValidationError: see `check`.
        """
        self.check(prefix, module)
        with _Reader() as reader:
            weights = {
                name: self._read(
                    parts_of(prefix + name, parameter.shape, self._files),
                    parameter.shape,
                    dtype,
                    reader,
                )
                for name, parameter in module.state_dict().items()
            }
        module.load_state_dict(weights, assign=True, strict=True)
        del weights  # the module owns them now
        try:
            yield module
        finally:
            module.to("meta")

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The rows `indices` of a matrix, [len(indices), columns]; no other row is read."""
        wanted = np.unique(np.asarray(indices, dtype=np.int64))
        # consecutive rows are one read
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        with _Reader() as reader:
            shape: Sequence[int] = ()
            if (quantization := self._quantization_of(name)) is not None:
                shape = quantization.shape(name, _Tensors(self, reader))
            found = [
                self._stored_rows(name, shape, int(run[0]), int(run[-1]) + 1, reader)
                for run in runs
            ]
            stored = torch.cat(found)[torch.from_numpy(np.searchsorted(wanted, indices))]
        return self._rounded(stored).to(dtype, copy=True)

    def _read(
        self,
        parts: Sequence[tuple[str, Index]],
        shape: Sequence[int],
        dtype: torch.dtype,
        reader: _Reader,
    ) -> torch.Tensor:
        result = torch.empty(shape, dtype=dtype)
        for name, where in parts:
            out = result[where]
            for start in range(0, len(out), ROWS_AT_ONCE):
                stop = start + ROWS_AT_ONCE
                stored = self._stored_rows(name, out.shape, start, stop, reader)
                if self._adapter is not None:
                    added = self._adapter.added(name, start, stop)
                    stored = stored if added is None else stored.double() + added
                out[start:stop] = self._rounded(stored)
        return result

    def _stored_rows(
        self, weight: str, shape: Sequence[int], start: int, stop: int, reader: _Reader
    ) -> torch.Tensor:
        """Rows start..stop-1 of a weight, dequantized if it is quantized."""
        stored = _Tensors(self, reader)
        if (quantization := self._quantization_of(weight)) is not None:
            return quantization.rows(weight, shape, start, stop, stored)
        return stored.rows(weight, start, stop)

    def place(self, name: str) -> tuple[Path, str]:
        """The file of a tensor, and its name there."""
        return self._files[name], self._stored_names[name]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return self._shapes

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._rounded_to is None else tensor.to(self._rounded_to)


class _Tensors:
    """What a format reads of a checkpoint: `Stored`."""

    def __init__(self, weights: StoredWeights, reader: _Reader) -> None:
        self._weights, self._reader = weights, reader

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._weights.shapes

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not self.shapes[name]:
            return self._reader.tensor(*self._weights.place(name))
        return self._reader.slices(*self._weights.place(name), slice(start, stop))

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._reader.slices(*self._weights.place(name), ..., slice(start, stop))


class _Reader(contextlib.AbstractContextManager["_Reader"]):
    """Reads tensors, and closes the files whenever OPEN_BYTES of them have been read."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._bytes = 0

    def slices(self, file: Path, name: str, *where: slice | EllipsisType) -> torch.Tensor:
        """A piece as stored in the file, which stays open while the tensor is kept."""
        return self._counted(self._content(file).get_slice(name)[where])

    def tensor(self, file: Path, name: str) -> torch.Tensor:
        """All of a tensor, as `slices`."""
        return self._counted(self._content(file).get_tensor(name))

    def _content(self, file: Path) -> Any:
        if self._bytes > OPEN_BYTES:
            self.close()
        if file not in self._open:
            self._open[file] = opened(file)
        return self._open[file]

    def _counted(self, found: torch.Tensor) -> torch.Tensor:
        self._bytes += found.nbytes
        return found

    def close(self) -> None:
        """Close all files."""
        self._open.clear()
        self._bytes = 0

    def __exit__(self, *_: object) -> None:
        self.close()


def parts_of(name: str, shape: Sequence[int], stored: Container[str]) -> list[tuple[str, Index]]:
    """The stored tensors that make up a parameter, and the place of each in it."""
    prefix, _, kind = name.rpartition(".")
    if name in stored or kind not in STACKS:
        return [(name, ...)]
    projections = STACKS[kind]
    rows = shape[1] // len(projections)
    return [
        (f"{prefix}.{expert}.{projection}.weight", (expert, slice(n * rows, (n + 1) * rows)))
        for expert in range(shape[0])
        for n, projection in enumerate(projections)
    ]


def _kind(module: torch.nn.Module) -> str:
    return type(module).__name__
