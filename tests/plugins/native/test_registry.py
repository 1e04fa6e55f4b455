"""The library in TensorRT's own plugin registry, which needs no GPU: its lean runtime has the same as TensorRT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cpp.builds import built

# A registry is its process's: each test has its own. `said` is printed as JSON.
BEGINNING = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import tensorrt_lean_bindings as trt
from qwenport.engines import plugin_library
from qwenport.engines.lowering.use_plugins import plugin_names
from qwenport.contract import PLUGIN_NAMESPACE, PLUGIN_VERSION
library, said = Path(sys.argv[1]), {}
registry = trt.get_plugin_registry()

def made(name, **values):
    fields = [trt.PluginField(f, np.array([v], np.int32), trt.PluginFieldType.INT32)
              for f, v in values.items()]
    creator = registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    collection = trt.PluginFieldCollection(fields)
    return creator.create_plugin("x", collection, trt.TensorRTPhase.BUILD)
"""


@pytest.fixture(scope="module")
def library() -> Path:
    return built("plugins-cuda") / "libqwenport_plugins.so"


def in_a_process(program: str, library: Path | str, folder: Path) -> tuple[dict[str, Any], str]:
    """What a program `said`, and its stderr."""
    command = [sys.executable, "-c", f"{BEGINNING}{program}\nprint(json.dumps(said))", library]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_build_finds_every_plugin(library: Path, tmp_path: Path) -> None:
    program = """
plugin_library.register_for_build(trt, library)
plugin_library.register_for_build(trt, library)
for name in plugin_names():
    creator = registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    said[name] = [field.name for field in creator.field_names]
    assert registry.get_creator(name, PLUGIN_VERSION, "") is None
"""
    said, _ = in_a_process(program, library, tmp_path)
    assert said == {"RotaryEmbeddingQK": [], "MoERouter": ["k", "normalize"], "MoEExperts": []}


def test_plugins_are_made_or_refused_with_a_line(library: Path, tmp_path: Path) -> None:
    program = """
plugin_library.register_for_build(trt, library)
for name, fields in (("MoERouter", {"k": 4, "normalize": 1}), ("MoEExperts", {})):
    plugin = made(name, **fields)
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    said[name] = [core.plugin_name, core.plugin_version, core.plugin_namespace]
said["refused"] = made("MoERouter", k=17, normalize=1) is None
"""
    said, stderr = in_a_process(program, library, tmp_path)
    assert said == {
        "MoERouter": ["MoERouter", "1", "qwenport"],
        "MoEExperts": ["MoEExperts", "1", "qwenport"],
        "refused": True,
    }
    assert "MoERouter: attribute 'k' is 17, outside 1..16" in stderr


def test_an_engine_in_the_working_folder_finds_its_library(library: Path, tmp_path: Path) -> None:
    shutil.copyfile(library, tmp_path / library.name)
    program = """
runtime = SimpleNamespace(get_plugin_registry=lambda: registry)
plugin_library.register_for_run(runtime, library)
said["found"] = registry.get_creator("MoEExperts", PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None
"""
    said, _ = in_a_process(program, library.name, tmp_path)
    assert said == {"found": True}


def test_what_is_no_library_of_plugins_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.so").write_text("no library")
    program = """
try:
    plugin_library.register_for_build(trt, library)
except plugin_library.BuildError as error:
    said["error"] = str(error)
"""
    said, _ = in_a_process(program, tmp_path / "no.so", tmp_path)
    assert "TensorRT 10.16.1.11 cannot load these plugins" in said["error"]
