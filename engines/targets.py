"""What an engine can be built for: TensorRT flavours and GPU architectures.

tensorrt-rtx builds anywhere, for several architectures at once. tensorrt builds on the GPU it is for.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qwenport import import_extra
from qwenport.engines.errors import BuildError

RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
TENSORRT_GPUS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121")

# TensorRT-RTX on Turing: no fused attention in bf16, no matrix product in fp32
FP16_ONLY = ("sm75",)


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two TensorRT packages: its Python module, the extra that installs it, its GPUs."""

    name: str
    module: str
    extra: str
    gpus: tuple[str, ...]
    builds_anywhere: bool


FLAVOURS = {
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "rtx", RTX_GPUS, True),
    "tensorrt": Flavour("tensorrt", "tensorrt", "gpu", TENSORRT_GPUS, False),
}


def flavour_of(target: str) -> Flavour:
    """Return a flavour by its command-line name.

    Raises:
        BuildError: no such target.
    """
    if target not in FLAVOURS:
        raise BuildError(f"target {target!r} is not one of {', '.join(FLAVOURS)}")
    return FLAVOURS[target]


def load_tensorrt(flavour: Flavour, purpose: str) -> Any:
    """Import the flavour's Python module, and make Polygraphy use the same one.

    Raises:
        MissingExtraError: the flavour is not installed.
        BuildError: Polygraphy already works with the other flavour in this process.
    """
    module: ModuleType = import_extra(flavour.module, flavour.extra, purpose)
    wanted = flavour.module == "tensorrt_rtx"
    if "polygraphy.config" not in sys.modules:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if wanted else "0"
    import polygraphy.config
    from polygraphy.logger import G_LOGGER

    G_LOGGER.colors = False
    if wanted != polygraphy.config.USE_TENSORRT_RTX:
        raise BuildError("one process can use one TensorRT flavour; start another for the other")
    return module


def parse_gpus(text: str | None, flavour: Flavour, dtype: str) -> tuple[str, ...]:
    """Read "sm86,sm89" and refuse what the flavour or the dtype cannot serve.

    Args:
        text: comma-separated architectures, or None for the flavour's default: for tensorrt-rtx all
            that can run the dtype, for tensorrt the GPU at hand.
        flavour: what will build.
        dtype: the package's.

    Raises:
        BuildError: an unknown name, a repeated one, or one that cannot run the model; says which.
    """
    if text is None:
        return (
            tuple(gpu for gpu in flavour.gpus if dtype == "fp16" or gpu not in FP16_ONLY)
            if flavour.builds_anywhere
            else (current_gpu(),)
        )
    gpus = tuple(part.strip().lower() for part in text.split(","))
    for gpu in gpus:
        if gpu not in RTX_GPUS + TENSORRT_GPUS:
            raise BuildError(f"no such GPU architecture: {gpu!r}; known: {', '.join(flavour.gpus)}")
        if gpu not in flavour.gpus:
            raise BuildError(
                f"{flavour.name} has no kernels for {gpu}; it serves {', '.join(flavour.gpus)}"
            )
        if dtype != "fp16" and gpu in FP16_ONLY:
            raise BuildError(f"{gpu} has no kernels for {dtype}; export with --dtype fp16 for it")
        if gpus.count(gpu) > 1:
            raise BuildError(f"{gpu} is named twice")
    if not flavour.builds_anywhere and gpus != (current_gpu(),):
        raise BuildError(f"tensorrt builds for the GPU at hand ({current_gpu()}) only")
    return gpus


def current_gpu() -> str:
    """The architecture of the first GPU, as "sm90".

    Raises:
        BuildError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise BuildError(
            "this needs an NVIDIA GPU and there is none here; --target tensorrt-rtx builds without one"
        )
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm{major}{minor}"
