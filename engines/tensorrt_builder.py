"""The TensorRT part of `build`: check what is asked for, lower, parse, check, build the plan.

engine.plan     the TensorRT plan
libqwenport_plugins.so   the CUDA plugins, if the engine uses them
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport.contract import CAPACITY, DTYPES, FP32, MODEL, PLAN, WITH_QUERIES, Progress, query
from qwenport.engines.attention import attention_of, choose_attention
from qwenport.engines.errors import BuildError
from qwenport.engines.plan import build_plan
from qwenport.engines.plugin_library import check_library, register_for_build
from qwenport.engines.request import Attention, Filled, Request, Steps
from qwenport.engines.targets import FLAVOURS, code_types, load_tensorrt, parse_gpus, product_types
from qwenport.exporter import Package, damaged, require_space
from qwenport.plugins.compiled import LIBRARY

if TYPE_CHECKING:
    from qwenport.engines.lowering import SignedWeight

MAX_STEP_TOKENS = 2048
"""Tokens per row in one session step: longer prompts are prefilled in chunks, so that activations stay bounded."""
MAX_STEP_LOGITS = 64
"""Positions per row whose logits one step returns; generation needs one."""
DECODE = Steps(1, 2, 2)
"""TensorRT has no fused attention for exactly one token, so the profile for decoding admits two."""
PREFILL = Steps(1024, MAX_STEP_TOKENS, MAX_STEP_LOGITS)
ONLY = Steps(1, MAX_STEP_TOKENS, MAX_STEP_LOGITS)
"""The profile for all steps, of the flavour for which the size of a plan with two is not known."""
MOST_SCORE_BYTES = 4 << 30
"""Bytes that a step of several tokens needs for the scores of dual chunk attention, at most."""
NARROWER = 8
"""How many times narrower the steps of such a profile are than those of the one before, for longer spans."""


def check_for_tensorrt(request: Request) -> None:
    """Refuse what cannot be built, before anything is written.

    Raises:
        BuildError, PluginError: weights that no engine has, an architecture that cannot run the model, or a form of
            attention or a library that is not for it.
        MissingExtraError: the flavour is not installed.
    """
    flavour = FLAVOURS[request.target]
    _attention(request, ())  # what no GPU can have needs none to be refused
    gpus = _gpus(request)
    _attention(request, gpus)
    config = request.package.config
    quantized = bool(code_types(config))
    if request.plugins is not None and quantized and config.moe is not None:
        raise BuildError(
            "the plugin of MoEExperts does not multiply by quantized weights; build without --plugins"
        )
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
    gpus = _gpus(request)
    attention = _attention(request, gpus)
    trt = load_tensorrt(flavour, "build engines")
    if plugins is not None:
        shutil.copyfile(plugins, folder / LIBRARY)
        register_for_build(trt, folder / LIBRARY)
    lowered, layers, weights = _write_lowered(
        request, folder / "lowered", attention.slots, progress, plugins=plugins is not None
    )
    profiles = [
        request.profile(steps, attention=attention, fixed_cache=True)
        for steps in steps_of(request, attention, several=flavour.builds_anywhere)
    ]
    built = build_plan(
        trt,
        lowered,
        folder / PLAN,
        gpus if flavour.builds_anywhere else (),
        profiles,
        attention.form,
        weights,
        progress,
    )
    shutil.rmtree(folder / "lowered")
    return Filled(
        runtime_version=trt.__version__,
        gpus=gpus,
        dtype=package.dtype,
        layers=built["layers"],
        attention=attention,
        profiles=profiles,
        bindings=_bindings(package, attention),
        plugins=() if plugins is None else (LIBRARY,),
        plugin_layers=layers,
        hashes={PLAN: built["sha256"]},
    )


def steps_of(request: Request, attention: Attention, *, several: bool) -> list[Steps]:
    """What an engine's profiles are for; `several` is whether there may be more than one.

    Dual chunk attention of several tokens has their scores in memory. Wide steps are for short spans then, and each
    narrower profile is for longer ones, up to all slots if a step of two tokens has the memory.
    """
    config, slots = request.package.config, attention.slots
    if config.dual_chunk is None:
        return [DECODE, PREFILL] if several else [ONLY]
    per_slot = config.num_attention_heads * score_bytes(request.package.dtype)
    affordable = MOST_SCORE_BYTES // (per_slot * request.batch)  # tokens x slots
    steps, most = [Steps(1, 1, 1)], min(MAX_STEP_TOKENS, request.capacity)
    while most > 1:
        longest = affordable // most
        if longest >= slots:
            steps.append(_several(most, slots))
            break
        longest -= longest % attention.span_multiple
        if longest:
            steps.append(_several(most, longest))
        most = min(max(most // NARROWER, affordable // slots), most - 1)
    return steps


def score_bytes(dtype: str) -> int:
    """Memory that TensorRT needs for the scores of dual chunk attention, per query head, token and slot.

    The products with three queries in fp32, the weights, and a copy of them.
    """
    return 3 * FP32.itemsize + 2 * DTYPES[dtype].itemsize


def _several(most: int, longest: int) -> Steps:
    return Steps(-(-most // 2), most, MAX_STEP_LOGITS, least=2, longest=longest)


def _gpus(request: Request) -> tuple[str, ...]:
    """The architectures of the engine.

    Raises:
        BuildError: see `parse_gpus`.
    """
    package = request.package
    types = product_types(package.config)
    return parse_gpus(request.gpus, FLAVOURS[request.target], package.dtype, types)


def _attention(request: Request, gpus: tuple[str, ...]) -> Attention:
    """The form that the engine gets.

    Raises:
        BuildError: the form asked for cannot be had.
    """
    package = request.package
    form = choose_attention(
        request.attention,
        flavour=request.target,
        gpus=gpus,
        dtype=package.dtype,
        config=package.config,
    )
    return attention_of(form, request.capacity)


def _write_lowered(
    request: Request, folder: Path, slots: int, progress: Progress, *, plugins: bool
) -> tuple[Path, dict[str, int], tuple[SignedWeight, ...]]:
    """Write the lowered model where the parser finds the weights: next to a link to them, and to the new ones.

    Returns:
        The model's file, the number of uses of each plugin, and the quantized weights.

    Raises:
        ExportError: the disk is too small.
        LoweringError, PackageError: the package's graph cannot be lowered.
    """
    import onnx_ir as ir

    from qwenport.engines.lowering import (
        CODES_FILE,
        check_graph,
        for_tensorrt,
        plugin_layers,
        write_tensors,
    )

    package = request.package
    with damaged(package.model):
        model, codes = for_tensorrt(
            package.read_model(),
            dtype=package.dtype,
            capacity=slots,
            rope_rows=package.config.rope_rows(request.capacity),
            kv_heads=package.config.num_key_value_heads,
            plugins=plugins,
        )
        check_graph(model)
    folder.mkdir()
    os.symlink(os.path.abspath(package.path / "weights"), folder / "weights")
    if codes.tensors:
        require_space(folder, codes.bytes)
        write_tensors(folder / CODES_FILE, codes.tensors, progress)
    path = folder / MODEL
    ir.save(model, path)
    return path, plugin_layers(model), tuple(codes.weights)


def _bindings(package: Package, attention: Attention) -> dict[str, Any]:
    """The package's bindings with the caches' slots, and the queries where the form of attention has them."""
    bindings = {
        side: [
            {**b, "shape": [attention.slots if size == CAPACITY else size for size in b["shape"]]}
            for b in values
        ]
        for side, values in package.manifest["bindings"].items()
    }
    if attention.form in WITH_QUERIES:
        config = package.config
        shape = ["batch", config.num_attention_heads, "seq", config.head_dim]
        bindings["outputs"] += [
            {"name": query(layer), "dtype": DTYPES[package.dtype].binding, "shape": shape}
            for layer in range(config.num_hidden_layers)
        ]
    return bindings
