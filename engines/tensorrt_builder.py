"""The TensorRT part of `build`: check what is asked for, lower, parse, check, build the plan.

engine.plan     the TensorRT plan
libqwenport_plugins.so   the CUDA plugins, if the engine uses them
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from qwenport.contract import CAPACITY, MODEL, PLAN, Progress
from qwenport.engines.plan import build_plan
from qwenport.engines.plugin_library import check_library, register_for_build
from qwenport.engines.request import Attention, Filled, Request
from qwenport.engines.targets import FLAVOURS, load_tensorrt, parse_gpus
from qwenport.exporter import Package, damaged
from qwenport.plugins.compiled import LIBRARY

MAX_STEP_TOKENS = 2048
"""Tokens per row in one session step: longer prompts are prefilled in chunks, so that activations stay bounded."""
MAX_STEP_LOGITS = 64
"""Positions per row whose logits one step returns; generation needs one."""


def check_for_tensorrt(request: Request) -> None:
    """Refuse what cannot be built, before anything is written.

    Raises:
        BuildError, PluginError: an architecture that cannot run the model, or a library that is not for it.
        MissingExtraError: the flavour is not installed.
    """
    flavour = FLAVOURS[request.target]
    gpus = parse_gpus(request.gpus, flavour, request.package.dtype)
    if request.plugins is not None:
        check_library(request.plugins, flavour, gpus)
    load_tensorrt(flavour, "build engines")


def fill_for_tensorrt(request: Request, folder: Path, progress: Progress) -> Filled:
    """Write the plan, and the plugins if they are used, into `folder`.

    Args:
        request: what to build.
        folder: the engine's directory.
        progress: called with (what is being done, done, total).

    Raises:
        LoweringError, BuildError: see `build_plan`.
    """
    package, plugins, flavour = request.package, request.plugins, FLAVOURS[request.target]
    gpus = parse_gpus(request.gpus, flavour, package.dtype)
    trt = load_tensorrt(flavour, "build engines")
    if plugins is not None:
        shutil.copyfile(plugins, folder / LIBRARY)
        register_for_build(trt, folder / LIBRARY)
    lowered, layers = _write_lowered(
        package, folder / "lowered", request.capacity, plugins=plugins is not None
    )
    profiles = [request.profile(MAX_STEP_TOKENS, MAX_STEP_LOGITS, fixed_cache=True)]
    built = build_plan(
        trt,
        lowered,
        folder / PLAN,
        gpus if flavour.builds_anywhere else (),
        profiles,
        progress,
    )
    shutil.rmtree(folder / "lowered")
    return Filled(
        runtime_version=trt.__version__,
        gpus=gpus,
        dtype=package.dtype,
        layers=built["layers"],
        attention=Attention.masked(request.capacity),
        profiles=profiles,
        bindings=_with_capacity(package.manifest["bindings"], request.capacity),
        plugins=() if plugins is None else (LIBRARY,),
        plugin_layers=layers,
        hashes={PLAN: built["sha256"]},
    )


def _write_lowered(
    package: Package, folder: Path, capacity: int, *, plugins: bool
) -> tuple[Path, dict[str, int]]:
    """Write the lowered model where the parser finds the weights: next to a link to them.

    Returns:
        The model's file, and the number of uses of each plugin.
    """
    import onnx_ir as ir

    from qwenport.engines.lowering import check_graph, for_tensorrt, plugin_layers

    with damaged(package.model):
        model = for_tensorrt(
            package.read_model(),
            dtype=package.dtype,
            capacity=capacity,
            positions=capacity,
            kv_heads=package.config.num_key_value_heads,
            plugins=plugins,
        )
        check_graph(model)
    folder.mkdir()
    os.symlink(os.path.abspath(package.path / "weights"), folder / "weights")
    path = folder / MODEL
    ir.save(model, path)
    return path, plugin_layers(model)


def _with_capacity(bindings: dict[str, Any], capacity: int) -> dict[str, Any]:
    return {
        side: [
            {**b, "shape": [capacity if size == CAPACITY else size for size in b["shape"]]}
            for b in values
        ]
        for side, values in bindings.items()
    }
