"""The C++ tests themselves, in the builds that a release, AddressSanitizer, UBSan and ThreadSanitizer make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .builds import built, run
from .runtime import Library
from .toy import toy_manifest

FUZZ_RUNS = 30_000


@pytest.mark.parametrize("setting", ["release", "address", "thread"])
def test_units_pass_in(setting: str) -> None:
    run(built(setting) / "unit")


@pytest.mark.parametrize("setting", ["release", "address", "thread"])
def test_the_code_for_cuda_runs_on_a_stand_in_for_cuda_in(setting: str) -> None:
    """tests/gpu/test_cuda_on_gpu.py runs the same on a GPU."""
    run(built(setting) / "cuda_on_cpu")


def test_no_bytes_of_a_manifest_do_harm(library: Library, engine_of, tmp_path: Path) -> None:
    """A short run of the fuzz target under ASan and UBSan, from a real manifest and a small one."""
    real = tmp_path / "real.json"
    real.write_text(json.dumps(engine_of("tiny-qwen2.5").manifest))
    small = tmp_path / "small.json"
    small.write_text(toy_manifest(library, capacity=160, max_batch=4, max_step_tokens=24))
    done = run(built("address") / "fuzz_manifest", FUZZ_RUNS, real, small)
    assert f"{FUZZ_RUNS} runs" in done.stdout
