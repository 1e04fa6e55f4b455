"""The command line: a group whose commands are imported only when one is invoked.

Exit codes: 0 done, 1 a parity check failed (or a bug, with its traceback), 2 an error the user
can act on, in one line, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from qwenport import QwenportError, __version__

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# name -> (module, one-line help); the order is the order of `qwenport --help`.
COMMANDS = {
    "export": ("qwenport.commands.export", "Write a checkpoint as an ONNX package."),
    "build": ("qwenport.commands.build", "Build a TensorRT engine from a package."),
    "validate": ("qwenport.commands.validate", "Compare a package or an engine with PyTorch."),
    "generate": ("qwenport.commands.generate", "Generate text with a package or an engine."),
    "inspect": ("qwenport.commands.inspect", "Show what a checkpoint, package or engine holds."),
    "doctor": ("qwenport.commands.doctor", "Show what is installed and which targets work here."),
    "demo": ("qwenport.commands.demo", "Run the whole path on a small checkpoint."),
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
    computes what PyTorch computes."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on `args` (default: the process's own) and return the exit code."""
    if "_QWENPORT_COMPLETE" in os.environ:
        cli.main(prog_name="qwenport")  # the shell asks for completions; click answers and exits
    arguments = list(sys.argv[1:] if args is None else args)
    # click's own `main` turns a broken pipe and several errors into exit code 1, which here
    # means that parity failed.
    try:
        with cli.make_context("qwenport", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_ERROR
    except QwenportError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Nobody reads stdout any more: keep the interpreter's last flush from failing too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        return _fail(f"the disk is full{where}: free some space or write somewhere else")
    return 0


def _fail(message: str) -> int:
    """Print `message` as one line on stderr."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_ERROR
