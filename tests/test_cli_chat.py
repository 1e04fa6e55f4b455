"""`qwenport chat` as a user meets it: piped, and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Capture

from qwenport import cli, exporter
from qwenport.commands.chat import HELP
from qwenport.engines import Chat, ChatOptions, GenerateOptions, open_session

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"
PATIENCE = 60.0  # seconds
SAID = ["Tell me about the sea.", "And the moon?"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporter.export(TINY, tmp_path_factory.mktemp("chat") / "package").path


@pytest.fixture
def talk(
    package: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Pipe lines into the command; return (exit code, stdout, stderr)."""

    def run(lines: list[str], *options: object, target: Path = package) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = cli.main(["chat", str(target), *map(str, options)])
        return (code, *capsys.readouterr())

    return run


def replies(package: Path, said: list[str], **options: object) -> list[str]:
    asked = ChatOptions(generate=GenerateOptions(30), **options)  # type: ignore[arg-type]
    chat = Chat(package, asked, session=open_session(package))
    return [chat.send(message).text for message in said]


def test_each_line_gets_a_reply(talk, package: Path) -> None:
    code, out, err = talk([SAID[0], "", SAID[1], "/history"], "--max-new-tokens", 30, "-q")
    first, second = replies(package, SAID)
    said = [f"user: {SAID[0]}", f"assistant: {first}", f"user: {SAID[1]}", f"assistant: {second}"]
    assert (code, err) == (0, "")
    assert out == "\n".join([first, second, *said, ""])


def test_reset_quit_help_and_what_is_no_command(talk, package: Path) -> None:
    lines = [SAID[0], "/reset", "/history", "/help", "/what", "/quit", SAID[1]]
    code, out, _ = talk(lines, "--max-new-tokens", 30)
    (first,) = replies(package, SAID[:1])
    assert code == 0
    assert out.startswith(first + "\n/history  show") and out.count("Ctrl-C ends a reply") == 2
    assert out.count("\n") == 1 + 2 * (HELP.count("\n") + 1)


def test_stops_and_a_system_message_reach_the_model(talk, package: Path) -> None:
    options = ["--system", "You like ships.", "--stop", " the", "--max-new-tokens", 30]
    code, out, _ = talk(SAID, *options)
    assert code == 0
    assert out.splitlines() == replies(
        package, SAID, system="You like ships.", stop_strings=[" the"]
    )


def test_a_full_cache_forgets_the_oldest_turns_and_says_so(talk) -> None:
    code, _, err = talk(["Why?"] * 12, "--max-new-tokens", 100, "--temperature", 2, "--seed", 1)
    assert code == 0
    assert "note: the oldest 1 turn was forgotten" in err


def test_what_cannot_be_said_ends_a_piped_conversation(talk, package: Path) -> None:
    code, out, err = talk(["word " * 600], "-q")
    assert (code, out) == (2, "")
    assert err.startswith("error: the conversation has ") and "the message is too long" in err
    code, _, err = talk(["x"], "--stop", "", "-q")
    assert code == 2 and "a stop string must be a text, not empty" in err


def test_a_model_without_a_chat_template_is_refused(talk, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    config = (checkpoint / "tokenizer_config.json").read_text()
    (checkpoint / "tokenizer_config.json").write_text(config.replace("chat_template", "unused"))
    package = exporter.export(checkpoint, tmp_path / "package").path
    code, out, err = talk(["x"], "-q", target=package)
    assert (code, out) == (2, "")
    assert err == f"error: {package}: there is no chat template\n"


def test_in_a_terminal_ctrl_c_ends_a_reply_and_not_the_program(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": []}')
    package = exporter.export(checkpoint, tmp_path / "package").path
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qwenport", "chat", str(package), "--max-new-tokens", "400"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    os.close(theirs)
    seen = ""

    def see(words: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + PATIENCE
        while words not in seen:
            ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, seen
            try:
                seen += os.read(ours, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the other end is closed
                assert words in seen, seen
        seen = seen.partition(words)[2]

    try:
        see("> ")
        os.write(ours, b"Tell me about the sea.\n")
        see("The sea")
        process.send_signal(signal.SIGINT)
        see("\n> ")
        os.write(ours, b"/history\n")
        see("assistant: The sea")
        see("\n> ")
        process.send_signal(signal.SIGINT)  # drops the line
        see("\n> ")
        os.write(ours, b"word " * 700 + b"\n")
        see("note: the conversation has")
        see("\n> ")
        os.write(ours, b"\x04")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
