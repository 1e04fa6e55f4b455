"""`qwenport chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenport.commands._common import PATH, note, runnable_kind, stream
from qwenport.commands._progress import progress_bar
from qwenport.commands._sampling import generate_options, sampling_options
from qwenport.contract import ONNXRUNTIME

if TYPE_CHECKING:
    from qwenport.engines import Cancellation, Chat

HELP = """/history  show what has been said
/reset    begin anew
/help     show this
/quit     leave, as Ctrl-D does
Ctrl-C ends a reply or drops a line, not the program.
Other lines are messages."""
PROMPT = "> "


@click.command("chat")
@click.argument("target", type=PATH)
@click.option(
    "--system",
    metavar="TEXT",
    help="The system message.",
    show_default="the chat template's own, if it has one",
)
@sampling_options(max_new_tokens=1024)
@click.option("-q", "--quiet", is_flag=True, help="No progress bars and no notes.")
def command(
    target: Path, system: str | None, stop_strings: tuple[str, ...], quiet: bool, **options: Any
) -> None:
    """Talk with TARGET, a package (on onnxruntime) or an engine directory (on what it was built for).

    Each line is a message; replies are printed as they are generated. Only the new turn is computed: what was
    said before stays in the cache, and when that is full the oldest turns are forgotten. Ctrl-C ends a reply,
    Ctrl-D the conversation; /help lists what else there is.

    \b
    Examples:
      qwenport chat qwen.engine
      qwenport chat qwen.engine --system "Answer in one sentence." --temperature 0.7
      printf 'Hello!\\nAnd who are you?\\n' | qwenport chat qwen.package
    """
    kind = runnable_kind(target)
    from qwenport.engines import Cancellation, Chat, ChatOptions, StopStrings

    StopStrings(stop_strings)
    asked = generate_options(lambda said: note(said, quiet), **options)
    cancellation = Cancellation()
    asked = replace(asked, cancellation=cancellation)
    notes: list[str] = []
    with progress_bar("loading the model", quiet) as progress:
        chat = Chat(
            target,
            ChatOptions(system, asked, stop_strings, drop_oldest=True),
            progress=progress,
            note=notes.append,
        )
    for said in notes:
        note(said, quiet)
    if sys.stdin.isatty():
        with suppress(ImportError):  # lines can be edited and called up again; not on every system
            import readline  # noqa: F401
        note(f"{_what(kind)} {target}; /help lists the commands", quiet)
    for line in _lines():
        if _is_command(line):
            if _obey(line.strip(), chat):
                return
        elif line.strip():
            with _interrupting(cancellation):
                _answer(chat, line, quiet)


def _what(kind: str) -> str:
    return "talking with the" if kind == "engine" else f"talking on {ONNXRUNTIME} with the package"


def _lines() -> Iterator[str]:
    """The lines of stdin; in a terminal with a prompt, where Ctrl-C drops the line that is being written."""
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "")
            yield line.encode(errors="surrogateescape").decode(errors="replace")
        except EOFError:
            if sys.stdin.isatty():
                click.echo()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()


def _is_command(line: str) -> bool:
    """Whether it is a slash and a word; other lines that begin with a slash are messages."""
    return line.startswith("/") and line[1:].strip().isalpha()


def _obey(line: str, chat: Chat) -> bool:
    """Do what a line with a slash says; return whether that is to leave."""
    if line == "/reset":
        chat.reset()
    elif line == "/history":
        for message in chat.history:
            click.echo(f"{message.role}: {message.content}")
    elif line != "/quit":
        click.echo(HELP)
    return line == "/quit"


@contextmanager
def _interrupting(cancellation: Cancellation) -> Iterator[None]:
    """Let Ctrl-C end a reply."""
    cancellation.reset()
    before = signal.signal(signal.SIGINT, lambda *_: cancellation.request())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(chat: Chat, message: str, quiet: bool) -> None:
    from qwenport.engines import CapacityError, ChatError

    try:
        reply = chat.send(message, stream)
    except (CapacityError, ChatError) as error:  # the message's fault: the conversation goes on
        if not sys.stdin.isatty():
            raise
        note(str(error), quiet=False)
        return
    stream("\n")
    turns = "turn was" if reply.dropped == 1 else "turns were"
    note(f"the oldest {reply.dropped} {turns} forgotten" if reply.dropped else None, quiet)
    note("the reply was cut: the cache is full" if reply.reason == "capacity" else None, quiet)
