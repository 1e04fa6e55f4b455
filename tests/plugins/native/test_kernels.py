"""The kernels' own sources, run on the CPU, against the operators' torch references."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_checks import DTYPES, check_experts, check_rotary, check_router, ran
from plugin_driver import Driver

from qwenport.plugins.moe_experts import moe_experts

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@settings(max_examples=40)
@given(
    dtype=dtypes,
    batch=st.integers(1, 3),
    seq=st.integers(1, 9),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 34),
    positions=st.integers(1, 50),
    seed=seeds,
)
def test_rotary_embedding_of_any_shape(on_cpu, dtype, batch, seq, heads, half, positions, seed):
    check_rotary(
        on_cpu,
        dtype,
        batch=batch,
        seq=seq,
        heads=heads,
        head_dim=2 * half,
        positions=positions,
        seed=seed,
    )


@every_dtype
def test_a_position_outside_the_tables_gives_nan(on_cpu: Driver, dtype: torch.dtype) -> None:
    q, k = torch.ones(1, 2, 3, 16, dtype=dtype), torch.ones(1, 1, 3, 16, dtype=dtype)
    table = torch.ones(4, 8, dtype=dtype)
    positions = torch.tensor([[4, 3, -1]])
    for y in ran(on_cpu.drive("RotaryEmbeddingQK", [q, k, table, table, positions])):
        assert y[:, :, [0, 2]].isnan().all() and not y[:, :, 1].isnan().any()


@st.composite
def logits(draw) -> torch.Tensor:
    """Steps of 1/16 (with many ties), no differences whose softmax would be subnormal."""
    experts = draw(st.integers(1, 512))
    shape = (*draw(st.lists(st.integers(1, 4), min_size=0, max_size=2)), experts)
    random = torch.Generator().manual_seed(draw(seeds))
    most = draw(st.sampled_from([1, 20, 500]))
    values = torch.randint(-most, most + 1, shape, generator=random) / 16
    low = torch.rand(shape, generator=random) < draw(st.sampled_from([0, 0.3]))
    return torch.where(low, -1000.0, values).to(draw(dtypes))


@settings(max_examples=60)
@given(logits=logits(), k=st.integers(1, 16), normalize=st.booleans())
def test_router_of_any_shape(on_cpu, logits, k, normalize):
    check_router(on_cpu, logits, k=min(k, logits.shape[-1]), normalize=normalize)


@pytest.mark.parametrize("experts", [1, 32, 33, 64, 65, 128, 129, 256, 257, 511, 512])
def test_the_last_expert_is_one_that_can_be_chosen(on_cpu: Driver, experts: int) -> None:
    check_router(on_cpu, torch.arange(experts)[None] / 16, k=1, normalize=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_have_no_softmax_give_nan_and_existing_experts(on_cpu: Driver, value) -> None:
    logits = torch.randn(5, 60)
    logits[1, 7] = value
    logits[3] = value
    check_router(on_cpu, logits, k=4, normalize=True)


@settings(max_examples=60)
@given(
    dtype=dtypes,
    tokens=st.one_of(st.integers(1, 12), st.sampled_from([17, 31, 64, 131, 300])),
    experts=st.integers(1, 20),
    k=st.integers(1, 5),
    hidden=st.one_of(st.integers(1, 40), st.sampled_from([64, 72, 136])),
    inner=st.one_of(st.integers(1, 40), st.sampled_from([64, 72, 104])),
    routing=st.sampled_from(["any", "one", "few"]),
    seed=seeds,
)
def test_experts_of_any_shape(on_each, dtype, tokens, experts, k, hidden, inner, routing, seed):
    check_experts(
        on_each,
        dtype,
        tokens=tokens,
        experts=experts,
        k=min(k, experts),
        hidden=hidden,
        inner=inner,
        routing=routing,
        seed=seed,
    )


@every_dtype
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"),
    [
        (1, 60, 4, 128, 88),  # Qwen1.5-MoE's experts, smaller
        (8, 128, 8, 64, 48),  # Qwen3-30B's
        (8, 20, 16, 64, 48),  # as many pairs of few tokens as there can be
        (9, 512, 16, 32, 16),  # the most of both
        (139, 8, 2, 264, 200),  # more rows and columns than a tile
        (600, 4, 2, 16, 16),  # more pairs than a chunk, more rows of an expert than a tile
        (50, 16, 2, 128, 192),  # whole steps, as real models have them, and many pieces of work
    ],
)
def test_experts_of_chosen_shapes(
    on_each: Driver,
    dtype: torch.dtype,
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    inner: int,
) -> None:
    check_experts(
        on_each, dtype, tokens=tokens, experts=experts, k=k, hidden=hidden, inner=inner, seed=tokens
    )


@every_dtype
@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize(("hidden", "inner"), [(16, 8), (131, 97)])
def test_an_expert_named_twice_counts_twice_and_one_that_does_not_exist_gives_nan(
    on_each: Driver, dtype: torch.dtype, tokens: int, hidden: int, inner: int
) -> None:
    """The larger sizes are read in more than one part."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=random).to(dtype)
    gate_up = (torch.randn(3, 2 * inner, hidden, generator=random) * 4 / hidden**0.5).to(dtype)
    down = torch.randn(3, hidden, inner, generator=random).to(dtype)
    indices = torch.randint(0, 3, (tokens, 4), generator=random)
    indices[0] = 1
    indices[1, 2], indices[2, 0] = 3, -1
    weights = torch.rand(tokens, 4, generator=random)
    (y,) = ran(on_each.drive("MoEExperts", [x, indices, weights, gate_up, down]))
    assert y[1].isnan().all() and y[2].isnan().all()
    good = [t for t in range(tokens) if t not in (1, 2)]
    exact = moe_experts(
        x[good].double(), indices[good], weights[good], gate_up.double(), down.double()
    )
    torch.testing.assert_close(y[good].double(), exact, rtol=0.03, atol=0.03 * float(exact.std()))


@every_dtype
@pytest.mark.parametrize("tokens", [6, 40])
def test_a_token_gets_the_same_bits_whatever_is_beside_it(
    on_each: Driver, dtype: torch.dtype, tokens: int
) -> None:
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=random).to(dtype)
    gate_up = torch.randn(6, 48, 64, generator=random).to(dtype)
    down = torch.randn(6, 64, 24, generator=random).to(dtype)
    indices = torch.rand(tokens, 6, generator=random).topk(3).indices
    weights = torch.rand(tokens, 3, generator=random)
    order = torch.randperm(tokens, generator=random)
    (y,) = ran(on_each.drive("MoEExperts", [x, indices, weights, gate_up, down]))
    shuffled = [x[order], indices[order], weights[order], gate_up, down]
    (other,) = ran(on_each.drive("MoEExperts", shuffled))
    assert torch.equal(y[order], other)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 33])
@every_dtype
def test_the_kernels_are_clean_under_sanitizers(
    sanitized: Driver, dtype: torch.dtype, tokens: int
) -> None:
    """Inputs, outputs, workspace and shared memory are exactly as large as asked for."""
    for gpu, hidden, inner in (("80", 72, 40), ("90", 72, 40), ("80", 19, 7)):
        driver = replace(sanitized, gpu=gpu)
        check_experts(driver, dtype, tokens=tokens, experts=5, k=2, hidden=hidden, inner=inner)
    check_rotary(
        sanitized,
        dtype,
        batch=2,
        seq=tokens,
        heads=(3, 1),
        head_dim=2 + tokens * 2,
        positions=40,
        seed=1,
    )
    check_router(sanitized, torch.ones(tokens, 60, dtype=dtype), k=4, normalize=False)


@dataclass(frozen=True)
class Launch:
    """A kernel: its bytes of shared memory, how many it read of what is read once (weights, rows), its grid's x."""

    shared: int
    read: int
    blocks: int


def launches_of(
    driver: Driver, plugin: str, inputs: list[torch.Tensor], path: Path, **fields: int
) -> list[Launch]:
    """What one enqueue launches."""
    path.unlink(missing_ok=True)
    ran(replace(driver, launches=path).drive(plugin, inputs, fields))
    launches = [Launch(*map(int, line.split())) for line in path.read_text().splitlines()]
    once = launches[: len(launches) // 2]  # the driver runs each plugin twice
    assert launches == once * 2
    return once


def experts_of(tokens: int) -> list[torch.Tensor]:
    """4 experts, 3 of which are chosen, 2 a token."""
    x, weights = torch.ones(tokens, 64), torch.ones(tokens, 2)
    gate_up, down = torch.ones(4, 32, 64).bfloat16(), torch.ones(4, 64, 16).bfloat16()
    indices = torch.stack([torch.arange(tokens) % 2, torch.full((tokens,), 3)], dim=1)
    return [x.bfloat16(), indices, weights, gate_up, down]


def test_launches_are_as_few_as_they_can_be(on_cpu: Driver, tmp_path: Path) -> None:
    q, k, table = torch.ones(2, 9, 3, 64), torch.ones(2, 2, 3, 64), torch.ones(9, 32)
    rotated = [q, k, table, table, torch.zeros(2, 3).long()]
    at = tmp_path / "launches"
    (rotation,) = launches_of(on_cpu, "RotaryEmbeddingQK", rotated, at)
    assert rotation.read == q.nbytes + k.nbytes
    assert len(launches_of(on_cpu, "MoERouter", [torch.ones(50, 60)], at, k=4, normalize=1)) == 1
    assert len(launches_of(on_cpu, "MoEExperts", experts_of(8), at)) == 2
    assert len(launches_of(on_cpu, "MoEExperts", experts_of(9), at)) == 6


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_few_tokens_read_each_chosen_expert_once(
    on_cpu: Driver, tokens: int, tmp_path: Path
) -> None:
    inputs = experts_of(tokens)
    swiglu, down = launches_of(on_cpu, "MoEExperts", inputs, tmp_path / "launches")
    chosen = inputs[1].unique().numel()
    assert swiglu.read == chosen * inputs[3][0].nbytes
    assert down.read == chosen * inputs[4][0].nbytes


@pytest.mark.parametrize("gpu", ["80", "86", "89", "90", "100", "120"])
def test_products_are_those_of_the_gpu_and_fit_its_shared_memory(
    on_cpu: Driver, gpu: str, tmp_path: Path
) -> None:
    """Hopper's have more of it; what does not fit is not launched."""
    at = tmp_path / "launches"
    launches = launches_of(replace(on_cpu, gpu=gpu), "MoEExperts", experts_of(9), at)
    most = max(launch.shared for launch in launches)
    assert (most > 99 * 1024) == (gpu == "90")


@pytest.mark.parametrize(
    ("gpu", "blocks"), [("80", 3), ("86", 3), ("89", 3), ("90", 3), ("100", 6), ("120", 3)]
)
def test_persistent_products_have_as_many_blocks_as_the_gpu_runs_at_once(
    on_cpu: Driver, gpu: str, blocks: int, tmp_path: Path
) -> None:
    """Of the stand-in's 3 multiprocessors, those of SM100 hold two blocks of 96 KiB each."""
    driver = replace(on_cpu, gpu=gpu)
    launches = launches_of(driver, "MoEExperts", experts_of(300), tmp_path / "launches")
    products = sorted(launches, key=lambda launch: launch.shared)[-2:]
    assert [product.blocks for product in products] == [blocks, blocks]
