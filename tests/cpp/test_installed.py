"""The installed package: what its files show and hide, examples built against it, and what a machine lacks.

The examples are linked to the real library. Without a GPU that library says so; to see the examples work,
the loader is given the tests' build on the stand-in in its place, which exports the same names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .builds import ROOT, built, configure, run, tensorrt_headers, tool
from .runtime import Error, Library
from .toy import toy_directory, toy_logits, toy_manifest

EXAMPLES = ["minimal", "chat", "server_loop", "bench"]
every_kind = pytest.mark.parametrize("kind", ["shared", "static"])
RUNTIME = ROOT / "engines" / "cpp"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """ "shared" or "static" -> the prefix that such a runtime was installed to, away from the source tree."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            build = built("static") if kind == "static" else built("release") / "runtime"
            made[kind] = tmp_path_factory.mktemp(kind) / "usr"
            run(tool("cmake"), "--install", build, "--prefix", made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def example(installed, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An example's program, built from a copy, against an installed tree only."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str = "shared") -> Path:
        if (name, kind) not in made:
            folder = tmp_path_factory.mktemp(name)
            shutil.copytree(ROOT / "examples" / "cpp" / name, folder / "source")
            warnings = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
            prefix = f"-DCMAKE_PREFIX_PATH={installed(kind)}"
            run(*configure(folder / "source", folder / "build", prefix, warnings))
            run(tool("cmake"), "--build", folder / "build")
            made[name, kind] = folder / "build" / name
        return made[name, kind]

    return make


@pytest.fixture(scope="module")
def on_stand_in(release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which programs find the stand-in's build as libqwenport."""
    folder = tmp_path_factory.mktemp("library")
    (soname,) = {path.name for path in (release / "runtime").glob("libqwenport.so.*.*")} - {
        path.name for path in (release / "runtime").glob("libqwenport.so.*.*.*")
    }
    (folder / soname).symlink_to(release / "libqwenport_stand_in.so")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module")
def toy(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_directory(library, tmp_path_factory.mktemp("toy"))


def greedy(library: Library, prompt: list[int], count: int) -> list[int]:
    manifest, held = toy_manifest(library), list(prompt)
    for _ in range(count):
        held.append(int(toy_logits(library, manifest, held).argmax()))
    return held[len(prompt) :]


def test_the_first_comment_of_the_header_is_the_minimal_example() -> None:
    header = (RUNTIME / "include/qwenport/qwenport.hpp").read_text()
    program = re.search(r"^//     #include.*?^//     }$", header, re.MULTILINE | re.DOTALL)
    assert program
    lines = [line.removeprefix("//").removeprefix("     ") for line in program[0].splitlines()]
    assert "\n".join(lines) + "\n" == (ROOT / "examples/cpp/minimal/main.cpp").read_text()
    assert len(lines) <= 20


def test_public_headers_stand_alone_in_cpp_and_c(installed, tmp_path: Path) -> None:
    """The first comment of a C header, a whole program, compiles as C; no header needs CUDA or TensorRT."""
    prefix = installed("shared")
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c", f"-I{prefix}/include"]
    flags += ["-o", tmp_path / "object"]
    for header in (prefix / "include" / "qwenport").iterdir():
        assert not re.search(r"#include [<\"](Nv|cuda|onnx)", header.read_text())
    for name in ("qwenport", "tokenizer", "chat"):
        (tmp_path / "one.cpp").write_text(f"#include <qwenport/{name}.hpp>\n")
        run("g++", "-std=c++17", *flags, tmp_path / "one.cpp")
        (tmp_path / "one.c").write_text(f"#include <qwenport/{name}.h>\n")
        run("gcc", "-std=c99", *flags, tmp_path / "one.c")
    for name in ("qwenport", "chat"):
        comment = (prefix / f"include/qwenport/{name}.h").read_text().partition("*/")[0]
        program = re.search(r"^ \*     #include.*^ \*     }$", comment, re.MULTILINE | re.DOTALL)
        assert program
        (tmp_path / "two.c").write_text(re.sub(r"^ \*", "", program[0], flags=re.MULTILINE))
        run("gcc", "-std=c99", *flags, tmp_path / "two.c")


@pytest.mark.parametrize("setting", ["release/runtime", "onnxruntime"])
def test_the_library_needs_no_runtime_to_start(setting: str) -> None:
    build, _, folder = setting.partition("/")
    library = built(build) / folder / "libqwenport.so"
    needed = run("readelf", "--dynamic", library).stdout
    assert not re.search(r"NEEDED.*(nvinfer|tensorrt|cuda|onnxruntime)", needed)
    names = run("nm", "--dynamic", "--defined-only", "--format=posix", library).stdout
    strong = {line.split()[0] for line in names.splitlines() if line.split()[1] in "TDBR"}
    assert strong
    assert {name for name in strong if "qwenport" not in name} == set()


def test_without_cuda_the_library_is_small_and_needs_only_the_system_s(tmp_path: Path) -> None:
    library = built("onnxruntime") / "libqwenport.so"
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "--dynamic", library).stdout)
    allowed = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= allowed
    run("strip", "-o", tmp_path / "stripped", library)
    assert (tmp_path / "stripped").stat().st_size < 2 << 20


def test_the_minimal_example_prints_the_tokens(
    example, on_stand_in, library: Library, toy: Path
) -> None:
    done = run(example("minimal"), toy, 5, 6, 7, env=on_stand_in)
    assert list(map(int, done.stdout.split())) == greedy(library, [5, 6, 7], 40)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_static_runtime_is_all_in_the_program(example, name: str) -> None:
    needed = run("readelf", "--dynamic", example(name, "static")).stdout
    assert not re.search(r"NEEDED.*(qwenport|nvinfer|tensorrt|cuda)", needed)


def test_chat_says_what_an_engine_lacks(example, on_stand_in, toy: Path) -> None:
    """tests/cpp/test_chat.py has conversations."""
    done = subprocess.run(
        [example("chat"), toy], env=on_stand_in, input="Hello!\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {toy}: a toy has no chat template\n"


def test_the_server_answers_every_request(
    example, on_stand_in, library: Library, toy: Path
) -> None:
    prompts = [[n, n + 1, n + 2] for n in range(1, 13)]
    lines = [" ".join(map(str, prompt)) for prompt in prompts]
    lines.insert(5, "4000")  # outside the vocabulary: an answer, not the end
    done = run(example("server_loop"), toy, env=on_stand_in, input="\n".join(lines))
    answers = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert len(answers) == len(lines)
    assert "must be in [0, 97)" in answers.pop("request 6")
    for prompt, answer in zip(
        prompts,
        (answers[key] for key in sorted(answers, key=lambda k: int(k.split()[1]))),
        strict=True,
    ):
        assert list(map(int, answer.split())) == greedy(library, prompt, 64)


# What a machine lacks, told by the real library


def complaint(program: Path, engine: Path, libraries: Path | None = None) -> str:
    """The one line that `minimal` ends with, in an environment without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("LD_LIBRARY_PATH", None)
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    done = subprocess.run([program, engine, "1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def engine_for(engine_of: Callable, tmp_path: Path, release: Path) -> Callable[..., Path]:
    """A real engine directory, its manifest changed as asked."""

    def make(**changes: object) -> Path:
        folder = tmp_path / "engine"
        shutil.copytree(engine_of("tiny-qwen2.5").path, folder)
        manifest = json.loads((folder / "qwenport.json").read_text())
        (folder / "qwenport.json").write_text(json.dumps(manifest | changes))
        return folder

    return make


@every_kind
def test_no_engine(example, kind: str, tmp_path: Path) -> None:
    assert "no qwenport.json; not an engine directory" in complaint(
        example("minimal", kind), tmp_path
    )


@every_kind
def test_an_engine_of_the_other_flavour(example, kind: str, engine_for) -> None:
    line = complaint(example("minimal", kind), engine_for())
    assert (
        "built for tensorrt-rtx, and this library was configured for onnxruntime and tensorrt;"
        in line
    )
    assert "build the engine with --target onnxruntime" in line
    assert "this library with -DQWENPORT_TENSORRT=RTX" in line


@every_kind
@pytest.mark.parametrize(
    ("libraries", "version", "expected"),
    [
        (None, "10.99.1.48", "tensorrt cannot be loaded: libnvinfer.so.10: "),
        ("empty", "10.99.1.48", "has no getInferLibMajorVersion; it is no TensorRT"),
        (
            "too_old",
            "10.1.1.48",
            "is 10.1.1.48, but this library was compiled with the headers of 10.",
        ),
        (
            "another",
            "11.0.1.48",
            "is 11.0.1.48, but this library was compiled with the headers of 10.",
        ),
        (
            "fits",
            "10.98.1.48",
            "built by tensorrt 10.98.1.48, installed is 10.99.1.48; build it again",
        ),
        ("fits", "10.99.1.48", "an engine needs an NVIDIA GPU (sm80, sm90) and "),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    example,
    kind: str,
    engine_for,
    release: Path,
    libraries: str | None,
    version: str,
    expected: str,
) -> None:
    """From a missing TensorRT over another release to a missing GPU, in the order in which they are met."""
    engine = engine_for(flavour="tensorrt", runtime_version=version, gpus=["sm80", "sm90"])
    folder = release / "nvinfer" / libraries if libraries else None
    if libraries is None and shutil.which("ldconfig"):
        cache = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
        assert "libnvinfer.so.10" not in cache, "this machine has TensorRT installed: remove it"
    assert expected in complaint(example("minimal", kind), engine, folder)


def test_tensorrt_may_lie_beside_the_library(
    installed, engine_for, release: Path, tmp_path: Path
) -> None:
    engine = engine_for(flavour="tensorrt", runtime_version="10.98.1.48")
    prefix = tmp_path / "usr"
    shutil.copytree(installed("shared"), prefix, symlinks=True)
    build, source = tmp_path / "build", ROOT / "examples" / "cpp" / "minimal"
    run(*configure(source, build, f"-DCMAKE_PREFIX_PATH={prefix}"))
    run(tool("cmake"), "--build", build)
    assert "cannot be loaded" in complaint(build / "minimal", engine)
    (library,) = prefix.rglob("libqwenport.so")
    shutil.copy(release / "nvinfer" / "fits" / "libnvinfer.so.10", library.parent)
    assert "installed is 10.99.1.48" in complaint(build / "minimal", engine)


def test_the_real_library_answers_python_as_well(release: Path, engine_for) -> None:
    library = Library(release / "runtime" / "libqwenport.so")
    with pytest.raises(Error, match="configured for onnxruntime and tensorrt") as error:
        library.load(engine_for())
    assert error.value.kind == "wrong version"


# What configuring needs


def configuring_fails(tmp_path: Path, *settings: object, **environment: str) -> str:
    command = configure(RUNTIME, tmp_path / "build", *settings)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode != 0
    return " ".join(done.stderr.split())


HEADERS = f"-DTENSORRT_INCLUDE_DIR={tensorrt_headers()}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["-DTENSORRT_INCLUDE_DIR=/nowhere"], "The headers of TensorRT were not found"),
        (["-DQWENPORT_TENSORRT=ON"], "or leave TensorRT out: -DQWENPORT_TENSORRT=OFF"),
        ([HEADERS, "-DQWENPORT_TENSORRT=RTX"], "has the headers of TensorRT. Give those of"),
        ([HEADERS, "-DQWENPORT_TENSORRT=trt"], "it is AUTO, ON (TensorRT), RTX (TensorRT-RTX) or OFF"),
        (["-DQWENPORT_ONNXRUNTIME=yes"], "it is AUTO, ON or OFF"),
        (
            ["-DQWENPORT_ONNXRUNTIME=OFF", "-DQWENPORT_TENSORRT=OFF"],
            "Neither onnxruntime nor TensorRT",
        ),
        (
            [HEADERS, "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"],
            "No CUDA toolkit of version 12.5 or newer was found",
        ),
        (
            [HEADERS, "-DNLOHMANN_JSON_INCLUDE_DIR=NLOHMANN_JSON_INCLUDE_DIR-NOTFOUND",
             "-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"],
            "apt-get install nlohmann-json3-dev",
        ),
        (
            [HEADERS, "-DCMAKE_CXX_COMPILER=/nowhere/c++"],
            "/nowhere/c++",
        ),
    ],
)  # fmt: skip
def test_what_configuring_lacks_is_named(
    tmp_path: Path, settings: list[str], expected: str
) -> None:
    assert expected in configuring_fails(tmp_path, *settings)


NO_CUDA = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"


@pytest.mark.parametrize(
    ("settings", "summary"),
    [
        ([], "TensorRT engines: no. The headers of TensorRT were not found."),
        ([NO_CUDA], "TensorRT engines: no."),
        (["-DQWENPORT_TENSORRT=OFF"], "TensorRT engines: no. -DQWENPORT_TENSORRT=OFF"),
        ([HEADERS], "tensorrt engines: yes, with "),
        ([HEADERS, "-DQWENPORT_ONNXRUNTIME=OFF"], "onnxruntime engines: no"),
    ],
)
def test_configuring_says_whose_engines_will_run(
    tmp_path: Path, settings: list[str], summary: str
) -> None:
    said = " ".join(run(*configure(RUNTIME, tmp_path, *settings)).stdout.split())
    assert summary in said
    if "-DQWENPORT_ONNXRUNTIME=OFF" not in settings:
        assert "onnxruntime engines: yes" in said


def test_a_static_library_asks_a_c_project_for_cpp(installed, tmp_path: Path) -> None:
    text = "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES C)\n"
    (tmp_path / "CMakeLists.txt").write_text(text + "find_package(qwenport CONFIG REQUIRED)\n")
    for kind, works in (("static", False), ("shared", True)):
        command = configure(tmp_path, tmp_path / kind, f"-DCMAKE_PREFIX_PATH={installed(kind)}")
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == works
        assert works or "needs C++ enabled" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("setting", "name"),
    [("", "libqwenport.a"), ("set(BUILD_SHARED_LIBS ON)", "libqwenport.so")],
)
def test_as_part_of_a_project_it_is_built_as_the_project_says(
    tmp_path: Path, setting: str, name: str
) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES CXX)\n"
        f"{setting}\nadd_subdirectory({RUNTIME} runtime)\n"
        'file(GENERATE OUTPUT name CONTENT "$<TARGET_FILE_NAME:qwenport> $<CONFIG>")\n'
    )
    run(*configure(tmp_path, tmp_path / "build", HEADERS))
    built_name, _, configuration = (tmp_path / "build" / "name").read_text().partition(" ")
    assert built_name.startswith(name)
    assert configuration == ""  # the build type, too, is the project's own affair


def test_alone_it_is_built_optimised(tmp_path: Path) -> None:
    run(*configure(RUNTIME, tmp_path, HEADERS))
    assert "CMAKE_BUILD_TYPE:STRING=Release" in (tmp_path / "CMakeCache.txt").read_text()


def test_headers_of_rtx_are_refused_for_tensorrt(tmp_path: Path) -> None:
    """The flavours' classes have other virtual tables: compiled against one, a call to the other crashes."""
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "NvInferVersion.h").write_text("#define TRT_MAJOR_RTX 1\n")
    given = f"-DTENSORRT_INCLUDE_DIR={headers}"
    error = configuring_fails(tmp_path, given, "-DQWENPORT_TENSORRT=ON")
    assert "has the headers of TensorRT-RTX" in error
    for setting in ("AUTO", "RTX"):
        asked = f"-DQWENPORT_TENSORRT={setting}"
        said = run(*configure(RUNTIME, tmp_path / setting, given, asked)).stdout
        assert "tensorrt-rtx engines: yes" in said


def test_versions(tmp_path: Path, installed) -> None:
    """find_package takes the version that pyproject states, and no other minor one."""
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    major, minor, _ = version.split(".")
    for wanted, works in [
        (version, True),
        (f"{major}.{minor}", True),
        (f"{major}.{int(minor) + 1}", False),
    ]:
        folder = tmp_path / wanted
        folder.mkdir()
        (folder / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES CXX)\n"
            f"find_package(qwenport {wanted} CONFIG REQUIRED)\n"
        )
        command = configure(folder, folder / "build", f"-DCMAKE_PREFIX_PATH={installed('shared')}")
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr


def test_clang_format_changes_nothing() -> None:
    folders = (RUNTIME, ROOT / "examples" / "cpp", ROOT / "plugins", ROOT / "tests")
    sources = [
        path
        for folder in folders
        for path in folder.rglob("*.[ch]*")
        if path.suffix in (".cpp", ".hpp", ".h", ".cu", ".cuh")
    ]
    assert len(sources) > 45
    run(tool("clang-format"), "--dry-run", "--Werror", *sources)


def tidy(*command: object) -> None:
    done = subprocess.run(
        [tool("clang-tidy"), "--quiet", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]


SOURCES = sorted([*RUNTIME.rglob("*.cpp"), *(ROOT / "tests" / "cpp").glob("*.cpp")])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_clang_tidy_finds_nothing(source: Path, release: Path) -> None:
    tidy("-p", release, source)


def test_clang_tidy_finds_nothing_in_the_examples(installed) -> None:
    examples = list((ROOT / "examples" / "cpp").rglob("*.cpp"))
    assert {path.parent.name for path in examples} == {"bench", "chat", "minimal", "server_loop"}
    flags = ["-std=c++17", f"-I{installed('shared')}/include", '-DQWENPORT_VERSION="0"']
    tidy(f"--config-file={ROOT / '.clang-tidy'}", *examples, "--", *flags)
