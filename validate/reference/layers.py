"""transformers' decoder layers one at a time: the arguments of the model's forward, and runs over long texts.

A layer's arguments (mask, positions, cos and sin) come from transformers' own model forward, which runs with
stand-ins for its layers; they record their arguments and compute nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference.dual_chunk import of_requests
from qwenport.validate.reference.hooks import as_float32
from qwenport.validate.reference.loading import attending, check_attention, torch_dtype
from qwenport.validate.text import Choices

Float32 = NDArray[np.float32]

# (module, choices of the piece) -> the context in which the piece runs
Agreeing = Callable[[Any, Choices | None], contextlib.AbstractContextManager[None]]


class LayerCalls:
    """transformers' model forward up to its layers: the arguments of each layer."""

    def __init__(self, model: Any, rotary: Any) -> None:
        """Take over a base model on the meta device, such as a Qwen2Model.

        Args:
            model: the model; its layers and final norm are replaced by stand-ins.
            rotary: a rotary module to replace the one on the meta device.
        """
        self._stand_in = _StandIn()
        self._model = model
        self.config = model.config
        model.rotary_emb = rotary
        model.layers = torch.nn.ModuleList([self._stand_in] * len(model.layers))
        model.norm = torch.nn.Identity()

    def __call__(
        self,
        hidden: torch.Tensor,
        first_position: int,
        *,
        cache: DynamicCache | None = None,
        attention: str = "eager",
    ) -> list[dict[str, Any]]:
        """The keyword arguments of each layer.

        Args:
            hidden: the layers' input, [1, S, hidden]; only its dtype and length matter, not its values.
            first_position: position of hidden[0, 0].
            cache: the earlier keys and values, which the mask includes.
            attention: the implementation that the mask is for.
        """
        self._stand_in.calls = []
        with attending(self.config, attention), torch.inference_mode():
            self._model(
                inputs_embeds=hidden,
                position_ids=first_position + torch.arange(hidden.shape[1])[None],
                past_key_values=cache,
                use_cache=cache is not None,
            )
        calls, self._stand_in.calls = self._stand_in.calls, []
        return calls


class _StandIn(torch.nn.Module):
    """Records the arguments of a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return hidden_states


def call_layer(module: Any, hidden: torch.Tensor, arguments: Any, attention: str) -> torch.Tensor:
    """A decoder layer's output, [1, S, hidden], given the arguments from `LayerCalls` for the same attention."""
    with attending(module.self_attn.config, attention), torch.inference_mode():
        result: torch.Tensor = module(hidden, **arguments)
    return result


class OpenLayer:
    """A decoder layer whose weights are in memory, as returned by `Reference.opened_layer`.

    Attributes:
        module: transformers' own, for hooks. Unless streamed, it is the model's own in fp32: do not change it.
    """

    def __init__(
        self, module: Any, index: int, dtype: str, calls: LayerCalls, agreeing: Agreeing
    ) -> None:
        """Made by `Reference.opened_layer`."""
        self.module = module
        self._index = index
        self._dtype = torch_dtype(dtype)
        self._calls = calls
        self._agreeing = agreeing

    def run(
        self,
        hidden: Float32,
        first_position: int = 0,
        attention: str = "eager",
        queries_at_once: int = 512,
        choices: Choices | None = None,
    ) -> Float32:
        """Run the layer on given hidden states, with transformers' cache between pieces of `queries_at_once` tokens.

        In memory are the scores of one piece, [heads, queries_at_once, S], and the keys and values of all pieces.

        Args:
            hidden: the input, fp32 [S, hidden]; it is rounded to the layer's dtype.
            first_position: position of hidden[0].
            attention: "eager" or "sdpa".
            queries_at_once: tokens per piece.
            choices: experts and FP8 codes of this layer to take over in near-ties.

        Returns:
            The layer's output, fp32 [S, hidden].

        Raises:
            ValidationError: invalid hidden states, positions, pieces or attention.
        """
        check_attention(attention)
        size = self._calls.config.hidden_size
        if hidden.ndim != 2 or hidden.shape[1] != size or not len(hidden):
            raise ValidationError(
                f"a layer runs on hidden states [S, {size}], not on {list(hidden.shape)}"
            )
        if first_position < 0 or queries_at_once < 1:
            raise ValidationError(
                f"a layer cannot run from position {first_position} in pieces of {queries_at_once} tokens"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(hidden)).to(self._dtype)
        result = self.run_tensor(tensor, first_position, attention, queries_at_once, choices)
        return as_float32(result)

    def run_tensor(
        self,
        hidden: torch.Tensor,
        first_position: int,
        attention: str,
        queries_at_once: int,
        choices: Choices | None = None,
    ) -> torch.Tensor:
        """As `run`, without checks: [S, hidden] to [S, hidden], both in the layer's dtype."""
        cache = self._cache()
        requests = [first_position + len(hidden)] * len(hidden)
        made = []
        for start in range(0, len(hidden), queries_at_once):
            stop = min(start + queries_at_once, len(hidden))
            piece = hidden[None, start:stop]
            arguments = self._calls(
                piece, first_position + start, cache=cache, attention=attention
            )[self._index]
            chosen = self._choices(choices, start, stop, len(hidden))
            with self._agreeing(self.module, chosen), of_requests(first_position, requests):
                made.append(call_layer(self.module, piece, arguments, attention)[0])
        return torch.cat(made)

    def _cache(self) -> DynamicCache:
        """transformers' cache for this layer alone.

        The mask has the length of the first layer with full attention, so this layer's part of the cache stands for
        all layers.
        """
        cache = DynamicCache(config=self._calls.config)
        cache.layers = [cache.layers[self._index]] * len(cache.layers)
        return cache

    def _choices(
        self, choices: Choices | None, start: int, stop: int, total: int
    ) -> Choices | None:
        """The choices for one piece; None if they belong to another text."""
        if choices is None:
            return None
        experts = choices.experts.get(self._index)
        rounded = choices.rounded.get(self._index, {})
        lengths = [] if experts is None else [len(experts)]
        lengths += [len(values) for values in rounded.values()]
        if not lengths or set(lengths) != {total}:
            return None
        return Choices(
            {} if experts is None else {self._index: experts[start:stop]},
            choices.margin,
            {self._index: {path: values[start:stop] for path, values in rounded.items()}},
        )
