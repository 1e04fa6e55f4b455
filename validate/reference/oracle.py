"""The oracle: transformers' own model, in fp32, from the checkpoint itself. None of the exporter's code computes here.

Two settings make the oracle answer the same question as the target: the rope settings requested at export are put
into the config, and where transformers would change frequencies with the length of the text (dynamic, longrope),
they are pinned to the length that the target's tables were made for.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenport.contract import E4M3, INT8, Progress, no_progress
from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.validate.quiet import quiet_transformers
from qwenport.validate.reference.adapter import MergedAdapter
from qwenport.validate.reference.dequantization import read_quantization
from qwenport.validate.reference.files import CONFIG, visible_to_transformers
from qwenport.validate.reference.hooks import (
    Attach,
    as_float32,
    attached,
    counting,
    recording_routes,
    recording_states,
    replaying,
    together,
)
from qwenport.validate.reference.int8 import RoundingActivations, rounding_activations
from qwenport.validate.reference.layers import OpenLayer, call_layer
from qwenport.validate.reference.loading import (
    check_attention,
    pin_rope,
    read_config,
    torch_dtype,
)
from qwenport.validate.reference.rounded_inputs import (
    agreeing,
    as_multiplied,
    moving,
    moving_inputs,
    recorded,
    taking_over,
)
from qwenport.validate.reference.streamed import StreamedModel
from qwenport.validate.reference.whole import WholeModel
from qwenport.validate.target import Target
from qwenport.validate.text import Choices, Text
from qwenport.wording import one_line

ROWS_AT_ONCE = 8192  # of the vocabulary matrix

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class Reference:
    """transformers' model of a checkpoint, in fp32 or a requested dtype, set up as the target was exported.

    Every method that takes a dtype takes "fp32", "bf16", "fp16" or "fp64", and raises ValidationError for another.
    Weights are in that dtype; rope frequencies are always computed in fp32, and so are, in transformers' code, the
    normalisations and softmaxes.

    Attributes:
        vocab_size: logits per position.
        num_layers: number of decoder layers used.
        weights_note: a description of the weights, for a reviewer.
        routed: whether tokens go to experts, whose choice rounding may change.
        rounds_inputs: whether linears round their inputs to FP8.
        replayed: number of expert choices and FP8 codes taken over so far, in all calls together.
    """

    def __init__(
        self,
        target: Target,
        checkpoint_path: Path,
        *,
        layers: int | None = None,
        streamed: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        """Load the checkpoint, or only inspect its files if it is streamed.

        Args:
            target: the target, whose dtype, rope settings and rope length apply.
            checkpoint_path: the checkpoint directory that the target was made from (see `check_source`).
            layers: use the first `layers` decoder layers, then final norm and head; None uses all.
            streamed: hold the weights of one layer at a time, for models larger than memory. The results are
                the same to the last bit; each call reads all weights once, `greedy` once per new token.
            progress: called after each layer of each text.

        Raises:
            ValidationError: transformers does not load the whole checkpoint, or there are not that many layers.
                It is one line of at most 300 characters, whatever transformers, torch or safetensors raised.
        """
        self.vocab_size = target.config.vocab_size
        self.routed = target.config.moe is not None
        self.weights_note = "fp32"
        rounded_to = None
        if target.dtype != target.source["dtype"] or target.source["converted"] or target.merged:
            self.weights_note = f"fp32, weights rounded to {target.dtype} first"
            rounded_to = torch_dtype(target.dtype)
        kind = StreamedModel if streamed else WholeModel
        with quiet_transformers(), reported(checkpoint_path, "transformers cannot use it"):
            config = _read_config(checkpoint_path, target.rope_scaling)
            adapter = MergedAdapter(checkpoint_path) if target.merged else None
            quantization = read_quantization(checkpoint_path)
            if quantization is not None:
                self.weights_note += f"; dequantized by {quantization.dequantized_by}"
            prefix = target.source["prefix"]
            self._model: StreamedModel | WholeModel = kind(
                checkpoint_path, config, rounded_to, layers, prefix, adapter, quantization
            )
            if target.config.rope.depends_on_length:
                pin_rope(self._model.rotary, target.rope_length)
            if target.config.dual_chunk is not None:
                self._model.attend_in_chunks(target.config.dual_chunk)
        self.num_layers = self._model.num_layers
        self.rounds_inputs = self._model.rounds_inputs
        self.replayed = 0
        self._progress = progress
        self._greedy: dict[tuple[tuple[int, ...], int], tuple[list[int], Float32]] = {}

    def logits(
        self,
        texts: Sequence[Text],
        dtype: str = "fp32",
        choices: Sequence[Choices | None] | None = None,
        attention: str = "eager",
    ) -> list[Float32]:
        """Run each text in one piece and without a cache.

        Args:
            dtype: the dtype that the model computes in; INT8 is fp32 with activations of products rounded to int8,
                E4M3 is fp32 with inputs moved a little before they are rounded to FP8.
            choices: for each text, experts to take over in near-ties. Their weights follow from the router's
                probabilities; `replayed` counts them.
            attention: which of transformers' implementations to use: "eager", plain operators one after another,
                or "sdpa", torch's scaled_dot_product_attention.

        Returns:
            For each text the logits of its `positions`, fp32 [len(positions), vocab].

        Raises:
            ValidationError: the model cannot run a text, or an unknown attention.
        """
        states = self._forward("logits", texts, dtype, choices, attention)
        wanted = [state[:, list(text.positions)] for text, state in zip(texts, states, strict=True)]
        del states
        with self.head(dtype) as head, torch.inference_mode():
            return [as_float32(head(rows)[0]) for rows in wanted]

    def hidden_states(
        self,
        texts: Sequence[Text],
        dtype: str = "fp32",
        choices: Sequence[Choices | None] | None = None,
        attention: str = "eager",
    ) -> list[list[Float32]]:
        """For each text the output of the embedding and then of each decoder layer: num_layers + 1 arrays.

        Each is fp32 [len(tokens), hidden]; the final norm is not applied to any. Arguments and errors as in `logits`.
        """
        found: list[list[Float32]] = [[] for _ in texts]
        self._forward("hidden states", texts, dtype, choices, attention, recording_states(found))
        return found

    def routing(
        self,
        texts: Sequence[Text],
        dtype: str = "fp32",
        choices: Sequence[Choices | None] | None = None,
        attention: str = "eager",
    ) -> list[dict[int, tuple[Float32, Int64]]]:
        """The routers' logits and choices for each text. Arguments and errors as in `logits`.

        Returns:
            For each text: sparse layer -> (router logits fp32 [len(tokens), E], its own choice, before any choice
            is taken over, int64 [len(tokens), k]).
        """
        found: list[dict[int, tuple[Float32, Int64]]] = [{} for _ in texts]
        self._forward("routing", texts, dtype, choices, attention, recording_routes(found))
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], Float32]:
        """transformers' own greedy `generate`, with no stop token and none of the checkpoint's sampling.

        Returns:
            (`count` new token ids, the logits fp32 [count, vocab] that each was chosen from).

        Raises:
            ValidationError: generate did not take the most likely token.
        """
        key = (tuple(tokens), count)
        if key not in self._greedy:
            _check_texts([Text(tuple(tokens), ())], self.vocab_size)
            new, logits = self._model.greedy(tokens, count, self._counting("greedy", count))
            if len(new) != count or new != logits.argmax(dim=1).tolist():
                raise ValidationError(
                    "transformers' generate() did not decode greedily; it cannot judge"
                )
            self._greedy[key] = new, as_float32(logits)
        return self._greedy[key]

    def own_rounding(self, tokens: Sequence[int], pieces: int = 8) -> float:
        """The error of transformers' fp32 logits from rounding alone: the larger of two distances.

        One is between its logits through its cache in pieces and in one piece. The other is between those in one piece
        and its logits in fp64: if a few channels dwarf the rest, sums lose precision that the first does not show.
        Where inputs are rounded to FP8, all three have the codes of those in one piece, unless they are further off.

        Args:
            pieces: the number of pieces, equally long except for the last; fewer if there are fewer tokens. Pieces
                of more than 8 tokens may round exactly as the whole text does, and then nothing is measured.

        Returns:
            rel-L2 over the logits of the last half of the tokens.

        Raises:
            ValidationError: the model cannot run the tokens, or there are fewer than two pieces.
        """
        text = Text(tuple(tokens), tuple(range(len(tokens) // 2, len(tokens))))
        _check_texts([text], self.vocab_size)
        if pieces < 2:
            raise ValidationError(
                f"a text in {pieces} pieces does not differ from one in one piece"
            )
        sizes = (len(tokens), -(-len(tokens) // pieces))
        states = [self._model.embed(tokens, "fp32")] * 2
        exact = self._model.embed(tokens, "fp64")
        tick = self._counter("own rounding", 1)
        for index in range(self.num_layers):
            with self.opened_layer(index, "fp32") as layer:
                with recorded(layer.module) as codes:
                    whole_state = layer.run_tensor(states[0], 0, "eager", sizes[0])
                    same = Choices({}, 0.0, {index: codes()})
                states = [whole_state, layer.run_tensor(states[1], 0, "eager", sizes[1], same)]
            with self.opened_layer(index, "fp64") as layer:
                exact = layer.run_tensor(exact, 0, "eager", len(tokens), same)
            tick()
        wanted = [state[None, list(text.positions)] for state in (*states, exact)]
        with self._model.final_norm("fp32") as norm, torch.inference_mode():
            wanted[:2] = [norm(rows) for rows in wanted[:2]]
        with self._model.final_norm("fp64") as norm, torch.inference_mode():
            right = norm(wanted[2])
        with self._model.head("fp32") as head, torch.inference_mode():
            with recorded(head) as codes:
                whole, given = head(wanted[0])[0], codes()
            with taking_over(head, given, lambda count: None):
                cached, right = head(wanted[1])[0], as_multiplied(head, right)
            # a large vocabulary in fp64 would take gigabytes: only some of its rows at a time
            parts = [right[0] @ rows.double().T for rows in head.weight.split(ROWS_AT_ONCE)]
        size = torch.linalg.norm(whole.double())
        differences = (cached - whole).double(), whole.double() - torch.cat(parts, dim=1)
        return max(float(torch.linalg.norm(d) / size) if d.any() else 0.0 for d in differences)

    def first_nonfinite(self, text: Text, dtype: str, attention: str = "eager") -> int | str | None:
        """Where an infinity or NaN first appears when transformers runs the text in `dtype`.

        Later layers are not run, and not read if streamed.

        Returns:
            "embedding", the index of the decoder layer that produces it from finite hidden states, "final norm and
            lm_head" (for all tokens and the logits at `text.positions`), or None if everything is finite.

        Raises:
            ValidationError: as in `logits`.
        """
        torch_dtype(dtype)
        check_attention(attention)
        _check_texts([text], self.vocab_size)
        state = self._model.embed(text.tokens, dtype)[None]
        if not state.isfinite().all():
            return "embedding"
        arguments = self._model.calls(state, text.first_position, attention=attention)
        tick = self._counter("first non-finite value", 1)
        for index in range(self.num_layers):
            with self._model.layer(index, dtype) as layer:
                state = call_layer(layer, state, arguments[index], attention)
            tick()
            if not state.isfinite().all():
                return index
        with self._model.final_norm(dtype) as norm, torch.inference_mode():
            state = norm(state)
        with self._model.head(dtype) as head, torch.inference_mode():
            logits = head(state[:, list(text.positions)])
        finite = state.isfinite().all() and logits.isfinite().all()
        return None if finite else "final norm and lm_head"

    def run_layer(
        self,
        index: int,
        dtype: str,
        hidden: Float32,
        first_position: int = 0,
        attention: str = "eager",
        queries_at_once: int = 512,
        choices: Choices | None = None,
    ) -> Float32:
        """Run decoder layer `index` on given hidden states, fp32 [S, hidden] to [S, hidden]; see `OpenLayer.run`."""
        with self.opened_layer(index, dtype) as layer:
            return layer.run(hidden, first_position, attention, queries_at_once, choices)

    @contextlib.contextmanager
    def opened_layer(self, index: int, dtype: str) -> Iterator[OpenLayer]:
        """Decoder layer `index` in `dtype`, to run on any number of hidden states (`OpenLayer.run`).

        Raises:
            ValidationError: no such layer or dtype.
        """
        with self.layer(index, dtype) as module:

            def agreeing(module: Any, choices: Choices | None) -> Any:
                return self.agreeing(module, index, choices)

            yield OpenLayer(module, index, dtype, self._model.calls, agreeing)

    @contextlib.contextmanager
    def layer(self, index: int, dtype: str) -> Iterator[Any]:
        """transformers' decoder layer `index` with its weights in `dtype`, while the context lasts.

        In fp32, unless streamed, it is the model's own: do not change it.
        """
        torch_dtype(dtype)
        if not 0 <= index < self.num_layers:
            raise ValidationError(f"layer {index} is not one of the {self.num_layers} layers")
        rounding = together(*self._rounding_activations(dtype))
        with (
            self._model.layer(index, dtype) as module,
            attached(rounding, 0, [(index, module)]),
        ):
            yield module

    @contextlib.contextmanager
    def agreeing(self, module: Any, index: int, choices: Choices | None) -> Iterator[None]:
        """Make decoder layer `index`, from `layer`, take over choices in near-ties while the context lasts."""
        with attached(self._replaying([choices]), 0, [(index, module)]):
            yield

    @contextlib.contextmanager
    def final_norm(self, dtype: str) -> Iterator[Any]:
        """transformers' norm after the last layer, as `layer`."""
        torch_dtype(dtype)
        with self._model.final_norm(dtype) as module:
            yield module

    @contextlib.contextmanager
    def head(self, dtype: str) -> Iterator[Any]:
        """transformers' projection to the vocabulary, as `layer`."""
        torch_dtype(dtype)
        with self._model.head(dtype) as module:
            rounding: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if dtype == INT8:
                rounding = RoundingActivations(module, self._model.blocks("lm_head.", module))
            elif dtype == E4M3:
                rounding = moving_inputs(module)
            with rounding:
                yield module

    def embed(self, tokens: Sequence[int]) -> Float32:
        """The tokens' embeddings, fp32 [len(tokens), hidden]."""
        _check_texts([Text(tuple(tokens), ())], self.vocab_size)
        return as_float32(self._model.embed(tokens, "fp32"))

    def position_embeddings(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A decoder layer's arguments for positions int64 [1, S]: cos and sin, [1, S, head_dim] in `dtype`."""
        with torch.no_grad():
            cos, sin = self._model.rotary(torch.zeros(1, dtype=dtype), positions)
        return cos, sin

    def rope_tables(self, start: int, stop: int) -> tuple[Float32, Float32, Float32]:
        """The output of transformers' rotary module for positions start..stop-1.

        Returns:
            (cos, sin, angles), fp32 [stop - start, head_dim / 2]; cos and sin include their scaling. The
            module repeats each frequency for the second half of a head; one half is returned.
        """
        positions = torch.arange(start, stop)[None]
        cos, sin = self.position_embeddings(positions, torch.float32)
        angles = positions[0, :, None].float() * self._model.rotary.inv_freq
        half = cos.shape[-1] // 2
        return as_float32(cos[0, :, :half]), as_float32(sin[0, :, :half]), as_float32(angles)

    def _forward(
        self,
        what: str,
        texts: Sequence[Text],
        dtype: str,
        choices: Sequence[Choices | None] | None,
        attention: str,
        *attaches: Attach,
    ) -> list[torch.Tensor]:
        torch_dtype(dtype)
        check_attention(attention)
        _check_texts(texts, self.vocab_size)
        replay = self._replaying([None for _ in texts] if choices is None else choices)
        # recording hooks first: they must see the router's own choice
        attach = together(*attaches, replay, self._counting(what, len(texts)))
        attach = together(*self._rounding_activations(dtype), attach)
        return self._model.forward(texts, dtype, attach, attention)

    def _rounding_activations(self, dtype: str) -> list[Attach]:
        """What a dtype does to the activations of products."""
        if dtype == INT8:
            return [rounding_activations(self._model.blocks)]
        return [moving] if dtype == E4M3 else []

    def _replaying(self, choices: Sequence[Choices | None]) -> Attach:
        def taken(count: int) -> None:
            self.replayed += count

        return together(replaying(choices, taken), agreeing(choices, taken))

    def _counting(self, what: str, texts: int) -> Attach:
        return counting(self._counter(what, texts))

    def _counter(self, what: str, texts: int) -> Callable[[], None]:
        """The callback for after each layer of each text."""
        done = itertools.count(1)
        total = texts * self.num_layers
        return lambda: self._progress(what, next(done), total)


def _read_config(path: Path, rope_scaling: str | None) -> Any:
    with (
        visible_to_transformers(path) as folder,
        reported(path / CONFIG, "transformers does not accept it", {str(folder): str(path)}),
    ):
        return read_config(folder, rope_scaling)


def _check_texts(texts: Sequence[Text], vocab_size: int) -> None:
    for text in texts:
        size, asked = len(text.tokens), text.positions
        if not size or text.first_position < 0:
            raise ValidationError(f"not a text: {size} tokens from position {text.first_position}")
        if not all(a < b for a, b in itertools.pairwise((-1, *asked, size))):
            raise ValidationError(
                f"not a text: {size} tokens, and logits asked for at {one_line(asked, 100)}, "
                "which are not ascending indices of them"
            )
        if not all(0 <= token < vocab_size for token in text.tokens):
            raise ValidationError(f"a text has tokens outside the vocabulary of {vocab_size}")
