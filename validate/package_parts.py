"""A package in parts for onnxruntime: the graph is cut at the hidden states, and each piece is a session of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport.engines import start_onnxruntime
from qwenport.engines.lowering import for_onnxruntime
from qwenport.exporter import Package
from qwenport.validate.sites import LOGITS, hidden_states
from qwenport.validate.streaming import Feeds, Run


class PackageParts:
    """`streaming.Parts` of a package, on the CPU in fp32."""

    def __init__(self, package: Package, layers: int, capacity: int) -> None:
        """Lower the graph; no weight is read.

        Args:
            package: the whole.
            layers: how many decoder layers to run before the final norm.
            capacity: cache slots a row.
        """
        self.num_layers = layers
        self._package, self._capacity = package, capacity
        self._model = for_onnxruntime(ir.load(package.model), on_cpu=True)
        self._inputs = [str(value.name) for value in self._model.graph.inputs]
        self._hidden = hidden_states(layers)

    def _cut(self, given: Sequence[str], wanted: Sequence[str]) -> Any:
        """A session of the piece of the graph between some values and others.

        Raises:
            ValueError: the piece needs more than is given, for instance another layer's cache.
        """
        graph = ir.convenience.extract(self._model.graph, given, wanted)
        used = {value for node in graph for value in node.inputs}
        for value in [*graph.inputs]:
            if value not in used:
                graph.inputs.remove(value)
        piece = ir.Model(
            graph, ir_version=self._model.ir_version, functions=list(self._model.functions.values())
        )
        return start_onnxruntime(piece, self._package.path)

    def _steps(self) -> list[str]:
        """The inputs that every part may read."""
        return [name for name in self._inputs if not name.startswith("past_key_values.")]

    @contextmanager
    def prologue(self, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.prologue`."""
        wanted = [self._hidden[0]]
        session = self._cut(self._steps(), wanted)

        def run(feeds: Feeds, hidden: None) -> tuple[Any, dict[str, Any]]:
            (result,) = session.run(wanted, _known(session, feeds))
            return result, dict.fromkeys(observe, result)

        yield run

    @contextmanager
    def layer(self, index: int, max_batch: int, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.layer`."""
        entry, end = self._hidden[index : index + 2]
        caches = {
            f"{index}.{part}": self._empty(f"past_key_values.{index}.{part}", max_batch)
            for part in ("key", "value")
        }
        given = [*self._steps(), entry, *(f"past_key_values.{name}" for name in caches)]
        presents = [f"present.{name}" for name in caches]
        inside = [name for name in observe if name != end]
        wanted = [end, *presents, *inside]
        session = self._cut(given, wanted)

        def run(feeds: Feeds, hidden: Any) -> tuple[Any, dict[str, Any]]:
            rows = len(feeds["input_ids"])
            past = {f"past_key_values.{name}": memory[:rows] for name, memory in caches.items()}
            known = _known(session, {**feeds, **past, entry: hidden})
            result, *rest = session.run(wanted, known)
            for memory, present in zip(caches.values(), rest, strict=False):
                memory[:rows] = present
            values = dict(zip(inside, rest[len(presents) :], strict=True))
            return result, {name: values.get(name, result) for name in observe}

        yield run

    @contextmanager
    def epilogue(self, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.epilogue`."""
        entry = hidden_states(self._package.config.num_hidden_layers)[-1]
        wanted = [LOGITS, *observe]
        session = self._cut([*self._steps(), entry], wanted)

        def run(feeds: Feeds, hidden: Any) -> tuple[Any, dict[str, Any]]:
            logits, *rest = session.run(wanted, _known(session, {**feeds, entry: hidden}))
            return logits, dict(zip(observe, rest, strict=True))

        yield run

    def _empty(self, name: str, rows: int) -> Any:
        (value,) = [value for value in self._model.graph.inputs if value.name == name]
        sizes = list(value.shape or ())[1:]
        shape = [rows, *(size if isinstance(size, int) else self._capacity for size in sizes)]
        return np.zeros(shape, dtype=np.float32)


def _known(session: Any, values: dict[str, Any] | Feeds) -> dict[str, Any]:
    return {value.name: values[value.name] for value in session.get_inputs()}
