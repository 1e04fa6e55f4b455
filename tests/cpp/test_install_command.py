"""`qwenport cpp install` from a wheel, what it says when it cannot, and `make embed`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from wheels import copy_sources, install, make_wheel

from qwenport import cmake, engines, exporter
from qwenport.cmake import CompilationError
from qwenport.contract import ONNXRUNTIME, TARGETS
from qwenport.engines import InstallError, cpp_library, install_cpp_library
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession

from .builds import ROOT, configure, run, tensorrt_headers, tool

PROMPT = [40, 41, 42]
PATIENCE = 120.0  # seconds


def environment(**variables: str) -> dict[str, str]:
    """This one, with the tools of the development environment in PATH."""
    kept = {key: value for key, value in os.environ.items() if key != "QWENPORT_ONNXRUNTIME"}
    return kept | {"PATH": f"{Path(tool('cmake')).parent}:{os.environ['PATH']}"} | variables


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if "__pycache__" not in name}


def test_a_wheel_s_user_gets_a_library_and_a_program_that_runs_an_engine(
    package_of: Callable[[str], exporter.Package], tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    copy_sources(tmp_path / "copy")
    install(make_wheel(tmp_path / "copy"), venv := tmp_path / "venv")
    shutil.rmtree(tmp_path / "copy")
    (site,) = (venv / "lib").glob("*/site-packages")
    before = files(site)
    # what the wheel depends on; the editable installation of this repository is not seen from there
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))

    command = [venv / "bin" / "qwenport", "cpp", "install", "usr", "--json"]
    done = run(*command, cwd=tmp_path, env=environment(DESTDIR=str(tmp_path / "nowhere")))
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["prefix"] == str(tmp_path / "usr")
    assert ONNXRUNTIME in report["targets"] and set(report["targets"]) <= set(TARGETS)
    assert report["bytes"] == Path(report["library"]).stat().st_size
    assert files(site) == before | {"shared.pth"}
    assert files(tmp_path) & {"nowhere", "build"} == set()

    shutil.copytree(ROOT / "examples" / "cpp" / "minimal", tmp_path / "source")
    prefix = f"-DCMAKE_PREFIX_PATH={report['prefix']}"
    run(*configure(tmp_path / "source", tmp_path / "minimal", prefix))
    run(tool("cmake"), "--build", tmp_path / "minimal")
    package = package_of("tiny-qwen2.5")
    engine = engines.build(package.path, tmp_path / "engine", target=ONNXRUNTIME)
    options = engines.GenerateOptions(max_new_tokens=40)
    (expected,) = engines.generate(OnnxRuntimeSession(package), [PROMPT], options)
    env = environment(QWENPORT_ONNXRUNTIME=report["onnxruntime_library"])
    done = run(tmp_path / "minimal" / "minimal", engine.path, *PROMPT, env=env)
    assert list(map(int, done.stdout.split())) == expected.tokens


def test_make_embed_prints_the_text_that_generate_writes() -> None:
    """In this environment, which has what `make embed` would install."""
    (ROOT / "build" / "embed" / "tiny.package").mkdir(
        parents=True, exist_ok=True
    )  # an earlier run's
    here = [f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.installed-embed"]
    quick = environment(MAKEFLAGS="", MAKELEVEL="0", CMAKE_BUILD_TYPE="None")  # not optimised
    done = run("make", "embed", *here, cwd=ROOT, env=quick)
    engine, prompt = "build/embed/tiny.engine", "Once upon a time"
    options = ["--prompt", prompt, "--max-new-tokens", "40", "--json"]
    generated = run(sys.executable, "-m", "qwenport", "generate", engine, *options, cwd=ROOT)
    report = json.loads(generated.stdout)
    assert len(report["token_ids"]) == 40
    assert done.stdout.splitlines()[-1] == prompt + report["text"]
    for command in ("export", "build", "cpp install"):
        assert f"/bin/qwenport {command} " in done.stdout


def test_make_embed_without_a_compiler_is_one_line(tmp_path: Path) -> None:
    command = ["make", "embed", f"VENV={tmp_path / 'venv'}"]
    env = environment(CXX="/nowhere/c++", MAKEFLAGS="", MAKELEVEL="0")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("error: a C++17 compiler is needed; ")
    assert not (tmp_path / "venv").exists()


# What it says when it cannot


def test_what_the_compiler_refuses_installs_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-Dnamespace=oops")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "qwenport", "cpp", "install", tmp_path / "usr"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: compiling the C++ library failed: ")
    assert "oops" in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert files(tmp_path) == set()


def test_ctrl_c_ends_the_compilers_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwenport", "cpp", "install", str(tmp_path / "usr")]
    process = subprocess.Popen(
        command,
        env=environment(TMPDIR=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline, compilers = time.monotonic() + PATIENCE, set()
    while not {"cc1plus", "building"} <= {name for name, _ in compilers}:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
        compilers = {named(child) for child in psutil.Process(process.pid).children(recursive=True)}
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert not any(is_alive(child) for _, child in compilers)
    assert files(tmp_path) == set()


def named(process: psutil.Process) -> tuple[str, psutil.Process]:
    """A process by its name; "building" is the CMake that builds, after it has configured."""
    try:
        return "building" if "--parallel" in process.cmdline() else process.name(), process
    except psutil.Error:  # it has ended since
        return "", process


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_cmake_that_is_missing_or_old_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 99.1)\n")
    old = r"cmake is older than 3\.22: pip install 'qwenport\[cpp\]'"
    with pytest.raises(CompilationError, match=old):
        compile_(tmp_path, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cmake.sysconfig, "get_path", lambda name: str(tmp_path))
    missing = r"cmake is missing, needed to compile: pip install 'qwenport\[cpp\]'"
    with pytest.raises(CompilationError, match=missing):
        install_cpp_library(tmp_path / "usr")


def test_a_compiler_or_a_make_that_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilationError, match=r"a C\+\+17 compiler is missing; .*install g\+\+"):
        install_cpp_library(tmp_path / "usr")
    only_cmake = {"cmake": tool("cmake")}
    monkeypatch.setattr(cmake, "tool", only_cmake.get)
    with pytest.raises(CompilationError, match=r"ninja or make is missing, .*qwenport\[cpp\]"):
        install_cpp_library(tmp_path / "usr")
    assert files(tmp_path) == set()


def test_headers_that_are_missing_are_named(tmp_path: Path) -> None:
    nowhere = {
        "NLOHMANN_JSON_INCLUDE_DIR": "NLOHMANN_JSON_INCLUDE_DIR-NOTFOUND",
        "CMAKE_FIND_ROOT_PATH": "/nowhere",
        "CMAKE_FIND_ROOT_PATH_MODE_INCLUDE": "ONLY",
    }
    json_missing = (
        r"nlohmann/json is missing, .*qwenport\[cpp\].*apt-get install nlohmann-json3-dev"
    )
    with pytest.raises(CompilationError, match=json_missing):
        compile_(cpp_library.SOURCES, tmp_path / "a", **nowhere)
    with pytest.raises(InstallError, match=r"no NvInferVersion.h there; .*\(of NvInfer.h\)"):
        install_cpp_library(tmp_path / "usr", tensorrt_include=tmp_path)
    no_cuda = {"CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit": "ON"}
    headers = {"TENSORRT_INCLUDE_DIR": tensorrt_headers()}
    with pytest.raises(CompilationError, match=r"no CUDA toolkit of version 12\.5 or newer"):
        compile_(cpp_library.SOURCES, tmp_path / "b", **no_cuda, **headers)


def compile_(source: Path, build: Path, **settings: object) -> None:
    cmake.build(source, build, settings, what="compiling", progress=lambda what, done, total: None)


def test_a_prefix_that_cannot_be_one_is_refused_before_compiling(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for prefix in (tmp_path / "file", tmp_path / "file" / "usr"):
        with pytest.raises(InstallError, match="file: not a folder to install in"):
            install_cpp_library(prefix)


def test_what_cannot_be_written_leaves_the_prefix_as_it_was(tmp_path: Path) -> None:
    staged, prefix = tmp_path / "staged", tmp_path / "usr"
    (staged / "include").mkdir(parents=True)
    (staged / "include" / "a.h").write_text("new")
    (staged / "lib").mkdir()
    (staged / "lib" / "x.so.1").write_text("new")
    (staged / "lib" / "x.so").symlink_to("x.so.1")
    (prefix / "include").mkdir(parents=True)
    (prefix / "include" / "a.h").write_text("old")
    (prefix / "lib").write_text("a file")
    with pytest.raises(InstallError, match=r"lib.*: cannot be installed there"):
        cpp_library._copy(staged, prefix)
    (prefix / "lib").unlink()
    (prefix / "lib" / "x.so").mkdir(parents=True)
    with pytest.raises(InstallError, match=r"lib/x.so: a folder is in the way"):
        cpp_library._copy(staged, prefix)
    assert files(prefix) == {"include", "include/a.h", "lib", "lib/x.so"}
    assert (prefix / "include" / "a.h").read_text() == "old"
    (prefix / "lib" / "x.so").rmdir()
    cpp_library._copy(staged, prefix)
    assert files(prefix) == files(staged)
    assert (prefix / "include" / "a.h").read_text() == "new"
    assert os.readlink(prefix / "lib" / "x.so") == "x.so.1"
