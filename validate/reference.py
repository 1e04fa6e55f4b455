"""The oracle: transformers' own model, in fp32, from the checkpoint itself. Nothing of ours computes here.

Two things are arranged so that the question is the one the target answers: the rope settings that the
export was asked for are put in the config, and where transformers would change frequencies with the length
of the text (dynamic, longrope) they are pinned to the length that the target's tables were made for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwenport.validate.errors import ValidationError
from qwenport.validate.quiet import quiet_transformers
from qwenport.validate.target import Target

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Reference:
    """transformers' model of a checkpoint, in fp32, as the target was asked to be."""

    def __init__(self, target: Target, checkpoint_path: Path) -> None:
        """Load the checkpoint.

        Args:
            target: whose dtype, rope settings and rope length apply.
            checkpoint_path: the checkpoint directory that the target was made from (see `check_source`).

        Raises:
            ValidationError: transformers does not load the checkpoint whole.
        """
        self.vocab_size = target.config.vocab_size
        self.weights_note = "fp32"
        with quiet_transformers():
            config = _config(checkpoint_path, target.rope_scaling)
            self._model = _load(checkpoint_path, config)
        if target.dtype != target.source["dtype"]:
            self.weights_note = f"fp32, weights rounded to {target.dtype} first"
            _round_weights(self._model, TORCH_DTYPES[target.dtype])
        self._halves: dict[str, Any] = {}
        self._greedy: dict[tuple[tuple[int, ...], int], tuple[list[int], Float32]] = {}
        self._rotary = self._model.model.rotary_emb
        if target.config.rope.depends_on_length:
            self._pin_rope(target.rope_length)

    def _pin_rope(self, length: int) -> None:
        """Use transformers' frequencies for texts of `length` tokens, whatever is computed.

        Source: transformers modeling_rope_utils.dynamic_rope_update, which acts on "dynamic" and
        "longrope" in `rope_type` at every forward, and on no other value.
        """
        kind = self._rotary.rope_type
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](self._rotary.config, None, seq_len=length)
        self._rotary.inv_freq = inv_freq
        self._rotary.attention_scaling = scaling
        self._rotary.rope_type = "default"

    def logits(self, tokens: Sequence[int], *, last: int = 0) -> Float32:
        """Run `tokens` from position 0, in one piece and without a cache.

        Returns:
            fp32 [len(tokens), vocab], or the `last` positions only.
        """
        return _run(self._model, tokens, last)

    def logits_in(self, dtype: str, tokens: Sequence[int], *, last: int = 0) -> Float32:
        """`logits`, by the same model computing in "bf16" or "fp16" throughout, as fp32 numbers."""
        return _run(self._half(dtype), tokens, last)

    def _half(self, dtype: str) -> Any:
        if dtype not in self._halves:
            half = copy.deepcopy(self._model)
            for parameter in half.parameters():  # parameters only: rope frequencies stay fp32
                parameter.data = parameter.data.to(TORCH_DTYPES[dtype])
            self._halves[dtype] = half
        return self._halves[dtype]

    def greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], Float32]:
        """transformers' own greedy `generate`, with no stop token and none of the checkpoint's sampling.

        Returns:
            (`count` new token ids, the logits fp32 [count, vocab] that each was chosen from).

        Raises:
            ValidationError: generate did not take the most likely token.
        """
        key = (tuple(tokens), count)
        if key not in self._greedy:
            self._greedy[key] = self._generate(tokens, count)
        return self._greedy[key]

    def own_rounding(self, tokens: Sequence[int], count: int) -> float:
        """rel-L2 between transformers' logits through its cache (`greedy`) and in one piece (`logits`)."""
        new, cached = self.greedy(tokens, count)
        whole = self.logits([*tokens, *new[:-1]], last=count)
        return float(np.linalg.norm(cached - whole) / np.linalg.norm(whole))

    def _generate(self, tokens: Sequence[int], count: int) -> tuple[list[int], Float32]:
        # On the model too: generate() fills what a request leaves open from there.
        settings = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=count, use_cache=True, pad_token_id=0
        )
        self._model.generation_config = settings
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        with torch.inference_mode(), quiet_transformers():
            result = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = result.sequences[0, len(tokens) :].tolist()
        logits: Float32 = torch.cat(result.logits).numpy()
        if len(new) != count or new != logits.argmax(axis=1).tolist():
            raise ValidationError(
                "transformers' generate() did not decode greedily; it cannot judge"
            )
        return new, logits

    def routing(
        self, tokens: Sequence[int], dtype: str = "fp32"
    ) -> dict[int, tuple[Float32, Int64]]:
        """Sparse layer -> (router logits fp32 [len(tokens), E], chosen experts int64 [len(tokens), k]).

        `dtype` is what the model computes in, as in `logits` ("fp32") and `logits_in` ("bf16", "fp16").
        """
        model = self._model if dtype == "fp32" else self._half(dtype)
        found: dict[int, tuple[Float32, Int64]] = {}

        def keep(layer: int) -> Any:
            def hook(module: Any, inputs: Any, outputs: Any) -> None:
                logits, _, chosen = outputs
                found[layer] = logits.float().numpy(), chosen.numpy()

            return hook

        handles = [
            layer.mlp.gate.register_forward_hook(keep(index))
            for index, layer in enumerate(model.model.layers)
            if hasattr(layer.mlp, "experts")
        ]
        try:
            _run(model, tokens, last=1)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def rope_tables(self, start: int, stop: int) -> tuple[Float32, Float32, Float32]:
        """What transformers' rotary module gives for positions start..stop-1.

        Returns:
            (cos, sin, angles), fp32 [stop - start, head_dim / 2]; cos and sin with their scaling. The
            module repeats each frequency for the second half of a head; one half is returned.
        """
        positions = torch.arange(start, stop)[None]
        with torch.inference_mode():
            cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32), positions)
            angles = positions[0, :, None].float() * self._rotary.inv_freq
        half = cos.shape[-1] // 2
        return cos[0, :, :half].numpy(), sin[0, :, :half].numpy(), angles.numpy()


def _run(model: Any, tokens: Sequence[int], last: int) -> Float32:
    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        result = model(ids, use_cache=False, logits_to_keep=last).logits[0]
    logits: Float32 = result.float().numpy()
    return logits


def _config(path: Path, rope_scaling: str | None) -> Any:
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if rope_scaling is not None:
        kind, _, factor = rope_scaling.partition(":")
        settings = {**config.rope_parameters, "rope_type": kind, "factor": float(factor)}
        if kind == "yarn":  # as Qwen's model card writes it
            settings["original_max_position_embeddings"] = config.max_position_embeddings
        config.rope_parameters = settings
    return config


def _load(path: Path, config: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers only warns of these, and goes on with random weights.
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ValidationError(
                f"transformers does not load {path} whole: {problem} {sorted(map(str, info[problem]))[0]}"
            )
    return model.eval()


def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, keep it in fp32. Buffers (rope frequencies) stay exact."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
