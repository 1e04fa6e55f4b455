"""The CUDA plugins on a GPU: what their kernels compute there, as TensorRT loads them, and under compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from able import this_machine
from cpp.builds import built
from plugin_checks import DTYPES, check_experts, check_rotary, check_router
from plugin_driver import Driver

REASON = this_machine().no_plugins()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def on_gpu() -> Driver:
    library = built("plugins-cuda") / "libqwenport_plugins.so"
    return Driver(built("plugins") / "drive_on_gpu", library, "device")


@every_dtype
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "head_dim"),
    [(1, 1, (28, 4), 128), (3, 7, (5, 1), 64), (2, 131, (3, 2), 22), (1, 2048, (32, 4), 128)],
)
def test_rotary_embedding(on_gpu, dtype, batch, seq, heads, head_dim) -> None:
    check_rotary(
        on_gpu,
        dtype,
        batch=batch,
        seq=seq,
        heads=heads,
        head_dim=head_dim,
        positions=4096,
        seed=seq,
    )


@every_dtype
@pytest.mark.parametrize("experts", [1, 31, 60, 128, 512])
@pytest.mark.parametrize("tokens", [1, 13, 4096])
def test_router(on_gpu, dtype, experts, tokens) -> None:
    random = torch.Generator().manual_seed(tokens)
    logits = torch.randint(-200, 200, (tokens, experts), generator=random) / 16
    check_router(on_gpu, logits.to(dtype), k=min(8, experts), normalize=tokens % 2 == 1)


@every_dtype
@pytest.mark.parametrize("routing", ["any", "one", "few"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 64, 131, 1021])
@pytest.mark.parametrize(("hidden", "inner"), [(512, 352), (264, 200), (37, 19)])
def test_experts(on_gpu, dtype, routing, tokens, hidden, inner) -> None:
    check_experts(
        on_gpu,
        dtype,
        tokens=tokens,
        experts=16,
        k=4,
        hidden=hidden,
        inner=inner,
        routing=routing,
        seed=tokens,
    )


@every_dtype
@pytest.mark.parametrize("build", ["plugins-cuda-80", "plugins-cuda-many"])
@pytest.mark.parametrize("tokens", [1, 9, 131, 1021])
def test_other_products_of_experts(on_gpu, dtype, build: str, tokens: int) -> None:
    """Those that a newer GPU's own take the place of, and those for many tokens when there are few."""
    driver = replace(on_gpu, library=built(build) / "libqwenport_plugins.so")
    check_experts(driver, dtype, tokens=tokens, experts=16, k=4, hidden=264, inner=200, seed=tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", ["plugins-cuda", "plugins-cuda-80"])
def test_experts_whose_work_goes_round_the_gpu_more_than_once(on_gpu, dtype, build: str) -> None:
    driver = replace(on_gpu, library=built(build) / "libqwenport_plugins.so")
    check_experts(driver, dtype, tokens=2048, experts=32, k=4, hidden=1024, inner=768)


@every_dtype
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(on_gpu, dtype, tool: str, tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    wrapped = tmp_path / "drive"
    wrapped.write_text(
        f"#!/bin/sh\nexec {sanitizer} --tool {tool} --error-exitcode 3 --log-file {tmp_path}/log "
        f'{on_gpu.program} "$@"\n'
    )
    wrapped.chmod(0o755)
    checked = Driver(wrapped, on_gpu.library, "device")
    for tokens in (3, 40):
        check_experts(checked, dtype, tokens=tokens, experts=6, k=2, hidden=72, inner=40)
    logits = torch.arange(300).reshape(5, 60).to(dtype)
    check_router(checked, logits / 16, k=4, normalize=True)
    check_rotary(checked, dtype, batch=2, seq=3, heads=(3, 1), head_dim=64, positions=9, seed=0)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    import sys

    script = Path(__file__).parents[2] / "benchmarks" / "plugins.py"
    command = [sys.executable, script, "--quick", "--work", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
