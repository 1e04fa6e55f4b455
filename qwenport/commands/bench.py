"""`qwenport bench`: how fast a package or an engine runs here, and the memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwenport import __version__
from qwenport.commands._common import PATH, note, output_options, print_json, runnable_kind
from qwenport.commands._progress import progress_bar
from qwenport.contract import MOST_THREADS, ONNXRUNTIME
from qwenport.wording import size

FAST_STEPS = "fast_steps"  # how Python loads an engine, in the C++ library's words
COUNT = click.IntRange(min=1)
THREADS = click.IntRange(1, MOST_THREADS)


@click.command("bench")
@click.argument("target", type=PATH)
@click.option(
    "--prompt-tokens",
    type=COUNT,
    metavar="N",
    help="Tokens of the prompt.",
    show_default="512, or as many as fit",
)
@click.option(
    "--new-tokens",
    type=COUNT,
    metavar="N",
    help="Tokens to decode after it.",
    show_default="64, or half of the context if that is less",
)
@click.option(
    "--threads",
    type=THREADS,
    metavar="N",
    help="CPU threads of onnxruntime; does nothing for a TensorRT engine.",
    show_default="onnxruntime's choice",
)
@output_options
def command(
    target: Path,
    prompt_tokens: int | None,
    new_tokens: int | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure TARGET, a package (on onnxruntime) or an engine directory (on what it was built for).

    One row, greedy, with the same made-up prompt for every target. The first request follows the load directly;
    prefill and time to first token are the medians of three later ones, decode is the median step after the last of
    them. Memory is this process's, Python included.
    The first load of a package also writes what later ones read. examples/cpp/bench measures the same in C++.

    \b
    Examples:
      qwenport bench qwen.package
      qwenport bench qwen.engine --threads 4 --prompt-tokens 1024 --json
    """
    runnable_kind(target)
    from qwenport.engines import measure
    from qwenport.machine import cores, cpu_name

    notes: list[str] = []
    with progress_bar("opening", quiet) as progress:
        measured = measure(
            target,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            progress=progress,
            note=notes.append,
        )
    for said in notes:
        note(said, quiet)
    if measured.flavour != ONNXRUNTIME and threads is not None:
        note(f"--threads does nothing for {measured.flavour}", quiet)
    facts = {
        "target": str(target),
        "language": "Python",
        "load_mode": FAST_STEPS if measured.flavour == ONNXRUNTIME else None,
        "qwenport_version": __version__,
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        **vars(measured),
    }
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(lines(facts)))


def lines(facts: dict[str, Any]) -> list[str]:
    """The results for people, as examples/cpp/bench prints them."""
    language = ", ".join(filter(None, (facts["language"], facts["load_mode"])))
    threads = "default" if facts["threads"] is None else facts["threads"]
    return [
        f"{facts['flavour']} {facts['runtime_version']}, {language}, qwenport {facts['qwenport_version']}",
        f"{facts['cpu']}, {facts['cores']} cores, threads: {threads}",
        "prompt of {prompt_tokens} tokens, {new_tokens} new tokens".format(**facts),
        "load                 {load_seconds:.3f} s".format(**facts),
        "time to first token  {first_token_seconds:.3f} s "
        "(first request {first_request_seconds:.3f} s)".format(**facts),
        "prefill              {prefill_tokens_per_second:.1f} tokens/s".format(**facts),
        "decode               {decode_tokens_per_second:.1f} tokens/s (".format(**facts)
        + "{:.2f} ms, 10th to 90th percentile {:.2f} to {:.2f} ms)".format(
            *(1e3 * facts[f"decode_{key}seconds"] for key in ("", "p10_", "p90_"))
        ),
        f"memory               {_memory(facts['loaded_bytes'])} after the load, "
        f"{_memory(facts['peak_bytes'])} at most",
    ]


def _memory(count: int | None) -> str:
    return "unknown" if count is None else size(count)
