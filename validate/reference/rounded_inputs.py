"""Linears that round their input to FP8, as compressed-tensors does: forward pre-hooks on transformers' modules.

Rounding is a step: an input that two correct programs compute differently in its last bits may fall to either side,
and everything after it then differs visibly. So where the oracle's input lies in the middle between two codes, up to
FP8_ROUNDING_MARGIN, it can take over the target's code; a code that is not as near as its own is never taken over.
What such codes do to logits is measured with inputs that are moved by so much before they are rounded.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qwenport.validate.reference.hooks import Attach, as_float32
from qwenport.validate.text import Choices
from qwenport.validate.thresholds import FP8_ROUNDING_MARGIN

Float32 = NDArray[np.float32]
LARGEST = 448.0
SAME_CODE = 1e-4
"""Relative: rounded values this close have the same code, and scales that differ in their last bits."""


class RoundsInput:
    """A forward pre-hook of one linear.

    Attributes:
        given: the target's rounded input, [tokens, K], to take over where it is as near; None for none.
        taken: called with the number of codes taken over.
        made: gets the rounded inputs, fp32 [tokens, K]; None if nobody asks.
        moves: whether inputs are moved first.
    """

    def __init__(self, stated: Mapping[str, Any], scale: torch.Tensor | None) -> None:
        """Set up the rounding.

        Args:
            stated: `input_activations` of the config's group, for the library.
            scale: of one element; None for a scale for each token.
        """
        self._stated, self._scale = stated, scale
        self.given: Float32 | None = None
        self.taken: Callable[[int], None] = lambda count: None
        self.made: list[Float32] | None = None
        self.moves = False

    @property
    def is_static(self) -> bool:
        """Whether the scale is stored."""
        return self._scale is not None

    def __call__(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Replace the module's input, [..., K]."""
        (x,) = inputs
        tokens = x.reshape(-1, x.shape[-1])
        tokens = moved(tokens) if self.moves else tokens
        scale = None if self._scale is None else self._scale.to(x.dtype)
        # The library takes the first two axes for those of tokens: of [tokens, K] it would make one scale for all.
        made = (by_library if _has_library() else by_formula)(self._stated, tokens[None], scale)[0]
        if self.given is not None and self.given.shape == made.shape:
            made = self._agreeing(tokens, made, torch.from_numpy(self.given).to(x.dtype))
        if self.made is not None:
            self.made.append(as_float32(made))
        return (made.reshape(x.shape),)

    def _agreeing(self, x: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        differs = (other - own).abs() > SAME_CODE * torch.maximum(other.abs(), own.abs())
        margin = FP8_ROUNDING_MARGIN * x.abs().amax(1, keepdim=True)
        near = differs & ((x - (own + other) / 2).abs() <= margin)
        self.taken(int(near.sum()))
        return torch.where(near, other, own)


class RoundsExperts:
    """A forward pre-hook of a layer's experts: products by their stacks round their left side.

    Attributes:
        roundings: an expert's linear, as "3.gate_proj" -> how.
    """

    def __init__(self, roundings: Mapping[str, RoundsInput]) -> None:
        self.roundings = roundings
        self._entered: list[_RoundsProducts] = []

    def register(self, module: torch.nn.Module) -> None:
        """Make the experts round from now on."""
        module.register_forward_pre_hook(self)
        module.register_forward_hook(self.leave, always_call=True)

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        """Begin."""
        self._entered.append(_RoundsProducts(module, self.roundings))
        self._entered[-1].__enter__()

    def leave(self, *_: Any) -> None:
        """End."""
        self._entered.pop().__exit__(None, None, None)


class _RoundsProducts(TorchFunctionMode):
    def __init__(self, module: torch.nn.Module, roundings: Mapping[str, RoundsInput]) -> None:
        super().__init__()
        self._stacks = {_memory(stack): (name, stack) for name, stack in module.named_parameters()}
        self._roundings = roundings

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and (stack := self._stacks.get(_memory(args[1]))) is not None:
            return self._product(*stack, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _product(
        self, name: str, stack: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """By one expert's matrix of a stack. Its gate's and its up's static scales may differ."""
        expert = (weight.storage_offset() - stack.storage_offset()) // weight.numel()
        if name == "down_proj":
            return functional.linear(*self._roundings[f"{expert}.{name}"](None, (x,)), weight)
        gate, up = (self._roundings[f"{expert}.{half}_proj"] for half in ("gate", "up"))
        if not gate.is_static:
            return functional.linear(*gate(None, (x,)), weight)
        halves = zip((gate, up), weight.chunk(2), strict=True)
        return torch.cat([functional.linear(*how(None, (x,)), half) for how, half in halves], -1)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def by_library(
    stated: Mapping[str, Any], x: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """compressed-tensors' fake quantization of [1, tokens, K]."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments = QuantizationArgs.model_validate(dict(stated))
    zero_point = None
    if scale is None:
        scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity())
    rounded: torch.Tensor = fake_quantize(x, scale, zero_point, arguments)
    return rounded


def by_formula(
    stated: Mapping[str, Any], x: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """The same: x / scale to the nearest e4m3 number of at most 448, times the scale; each step in the dtype of x."""
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / LARGEST
        scale[scale == 0] = torch.finfo(x.dtype).eps
    steps = (x / scale).clamp(-LARGEST, LARGEST)
    return steps.to(torch.float8_e4m3fn).to(x.dtype) * scale


def moved(tokens: torch.Tensor) -> torch.Tensor:
    """Inputs [tokens, K], each moved at random by up to FP8_ROUNDING_MARGIN of its token's largest.

    Always the same way, and a text that begins as another is moved as that one is.
    """
    shares = 2 * torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) - 1
    largest = tokens.abs().amax(1, keepdim=True)
    return tokens + (FP8_ROUNDING_MARGIN * largest * shares).to(tokens.dtype)


def moving(text: int, index: int, layer: Any) -> list[Any]:
    """An `Attach`: the linears of a layer move their inputs before they round them."""
    return [moving_inputs(layer)]


@contextlib.contextmanager
def moving_inputs(module: torch.nn.Module) -> Iterator[None]:
    """The same for any module."""
    with _moving([*_hooks(module).values(), *_hooks_of_experts(module)]):
        yield


@contextlib.contextmanager
def moving_experts(module: torch.nn.Module) -> Iterator[bool]:
    """The same for experts alone; yields whether there are any that round."""
    hooks = _hooks_of_experts(module)
    with _moving(hooks):
        yield bool(hooks)


@contextlib.contextmanager
def _moving(hooks: Sequence[RoundsInput]) -> Iterator[None]:
    for hook in hooks:
        hook.moves = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.moves = False


def agreeing(choices: Sequence[Choices | None], taken: Callable[[int], None]) -> Attach:
    """Take over the codes in choices[text] that are as near as the oracle's own.

    `taken` is called with the number of codes taken over.
    """

    def attach(text: int, index: int, layer: Any) -> list[Any]:
        wanted = choices[text]
        given = {} if wanted is None else wanted.rounded.get(index, {})
        return [taking_over(layer, given, taken)] if given else []

    return attach


@contextlib.contextmanager
def taking_over(
    module: Any, given: Mapping[str, Float32], taken: Callable[[int], None]
) -> Iterator[None]:
    """The same for one module: path of a linear in it, "" for itself -> its rounded input."""
    hooks = _hooks(module)
    with contextlib.ExitStack() as stack:
        for path in given.keys() & hooks.keys():
            stack.enter_context(_given(hooks[path], given[path], taken))
        yield


def as_multiplied(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The input [..., K] of a linear as it multiplies it."""
    for hook in _hooks(linear).values():
        (x,) = hook(linear, (x,))
    return x


@contextlib.contextmanager
def recorded(layer: Any) -> Iterator[Callable[[], dict[str, Float32]]]:
    """Record while the context lasts; yields a function that then returns path of a linear -> its rounded input."""
    hooks = _hooks(layer)
    for hook in hooks.values():
        hook.made = []
    try:
        yield lambda: {path: np.concatenate(hook.made or []) for path, hook in hooks.items()}
    finally:
        for hook in hooks.values():
            hook.made = None


@contextlib.contextmanager
def _given(hook: RoundsInput, values: Float32, taken: Callable[[int], None]) -> Iterator[None]:
    hook.given, hook.taken = values, taken
    try:
        yield
    finally:
        hook.given = None


def _hooks(layer: Any) -> dict[str, RoundsInput]:
    """Path of a linear in the layer -> its hook."""
    return {
        path: hook
        for path, module in layer.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, RoundsInput)
    }


def _hooks_of_experts(layer: Any) -> list[RoundsInput]:
    return [
        rounding
        for module in layer.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, RoundsExperts)
        for rounding in hook.roundings.values()
    ]


def _has_library() -> bool:
    return importlib.util.find_spec("compressed_tensors") is not None
