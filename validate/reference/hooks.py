"""Forward hooks on transformers' decoder layers, to observe or change what happens inside them.

An `Attach` is called before a layer runs a text, and returns the hooks for that run only. Both runners call it, so
observations do not depend on where the weights are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenport.validate.text import Choices

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

Attach = Callable[[int, int, Any], list[Any]]  # (text, layer index, layer) -> hook handles


@contextlib.contextmanager
def attached(attach: Attach, text: int, layers: Iterable[tuple[int, Any]]) -> Iterator[None]:
    """Keep the hooks of `text` on `layers`, pairs of index and module, while the context lasts."""
    with contextlib.ExitStack() as stack:
        for index, layer in layers:
            for handle in attach(text, index, layer):
                stack.enter_context(handle)
        yield


def together(*attaches: Attach) -> Attach:
    """Combine several, in this order."""
    return lambda text, index, layer: [
        handle for attach in attaches for handle in attach(text, index, layer)
    ]


def counting(tick: Callable[[], None]) -> Attach:
    """Call `tick` after every layer of every text."""
    return lambda text, index, layer: [layer.register_forward_hook(lambda *_: tick())]


def recording_states(found: Sequence[list[Float32]]) -> Attach:
    """Append to found[text] the input of layer 0 and the output of each layer, fp32 [S, hidden]."""

    def attach(text: int, index: int, layer: Any) -> list[Any]:
        def before(module: Any, inputs: Any) -> None:
            found[text].append(as_float32(inputs[0][0]))

        def after(module: Any, inputs: Any, output: Any) -> None:
            found[text].append(as_float32(output[0]))

        first = [layer.register_forward_pre_hook(before)] if index == 0 else []
        return [*first, layer.register_forward_hook(after)]

    return attach


def recording_routes(found: Sequence[dict[int, tuple[Float32, Int64]]]) -> Attach:
    """Store in found[text], for each sparse layer, router logits fp32 [S, E] and chosen experts int64 [S, k]."""

    def attach(text: int, index: int, layer: Any) -> list[Any]:
        def after(module: Any, inputs: Any, outputs: Any) -> None:
            logits, _, chosen = outputs
            found[text][index] = as_float32(logits), chosen.numpy()

        return [layer.mlp.gate.register_forward_hook(after)] if is_sparse(layer) else []

    return attach


def replaying(choices: Sequence[Choices | None], taken: Callable[[int], None]) -> Attach:
    """Send tokens to the experts in choices[text], if the router's own choice was hardly better.

    `taken` is called with the number of tokens sent elsewhere.
    """

    def attach(text: int, index: int, layer: Any) -> list[Any]:
        wanted = choices[text]
        if wanted is None or index not in wanted.experts:
            return []
        experts = torch.from_numpy(wanted.experts[index])

        def after(module: Any, inputs: Any, outputs: Any) -> Any:
            logits, _, chosen = outputs
            if experts.shape != chosen.shape:
                return outputs  # another number of experts is not a near-tie
            everyone = torch.zeros_like(logits, dtype=torch.bool)
            own, other = everyone.scatter(1, chosen, True), everyone.scatter(1, experts, True)
            lost = logits.masked_fill(~(own & ~other), -torch.inf).amax(1)
            gained = logits.masked_fill(~(other & ~own), torch.inf).amin(1)
            differs = (own != other).any(1)
            near = differs & (other.sum(1) == chosen.shape[1]) & (lost - gained < wanted.margin)
            if not near.any():
                return outputs
            taken(int(near.sum()))
            chosen = torch.where(near[:, None], experts, chosen)
            # As in the routers of Qwen2-MoE and Qwen3-MoE, for all rows at once as there: a row that keeps its
            # experts keeps its weights to the last bit.
            weights = torch.softmax(logits, dtype=torch.float, dim=-1).gather(1, chosen)
            if module.norm_topk_prob:
                weights /= weights.sum(dim=-1, keepdim=True)
            return logits, weights.to(logits.dtype), chosen

        return [layer.mlp.gate.register_forward_hook(after)]

    return attach


def is_sparse(layer: Any) -> bool:
    """Whether a decoder layer has experts."""
    return hasattr(layer.mlp, "experts")


def as_float32(tensor: torch.Tensor) -> Float32:
    """The tensor's values as a numpy array."""
    values: Float32 = tensor.detach().float().numpy()
    return values
