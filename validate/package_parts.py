"""A package in parts for onnxruntime: the graph is cut at the hidden states, and each piece is a separate session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport import contract
from qwenport.contract import INPUT_IDS, is_past, past, present
from qwenport.engines import start_onnxruntime
from qwenport.engines.lowering import for_onnxruntime
from qwenport.engines.memory import untouched_zeros
from qwenport.exporter import Package
from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.validate.run import CandidateError, InseparableError
from qwenport.validate.sites import LOGITS, hidden_states
from qwenport.validate.streaming import Feeds, Geometry, Run
from qwenport.wording import cut

on_cpu = partial(for_onnxruntime, on_cpu=True)

FLOAT = 1  # onnx.TensorProto.FLOAT


class PackageParts:
    """`streaming.Parts` of a package, on the CPU in fp32."""

    def __init__(
        self, package: Package, layers: int, lower: Callable[[ir.Model], ir.Model] = on_cpu
    ) -> None:
        """Lower the graph; no weight is read.

        Args:
            package: the whole package.
            layers: how many decoder layers to run before the final norm.
            lower: lowers the package's graph.

        Raises:
            ValidationError: a node uses a value that no node produces.
        """
        self.num_layers = layers
        self._package = package
        model = package.read_model()
        _check_values(model, package)
        self._model = lower(model)
        self._inputs = [str(value.name) for value in self._model.graph.inputs]
        self._hidden = hidden_states(package.config.num_hidden_layers)

    def _cut(self, given: Sequence[str], wanted: Sequence[str]) -> Any:
        """A session for the piece of the graph between two sets of values.

        Raises:
            InseparableError: the piece needs more than the given values, for instance another layer's cache.
        """
        try:
            graph = ir.convenience.extract(self._model.graph, given, wanted)
        except ValueError as error:
            raise InseparableError(
                f"the graph cannot be cut before {wanted[0]}: {' '.join(str(error).split())}"
            ) from error
        used = {value for node in graph for value in node.inputs}
        for value in [*graph.inputs]:
            if value not in used:
                graph.inputs.remove(value)
        piece = ir.Model(
            graph, ir_version=self._model.ir_version, functions=list(self._model.functions.values())
        )
        with reported(self._package.path, "does not load"):
            serialized = ir.to_proto(piece).SerializeToString()
            return _Session(start_onnxruntime(serialized, self._package.path))

    def _steps(self) -> list[str]:
        """The inputs that every part may read."""
        return [name for name in self._inputs if not is_past(name)]

    @contextmanager
    def prologue(self, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.prologue`."""
        wanted = [self._hidden[0]]
        session = self._cut(self._steps(), wanted)

        def run(number: int, feeds: Feeds, hidden: None) -> tuple[Any, dict[str, Any]]:
            (result,) = session.run(wanted, _known(session, feeds))
            return result, dict.fromkeys(observe, result)

        yield run

    @contextmanager
    def layer(self, index: int, sizes: Sequence[Geometry], observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.layer`."""
        entry, end = self._hidden[index : index + 2]
        names = contract.caches(index)
        caches = [{name: self._empty(size) for name in names} for size in sizes]
        given = [*self._steps(), entry, *map(past, names)]
        wanted = [end, *(name for name in observe if name != end)]
        session = self._cut(given, [*wanted, *map(present, names)])
        taken = {value.name for value in session.get_inputs()}

        def run(number: int, feeds: Feeds, hidden: Any) -> tuple[Any, dict[str, Any]]:
            binding = session.io_binding()
            for name, array in {**feeds, entry: hidden}.items():
                if name in taken:
                    binding.bind_cpu_input(name, np.ascontiguousarray(array))
            for name in wanted:
                binding.bind_output(name, "cpu")
            rows = len(feeds[INPUT_IDS])
            for name, memory in caches[number].items():
                # past and present are the same memory, as in a session: nothing is copied
                place = ("cpu", 0, FLOAT, [rows, *memory.shape[1:]], memory.ctypes.data)
                if past(name) in taken:
                    binding.bind_input(past(name), *place)
                binding.bind_output(present(name), *place)
            session.run_with_iobinding(binding)
            made = [value.numpy() for value in binding.get_outputs()[: len(wanted)]]
            values = dict(zip(wanted, made, strict=True))
            return made[0], {name: values[name] for name in observe}

        yield run

    @contextmanager
    def epilogue(self, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.epilogue`."""
        entry = self._hidden[-1]
        wanted = [LOGITS, *observe]
        session = self._cut([*self._steps(), entry], wanted)

        def run(number: int, feeds: Feeds, hidden: Any) -> tuple[Any, dict[str, Any]]:
            logits, *rest = session.run(wanted, _known(session, {**feeds, entry: hidden}))
            return logits, dict(zip(observe, rest, strict=True))

        yield run

    def _empty(self, size: Geometry) -> Any:
        """A cache, [max_batch, heads, capacity, head_dim]."""
        config = self._package.config
        shape = (size.max_batch, config.num_key_value_heads, size.capacity, config.head_dim)
        return untouched_zeros(shape, np.float32)


class _Session:
    """An onnxruntime session; an exception while it runs is the target's failure."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> Any:
        return self._guard(self._session.run, *arguments)

    def run_with_iobinding(self, binding: Any) -> None:
        self._guard(self._session.run_with_iobinding, binding)

    @staticmethod
    def _guard(method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:  # onnxruntime's exceptions have no base class
            raise CandidateError(f"the target raised {type(error).__name__}: {error}") from error


def _known(session: Any, values: dict[str, Any] | Feeds) -> dict[str, Any]:
    return {value.name: values[value.name] for value in session.get_inputs()}


def _check_values(model: ir.Model, package: Package) -> None:
    """Refuse a graph that no runtime loads, as for the whole package; cut into pieces it would look like a fault.

    Raises:
        ValidationError: a node uses a value that no node produces.
    """
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and value not in known:
                raise ValidationError(
                    f"{cut(package.path)} does not load: nothing makes the value {cut(value.name)}, "
                    f"which node {cut(node.name)} is given"
                )
