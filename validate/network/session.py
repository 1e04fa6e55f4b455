"""A session over an interpreted network: the same steps as on an engine, with the cache updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qwenport.contract import INPUT_IDS, SCORE_BYTES, caches, is_past, past, present_of
from qwenport.engines import MAX_STEP_LOGITS, MAX_STEP_TOKENS, CachedSession, SessionError
from qwenport.engines.memory import untouched_zeros
from qwenport.engines.session import Float32, Int64
from qwenport.engines.spans import Spans
from qwenport.exporter import ModelConfig
from qwenport.validate.network.interpreter import Interpreter
from qwenport.validate.sites import LOGITS


class NetworkSession(CachedSession):
    """`Session` over TensorRT's network of a package."""

    def __init__(
        self,
        interpreter: Interpreter,
        config: ModelConfig,
        *,
        max_batch: int,
        capacity: int,
        max_positions: int,
        spans: Spans | None = None,
        observe: Sequence[str] = (),
    ) -> None:
        """Allocate the cache, with as many slots as the network was parsed for.

        Args:
            interpreter: the parsed network's interpreter.
            config: the model's config.
            max_batch: rows.
            capacity: usable slots per row, as for an engine's session.
            max_positions: rows of the rope tables.
            spans: as for `CachedSession`.
            observe: tensors of the network that each step leaves in `observed`.

        Raises:
            SessionError: the network has no such tensor to observe.
            NetworkError: see `Interpreter.program`.
        """
        chunks = config.dual_chunk
        super().__init__(
            max_batch=max_batch,
            capacity=capacity,
            vocab_size=config.vocab_size,
            max_step_tokens=MAX_STEP_TOKENS,
            max_step_logits=MAX_STEP_LOGITS,
            max_positions=max_positions,
            spans=spans,
            unscaled_length=None if chunks is None else chunks.original_max_position_embeddings,
            score_bytes=0 if chunks is None else SCORE_BYTES * config.num_attention_heads,
        )
        for name in observe:
            if not interpreter.has(name):
                raise SessionError(f"the network has no tensor {name} that could be observed")
        self._cache = caches_of(interpreter, max_batch)
        self._observe = tuple(observe)
        presents = map(present_of, self._cache)
        wanted = (LOGITS, *presents, *self._observe)
        self._program = interpreter.program(interpreter.inputs, wanted)

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        rows = len(feeds[INPUT_IDS])
        known = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
        caches = {name: memory[:rows] for name, memory in self._cache.items()}
        made = self._program.run({**known, **caches})
        share(caches, made)
        self.observed = {name: as_numpy(made[name]) for name in self._observe}
        logits: Float32 = made[LOGITS].numpy()
        return logits


def caches_of(
    interpreter: Interpreter, rows: int, layer: int | None = None
) -> dict[str, torch.Tensor]:
    """Zeroed memory of `rows` rows for every cache input of the network, or for one layer's."""
    network = interpreter.parsed.network
    wanted = None if layer is None else {past(cache) for cache in caches(layer)}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return {
        tensor.name: _zeros((rows, *tuple(tensor.shape)[1:]), interpreter.type_of(tensor))
        for tensor in inputs
        if is_past(tensor.name) and (wanted is None or tensor.name in wanted)
    }


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    zeros = untouched_zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
    return torch.from_numpy(zeros).view(dtype)


def share(caches: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> None:
    """Let `present` be `past`: in an engine they are the same memory, whichever layer wrote it."""
    for name, memory in caches.items():
        present = made[present_of(name)]
        if present.data_ptr() != memory.data_ptr():
            memory.copy_(present)


def as_numpy(tensor: torch.Tensor) -> Any:
    """A NumPy array; NumPy has no bf16, so that becomes fp32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
