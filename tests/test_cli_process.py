"""What only a process of its own shows: signals, streams, and how light the start is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from qwenport import cli

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"
QWENPORT = [sys.executable, "-m", "qwenport"]
PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package without stop tokens, made by a process whose output is looked at too."""
    folder = tmp_path_factory.mktemp("process")
    checkpoint = Path(shutil.copytree(TINY, folder / "tiny"))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": []}')
    command = [*QWENPORT, "export", str(checkpoint), str(folder / "package"), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert json.loads(run.stdout)["model_type"] == "qwen2"
    assert run.stderr == ""
    return folder / "package"


def start(
    *arguments: object, folder: Path, hang_up: signal.Handlers = signal.SIG_DFL
) -> subprocess.Popen[str]:
    command, pipe = [*QWENPORT, *map(str, arguments)], subprocess.PIPE

    def set_signals() -> None:  # tests that run in the background have been told to ignore both
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, hang_up)

    return subprocess.Popen(
        command, cwd=folder, stdout=pipe, stderr=pipe, text=True, preexec_fn=set_signals
    )


def wait_until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
        (signal.SIGINT, cli.EXIT_INTERRUPTED, "error: interrupted\n"),
    ],
)
def test_a_signal_during_export_leaves_nothing(
    number: signal.Signals, code: int, message: str, tmp_path: Path
) -> None:
    with start(
        "export", shutil.copytree(TINY, tmp_path / "tiny"), "out", folder=tmp_path
    ) as process:
        wait_until(lambda: list(tmp_path.glob("*.partial/weights/*")), process)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (code, message)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_sigterm_during_a_build_leaves_nothing(package: Path, tmp_path: Path) -> None:
    options = ("--target", "tensorrt-rtx")
    with start("build", package, "out", *options, folder=tmp_path) as process:
        wait_until(lambda: list(tmp_path.iterdir()), process)
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (143, "")
    assert list(tmp_path.iterdir()) == []


SIGNALLED_WHILE_IT_LOGS = """
import os, signal, sys

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
from polygraphy.backend.trt import get_trt_logger

from qwenport import cli


left = 2 * [getattr(signal, sys.argv[1])]


def log(self, severity, message):
    if left:
        os.kill(os.getpid(), left.pop())


type(get_trt_logger()).log = log
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_tensorrt_calls_python_ends_a_build(
    name: str, code: int, package: Path, tmp_path: Path
) -> None:
    """Between Python and C++ an exception would be lost, and the build would go on to its end."""
    script = [sys.executable, "-c", SIGNALLED_WHILE_IT_LOGS, name]
    command = [*script, "build", package, "out", "--target", "tensorrt-rtx", "--gpu", "sm89"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nohup_keeps_an_export_alive(tmp_path: Path) -> None:
    with start("inspect", TINY, "--json", folder=tmp_path, hang_up=signal.SIG_IGN) as process:
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and json.loads(out)["kind"] == "checkpoint"


def read_some(stream: IO[str], count: int) -> str:
    return "".join(stream.read(1) for _ in range(count))


def test_text_arrives_while_it_is_made_and_ctrl_c_keeps_it(package: Path, tmp_path: Path) -> None:
    options = ("--prompt", "Once upon a time", "--max-new-tokens", 500)
    with start("generate", package, *options, folder=tmp_path) as process:
        assert process.stdout is not None
        first = read_some(process.stdout, 3)
        assert process.poll() is None, "the text came all at once"
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert rest.endswith("\n") and rest.count("\n") >= 1 and first
    assert "ended by Ctrl-C" in err and "Traceback" not in err and "error:" not in err


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_generation_quietly(package: Path, tmp_path: Path) -> None:
    options = ("--prompt", "Once upon a time", "--max-new-tokens", 500)
    with start("generate", package, *options, folder=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=PATIENCE) == cli.EXIT_BROKEN_PIPE
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ["validate", "package", "--reference", "tiny", "--budget", "quick", "--json"],
            marks=pytest.mark.slow,
        ),
        ["generate", "package", "--prompt", "Once", "--max-new-tokens", "3", "--json"],
        ["build", "package", "engine", "--target", "tensorrt-rtx", "--gpu", "sm86", "--json"],
        ["inspect", "package", "--json"],
    ],
)
def test_json_is_all_of_stdout_and_no_library_writes_to_stderr(
    arguments: list[str], package: Path
) -> None:
    run = subprocess.run(
        [*QWENPORT, *arguments], cwd=package.parent, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert isinstance(json.loads(run.stdout), dict)


@pytest.mark.slow
def test_text_that_the_locale_cannot_show_does_not_end_generation(package: Path) -> None:
    options = ["--prompt", "Once", "--temperature", "100", "--seed", "3", "--max-new-tokens", "60"]
    run = subprocess.run(
        [*QWENPORT, "generate", "package", *options],
        cwd=package.parent,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0
    assert run.stdout.isascii()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    program = (
        "import sys; from qwenport import cli; code = cli.main(sys.argv[1:]);"
        "print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, name, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TINY)
    imported = set(run.stderr.split())
    assert f"qwenport.commands.{name}" in imported
    assert not imported & {
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "rich",
        "torch",
        "transformers",
    }


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15])
def test_ctrl_c_behind_the_last_rename_is_too_late(delay: float, tmp_path: Path) -> None:
    """The package is there and the command says so, however long Python takes to shut down."""
    checkpoint = shutil.copytree(TINY, tmp_path / "tiny")
    with start("export", checkpoint, "out", "-q", folder=tmp_path) as process:
        wait_until((tmp_path / "out").is_dir, process)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "") and "out: qwen2" in out


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_ctrl_c_behind_the_last_word_is_too_late(
    delay: float, package: Path, tmp_path: Path
) -> None:
    with start("inspect", package, "--brief", folder=tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) in ((0, ""), (cli.EXIT_INTERRUPTED, "error: interrupted\n"))


def test_a_signal_that_comes_just_before_it_is_ignored_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's words for it, for an error that cannot be caught; any other such error is shown."""
    shown: list[object] = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    for text in ("Signal 2 ignored due to race condition", "another"):
        lost = SimpleNamespace(exc_type=OSError, exc_value=OSError(text))
        cli._raise_again(lost)  # type: ignore[arg-type]
    assert shown == [lost] and capsys.readouterr().err == ""


def test_ctrl_c_in_a_finaliser_is_not_lost(tmp_path: Path) -> None:
    """Python drops what is raised while an object is being removed; the interrupt comes again."""
    script = tmp_path / "late.py"
    script.write_text(
        "import signal, sys, time\n"
        "import click\n"
        "from qwenport import cli\n"
        "class Slow:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        time.sleep(0.01)\n"
        "@click.command()\n"
        "def command():\n"
        "    slow = Slow()\n"
        "    del slow\n"
        "    time.sleep(30)\n"
        "    click.echo('done')\n"
        "cli.LazyGroup.get_command = lambda self, context, name: command\n"
        "sys.argv = ['qwenport', 'doctor']\n"
        "sys.exit(cli.main())\n"
    )
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (
        cli.EXIT_INTERRUPTED,
        "",
        "error: interrupted\n",
    )
