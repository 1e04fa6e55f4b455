"""What only a GPU can show: engines of either flavour, and packages on onnxruntime's CUDA provider.

Each case is a process of its own, since one process uses one TensorRT flavour.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from able import this_machine

EXAMPLES = Path(__file__).parents[2] / "examples"

every_checkpoint = pytest.mark.parametrize(
    "name", ["tiny-qwen2.5", "tiny-qwen2-moe", "tiny-qwen2.5-1m"]
)

HERE = this_machine()

pytestmark = pytest.mark.skipif(HERE.gpu is None, reason=str(HERE.no_gpu()))


def qwenport(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qwenport", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@every_checkpoint
@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_an_engine_has_parity_and_writes_what_its_package_writes(target, dtype, name, tmp_path):
    if reason := HERE.no_target(target, dtype):
        pytest.skip(reason)
    package, engine = tmp_path / "package", tmp_path / "engine"
    checkpoint = EXAMPLES / name
    qwenport("export", checkpoint, package, "--dtype", dtype)
    qwenport("build", package, engine, "--target", target, "--gpu", HERE.gpu)
    report = json.loads(qwenport("validate", engine, "--reference", checkpoint, "--json"))
    assert report["passed"]
    if dtype == "fp32":
        words = ("--prompt", "Once upon a time", "--max-new-tokens", 40, "--json")
        ours, theirs = (json.loads(qwenport("generate", t, *words)) for t in (engine, package))
        assert ours["token_ids"] == theirs["token_ids"]


@every_checkpoint
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_package_has_parity_on_the_cuda_provider(dtype, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime here has no CUDA provider")
    from qwenport import exporter, validate

    package = exporter.export(EXAMPLES / name, tmp_path / "package", dtype=dtype)
    report = validate.validate(package.path, EXAMPLES / name, device="cuda")
    assert report.passed, report.failures
