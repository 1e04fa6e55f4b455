"""Both implementations of dequantization give what Python's integers and compressed-tensors give, bit for bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import quantization_config

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference.dequantization.pack_quantized import (
    PackQuantized,
    Scheme,
    by_formula,
    by_library,
)

WEIGHT = "model.layers.0.mlp.up_proj.weight"
DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}
IMPLEMENTATIONS = [
    by_formula,
    pytest.param(
        by_library,
        marks=pytest.mark.skipif(
            importlib.util.find_spec("compressed_tensors") is None,
            reason="compressed-tensors is not installed",
        ),
    ),
]


@dataclass(frozen=True)
class Case:
    """A matrix as Python integers, and its scales."""

    bits: int
    group: int | None
    symmetric: bool
    codes: list[list[int]]
    zeros: list[list[int]]
    scales: torch.Tensor

    @property
    def scheme(self) -> Scheme:
        stated = quantization_config(
            bits=self.bits, group=self.group, symmetric=self.symmetric, ignore=()
        )["config_groups"]["group_0"]
        return Scheme(self.bits, self.group, self.symmetric, ("Linear",), stated)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), len(self.codes[0])

    def stored(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors."""
        tensors = {
            f"{WEIGHT}_packed": words(self.codes, self.bits),
            f"{WEIGHT}_scale": self.scales,
            f"{WEIGHT}_shape": torch.tensor(self.shape),
        }
        if not self.symmetric:
            columns = [list(column) for column in zip(*self.zeros, strict=True)]
            tensors[f"{WEIGHT}_zero_point"] = words(columns, self.bits).T.contiguous()
        return tensors

    def expected(self) -> torch.Tensor:
        """The exact products, rounded once by numpy."""
        group = self.shape[1] // self.scales.shape[1]
        rows = [
            [
                Fraction(code - zeros[k // group]) * Fraction(scales[k // group])
                for k, code in enumerate(codes)
            ]
            for codes, zeros, scales in zip(
                self.codes, self.zeros, self.scales.double().tolist(), strict=True
            )
        ]
        exact = np.array(rows, dtype=np.float64)  # at most 24 + 9 bits: still exact
        assert all(
            Fraction(a) == b
            for a, b in zip(exact.ravel().tolist(), (x for r in rows for x in r), strict=True)
        )
        with np.errstate(over="ignore"):
            rounded = exact.astype(DTYPES[self.scales.dtype])
        return torch.from_numpy(rounded.astype(np.float64)).to(self.scales.dtype)


def words(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Each row as one long integer, its first code lowest, cut into int32."""
    count = -(-len(rows[0]) * bits // 32)
    data = b"".join(
        sum(code << (bits * place) for place, code in enumerate(row)).to_bytes(4 * count, "little")
        for row in rows
    )
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").reshape(len(rows), count).copy())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bits = draw(st.sampled_from((4, 8)))
    group = draw(st.sampled_from((None, 8, 32)))
    symmetric = draw(st.booleans())
    rows = draw(st.integers(1, 21))
    groups = draw(st.integers(1, 3))
    # a row need not end with a word if one scale is for all of it
    columns = draw(st.integers(1, 40)) if group is None else group * groups
    groups = 1 if group is None else groups
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = random.integers(0, 2**bits, (rows, columns)).tolist()
    middle = [[2 ** (bits - 1)] * groups for _ in range(rows)]
    zeros = middle if symmetric else random.integers(0, 2**bits, (rows, groups)).tolist()
    dtype = draw(st.sampled_from(list(DTYPES)))
    exponents = random.integers(-20, 13, (rows, groups))  # fp16: from subnormals to infinity
    scales = torch.from_numpy(random.standard_normal((rows, groups)) * 2.0**exponents).to(dtype)
    return Case(bits, group, symmetric, codes, zeros, scales)


class InMemory:
    """Tensors as a format reads them; `read` says which rows of each it asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.read: dict[str, tuple[int, int]] = {}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read[name] = (start, stop)
        return self._tensors[name][start:stop]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name][:, start:stop]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def parts(case: Case) -> tuple[Any, ...]:
    stored = case.stored()
    zero_point = stored.get(f"{WEIGHT}_zero_point")
    packed, scale = stored[f"{WEIGHT}_packed"], stored[f"{WEIGHT}_scale"]
    return case.scheme, packed, scale, zero_point, case.shape[1]


@pytest.mark.parametrize("dequantize", IMPLEMENTATIONS)
@given(case=cases())
def test_weights_are_the_exact_products_rounded_once(
    dequantize: Callable[..., torch.Tensor], case: Case
) -> None:
    found = dequantize(*parts(case))
    assert found.dtype == case.scales.dtype
    assert found.shape == case.shape
    assert torch.equal(found, case.expected())


@given(case=cases())
def test_the_formula_and_the_library_give_the_same_bits(case: Case) -> None:
    pytest.importorskip("compressed_tensors")
    ours, theirs = by_formula(*parts(case)), by_library(*parts(case))
    assert ours.dtype == theirs.dtype
    assert torch.equal(bits_of(ours), bits_of(theirs))


@pytest.mark.parametrize("library", [False, True])
@given(case=cases(), data=st.data())
def test_some_rows_are_read_alone_and_are_those_of_the_whole(
    library: bool, case: Case, data: st.DataObject
) -> None:
    if library:
        pytest.importorskip("compressed_tensors")
    count = case.shape[0]
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count + 5))  # past the end, as the reader's last piece
    stored = case.stored()
    tensors = InMemory(stored)
    read = tensors.read
    quantization = PackQuantized(Path("checkpoint"), (case.scheme,))
    assert quantization.tensors(WEIGHT, case.shape, stored) == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qwenport.validate.reference.dequantization.pack_quantized._has_library",
            lambda: library,
        )
        found = quantization.rows(WEIGHT, case.shape, start, stop, tensors)
    assert torch.equal(found, case.expected()[start:stop])
    assert read.keys() == stored.keys()
    extra = 0 if case.symmetric else 32 // case.bits - 1
    first, last = read[f"{WEIGHT}_packed"]
    assert start - extra <= first <= start and last == min(stop, count)
    if not case.symmetric:
        first, last = read[f"{WEIGHT}_zero_point"]
        assert (last - first - 2) * 32 // case.bits < stop - start


def one_case(**changes: Any) -> Case:
    values: dict[str, Any] = {
        "bits": 4,
        "group": 8,
        "symmetric": False,
        "codes": [[3] * 16] * 8,
        "zeros": [[5, 9]] * 8,
        "scales": torch.full((8, 2), 0.5),
    }
    return Case(**{**values, **changes})


def rows_of(case: Case, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    quantization = PackQuantized(Path("checkpoint"), (case.scheme,))
    return quantization.rows(WEIGHT, shape, 0, shape[0], InMemory(stored))


def test_another_stated_shape_is_named() -> None:
    case = one_case()
    stored = case.stored() | {f"{WEIGHT}_shape": torch.tensor([8, 24])}
    with pytest.raises(ValidationError, match=rf"{WEIGHT}_shape is \[8, 24\].*\[8, 16\]"):
        rows_of(case, stored, case.shape)


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [("packed", torch.int64), ("zero_point", torch.int8), ("scale", torch.float64)],
)
def test_another_dtype_is_named(tensor: str, dtype: torch.dtype) -> None:
    case = one_case()
    stored = case.stored()
    stored[f"{WEIGHT}_{tensor}"] = stored[f"{WEIGHT}_{tensor}"].to(dtype)
    with pytest.raises(ValidationError, match=f"{WEIGHT}_{tensor} is {dtype}"):
        rows_of(case, stored, case.shape)


def test_groups_that_do_not_divide_the_columns_are_refused() -> None:
    with pytest.raises(ValidationError, match=f"{WEIGHT} has 20 columns"):
        PackQuantized(Path("checkpoint"), (one_case().scheme,)).tensors(WEIGHT, (8, 20), ())


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class() -> None:
    targets = ("Linear", "re:.*up_proj", "model.layers.1.mlp.up_proj")
    schemes = tuple(Scheme(4, 8 * n, True, (t,), {}) for n, t in enumerate(targets, 1))
    quantization = PackQuantized(Path("checkpoint"), schemes)
    for linear, found in {"down_proj": 8, "up_proj": 16}.items():
        scheme = quantization.scheme_of(f"model.layers.0.mlp.{linear}.weight")
        assert scheme.group_size == found
    assert quantization.scheme_of("model.layers.1.mlp.up_proj.weight").group_size == 24
    with pytest.raises(ValidationError, match=r"targets model\.layers\.0\.mlp\.down_proj,"):
        PackQuantized(Path("checkpoint"), schemes[1:]).scheme_of(
            "model.layers.0.mlp.down_proj.weight"
        )


def test_the_library_chooses_the_same_scheme() -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    targets = ("Linear", "re:.*up_proj", "re:.*mlp.*", "model.layers.1.mlp.up_proj", "Embedding")
    schemes = tuple(Scheme(4, n, True, (target,), {}) for n, target in enumerate(targets, 1))
    quantization = PackQuantized(Path("checkpoint"), schemes)
    linear = torch.nn.Linear(1, 1)
    for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.up_proj"):
        for layer in (0, 1):
            module = f"model.layers.{layer}.{name}"
            theirs = match.match_targets(module, linear, targets)[0]
            assert quantization.scheme_of(f"{module}.weight").targets == (theirs,)
