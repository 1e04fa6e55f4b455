"""The torch operator of the KV cache update, compared with NumPy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenport.exporter.decoder import tensor_scatter

OPERATOR = torch.ops.qwenport.tensor_scatter.default


@given(
    batch=st.integers(1, 3),
    room=st.integers(0, 5),
    seq=st.integers(1, 4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_cache_update_writes_its_slots_and_no_other(
    batch: int, room: int, seq: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    past = torch.randn(batch, 2, room + seq, 4, generator=generator).to(dtype)
    update = torch.randn(batch, 2, seq, 4, generator=generator).to(dtype)
    first = torch.randint(0, room + 1, (batch,), generator=generator)
    expected, before = past.float().numpy().copy(), past.clone()
    for row, slot in enumerate(first.tolist()):
        expected[row, :, slot : slot + seq] = update[row].float().numpy()
    present = tensor_scatter(past, update, first)
    assert present.dtype == dtype
    np.testing.assert_array_equal(present.float().numpy(), expected)
    assert torch.equal(past, before), "the operator must not write into its input"


def test_the_cache_update_is_a_well_formed_torch_operator() -> None:
    arguments = (torch.randn(2, 2, 7, 4), torch.randn(2, 2, 3, 4), torch.tensor([0, 4]))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPERATOR, arguments, test_utils=checks)
