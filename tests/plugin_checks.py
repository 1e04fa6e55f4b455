"""What the plugins' kernels must compute, wherever they run: the operators' torch references in fp64.

Inputs are drawn afresh from a seed. 16-bit results may be as far from fp64 as torch's own in that dtype, plus one
rounding of the result, which both make and which may fall either way.
"""

from __future__ import annotations

import torch
from plugin_driver import Driven, Driver

from qwenport.plugins.moe_experts import moe_experts
from qwenport.plugins.moe_router import moe_router
from qwenport.plugins.rotary_embedding import rotary_embedding

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32_BAR, HALF_BAR = 1e-5, 1e-2
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """rel-L2."""
    exact = exact.double()
    norm = float(exact.norm())
    difference = float((found.double() - exact).norm())
    return difference / norm if norm else difference


def check_close(found: torch.Tensor, exact: torch.Tensor, own: torch.Tensor) -> None:
    """Hold a result against fp64 and against torch's own in its dtype."""
    assert found.dtype == own.dtype and found.shape == own.shape
    error = distance(found, exact)
    if found.dtype == torch.float32:
        assert error <= FP32_BAR
    else:
        assert error <= min(HALF_BAR, distance(own, exact) + ROUNDING[found.dtype])


def ran(driven: Driven) -> list[torch.Tensor]:
    """The outputs of a plugin that came to its end and complained of nothing."""
    assert driven.log == []
    assert driven.report.get("stopped") is None
    return driven.outputs


def check_rotary(
    driver: Driver,
    dtype: torch.dtype,
    *,
    batch: int,
    seq: int,
    heads: tuple[int, int],
    head_dim: int,
    positions: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, count, seq, head_dim, generator=random).to(dtype) for count in heads)
    angles = torch.rand(positions, head_dim // 2, generator=random) * 6.3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    at = torch.randint(0, positions, (batch, seq), generator=random)
    dynamic = [[0, 2], [0, 2], [], [], [0, 1]]
    found = ran(driver.drive("RotaryEmbeddingQK", [q, k, cos, sin, at], dynamic=dynamic))
    for x, y in zip((q, k), found, strict=True):
        exact = rotary_embedding(x.double(), cos.double(), sin.double(), at)
        check_close(y, exact, rotary_embedding(x, cos, sin, at))


def check_router(driver: Driver, logits: torch.Tensor, *, k: int, normalize: bool) -> None:
    """Logits among which no two differ by so little that rounding could swap them."""
    fields = {"k": k, "normalize": int(normalize)}
    dynamic = [list(range(logits.ndim - 1))]
    weights, indices = ran(driver.drive("MoERouter", [logits], fields, dynamic=dynamic))
    exact, expected = moe_router(logits, k=k, normalize=normalize)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, exact, rtol=1e-5, atol=1e-30, equal_nan=True)


def check_experts(
    driver: Driver,
    dtype: torch.dtype,
    *,
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    inner: int,
    routing: str = "any",
    seed: int = 0,
) -> None:
    """routing: "any" experts, "one" expert first for all tokens, or "few" of them, the others idle."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=random).to(dtype)
    gate_up = (torch.randn(experts, 2 * inner, hidden, generator=random) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, inner, generator=random) / inner**0.5).to(dtype)
    scores = torch.rand(tokens, experts, generator=random)
    if routing == "one":
        scores[:, experts // 2] = 2
    if routing == "few":
        scores[:, k:] = 0
    indices = scores.topk(k).indices
    weights = torch.rand(tokens, k, generator=random)
    inputs = [x, indices, weights, gate_up, down]
    (found,) = ran(driver.drive("MoEExperts", inputs, dynamic=[[0], [0], [0]]))
    exact = moe_experts(x.double(), indices, weights, gate_up.double(), down.double())
    check_close(found, exact, moe_experts(x, indices, weights, gate_up, down))
