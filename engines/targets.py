"""Build targets: TensorRT flavours and GPU architectures.

tensorrt-rtx builds anywhere, for several architectures at once. tensorrt builds on the GPU it is for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qwenport import import_extra
from qwenport.contract import FP8, GPUS, TENSORRT, TENSORRT_RTX
from qwenport.engines.errors import BuildError

if TYPE_CHECKING:
    from qwenport.exporter import ModelConfig

FP16_ONLY = ("sm75",)
"""Architectures without fused bf16 attention and without fp32 matmul (TensorRT-RTX on Turing)."""


INT4, INT8, FLOAT8, FLOAT32 = "INT4", "INT8", "FP8", "products in fp32"
WITHOUT = {
    INT4: ("sm75",),
    INT8: (),
    FLOAT8: ("sm75", "sm80", "sm86", "sm87"),
    FLOAT32: FP16_ONLY,
}
"""Type that an engine multiplies in -> architectures without kernels for it; one of them fails a build."""


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two TensorRT packages: its Python module, the extra that installs it, its GPUs."""

    name: str
    module: str
    extra: str
    gpus: tuple[str, ...]
    builds_anywhere: bool


FLAVOURS = {
    TENSORRT_RTX: Flavour(TENSORRT_RTX, "tensorrt_rtx", "rtx", GPUS[TENSORRT_RTX], True),
    TENSORRT: Flavour(TENSORRT, "tensorrt", "gpu", GPUS[TENSORRT], False),
}
"""The flavours by their command-line names."""


def flavour_of(target: str) -> Flavour:
    """Return a flavour by its command-line name.

    Raises:
        BuildError: no such target.
    """
    if target not in FLAVOURS:
        raise BuildError(f"target {target!r} is not one of {', '.join(FLAVOURS)}")
    return FLAVOURS[target]


def load_tensorrt(flavour: Flavour, purpose: str) -> Any:
    """Import the flavour's Python module and make Polygraphy use it.

    Raises:
        MissingExtraError: the flavour is not installed.
        BuildError: Polygraphy already uses the other flavour in this process.
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


def code_types(config: ModelConfig) -> tuple[str, ...]:
    """The types of the codes in an engine: 8 bits with a scale per row stay 8 bits, in blocks they become 4 and 4.

    Weights that the export has dequantized have none.
    """
    from qwenport.exporter import quantized_weights

    found = []
    for storage, _ in quantized_weights(config).values():
        if storage.is_whole:
            continue
        is_float8 = FP8 in storage.integers.values()
        in_bytes = storage.bits == 8 and storage.group is None
        found.append(FLOAT8 if is_float8 else INT8 if in_bytes else INT4)
    return tuple(dict.fromkeys(found))


def product_types(config: ModelConfig) -> tuple[str, ...]:
    """What an engine multiplies in besides its dtype: the types of its codes, and of dual chunk attention's scores."""
    return (*code_types(config), *[FLOAT32] * (config.dual_chunk is not None))


def serves(flavour: Flavour, gpu: str, config: ModelConfig, dtype: str) -> bool:
    """Whether engines of a flavour run a model on an architecture."""
    return gpu in flavour.gpus and _has_types(gpu, dtype, product_types(config))


def _has_types(gpu: str, dtype: str, types: Sequence[str]) -> bool:
    has_dtype = dtype == "fp16" or gpu not in FP16_ONLY
    return has_dtype and not any(gpu in WITHOUT[each] for each in types)


def parse_gpus(
    text: str | None, flavour: Flavour, dtype: str, types: Sequence[str] = ()
) -> tuple[str, ...]:
    """Parse "sm86,sm89" and refuse architectures that the flavour or a type does not support.

    Args:
        text: comma-separated architectures, or None for the flavour's default: for tensorrt-rtx all
            that can run the types, for tensorrt the local GPU.
        flavour: the flavour that will build.
        dtype: the package's dtype.
        types: what else it multiplies in, as of `product_types`.

    Raises:
        BuildError: an unknown name, a repeated one, or one that cannot run the model; says which.
    """
    if text is None and flavour.builds_anywhere:
        return tuple(gpu for gpu in flavour.gpus if _has_types(gpu, dtype, types))
    asked = [current_gpu()] if text is None else [part.strip() for part in text.split(",")]
    gpus = tuple(map(str.lower, asked))
    for gpu, word in zip(gpus, asked, strict=True):
        serving = [known.name for known in FLAVOURS.values() if gpu in known.gpus]
        if text is not None and not serving:
            raise BuildError(_unknown(word, flavour))
        if flavour.name not in serving:
            other = f"; `build --target {serving[0]}` has" if serving else ""
            if other and dtype != "fp16" and gpu in FP16_ONLY:
                other += ", in fp16 (export with --dtype fp16)"
            raise BuildError(
                f"{flavour.name} has no kernels for {gpu}, it serves {', '.join(flavour.gpus)}{other}"
            )
        if dtype != "fp16" and gpu in FP16_ONLY:
            raise BuildError(f"{gpu} has no kernels for {dtype}; export with --dtype fp16 for it")
        lacking = [each for each in types if gpu in WITHOUT[each]]
        if lacking:
            needs = "dual chunk attention needs"
            if lacking[0] != FLOAT32:
                needs = "the package's quantized weights need"
            raise BuildError(
                f"{gpu} has no kernels for {lacking[0]}, which {needs}; leave it out of --gpu"
            )
        if gpus.count(gpu) > 1:
            raise BuildError(f"{gpu} is named twice")
    if text is not None and not flavour.builds_anywhere:
        _check_local(gpus, flavour)
    return gpus


def _unknown(word: str, flavour: Flavour) -> str:
    """Why a name in a list of GPUs is refused."""
    if not word:
        return "an empty name in the list of GPUs"
    known = {gpu for other in FLAVOURS.values() for gpu in other.gpus}
    meant = f" (did you mean sm{word}?)" if f"sm{word}" in known else ""
    return (
        f"no TensorRT has kernels for {word!r}{meant}; {flavour.name} serves {', '.join(flavour.gpus)} "
        "(`qwenport inspect` names the architecture of common GPUs)"
    )


def _check_local(gpus: tuple[str, ...], flavour: Flavour) -> None:
    """Raises BuildError: the local GPU is not the one asked for, or there is none."""
    try:
        local = current_gpu()
    except BuildError as error:
        raise BuildError(
            f"{flavour.name} builds on the GPU that the engine is for, and there is none here: build on a machine "
            f"with an {gpus[0]} GPU"
        ) from error
    if gpus != (local,):
        raise BuildError(f"{flavour.name} builds only for the local GPU ({local})")


def current_gpu() -> str:
    """The architecture of the first GPU, as "sm90".

    Raises:
        BuildError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise BuildError(
            "this needs an NVIDIA GPU and there is none here; --target tensorrt-rtx builds without one"
        )
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm{major}{minor}"
