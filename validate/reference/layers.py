"""Single decoder layers of transformers: what the model's forward calls them with, and runs over long texts.

A layer's arguments (mask, positions, cos and sin) come from transformers' own model forward, which is run with
stand-ins for its layers; they note their arguments and compute nothing.
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
from qwenport.validate.reference.hooks import as_float32
from qwenport.validate.reference.loading import attending, check_attention, torch_dtype
from qwenport.validate.text import Choices

Float32 = NDArray[np.float32]

# (module, choices of the piece) -> the context that the piece is run in
Agreeing = Callable[[Any, Choices | None], contextlib.AbstractContextManager[None]]


class LayerCalls:
    """transformers' model forward up to its layers: what each would be called with."""

    def __init__(self, model: Any, rotary: Any) -> None:
        """Take over a base model on the meta device, such as a Qwen2Model.

        Args:
            model: its layers and final norm are exchanged for stand-ins.
            rotary: its rotary module in place of the one on the meta device.
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
            hidden: what the layers run on, [1, S, hidden]; its dtype and length count, its values do not.
            first_position: of hidden[0, 0].
            cache: the keys and values that came before, which the mask includes.
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
    """Notes what a decoder layer is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return hidden_states


def call_layer(module: Any, hidden: torch.Tensor, arguments: Any, attention: str) -> torch.Tensor:
    """A decoder layer's output, [1, S, hidden], with what `LayerCalls` gives for the same attention."""
    with attending(module.self_attn.config, attention), torch.inference_mode():
        result: torch.Tensor = module(hidden, **arguments)
    return result


class OpenLayer:
    """A decoder layer whose weights are in memory, as `Reference.opened_layer` gives it.

    Attributes:
        module: transformers' own, for hooks. Unless streamed it is the model's own in fp32: do not change it.
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
        """The layer on given hidden states, with transformers' cache between pieces of `queries_at_once` tokens.

        The scores of one piece are in memory, [heads, queries_at_once, S], and the keys and values of all.

        Args:
            hidden: fp32 [S, hidden]; what it runs on, rounded to the layer's dtype.
            first_position: of hidden[0].
            attention: "eager" or "sdpa".
            queries_at_once: tokens of a piece.
            choices: experts of this layer to take over in near-ties.

        Returns:
            What leaves the layer, fp32 [S, hidden].

        Raises:
            ValidationError: there are no such hidden states, positions, pieces or attention.
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
        """As `run`, unchecked: [S, hidden] to [S, hidden], both in the layer's dtype."""
        cache = self._cache()
        made = []
        for start in range(0, len(hidden), queries_at_once):
            stop = min(start + queries_at_once, len(hidden))
            piece = hidden[None, start:stop]
            arguments = self._calls(
                piece, first_position + start, cache=cache, attention=attention
            )[self._index]
            chosen = self._choices(choices, start, stop, len(hidden))
            with self._agreeing(self.module, chosen):
                made.append(call_layer(self.module, piece, arguments, attention)[0])
        return torch.cat(made)

    def _cache(self) -> DynamicCache:
        """transformers' cache for this layer alone.

        The mask is made to the length of the first layer that has full attention; so this layer's part of the cache
        stands for all.
        """
        cache = DynamicCache(config=self._calls.config)
        cache.layers = [cache.layers[self._index]] * len(cache.layers)
        return cache

    def _choices(
        self, choices: Choices | None, start: int, stop: int, total: int
    ) -> Choices | None:
        """Those of one piece; those of another text are left out."""
        if choices is None or self._index not in choices.experts:
            return None
        experts = choices.experts[self._index]
        if len(experts) != total:
            return None
        return Choices({self._index: experts[start:stop]}, choices.margin)
