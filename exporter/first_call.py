"""PyTorch's elementwise functions on the CPU, each called once before several threads may call it first.

MKL chooses the code of such a function when it is first called. If several threads make that call together, one of them
may run code of low accuracy: the cosines of a fresh process are then wrong by 1e-4, once
(https://github.com/pytorch/pytorch/issues/188792).
"""

from __future__ import annotations

from functools import cache

NAMES = (
    "acos asin atan ceil cos erf erfc erfinv exp expm1 floor lgamma log log10 log1p log2 rsqrt sin sqrt tan tanh trunc"
).split()
"""Those that PyTorch leaves to MKL (aten/src/ATen/cpu/vml.h)."""


@cache
def settle() -> None:
    """Call each function on one number, in fp32 and fp64. Call this before computing anything that has to be right."""
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in NAMES:
            getattr(torch, name)(one)
