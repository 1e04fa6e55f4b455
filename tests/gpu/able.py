"""What a machine can run of the tests on a GPU, and why not the rest: a reason to skip, or None."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from qwenport.contract import OLDEST_PLUGIN_GPU
from qwenport.engines.targets import FLAVOURS, FP16_ONLY


@dataclass(frozen=True)
class Machine:
    """The first GPU's architecture ("sm90"; None without a GPU), and whether a Python module is installed."""

    gpu: str | None
    has: Callable[[str], bool]

    def no_gpu(self) -> str | None:
        return None if self.gpu else "needs an NVIDIA GPU, and there is none here"

    def no_target(self, target: str, dtype: str = "fp16") -> str | None:
        """Why an engine of the dtype cannot be built and run for a target."""
        flavour = FLAVOURS[target]
        if self.gpu is None:
            return self.no_gpu()
        if not self.has(flavour.module):
            return f"{flavour.module} is not installed"
        if self.gpu not in flavour.gpus:
            return f"{target} has no kernels for this GPU, {self.gpu}"
        if dtype != "fp16" and self.gpu in FP16_ONLY:
            return f"{target} has no kernels for {dtype} on {self.gpu}"
        return None

    def no_plugins(self) -> str | None:
        """Why the CUDA plugins cannot run."""
        if self.gpu is None:
            return self.no_gpu()
        if int(self.gpu[2:]) < OLDEST_PLUGIN_GPU:
            return f"the plugins need a GPU of sm{OLDEST_PLUGIN_GPU} or newer, this is {self.gpu}"
        return self.no_builds()

    def no_builds(self) -> str | None:
        """Why `make cpp`'s builds cannot be made here."""
        if not self.has("kernel_lens"):
            return "TensorRT's headers are not installed: run `make cpp` first"
        return None


def this_machine() -> Machine:
    """The machine that runs the tests."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        gpu = f"sm{major}{minor}"
    return Machine(gpu, lambda module: importlib.util.find_spec(module) is not None)
