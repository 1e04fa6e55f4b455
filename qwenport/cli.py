"""The command line: a group whose commands are imported only when one is invoked.

Exit codes: 0 done, 1 parity does not hold and nothing else, 2 an error the user can act on, in one line,
70 a bug in this program, 129 hung up, 130 interrupted, 141 the reader of our output is gone, 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

import click

from qwenport import QwenportError, __version__, missing_link
from qwenport.wording import MOST, cut_words, one_line

EXIT_ERROR = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# name -> (module, one-line help); the order is the order of `qwenport --help`.
COMMANDS = {
    "export": ("qwenport.commands.export", "Write a checkpoint as an ONNX package."),
    "build": ("qwenport.commands.build", "Build a TensorRT engine from a package."),
    "validate": ("qwenport.commands.validate", "Compare a package or an engine with PyTorch."),
    "selftest": (
        "qwenport.commands.selftest",
        "Check an engine on this machine against its proof.",
    ),
    "generate": ("qwenport.commands.generate", "Generate text with a package or an engine."),
    "chat": ("qwenport.commands.chat", "Talk with a package or an engine."),
    "bench": ("qwenport.commands.bench", "Measure speed, load time and memory on this machine."),
    "perplexity": ("qwenport.commands.perplexity", "Score a text with a package or an engine."),
    "inspect": ("qwenport.commands.inspect", "Show what a checkpoint, package or engine holds."),
    "cache": ("qwenport.commands.cache", "Show or clear what makes packages open faster."),
    "plugins": ("qwenport.commands.plugins", "Compile the CUDA plugins for TensorRT."),
    "cpp": ("qwenport.commands.cpp", "Compile and install the C++ library."),
    "doctor": ("qwenport.commands.doctor", "Show what is installed and which targets work here."),
    "demo": ("qwenport.commands.demo", "Run the whole path on a small checkpoint."),
}

TRACEBACK = "QWENPORT_TRACEBACK"
ERROR = "error: "

# Errors caused by the file system.
SYSTEM_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)

# Libraries report through exceptions only, and only local files are opened.
QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
}


class LazyGroup(click.Group):
    """A group that lists `COMMANDS` without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="qwenport")
def cli() -> None:
    """One checkpoint directory in, an ONNX package or a TensorRT engine out, with proof that it
    computes what PyTorch computes.

    \b
    From a checkpoint to text:
      qwenport export CHECKPOINT PACKAGE
      qwenport validate PACKAGE --reference CHECKPOINT
      qwenport generate PACKAGE --prompt "Once upon a time"
      qwenport build PACKAGE ENGINE_DIR --target tensorrt-rtx

    Results go to stdout; progress, notes and errors to stderr. Exit codes: 0 done, 1 parity does
    not hold, 2 an error that the message explains.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on `args` (default: the process's own) and return the exit code.

    A termination signal raises SystemExit in the main thread, so that a killed command's partial output is removed
    as after Ctrl-C. Once a process's own command line has finished, Ctrl-C has no effect.
    """
    if "_QWENPORT_COMPLETE" in os.environ:
        cli.main(prog_name="qwenport")  # the shell asks for completions; click answers and exits
    arguments = list(sys.argv[1:] if args is None else args)
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    with _exit_on_signals(is_process=args is None), warnings.catch_warnings():
        logging.disable()
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            return _run(arguments, is_process=args is None)
        finally:
            logging.disable(logging.NOTSET)


def _run(arguments: list[str], is_process: bool) -> int:
    # click's own `main` turns a broken pipe and several errors into exit code 1, which here
    # means that parity failed.
    if wrong := missing_link():
        return _fail(wrong)
    try:
        with cli.make_context("qwenport", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        if is_process:
            _ignore_interrupts()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help
        return EXIT_ERROR
    except click.ClickException as error:
        return _fail(_explain(error))
    except QwenportError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        if is_process:
            _ignore_interrupts()
        _fail("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout is gone: keep the interpreter's last flush from failing too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        message = _system_error(error)
        return _bug(error) if message is None else _fail(message)
    except Exception as error:
        return _bug(error)
    return 0


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C: nothing is left to stop, and Python takes a while to shut down."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _bug(error: Exception) -> int:
    """Report a bug in Qwenport and its place; with QWENPORT_TRACEBACK set, the whole traceback."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = (
        f"{os.path.basename(os.path.dirname(frame.filename))}/{os.path.basename(frame.filename)}"
    )
    _fail(
        f"a bug in Qwenport, please report it: {type(error).__name__}: {error} "
        f"({place}, line {frame.lineno}; {TRACEBACK}=1 shows the traceback)"
    )
    return EXIT_BUG


def _explain(error: click.ClickException) -> str:
    """click's message, followed by the usage for a usage error."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message} ({context.get_usage()})"


def _system_error(error: OSError) -> str | None:
    """The message for a system error that is not our bug; None if it may be."""
    file = error.filename2 or error.filename  # of two, the second is written to
    where = f" {file}" if file else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        while_writing = f" while writing{where}" if where else ""
        return f"the disk is full{while_writing}: free some space or write somewhere else"
    if error.errno in SYSTEM_ERRORS:
        return f"{error.strerror}:{where}" if where else str(error.strerror)
    return None


@contextlib.contextmanager
def _exit_on_signals(is_process: bool) -> Iterator[None]:
    """Turn SIGTERM, and SIGHUP unless it is ignored (nohup), into SystemExit(128 + number).

    Args:
        is_process: the process ends with this command, so Ctrl-C is ignored afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # cleanup must not be interrupted
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    before_interrupt = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
    before_hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_process else before_interrupt)
        sys.unraisablehook = before_hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    """Raise Ctrl-C again if it came in an object's finalizer, where Python drops every exception.

    A signal that came just before it was set to be ignored is ignored; Python reports that as an OSError.
    """
    if issubclass(lost.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.01, lambda: signal.pthread_kill(main or 0, signal.SIGINT)).start()
    elif not (issubclass(lost.exc_type, OSError) and "ignored due to race" in str(lost.exc_value)):
        sys.__unraisablehook__(lost)


def _fail(message: str) -> int:
    """Print `message` on stderr, as one line of at most MOST characters."""
    print(f"{ERROR}{one_line(cut_words(message), MOST - len(ERROR))}", file=sys.stderr)
    return EXIT_ERROR
