"""The tests on a GPU skip what a machine cannot do, and say why: judged here for machines that we do not have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from able import Machine, this_machine

ALL = {"tensorrt", "tensorrt_rtx", "kernel_lens"}


def machine(gpu: str | None, installed: set[str]) -> Machine:
    return Machine(gpu, installed.__contains__)


@pytest.mark.parametrize(
    ("gpu", "installed", "target", "dtype", "reason"),
    [
        (None, ALL, "tensorrt", "fp16", "needs an NVIDIA GPU, and there is none here"),
        ("sm90", ALL, "tensorrt", "bf16", None),
        ("sm90", ALL, "tensorrt-rtx", "bf16", "tensorrt-rtx has no kernels for this GPU, sm90"),
        ("sm90", {"tensorrt_rtx"}, "tensorrt", "fp16", "tensorrt is not installed"),
        ("sm89", {"tensorrt_rtx"}, "tensorrt-rtx", "fp32", None),
        ("sm87", ALL, "tensorrt-rtx", "fp16", "tensorrt-rtx has no kernels for this GPU, sm87"),
        ("sm87", ALL, "tensorrt", "fp16", None),
        ("sm75", ALL, "tensorrt-rtx", "fp16", None),
        ("sm75", ALL, "tensorrt-rtx", "bf16", "tensorrt-rtx has no kernels for bf16 on sm75"),
        ("sm75", ALL, "tensorrt", "fp16", "tensorrt has no kernels for this GPU, sm75"),
    ],
)
def test_engines(
    gpu: str | None, installed: set[str], target: str, dtype: str, reason: str | None
) -> None:
    assert machine(gpu, installed).no_target(target, dtype) == reason


@pytest.mark.parametrize(
    ("gpu", "installed", "reason"),
    [
        (None, ALL, "needs an NVIDIA GPU, and there is none here"),
        ("sm75", ALL, "the plugins need a GPU of sm80 or newer, this is sm75"),
        ("sm90", set(), "TensorRT's headers are not installed: run `make cpp` first"),
        ("sm90", ALL, None),
        ("sm110", ALL, None),
    ],
)
def test_plugins(gpu: str | None, installed: set[str], reason: str | None) -> None:
    assert machine(gpu, installed).no_plugins() == reason


def test_this_machine_knows_its_gpu() -> None:
    import torch

    assert (this_machine().gpu is not None) == torch.cuda.is_available()
    assert this_machine().has("torch") and not this_machine().has("no_such_module")
