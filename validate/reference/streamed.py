"""One decoder layer in memory at a time, for models larger than memory. The layers are transformers' own.

What a layer is called with (mask, positions, cos and sin) comes from transformers' own model forward as well: it is
run with stand-ins for its layers, which note their arguments and compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from qwenport.validate.reference.hooks import Attach, attached
from qwenport.validate.reference.loading import EAGER, keep_layers, torch_dtype
from qwenport.validate.reference.stored import StoredWeights
from qwenport.validate.text import Text

EMBEDDING = "model.embed_tokens."
HEAD = "lm_head."
FINAL_NORM = "model.norm."


class StreamedModel:
    """transformers' model without weights, which its modules get when they run.

    Attributes:
        num_layers: decoder layers.
        rotary: transformers' rotary module.
    """

    def __init__(
        self, path: Path, config: Any, rounded_to: torch.dtype | None, layers: int | None
    ) -> None:
        """Look at the checkpoint's names and shapes; no weight is read.

        Args:
            rounded_to: round all weights to this dtype before anything else; None leaves them.
            layers: see `keep_layers`.

        Raises:
            ValidationError: a tensor is missing, misshapen or not used, or there are not that many layers.
        """
        self._stored = StoredWeights(path, rounded_to)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER)
        model.eval().requires_grad_(False)
        for index, layer in enumerate(model.model.layers):
            self._stored.check(_layer_prefix(index), layer)
        self._head_prefix = EMBEDDING if model.config.tie_word_embeddings else HEAD
        self._stored.check(EMBEDDING, model.model.embed_tokens)
        self._stored.check(FINAL_NORM, model.model.norm)
        self._stored.check(self._head_prefix, model.lm_head)
        keep_layers(model, layers)

        self._layers, self._final_norm, self._head = (
            list(model.model.layers),
            model.model.norm,
            model.lm_head,
        )
        self.num_layers = len(self._layers)
        # Without the meta device: a rotary module computes its frequencies when it is made.
        self.rotary = type(model.model.rotary_emb)(config=model.config)
        self._stand_in = _StandIn()
        self._model = model.model
        self._model.rotary_emb = self.rotary
        self._model.layers = torch.nn.ModuleList([self._stand_in] * self.num_layers)
        self._model.norm = torch.nn.Identity()

    def forward(self, texts: Sequence[Text], dtype: str, attach: Attach) -> list[torch.Tensor]:
        """What leaves the final norm: for each text a tensor [1, len(tokens), hidden] in `dtype`."""
        return self._pass(texts, dtype, attach, None)

    def greedy(
        self, tokens: Sequence[int], count: int, attach: Attach
    ) -> tuple[list[int], torch.Tensor]:
        """`count` passes through transformers' cache, the first with all of `tokens`, then a token each.

        Returns:
            (new tokens, the logits fp32 [count, vocab] they were chosen from).
        """
        cache = DynamicCache(config=self._model.config)
        new: list[int] = []
        logits = []
        text = Text(tuple(tokens), last=1)
        while len(new) < count:
            (state,) = self._pass([text], "fp32", attach, cache)
            with self.head("fp32") as head, torch.inference_mode():
                logits.append(head(state[:, -1:])[0])
            new.append(int(logits[-1].argmax()))
            text = Text((new[-1],), last=1, first_position=text.first_position + len(text.tokens))
        return new, torch.cat(logits)

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """The tokens' embeddings, fp32 [len(tokens), hidden]."""
        return self._rows(tokens, "fp32")

    def layer(self, index: int, dtype: str) -> AbstractContextManager[Any]:
        """The decoder layer, with weights for the time of the context."""
        return self._loaded(_layer_prefix(index), self._layers[index], dtype)

    def final_norm(self, dtype: str) -> AbstractContextManager[Any]:
        """The norm after the last layer, as `layer`."""
        return self._loaded(FINAL_NORM, self._final_norm, dtype)

    def head(self, dtype: str) -> AbstractContextManager[Any]:
        """The vocabulary projection, as `layer`."""
        return self._loaded(self._head_prefix, self._head, dtype)

    def _pass(
        self, texts: Sequence[Text], dtype: str, attach: Attach, cache: DynamicCache | None
    ) -> list[torch.Tensor]:
        with torch.inference_mode():
            entries = [self._enter(text, dtype, cache) for text in texts]
            states = [state for state, _ in entries]
            for index in range(self.num_layers):
                with self.layer(index, dtype) as layer:
                    for number, (_, arguments) in enumerate(entries):
                        with attached(attach, number, [(index, layer)]):
                            states[number] = layer(states[number], **arguments[index])
            with self.final_norm(dtype) as norm:
                return [norm(state) for state in states]

    def _enter(
        self, text: Text, dtype: str, cache: DynamicCache | None
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """What the first layer is given, and what each layer is given beside it."""
        self._stand_in.calls = []
        self._model(
            inputs_embeds=self._rows(text.tokens, dtype)[None],
            position_ids=text.first_position + torch.arange(len(text.tokens))[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states, arguments = zip(*self._stand_in.calls, strict=True)
        return states[0], list(arguments)

    def _rows(self, tokens: Sequence[int], dtype: str) -> torch.Tensor:
        return self._stored.rows(f"{EMBEDDING}weight", tokens, torch_dtype(dtype))

    def _loaded(
        self, prefix: str, module: torch.nn.Module, dtype: str
    ) -> AbstractContextManager[Any]:
        return self._stored.loaded(prefix, module, torch_dtype(dtype))


class _StandIn(torch.nn.Module):
    """Notes what a decoder layer is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append((hidden_states, arguments))
        return hidden_states


def _layer_prefix(index: int) -> str:
    return f"model.layers.{index}."
