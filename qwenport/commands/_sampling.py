"""Options of the commands that generate text: how tokens are chosen, and where a text ends."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from qwenport.engines import GenerateOptions

Function = TypeVar("Function", bound=Callable[..., Any])

_STOP = click.option(
    "--stop",
    "stop_strings",
    multiple=True,
    metavar="TEXT",
    help="End the text before TEXT, wherever the model's tokens begin and end; may be repeated.",
)
_SAMPLING = (
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the most likely token every time; above it tokens are drawn at random, the more "
        "freely the higher it is.",
    ),
    click.option(
        "--top-k", type=int, default=0, help="Draw from the K most likely tokens; 0 is no limit."
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        help="Draw from the most likely tokens that together have this probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Above 1, tokens seen before become less likely.",
    ),
    click.option(
        "--seed", type=int, help="The same seed draws the same tokens.", show_default="a new one"
    ),
)


def sampling_options(*, max_new_tokens: int) -> Callable[[Function], Function]:
    """Add --stop, --max-new-tokens with a default, and the options of sampling.

    `generate_options` takes all but the first.
    """
    most = click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        default=max_new_tokens,
        help="Stop after N new tokens.",
    )

    def add(command: Function) -> Function:
        for option in reversed((_STOP, most, *_SAMPLING)):
            command = option(command)
        return command

    return add


def generate_options(
    note: Callable[[str], None], *, seed: int | None, **options: Any
) -> GenerateOptions:
    """What the options ask for, with a new seed if there is none.

    Raises:
        GenerationError, SamplingParamsError: one is out of its range.
    """
    from qwenport.engines import GenerateOptions

    asked = GenerateOptions(**options, seed=seed)
    greedy = asked.sampling.greedy
    if greedy and (options["top_k"] or options["top_p"] < 1 or seed is not None):
        note("--top-k, --top-p and --seed do nothing without --temperature")
    return GenerateOptions(**options, seed=secrets.randbits(32) if seed is None else seed)
