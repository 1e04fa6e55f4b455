"""Rounding of weights, compared with compressed-tensors' own minmax rounding and its dequantization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenport.exporter.quantization.pack_quantized import PackQuantized
from qwenport.exporter.quantizing import rounding
from qwenport.exporter.quantizing.rounding import Rounded, round_weight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = [
    PackQuantized(bits, group, s)
    for bits, group in ((4, 32), (4, 64), (8, None))
    for s in (True, False)
]
kinds = st.sampled_from(KINDS)
dtypes = st.sampled_from([*DTYPES.values()])


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Values of any size and shape of distribution, a row of zeros and an outlier among them."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    rows, columns = draw(st.integers(1, 6)), 64 * draw(st.integers(1, 3))
    values = torch.randn(rows, columns, generator=random)
    shift = draw(st.sampled_from([0.0, 0.0, 3.0, -10.0]))  # one sign only
    values = (values + shift) * 10.0 ** draw(st.integers(-6, 3))
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = 0
    if draw(st.booleans()):
        values[0, draw(st.integers(0, columns - 1))] *= draw(st.sampled_from([30.0, -1000.0]))
    return values


def args(storage: PackQuantized) -> QuantizationArgs:
    strategy = "channel" if storage.group is None else "group"
    return QuantizationArgs(
        num_bits=storage.bits,
        symmetric=storage.symmetric,
        strategy=strategy,
        group_size=storage.group,
    )


def dequantized(made: Rounded, storage: PackQuantized) -> torch.Tensor:
    """By compressed-tensors, whose codes are signed."""
    codes, zeros = (
        (part.to(torch.int16) - storage.middle).to(torch.int8) for part in (made.codes, made.zeros)
    )
    return dequantize(codes, made.scales, zeros, args(storage))


def minmax(weight: torch.Tensor, storage: PackQuantized) -> torch.Tensor:
    """compressed-tensors' plain rounding, with its own choice of scales, in the weight's dtype."""
    rows = weight.unflatten(1, (-1, storage.block(weight.shape[1])))
    scales, zeros = calculate_qparams(rows.amin(2), rows.amax(2), args(storage))
    return fake_quantize(weight, scales.to(weight.dtype), zeros, args(storage))


def error(weight: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Squared error of each row, in fp64."""
    return (made.double() - weight.double()).square().sum(1)


@given(weights(), kinds, dtypes)
@settings(max_examples=60)
def test_the_error_is_at_most_that_of_plain_rounding(weight, storage, dtype) -> None:
    weight = weight.to(dtype)
    made = dequantized(round_weight(weight, storage, dtype), storage)
    assert made.dtype == dtype
    slack = 1e-5 * weight.double().square().sum(1)  # the search compares in fp32
    assert bool(
        (error(weight, made) <= error(weight, minmax(weight, storage)) + 1e-3 * slack).all()
    )


def test_the_search_is_better_than_plain_rounding_on_weights_as_models_have_them() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) ** 3
    for storage, most in ((PackQuantized(4, 128, True), 0.9), (PackQuantized(4, 32, False), 0.99)):
        made = dequantized(round_weight(weight, storage, torch.float32), storage)
        assert error(weight, made).sum() < most * error(weight, minmax(weight, storage)).sum()


@given(weights(), kinds, dtypes)
@settings(max_examples=60)
def test_codes_are_the_nearest_of_their_scale_and_scales_are_numbers(
    weight, storage, dtype
) -> None:
    made = round_weight(weight.to(dtype), storage, dtype)
    most = 2**storage.bits - 1
    assert made.codes.dtype == made.zeros.dtype == torch.uint8
    assert int(made.codes.max()) <= most and int(made.zeros.max()) <= most
    assert made.scales.dtype == dtype and bool(
        (torch.isfinite(made.scales) & (made.scales > 0)).all()
    )
    if storage.symmetric:
        assert set(made.zeros.flatten().tolist()) == {storage.middle}
    scale, zero = made.scales.double()[:, :, None], made.zeros.double()[:, :, None]
    groups = weight.to(dtype).double().unflatten(1, (scale.shape[1], -1))
    exact = (groups / scale + zero).clamp(0, most)
    codes = made.codes.double().unflatten(1, (scale.shape[1], -1))
    assert bool(((codes - exact).abs() <= 0.5 + 1e-4).all())


@given(st.integers(0, 1 << 30), kinds, dtypes)
@settings(max_examples=60)
def test_weights_that_lie_on_a_grid_stay(seed, storage, dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    if storage.bits == 8:
        dtype = torch.float32  # half precision has fewer bits than such a value needs
    most = 2**storage.bits - 1
    codes = torch.randint(0, most + 1, (3, 64), generator=random).to(torch.uint8)
    blocks = 64 // storage.block(64)
    zeros = torch.full((3, blocks), storage.middle, dtype=torch.uint8)
    if not storage.symmetric:
        zeros = torch.randint(0, most + 1, (3, blocks), generator=random).to(torch.uint8)
    codes.unflatten(1, (blocks, -1))[:, :, 0] = most  # so that the range is known
    codes.unflatten(1, (blocks, -1))[:, :, 1] = 0
    scales = (torch.rand(3, blocks, generator=random) + 0.5).to(dtype)
    weight = dequantized(Rounded(codes, scales, zeros), storage)
    again = dequantized(round_weight(weight, storage, dtype), storage)
    if dtype == torch.float32:  # the fit of the scale has its own last bits
        torch.testing.assert_close(again, weight, rtol=1e-6, atol=0)
    else:
        assert torch.equal(again, weight)


def bits_of(values: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("storage", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES.values()], ids=[*DTYPES])
@pytest.mark.parametrize("name", ["zeros", "one value", "subnormal", "largest", "both ends"])
def test_degenerate_groups_stay_finite_and_close(storage, dtype, name) -> None:
    info = torch.finfo(dtype)
    least = info.tiny * info.eps
    row: list[float] = {
        "zeros": [0.0] * 64,
        "one value": [0.0] * 63 + [0.1],
        "subnormal": [least * (i % 3) for i in range(64)],
        "largest": [info.max] + [0.0] * 63,
        "both ends": [info.max, -info.max] * 32,
    }[name]
    weight = bits_of(row, dtype)
    made = round_weight(weight, storage, dtype)
    values = dequantized(made, storage)
    assert bool(torch.isfinite(made.scales).all() and torch.isfinite(values).all())
    assert bool((made.scales > 0).all())
    worst = (values.double() - weight.double()).abs().max().item()
    allowed = {"zeros": 0.0, "one value": 0.1 * 2**-7, "subnormal": least}
    assert worst <= allowed.get(name, info.max / 7)


@given(st.integers(1, 200), st.integers(1, 64), kinds)
@example(rows=70, seed=3, storage=KINDS[0])
@settings(max_examples=20)
def test_rows_are_rounded_alike_whatever_is_rounded_with_them(rows, seed, storage) -> None:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    whole = round_weight(weight, storage, torch.bfloat16)
    cut = rows // 2
    parts = [
        round_weight(w, storage, torch.bfloat16) for w in (weight[:cut], weight[cut:]) if len(w)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "ELEMENTS_AT_ONCE", 64 * 7)
        parts.append(round_weight(weight, storage, torch.bfloat16))
    *halves, small = parts
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(h, name) for h in halves]))
        assert torch.equal(getattr(whole, name), getattr(small, name))
