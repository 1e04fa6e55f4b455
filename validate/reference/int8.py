"""transformers in fp32, with the activations of products by quantized weights rounded to int8.

Engines for onnxruntime round so: each row in blocks along its columns, to 127 steps of the block's largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qwenport.validate.reference.hooks import Attach

LARGEST = 127
MOST_BLOCK = 128
"""The most columns of a block."""

Blocks = Callable[[str, torch.nn.Module], Mapping[str, int]]
"""(prefix of a module's parameters in the checkpoint, module) -> quantized parameter -> columns with one scale."""


class RoundingActivations(TorchFunctionMode):
    """While active, products by some weights round their left side."""

    def __init__(self, module: torch.nn.Module, blocks: Mapping[str, int]) -> None:
        """Choose the weights.

        Args:
            module: has them.
            blocks: parameter -> columns with one scale. A stack of experts is a single parameter.
        """
        super().__init__()
        parameters = dict(module.named_parameters())
        self._blocks = {_memory(parameters[name]): block for name, block in blocks.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            block = self._blocks.get(_memory(args[1]))
            if block is not None:
                args = (rounded(args[0], block), *args[1:])
        return func(*args, **(kwargs or {}))


def rounding_activations(blocks: Blocks) -> Attach:
    """The same for decoder layers."""

    def attach(text: int, index: int, layer: Any) -> list[Any]:
        found = blocks(f"model.layers.{index}.", layer)
        mode = RoundingActivations(layer, found)

        def enter(*_: Any) -> None:
            mode.__enter__()

        def leave(*_: Any) -> None:
            mode.__exit__(None, None, None)

        return [
            layer.register_forward_pre_hook(enter),
            layer.register_forward_hook(leave, always_call=True),
        ]

    return attach


def rounded(activations: torch.Tensor, columns: int) -> torch.Tensor:
    """Activations [..., K] rounded to int8 in blocks.

    Args:
        activations: in fp32.
        columns: of the weight that share a scale; blocks are as long, but at most MOST_BLOCK and a power of two.
    """
    block = min(columns & -columns, MOST_BLOCK)
    blocks = activations.unflatten(-1, (-1, block))
    step = blocks.abs().amax(dim=-1, keepdim=True) / LARGEST
    return (torch.round(blocks / step.where(step > 0, 1.0)) * step).flatten(-2)


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor, or the one that it is a part of, begins."""
    return tensor.untyped_storage().data_ptr()
