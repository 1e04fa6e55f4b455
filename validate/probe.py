"""One of transformers' decoder layers, run on the target's values: what each operator should compute from its input.

With the target's own values substituted after every operator, each operator is judged alone: the correct result for
the target's input is compared with the target's result. An error in the input does not count.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenport.validate.reference import Reference
from qwenport.validate.reference.loading import torch_dtype
from qwenport.validate.sites import ATTENTION, GATED, RESIDUALS, ROPE, ROUTER, Site

Float32 = NDArray[np.float32]
Array = NDArray[Any]
INTERFACE = "qwenport_probe"


def run_layer(
    reference: Reference,
    module: Any,
    hidden: Array,
    first_position: int,
    dtype: str,
) -> torch.Tensor:
    """Run a transformers decoder layer on given hidden states, in one piece and without a cache.

    Args:
        reference: provides the rotary embedding.
        module: as returned by `Reference.layer`.
        hidden: [S, hidden].
        first_position: position of hidden[0].
        dtype: the module's dtype.

    Returns:
        [S, hidden] in that dtype.
    """
    size, kind = len(hidden), torch_dtype(dtype)
    positions = first_position + torch.arange(size)[None]
    mask = torch.full((size, size), torch.finfo(kind).min, dtype=kind).triu(1)
    with torch.inference_mode():
        result: torch.Tensor = module(
            torch.from_numpy(np.ascontiguousarray(hidden)).to(kind)[None],
            attention_mask=mask[None, None],
            position_ids=positions,
            position_embeddings=reference.position_embeddings(positions, kind),
            use_cache=False,
        )
    return result[0]


class Probe:
    """Records what every site of a layer should be; substitutes given values for it.

    Attributes:
        expected: site name -> tensor [S, ...], after the layer has run.
        inputs: name of a submodule -> its input [S, ...], of those whose result is a site.
        result: the layer's result, stored by the caller.
        others: the same for attention by other formulas: torch's scaled_dot_product_attention, and the one that
            TensorRT's parser generates for any Attention.
    """

    def __init__(self, sites: tuple[Site, ...], given: Mapping[str, Array], dtype: str) -> None:
        self._sites = {site.name: site for site in sites}
        self._given, self._dtype = given, torch_dtype(dtype)
        self.expected: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self.result = torch.empty(0)
        self.others: dict[str, list[torch.Tensor]] = {}

    def _at(self, name: str, made: torch.Tensor) -> torch.Tensor:
        """Record what a site should be, [S, ...], and continue with the value given for it."""
        self.expected[name] = made
        if name not in self._given or self._given[name].size != made.numel():
            return made  # nothing is given, or the given value does not fit
        return torch.from_numpy(self._given[name]).to(self._dtype).reshape(made.shape)

    @contextlib.contextmanager
    def attached(self, module: Any) -> Iterator[None]:
        """Attach to `module`, a decoder layer, while the context lasts."""
        config = module.self_attn.config
        implementation = config._attn_implementation
        handles = [hook for name in self._sites for hook in self._hooks(module, name)]
        ALL_ATTENTION_FUNCTIONS[INTERFACE] = self._attention
        config._attn_implementation = INTERFACE
        try:
            yield
        finally:
            config._attn_implementation = implementation
            for handle in handles:
                handle.remove()

    def _hooks(self, module: Any, name: str) -> list[Any]:
        if (
            name == ATTENTION and ROPE[0] not in self._sites
        ):  # of its own rotations: dual chunk attention
            return [self._before(module.self_attn.o_proj, name)]
        if name in (*ROPE, ATTENTION):
            return []
        if name == ROUTER:
            return [module.mlp.gate.register_forward_hook(self._router)]
        if name == RESIDUALS[0]:
            return [self._before(module.post_attention_layernorm, name)]
        if name == RESIDUALS[1]:
            return [module.register_forward_hook(self._after(name))]
        if name.endswith(GATED):
            path = name.removesuffix(GATED)
            return [self._before(module.get_submodule(f"{path}down_proj"), name)]
        if name == "mlp.gate" and ROUTER in self._sites:
            return []  # handled with the router
        return [module.get_submodule(name).register_forward_hook(self._after(name))]

    def _before(self, module: Any, name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            (made,) = inputs
            return (self._at(name, _flat(made)).reshape(made.shape),)

        return module.register_forward_pre_hook(hook)

    def _after(self, name: str) -> Callable[..., torch.Tensor]:
        def hook(_: Any, inputs: Any, made: torch.Tensor) -> torch.Tensor:
            if inputs:
                self.inputs[name] = _flat(inputs[0])
            return self._at(name, _flat(made)).reshape(made.shape)

        return hook

    def _router(self, module: Any, inputs: Any, outputs: Any) -> Any:
        """The router's weights as [S, E], zero for experts that were not chosen."""
        logits = self._at("mlp.gate", outputs[0])
        chosen = outputs[2]
        if ROUTER in self._given:
            given = torch.from_numpy(self._given[ROUTER])
            chosen = (given != 0).int().topk(chosen.shape[1]).indices
        probabilities = torch.softmax(logits.float(), dim=-1)
        own = torch.topk(probabilities, chosen.shape[1]).indices
        everyone = torch.zeros_like(probabilities)
        weights = probabilities.gather(1, own)
        if module.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        dense = self._at(ROUTER, everyone.scatter(1, own, weights).to(logits.dtype))
        if ROUTER not in self._given:
            chosen = own
        return logits, dense.gather(1, chosen), chosen

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        query, key = (
            self._at(name, made[0].transpose(0, 1)).transpose(0, 1)[None]
            for name, made in zip(ROPE, (query, key), strict=True)
        )
        if self._dtype in (torch.bfloat16, torch.float16):
            sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
            root = torch.tensor(scaling**0.5, dtype=self._dtype)  # rounded, as in the network
            ways = ((query, key, scaling), (query * root, key * root, 1.0))
            self.others[ATTENTION] = [
                sdpa(module, q, k, value, attention_mask, dropout, scale, **kwargs)[0][0]
                for q, k, scale in ways
            ]
        eager = sys.modules[type(module).__module__].eager_attention_forward
        made, weights = eager(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        return self._at(ATTENTION, made[0])[None], weights


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its batch axis, if any: [S, ...]."""
    return tensor[0] if tensor.ndim > 2 and tensor.shape[0] == 1 else tensor
