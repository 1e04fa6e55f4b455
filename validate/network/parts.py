"""A parsed network in parts: the network is whole; its weights are read and dropped one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qwenport import contract
from qwenport.contract import INPUT_IDS, is_past, present
from qwenport.validate.network.interpreter import Interpreter, Program
from qwenport.validate.network.session import as_numpy, caches_of, share
from qwenport.validate.sites import LOGITS, hidden_states
from qwenport.validate.streaming import Feeds, Geometry, Run


class NetworkParts:
    """`streaming.Parts` of TensorRT's network of a package."""

    def __init__(self, interpreter: Interpreter, layers: int, all_layers: int) -> None:
        """Split a network into parts.

        Args:
            interpreter: the network's interpreter.
            layers: how many decoder layers to run before the final norm.
            all_layers: how many the network has.
        """
        self.num_layers = layers
        self._interpreter = interpreter
        self._hidden = hidden_states(all_layers)
        self._last = self._hidden[-1]
        self._steps = [n for n in interpreter.inputs if not is_past(n)]

    @contextmanager
    def _program(self, given: Sequence[str], wanted: Sequence[str]) -> Iterator[Program]:
        program = self._interpreter.program([*self._steps, *given], wanted)
        try:
            yield program
        finally:
            program.release()

    @contextmanager
    def prologue(self, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.prologue`."""
        with self._program((), [self._hidden[0], *observe]) as program:
            yield lambda number, feeds, hidden: _split(
                program.run(_tensors(feeds)), self._hidden[0], observe
            )

    @contextmanager
    def layer(self, index: int, sizes: Sequence[Geometry], observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.layer`."""
        entry, end = self._hidden[index : index + 2]
        caches = [caches_of(self._interpreter, size.max_batch, index) for size in sizes]
        presents = [present(cache) for cache in contract.caches(index)]
        pasts = [contract.past(cache) for cache in contract.caches(index)]
        with self._program([entry, *pasts], [end, *presents, *observe]) as program:

            def run(number: int, feeds: Feeds, hidden: torch.Tensor) -> tuple[Any, dict[str, Any]]:
                rows = len(feeds[INPUT_IDS])
                past = {name: memory[:rows] for name, memory in caches[number].items()}
                made = program.run({**_tensors(feeds), entry: hidden, **past})
                share(past, made)
                return _split(made, end, observe)

            yield run

    @contextmanager
    def epilogue(self, observe: Sequence[str]) -> Iterator[Run]:
        """See `Parts.epilogue`."""
        with self._program([self._last], [LOGITS, *observe]) as program:

            def run(number: int, feeds: Feeds, hidden: torch.Tensor) -> tuple[Any, dict[str, Any]]:
                made = program.run({**_tensors(feeds), self._last: hidden})
                logits, seen = _split(made, LOGITS, observe)
                return as_numpy(logits), seen

            yield run


def _tensors(feeds: Feeds) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def _split(
    made: dict[str, torch.Tensor], result: str, observe: Sequence[str]
) -> tuple[torch.Tensor, dict[str, Any]]:
    return made[result], {name: as_numpy(made[name]) for name in observe}
