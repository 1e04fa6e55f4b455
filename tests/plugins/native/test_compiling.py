"""`qwenport plugins build`: the library it makes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cpp.builds import ROOT, built, tensorrt_headers, tool

from qwenport.engines import BuildError
from qwenport.engines.plugin_library import check_library
from qwenport.engines.targets import FLAVOURS
from qwenport.plugins import compiled
from qwenport.plugins.compiled import PluginError, open_library


def qwenport(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwenport", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def fails(*arguments: object, **environment: str) -> str:
    """The one line of a command that cannot be done."""
    done = qwenport(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def ampere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A library for SM80, and the command's report."""
    library = tmp_path_factory.mktemp("compiled") / "ampere.so"
    headers = ("--tensorrt-include", tensorrt_headers())
    done = qwenport("plugins", "build", library, "--arch", "sm80", *headers, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return library, json.loads(done.stdout)


def test_the_command_compiles_a_library(ampere: tuple[Path, dict]) -> None:
    library, report = ampere
    assert report["library"] == str(library)
    assert report["gpus"] == ["sm80"]
    assert report["bytes"] == library.stat().st_size
    assert re.fullmatch(r"10\.\d+", report["tensorrt"])
    assert [path.name for path in library.parent.iterdir()] == ["ampere.so"]
    assert open_library(library).gpus == ("sm80",)


def test_the_library_needs_neither_tensorrt_nor_cuda_and_shows_three_names(
    ampere: tuple[Path, dict],
) -> None:
    library, _ = ampere
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*(nvinfer|cuda)", needed)
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", library]
    names = subprocess.run(command, capture_output=True, text=True).stdout
    strong = {line.split()[0] for line in names.splitlines() if line.split()[1] in "TDBR"}
    assert strong == {"getCreators", "setLoggerFinder", "qwenport_plugins_description"}
    kinds = {line.split()[1] for line in names.splitlines()}
    assert "u" not in kinds  # a unique symbol keeps a library in its process for ever


def test_the_default_is_every_architecture() -> None:
    assert open_library(built("plugins-cuda") / "libqwenport_plugins.so").gpus == compiled.GPUS


def test_an_engine_for_another_gpu_refuses_the_library(ampere: tuple[Path, dict]) -> None:
    library, _ = ampere
    for able in ("sm80", "sm86", "sm89"):  # the same generation, no older
        check_library(library, FLAVOURS["tensorrt"], (able,))
    with pytest.raises(BuildError, match=r"compiled for sm80, not for sm90; .*--arch sm90"):
        check_library(library, FLAVOURS["tensorrt"], ("sm90",))


@pytest.mark.parametrize(
    ("arch", "complaint"),
    [
        ("sm75", "need a GPU of sm80 or newer, not sm75"),
        ("90", "no such GPU architecture: '90'; write them as sm80,sm90"),
        ("sm80,sm80", "named twice"),
        ("", "no such GPU architecture"),
    ],
)
def test_bad_architectures_are_named(arch: str, complaint: str) -> None:
    assert complaint in fails("plugins", "build", "--arch", arch)


def test_what_the_compiler_refuses_leaves_the_old_library(tmp_path: Path) -> None:
    library = tmp_path / "old.so"
    library.write_text("old")
    headers = ("--tensorrt-include", tensorrt_headers())
    line = fails("plugins", "build", library, "--arch", "sm99", *headers, "--quiet")
    assert "Unsupported gpu architecture" in line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.so", "old")]


def test_headers_that_are_missing_or_anothers_are_named(tmp_path: Path) -> None:
    build = ("plugins", "build", tmp_path / "x.so", "--tensorrt-include")
    assert "no NvInferRuntime.h there" in fails(*build, tmp_path)
    (tmp_path / "NvInferRuntime.h").touch()
    (tmp_path / "NvInferVersion.h").write_text("#define TRT_MAJOR_RTX 1\n")
    assert "headers of TensorRT-RTX, which has no plugins" in fails(*build, tmp_path)


def test_tools_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiled, "CUDA", tmp_path)
    with pytest.raises(PluginError, match=r"nvcc is missing, .* CUDA toolkit"):
        compiled.compile_library(tmp_path / "x.so")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "x.so"
    line = fails("plugins", "build", target, "--tensorrt-include", tensorrt_headers())
    assert "nowhere: no such folder" in line


def test_what_is_no_such_library_is_refused(tmp_path: Path, release: Path) -> None:
    with pytest.raises(PluginError, match=r"no such file; compile it with `qwenport plugins build"):
        open_library(tmp_path / "x.so")
    (tmp_path / "x.so").write_text("text")
    with pytest.raises(PluginError, match="not a library of these plugins"):
        open_library(tmp_path / "x.so")
    with pytest.raises(PluginError, match="not a library of these plugins"):
        open_library(release / "nvinfer" / "fits" / "libnvinfer.so.10")


def test_plugins_are_refused_for_tensorrt_rtx(tmp_path: Path, ampere: tuple[Path, dict]) -> None:
    from qwenport import exporter

    root = Path(__file__).parents[3]
    package = exporter.export(root / "examples" / "tiny-qwen2-moe", tmp_path / "package")
    target = ("build", package.path, tmp_path / "engine", "--target", "tensorrt-rtx")
    line = fails(*target, "--plugins", ampere[0])
    assert "tensorrt-rtx has no plugins" in line
    assert not (tmp_path / "engine").exists()


SOURCES = sorted([*ROOT.glob("plugins/*/*.cpp"), *ROOT.glob("plugins/*/*.cu")])


def test_every_plugin_has_sources() -> None:
    folders = {
        path.name for path in (ROOT / "plugins").iterdir() if (path / "lowering.py").exists()
    }
    assert {path.parent.name for path in SOURCES} == folders | {"cuda"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_clang_tidy_finds_nothing(source: Path) -> None:
    """In the plugins as they are compiled for the CPU."""
    command = [tool("clang-tidy"), "--quiet", "-p", built("plugins"), source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
