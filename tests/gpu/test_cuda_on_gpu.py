"""The C++ library's code for CUDA on a GPU: memory, copies, capture and replay, with a trivial kernel."""

from __future__ import annotations

import subprocess

import pytest
import torch
from cpp.builds import built


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here"
)
def test_memory_copies_capture_and_replay() -> None:
    program = built("release") / "cuda_device"
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
