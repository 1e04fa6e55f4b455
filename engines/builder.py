"""package -> engine directory: lower, parse, check, build, all or nothing.

engine.plan     the TensorRT plan
libqwenport_plugins.so   the CUDA plugins, if the engine uses them
qwenport.json   the manifest: bindings, profile, GPUs, TensorRT flavour and version, hashes
config.json, tokenizer and generation files, as in the package
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenport import __version__
from qwenport.contract import (
    CAPACITY,
    ENGINE_FORMAT,
    ENGINE_VERSION,
    INPUT_IDS,
    KEY_POSITIONS,
    LOGITS_INDICES,
    MANIFEST,
    MODEL,
    PLAN,
    POSITION_IDS,
    WRITE_INDICES,
    Progress,
    caches,
    no_progress,
    past,
    present,
)
from qwenport.engines.engine import Engine
from qwenport.engines.errors import BuildError
from qwenport.engines.lowering import check_graph, for_tensorrt, plugin_layers
from qwenport.engines.plan import build_plan
from qwenport.engines.plugin_library import check_library, register_for_build
from qwenport.engines.targets import flavour_of, load_tensorrt, parse_gpus
from qwenport.exporter import (
    Package,
    as_json,
    atomic_directory,
    copy_companions,
    damaged,
    load_package,
    sha256,
    write_json,
)
from qwenport.plugins.compiled import LIBRARY

MAX_STEP_TOKENS = 2048
"""Tokens per row in one session step: longer prompts are prefilled in chunks, so that activations stay bounded."""
MAX_STEP_LOGITS = 64
"""Positions per row whose logits one step returns; generation needs one."""
TYPICAL_SPAN = 1024  # the span that the builder tunes decoding for


def build(
    package_path: Path | str,
    engine_path: Path | str,
    *,
    target: str,
    gpus: str | None = None,
    max_seq_len: int | None = None,
    max_batch: int | None = None,
    plugins: Path | str | None = None,
    force_clean: bool = False,
    progress: Progress = no_progress,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Build the engine of a package.

    Args:
        package_path: a package written by `export`.
        engine_path: directory to create; must not exist.
        target: "tensorrt-rtx" (builds anywhere) or "tensorrt" (builds on the GPU it is for).
        gpus: "sm86,sm89"; see `parse_gpus` for the default.
        max_seq_len: cache slots, at most (and by default) the package's.
        max_batch: batch rows, at most (and by default) the package's.
        plugins: library of the CUDA plugins to use and copy; without it the custom operators are
            computed from their function bodies.
        force_clean: remove scratch directories of builds for the same path, even of builds that may still run.
        progress: called with (what, done, total).
        note: called with messages for the user.

    Raises:
        PackageError, MissingExtraError, PluginError, LoweringError, BuildError: the build failed; nothing is left
            at engine_path.
    """
    engine_path = Path(engine_path)
    flavour = flavour_of(target)
    package = load_package(package_path)
    architectures = parse_gpus(gpus, flavour, package.dtype)
    capacity = _limit("max sequence length", max_seq_len, package.max_seq_len)
    batch = _limit("max batch", max_batch, package.max_batch)
    if plugins is not None:
        plugins = Path(plugins)
        check_library(plugins, flavour, architectures)
    package.check_graph()
    trt = load_tensorrt(flavour, "build engines")
    with atomic_directory(engine_path, force_clean=force_clean, note=note) as scratch:
        if plugins is not None:
            shutil.copyfile(plugins, scratch / LIBRARY)
            register_for_build(trt, scratch / LIBRARY)
        lowered, layers = write_lowered(
            package, scratch / "lowered", capacity, plugins=plugins is not None
        )
        profile = profile_shapes(package, capacity, batch)
        built = build_plan(
            trt,
            lowered,
            scratch / PLAN,
            architectures if flavour.builds_anywhere else (),
            profile,
            progress,
        )
        shutil.rmtree(scratch / "lowered")
        copy_companions(package.path, scratch)
        manifest = {
            "format": ENGINE_FORMAT,
            "format_version": ENGINE_VERSION,
            "qwenport_version": __version__,
            "flavour": flavour.name,
            "tensorrt_version": trt.__version__,
            "gpus": list(architectures),
            "model": package.manifest["model"],
            "dtype": package.dtype,
            "max_seq_len": capacity,
            "max_batch": batch,
            "rope_scaling": package.manifest["rope_scaling"],
            "profile": profile,
            "bindings": _with_capacity(package.manifest["bindings"], capacity),
            "aliases": {
                present(cache): past(cache)
                for layer in range(package.config.num_hidden_layers)
                for cache in caches(layer)
            },
            "layers": built["layers"],
            "plugins": [LIBRARY] if plugins is not None else [],
            "plugin_layers": layers,
            "package": {
                "manifest_sha256": sha256(package.path / MANIFEST),
                "source": package.manifest["source"],
                "dtype": package.dtype,
                "weight_bytes": package.manifest["weights"]["bytes"],
                "max_seq_len": package.max_seq_len,
            },
            "files": {
                path.name: (
                    {"bytes": path.stat().st_size, "sha256": built["sha256"]}
                    if path.name == PLAN
                    else {"bytes": path.stat().st_size, "sha256": sha256(path)}
                )
                for path in sorted(scratch.iterdir())
            },
        }
        write_json(scratch / MANIFEST, manifest)
    return Engine(engine_path, as_json(manifest))


def _limit(what: str, asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise BuildError(f"{what} {asked}: the package was exported for 1 to {most}")
    return asked


def profile_shapes(package: Package, capacity: int, batch: int) -> dict[str, dict[str, list[int]]]:
    """One dynamic profile, tuned for single-token decoding: input name -> its min, opt and max shape."""
    config = package.config
    tokens = min(MAX_STEP_TOKENS, capacity)
    heads, head_dim = config.num_key_value_heads, config.head_dim

    def shapes(*least: int, opt: list[int], most: list[int]) -> dict[str, list[int]]:
        return {"min": list(least), "opt": opt, "max": most}

    profile = {
        INPUT_IDS: shapes(1, 1, opt=[1, 1], most=[batch, tokens]),
        POSITION_IDS: shapes(1, 1, opt=[1, 1], most=[batch, tokens]),
        WRITE_INDICES: shapes(1, opt=[1], most=[batch]),
        KEY_POSITIONS: shapes(1, opt=[min(TYPICAL_SPAN, capacity)], most=[capacity]),
        LOGITS_INDICES: shapes(1, 1, opt=[1, 1], most=[batch, min(MAX_STEP_LOGITS, tokens)]),
    }
    cache = [heads, capacity, head_dim]
    for layer in range(config.num_hidden_layers):
        for name in caches(layer):
            profile[past(name)] = shapes(1, *cache, opt=[1, *cache], most=[batch, *cache])
    return profile


def _with_capacity(bindings: dict[str, Any], capacity: int) -> dict[str, Any]:
    return {
        side: [
            {**b, "shape": [capacity if size == CAPACITY else size for size in b["shape"]]}
            for b in values
        ]
        for side, values in bindings.items()
    }


def write_lowered(
    package: Package, folder: Path, capacity: int, *, plugins: bool
) -> tuple[Path, dict[str, int]]:
    """Write the lowered model where the parser finds the weights: next to a link to them.

    Returns:
        The model's file, and the number of uses of each plugin.
    """
    import onnx_ir as ir

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
