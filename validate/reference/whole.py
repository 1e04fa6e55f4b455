"""The whole model in memory: transformers' own forward and `generate`, with hooks on its layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from qwenport.exporter import DualChunk
from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.validate.quiet import quiet_transformers
from qwenport.validate.reference.adapter import MergedAdapter
from qwenport.validate.reference.dequantization import Quantization, refuse_quantized_tied_head
from qwenport.validate.reference.dual_chunk import of_requests, use_dual_chunk
from qwenport.validate.reference.files import (
    CONFIG,
    DECODER,
    key_mapping,
    known_name,
    opened,
    tensor_files,
    visible_to_transformers,
    weight_files,
)
from qwenport.validate.reference.hooks import Attach, attached
from qwenport.validate.reference.layers import LayerCalls
from qwenport.validate.reference.loading import (
    EAGER,
    attending,
    keep_layers,
    model_without_weights,
    torch_dtype,
)
from qwenport.validate.reference.stored import StoredWeights, parts_of
from qwenport.validate.text import Text
from qwenport.wording import cut, one_line

ALIGNMENT = 64  # bytes, of torch's CPU allocations


class WholeModel:
    """transformers' model in fp32; a copy in another dtype is made on first use and kept.

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
        """Load the checkpoint with transformers' loader.

        Args:
            rounded_to: round all weights to this dtype, then keep them in fp32; None leaves them unchanged.
            layers: see `keep_layers`.
            prefix: the files' prefix of the decoder's tensors in place of "model.".
            adapter: the adapter that is added to the weights before they are rounded.
            quantization: how the weights are quantized that are; transformers gets them dequantized.

        Raises:
            ValidationError: transformers does not load the whole checkpoint, or it does not have that many layers.
        """
        with reported(path / CONFIG, "transformers makes no model of it"):
            skeleton = model_without_weights(copy.deepcopy(config))
        self.rounds_inputs = False
        self._stored: StoredWeights | None = None
        if quantization is None:
            self._model = _load(path, config, prefix)
        else:
            with reported(path, "its weights cannot be read"):
                self._stored = StoredWeights(path, None, prefix, quantization=quantization)
            self._model, self.rounds_inputs = _load_dequantized(
                path, skeleton, config, self._stored, quantization
            )
        if adapter is not None:
            _merge(self._model, path, prefix, adapter)
        for model in (self._model, skeleton):
            keep_layers(model, layers)
        if rounded_to is not None:
            _round_weights(self._model, rounded_to)
        self._copies: dict[str, Any] = {}
        self.num_layers = len(self._model.model.layers)
        self.rotary = self._model.model.rotary_emb
        self.calls = LayerCalls(skeleton.model, self.rotary)

    def attend_in_chunks(self, settings: DualChunk) -> None:
        """Compute dual chunk attention, which transformers ignores."""
        use_dual_chunk(self._model.model.layers, settings, self.rotary)

    def forward(
        self, texts: Sequence[Text], dtype: str, attach: Attach, attention: str
    ) -> list[torch.Tensor]:
        """The final norm's output: for each text a tensor [1, len(tokens), hidden] in `dtype`."""
        model = self._in(dtype).model
        results = []
        for number, text in enumerate(texts):
            ids = torch.tensor([text.tokens], dtype=torch.int64)
            positions = text.first_position + torch.arange(len(text.tokens))[None]
            with (
                attached(attach, number, enumerate(model.layers)),
                attending(model.config, attention),
                of_requests(text.first_position, text.requests),
                torch.inference_mode(),
            ):
                output = model(ids, position_ids=positions, use_cache=False)
            results.append(output.last_hidden_state)
        return results

    def greedy(
        self, tokens: Sequence[int], count: int, attach: Attach
    ) -> tuple[list[int], torch.Tensor]:
        """`generate`, without a stop token: (new tokens, the logits fp32 [count, vocab] they were chosen from)."""
        # On the model too: generate() takes from there what a request leaves open.
        settings = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=count, use_cache=True, pad_token_id=0
        )
        self._model.generation_config = settings
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        layers = enumerate(self._model.model.layers)
        with attached(attach, 0, layers), torch.inference_mode(), quiet_transformers():
            result = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return result.sequences[0, len(tokens) :].tolist(), torch.cat(result.logits)

    def embed(self, tokens: Sequence[int], dtype: str) -> torch.Tensor:
        """The tokens' embeddings, [len(tokens), hidden] in `dtype`."""
        with torch.inference_mode():
            rows: torch.Tensor = self._model.model.embed_tokens(torch.tensor(list(tokens)))
        return rows.to(torch_dtype(dtype))

    @contextlib.contextmanager
    def layer(self, index: int, dtype: str) -> Iterator[Any]:
        """The decoder layer: the model's own in fp32, else a copy while the context lasts."""
        yield _converted(self._model.model.layers[index], dtype)

    @contextlib.contextmanager
    def final_norm(self, dtype: str) -> Iterator[Any]:
        """The norm after the last layer, as `layer`."""
        yield _converted(self._model.model.norm, dtype)

    @contextlib.contextmanager
    def head(self, dtype: str) -> Iterator[Any]:
        """The vocabulary projection, as `layer`."""
        yield _converted(self._model.lm_head, dtype)

    def blocks(self, prefix: str, module: torch.nn.Module) -> dict[str, int]:
        """See `StoredWeights.blocks`."""
        return {} if self._stored is None else self._stored.blocks(prefix, module)

    def _in(self, dtype: str) -> Any:
        if torch_dtype(dtype) == torch.float32:
            return self._model
        if dtype not in self._copies:
            self._copies[dtype] = _converted(self._model, dtype)
        return self._copies[dtype]


def _converted(module: torch.nn.Module, dtype: str) -> torch.nn.Module:
    if torch_dtype(dtype) == torch.float32:
        return module
    converted = copy.deepcopy(module)
    for parameter in converted.parameters():  # parameters only: rope frequencies stay fp32
        parameter.data = parameter.data.to(torch_dtype(dtype))
    return converted


def _load(path: Path, config: Any, prefix: str) -> Any:
    _check_files(path)
    with (
        visible_to_transformers(path) as folder,
        reported(path, "transformers does not load it", {str(folder): str(path)}),
    ):
        model, info = _from_pretrained(
            AutoModelForCausalLM, folder, config, key_mapping=key_mapping(prefix)
        )
    _check_loaded(path, info, ("missing_keys", "mismatched_keys", "error_msgs"))
    _align(model)
    return model.eval().requires_grad_(False)


def _load_dequantized(
    path: Path, skeleton: Any, config: Any, stored: StoredWeights, quantization: Quantization
) -> tuple[Any, bool]:
    """As `_load`, with the quantized weights dequantized by `dequantization`; also whether linears round inputs.

    While transformers loads them, the weights are in memory in their own dtype as well.
    """
    _check_files(path)
    with reported(path, "its weights cannot be read"):
        refuse_quantized_tied_head(path, stored.names, tied=config.tie_word_embeddings)
        tensors = stored.dequantized(skeleton.state_dict())
    with reported(path, "transformers does not load it"):
        model, info = _from_pretrained(type(skeleton), None, config, state_dict=tensors)
    del tensors
    # Unexpected is, among others, what `dequantized` found no use for.
    _check_loaded(path, info, ("missing_keys", "mismatched_keys", "error_msgs", "unexpected_keys"))
    _align(model)
    return model.eval().requires_grad_(False), stored.round_inputs(model)


def _check_files(path: Path) -> None:
    """transformers does not say which file is damaged."""
    with reported(path, "its weights cannot be read"):
        for file in weight_files(path):
            with opened(file):
                pass


def _from_pretrained(
    model_class: Any, source: Path | None, config: Any, **how: Any
) -> tuple[Any, dict[str, Any]]:
    model, info = model_class.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused by `_check_loaded`, by name
        **how,
        **EAGER,
    )
    return model, info


def _check_loaded(path: Path, info: dict[str, Any], problems: Sequence[str]) -> None:
    """transformers only warns about these, and continues with random weights."""
    for problem in problems:
        if info.get(problem):
            first = sorted(map(str, info[problem]))[0]
            raise ValidationError(
                one_line(
                    f"transformers does not load {cut(path)} whole: {problem} {one_line(first, 120)}"
                )
            )


def _align(model: torch.nn.Module) -> None:
    """Copy parameters that are not aligned as torch's own allocations are.

    Those of an fp32 checkpoint are still in the mapped file, wherever its header ends, and the matmul of a single token
    rounds differently there. Logits must not depend on the length of a header.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _merge(model: torch.nn.Module, path: Path, prefix: str, adapter: MergedAdapter) -> None:
    stored = {known_name(name, prefix) for name, _, _ in tensor_files(path)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, where in parts_of(name, parameter.shape, stored):
                matrix = parameter[where]
                added = adapter.added(part, 0, len(matrix))
                if added is not None:
                    matrix.copy_(matrix.double() + added)


def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, but keep it in fp32. Buffers (rope frequencies) stay exact."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
