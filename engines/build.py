"""package -> engine directory: lower, parse, check, build, all or nothing.

engine.plan     the TensorRT plan
libqwenport_plugins.so, if the engine uses the CUDA plugins
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
from qwenport.engines.engine import FORMAT_VERSION, PLAN, Engine
from qwenport.engines.errors import BuildError
from qwenport.engines.lowering import check_graph, for_tensorrt, plugin_layers
from qwenport.engines.plan import Progress, build_plan
from qwenport.engines.plugin_library import check_library, register_for_build
from qwenport.engines.targets import flavour_of, load_tensorrt, parse_gpus
from qwenport.exporter import (
    ENGINE_FORMAT,
    MANIFEST,
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

# One step of a session: longer prompts are prefilled in pieces, so that activations stay bounded.
MAX_STEP_TOKENS = 2048
MAX_STEP_LOGITS = 64  # positions whose logits one step returns; generation needs one
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
    progress: Progress = lambda what, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Build the engine of a package.

    Args:
        package_path: what `export` wrote.
        engine_path: directory to create; must not exist.
        target: "tensorrt-rtx" (builds anywhere) or "tensorrt" (on the GPU it is for).
        gpus: "sm86,sm89"; see `parse_gpus` for the default.
        max_seq_len: cache slots, at most (and by default) the package's.
        max_batch: rows, at most (and by default) the package's.
        plugins: library of the CUDA plugins, to be used and copied; without it the custom operators are
            computed from their function bodies.
        force_clean: remove scratch directories of builds for the same place, even if they may still run.
        progress: called with (what, done, total).
        note: called with what the user should know meanwhile.

    Raises:
        PackageError, MissingExtraError, PluginError, LoweringError, BuildError: nothing is left at engine_path.
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
            "format_version": FORMAT_VERSION,
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
                f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
                for layer in range(package.config.num_hidden_layers)
                for part in ("key", "value")
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
        raise BuildError(f"{what} {asked} is outside 1..{most}, what the package was exported for")
    return asked


def profile_shapes(package: Package, capacity: int, batch: int) -> dict[str, dict[str, list[int]]]:
    """One dynamic profile, tuned for decoding one token: input name -> its min, opt and max shape."""
    config = package.config
    tokens = min(MAX_STEP_TOKENS, capacity)
    heads, head_dim = config.num_key_value_heads, config.head_dim

    def shapes(*least: int, opt: list[int], most: list[int]) -> dict[str, list[int]]:
        return {"min": list(least), "opt": opt, "max": most}

    profile = {
        "input_ids": shapes(1, 1, opt=[1, 1], most=[batch, tokens]),
        "position_ids": shapes(1, 1, opt=[1, 1], most=[batch, tokens]),
        "write_indices": shapes(1, opt=[1], most=[batch]),
        "key_positions": shapes(1, opt=[min(TYPICAL_SPAN, capacity)], most=[capacity]),
        "logits_indices": shapes(1, 1, opt=[1, 1], most=[batch, min(MAX_STEP_LOGITS, tokens)]),
    }
    cache = [heads, capacity, head_dim]
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            profile[f"past_key_values.{layer}.{part}"] = shapes(
                1, *cache, opt=[1, *cache], most=[batch, *cache]
            )
    return profile


def _with_capacity(bindings: dict[str, Any], capacity: int) -> dict[str, Any]:
    return {
        side: [
            {**b, "shape": [capacity if size == "capacity" else size for size in b["shape"]]}
            for b in values
        ]
        for side, values in bindings.items()
    }


def write_lowered(
    package: Package, folder: Path, capacity: int, *, plugins: bool
) -> tuple[Path, dict[str, int]]:
    """Write the lowered model where the parser finds the weights: beside a link to them.

    Returns:
        The model's file, and how often it uses each plugin.
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
    path = folder / "model.onnx"
    ir.save(model, path)
    return path, plugin_layers(model)
