"""The library of CUDA plugins for an engine directory: checked against the target, registered with TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenport.contract import PLUGIN_NAMESPACE, PLUGIN_VERSION
from qwenport.engines.errors import BuildError, EngineError
from qwenport.engines.targets import Flavour
from qwenport.exporter import sha256
from qwenport.plugins.compiled import open_library

_registered: dict[int, str] = {}
"""TensorRT module -> SHA-256 of the library in its registry, which accepts each plugin name once per process."""


def check_library(path: Path, flavour: Flavour, gpus: tuple[str, ...]) -> None:
    """Refuse a library that an engine for these GPUs could not use.

    Raises:
        PluginError: not a library of the plugins.
        BuildError: the flavour has no plugins, or the library has no code for a GPU.
    """
    if flavour.builds_anywhere:
        raise BuildError(
            f"{flavour.name} has no plugins: build with --target tensorrt, or without --plugins"
        )
    library = open_library(path)
    missing = [gpu for gpu in gpus if not any(_runs(code, gpu) for code in library.gpus)]
    if missing:
        raise BuildError(
            f"{path}: compiled for {', '.join(library.gpus)}, not for {', '.join(missing)}; compile it with "
            f"`qwenport plugins build --arch {','.join(missing)}`"
        )


def _runs(code: str, gpu: str) -> bool:
    """Whether code for one GPU runs on another: it does within a generation, on GPUs that are no older."""
    compiled, present = int(code[2:]), int(gpu[2:])
    return compiled // 10 == present // 10 and compiled <= present


def register_for_build(trt: Any, path: Path) -> None:
    """Let TensorRT's parser find the plugins of a library.

    Raises:
        BuildError: TensorRT cannot load it, or this process has already built with another.
    """
    digest = sha256(path)
    known = _registered.get(id(trt))
    if known == digest:
        return
    if known is not None:
        raise BuildError(
            f"{path}: this process has built with other plugins; start another process"
        )
    from qwenport.engines.lowering.use_plugins import plugin_names

    registry = trt.get_plugin_registry()
    if registry.load_library(str(path.resolve())) is None:
        raise BuildError(f"{path}: TensorRT {trt.__version__} cannot load these plugins")
    for name in plugin_names():
        if registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
            raise BuildError(f"{path}: TensorRT does not find the plugin {name} in it")
    _registered[id(trt)] = digest


def register_for_run(runtime: Any, path: Path) -> None:
    """Let a TensorRT runtime find the plugins of an engine that it is about to load.

    Raises:
        EngineError: TensorRT cannot load the library.
    """
    # a name without a folder would be searched for elsewhere
    if runtime.get_plugin_registry().load_library(str(path.resolve())) is None:
        raise EngineError(f"{path}: TensorRT cannot load the engine's plugins; build it again")
