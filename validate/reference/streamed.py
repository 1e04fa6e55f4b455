"""One decoder layer in memory at a time, for models larger than memory. The layers are transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from qwenport.exporter import DualChunk
from qwenport.validate.failures import reported
from qwenport.validate.reference.adapter import MergedAdapter
from qwenport.validate.reference.dequantization import Quantization, refuse_quantized_tied_head
from qwenport.validate.reference.dual_chunk import of_requests, use_dual_chunk
from qwenport.validate.reference.files import CONFIG, DECODER
from qwenport.validate.reference.hooks import Attach, attached
from qwenport.validate.reference.layers import LayerCalls, call_layer
from qwenport.validate.reference.loading import keep_layers, model_without_weights, torch_dtype
from qwenport.validate.reference.stored import StoredWeights
from qwenport.validate.text import Text

EMBEDDING = "model.embed_tokens."
HEAD = "lm_head."
FINAL_NORM = "model.norm."


class StreamedModel:
    """transformers' model without weights; each module gets its weights when it runs.

    Attributes:
        num_layers: decoder layers.
        rounds_inputs: whether linears round their inputs.
        rotary: transformers' rotary module.
        calls: the layers' arguments.
    """

    def __init__(
        self,
        path: Path,
        config: Any,
        rounded_to: torch.dtype | None,
        layers: int | None,
        prefix: str = DECODER,
        adapter: MergedAdapter | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        """Read the checkpoint's names and shapes; no weight is read.

        Args:
            rounded_to: round all weights to this dtype before anything else; None leaves them unchanged.
            layers: see `keep_layers`.
            prefix: the files' prefix of the decoder's tensors in place of "model.".
            adapter: the adapter that is added to the weights before they are rounded.
            quantization: how the weights are quantized that are.

        Raises:
            ValidationError: a file is damaged, a tensor is missing, misshapen or unused, or there are not that
                many layers.
        """
        with reported(path, "its weights cannot be read"):
            self._stored = StoredWeights(path, rounded_to, prefix, adapter, quantization)
        with reported(path / CONFIG, "transformers makes no model of it"):
            model = model_without_weights(config)
        tied = model.config.tie_word_embeddings
        refuse_quantized_tied_head(path, self._stored.names, tied=tied)
        for index, layer in enumerate(model.model.layers):
            self._stored.check(_layer_prefix(index), layer)
        self._head_prefix = EMBEDDING if tied else HEAD
        self._stored.check(EMBEDDING, model.model.embed_tokens)
        self._stored.check(FINAL_NORM, model.model.norm)
        self._stored.check(self._head_prefix, model.lm_head)
        with reported(path, "its scales cannot be read"):
            self.rounds_inputs = self._stored.round_inputs(model)
        keep_layers(model, layers)

        self._layers = list(model.model.layers)
        self._final_norm, self._head = model.model.norm, model.lm_head
        self.num_layers = len(self._layers)
        # Not on the meta device: a rotary module computes its frequencies when it is constructed.
        self.rotary = type(model.model.rotary_emb)(config=model.config)
        self.calls = LayerCalls(model.model, self.rotary)

    def attend_in_chunks(self, settings: DualChunk) -> None:
        """Compute dual chunk attention, which transformers ignores."""
        use_dual_chunk(self._layers, settings, self.rotary)

    def forward(
        self, texts: Sequence[Text], dtype: str, attach: Attach, attention: str
    ) -> list[torch.Tensor]:
        """The final norm's output: for each text a tensor [1, len(tokens), hidden] in `dtype`."""
        return self._pass(texts, dtype, attach, attention, None)

    def greedy(
        self, tokens: Sequence[int], count: int, attach: Attach
    ) -> tuple[list[int], torch.Tensor]:
        """`count` passes through transformers' cache, the first with all of `tokens`, then one token each.

        Returns:
            (new tokens, the logits fp32 [count, vocab] they were chosen from).
        """
        cache = DynamicCache(config=self.calls.config)
        new: list[int] = []
        logits = []
        text = Text.ending(tokens, 1)
        while len(new) < count:
            (state,) = self._pass([text], "fp32", attach, "eager", cache)
            with self.head("fp32") as head, torch.inference_mode():
                logits.append(head(state[:, -1:])[0])
            new.append(int(logits[-1].argmax()))
            text = Text.ending(new[-1:], 1, text.first_position + len(text.tokens))
        return new, torch.cat(logits)

    def embed(self, tokens: Sequence[int], dtype: str) -> torch.Tensor:
        """The tokens' embeddings, [len(tokens), hidden] in `dtype`."""
        return self._stored.rows(f"{EMBEDDING}weight", tokens, torch_dtype(dtype))

    def layer(self, index: int, dtype: str) -> AbstractContextManager[Any]:
        """The decoder layer, with weights while the context lasts."""
        return self._loaded(_layer_prefix(index), self._layers[index], dtype)

    def final_norm(self, dtype: str) -> AbstractContextManager[Any]:
        """The norm after the last layer, as `layer`."""
        return self._loaded(FINAL_NORM, self._final_norm, dtype)

    def head(self, dtype: str) -> AbstractContextManager[Any]:
        """The vocabulary projection, as `layer`."""
        return self._loaded(self._head_prefix, self._head, dtype)

    def blocks(self, prefix: str, module: torch.nn.Module) -> dict[str, int]:
        """See `StoredWeights.blocks`."""
        return self._stored.blocks(prefix, module)

    def _pass(
        self,
        texts: Sequence[Text],
        dtype: str,
        attach: Attach,
        attention: str,
        cache: DynamicCache | None,
    ) -> list[torch.Tensor]:
        states = [self.embed(text.tokens, dtype)[None] for text in texts]
        arguments = [
            self.calls(state, text.first_position, cache=cache, attention=attention)
            for text, state in zip(texts, states, strict=True)
        ]
        for index in range(self.num_layers):
            with self.layer(index, dtype) as layer:
                for number, state in enumerate(states):
                    text = texts[number]
                    with (
                        attached(attach, number, [(index, layer)]),
                        of_requests(text.first_position, text.requests),
                    ):
                        states[number] = call_layer(
                            layer, state, arguments[number][index], attention
                        )
        with self.final_norm(dtype) as norm, torch.inference_mode():
            return [norm(state) for state in states]

    def _loaded(
        self, prefix: str, module: torch.nn.Module, dtype: str
    ) -> AbstractContextManager[Any]:
        return self._stored.loaded(prefix, module, torch_dtype(dtype))


def _layer_prefix(index: int) -> str:
    return f"model.layers.{index}."
