"""The distribution, and the command line's promises: light start, one-line errors, exit codes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import click
import pytest
from wheels import FOLDERS, OFFLINE, ROOMS, ROOT, copy_sources, install, make_wheel, pip

import qwenport
from qwenport import MissingExtraError, QwenportError, cli, import_extra

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(pattern: str) -> dict[str, Path]:
    """Files of the packages that match `pattern`: path in the wheel -> path in the repository."""
    return {
        "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts]): path
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob(pattern)
    }


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    copy_sources(copy)
    return copy


@pytest.fixture(scope="module")
def wheel(copied: Path) -> Path:
    return make_wheel(copied)


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_a_type_checker_sees_the_package_from_an_empty_folder(
    kind: str, copied: Path, wheel: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    if kind == "editable":  # what `pip install -e` does, for a Python without setuptools
        build = "import setuptools.build_meta as backend; backend.build_editable('dist')"
        subprocess.run([sys.executable, "-c", build], cwd=copied, check=True)
        (wheel,) = (copied / "dist").glob("*editable*.whl")
    install(wheel, venv)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "uses.py").write_text(
        "from qwenport.exporter import export\nreveal_type(export)\nexport(1)\n"
    )
    options = ["--python-executable", venv / "bin" / "python", "--ignore-missing-imports"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", tmp_path / "cache", "uses.py"],
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Revealed type is "def (checkpoint_path: ' in run.stdout, run.stdout
    assert "Package" in run.stdout
    assert 'Argument 1 to "export" has incompatible type "int"' in run.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_a_checkout_without_links_is_refused_in_one_line(
    room: str, copied: Path, tmp_path: Path
) -> None:
    """As git writes it on Windows unless it is told otherwise: a text file that holds the target."""
    copy = shutil.copytree(copied, tmp_path / "copy", symlinks=True)
    (copy / "qwenport" / room).unlink()
    (copy / "qwenport" / room).write_text(f"../{room}")
    refused = pip("wheel", *OFFLINE, "--wheel-dir", tmp_path / "dist", copy)
    assert refused.returncode != 0
    (line, *_) = [line for line in refused.stderr.splitlines() if "core.symlinks" in line]
    assert "error: " in line and f"qwenport/{room} is not the link" in line
    for program in (
        ["-m", "qwenport", "inspect", "x"],
        ["-c", f"from qwenport import {room}"],
    ):
        run = subprocess.run(
            [sys.executable, *program], capture_output=True, text=True, cwd=copy, check=False
        )
        last = run.stderr.splitlines()[-1]
        assert run.returncode and f"qwenport/{room} is not the link" in last, run.stderr
        assert ("Traceback" in run.stderr) == (program[0] == "-c")


def test_the_rooms_are_links_to_the_top_level_folders() -> None:
    for room in ROOMS:
        assert os.readlink(ROOT / "qwenport" / room) == f"../{room}"


def test_wheel_holds_every_module_and_nothing_outside_the_package(wheel_names: set[str]) -> None:
    assert {name for name in wheel_names if name.endswith(".py")} == set(sources("*.py"))
    tops = {name.partition("/")[0] for name in wheel_names}
    assert tops == {"qwenport", f"qwenport-{qwenport.__version__}.dist-info"}


def test_wheel_holds_the_sources_that_are_compiled_where_they_run(wheel_names: set[str]) -> None:
    compiled = {
        name
        for pattern in (
            "CMakeLists.txt",
            "*.cmake",
            "*.in",
            "*.cpp",
            "*.cu",
            "*.cuh",
            "*.h",
            "*.hpp",
        )
        for name in sources(pattern)
    }
    assert compiled | {"qwenport/py.typed"} <= wheel_names


def test_version_is_the_same_in_the_package_and_in_pyproject() -> None:
    assert PROJECT["project"]["version"] == qwenport.__version__


def test_every_direct_dependency_is_pinned() -> None:
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"].values()
    direct = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    names = {name.partition(">")[0] for name in direct if not name.startswith("qwenport")}
    assert names <= pins


def test_help_imports_nothing_heavy() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qwenport", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "qwenport.cli" in imported
    assert not imported & {"numpy", "onnx", "onnxruntime", "rich", "torch", "transformers"}
    assert not {name for name in imported if name.startswith("qwenport.commands.")}
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in run.stdout
        assert summary in run.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_listed_command_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"Usage: qwenport {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (QwenportError("first line\n  second line"), 2, "error: first line second line\n"),
        (click.ClickException("bad file"), 2, "error: bad file\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (click.Abort(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "model.onnx"),
            2,
            "error: the disk is full while writing model.onnx: "
            "free some space or write somewhere else\n",
        ),
        (click.exceptions.Exit(1), 1, ""),
    ],
)
def test_exit_code_and_message(
    raised: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @click.command()
    def command() -> None:
        raise raised

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("bug", [FileNotFoundError(errno.ENOENT, "a bug"), TypeError("a bug")])
def test_a_bug_is_one_line_and_no_verdict_and_keeps_its_traceback_for_us(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        raise bug

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
    monkeypatch.delenv("QWENPORT_TRACEBACK", raising=False)
    assert cli.main(["doctor"]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert type(bug).__name__ in line and "test_packaging.py" in line
    monkeypatch.setenv("QWENPORT_TRACEBACK", "1")
    assert cli.main(["doctor"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nonsense"], ["doctor", "--nonsense"], []])
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Usage: qwenport" in capsys.readouterr().err


def test_a_closed_pipe_is_not_a_parity_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "qwenport", "doctor", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert run.returncode == cli.EXIT_BROKEN_PIPE
    assert run.stderr == b""


def test_shell_completion_offers_the_commands() -> None:
    environment = {"COMP_WORDS": "qwenport doc", "COMP_CWORD": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "qwenport"],
        env={**os.environ, **environment, "_QWENPORT_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == ["plain,doctor"]


def test_missing_extra_is_one_line_with_the_command_to_run() -> None:
    with pytest.raises(MissingExtraError) as caught:
        import_extra("no_such_module.inner", "rtx", "build engines")
    assert str(caught.value) == (
        "no-such-module is not installed, needed to build engines: pip install 'qwenport[rtx]'"
    )


def test_import_extra_does_not_blame_the_extra_for_its_own_broken_dependency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extra.py").write_text("import a_dependency_of_it\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_it"):
        import_extra("broken_extra", "rtx", "build engines")


def test_import_extra_returns_the_module() -> None:
    assert import_extra("json.decoder", "cpu", "test").__name__ == "json.decoder"
