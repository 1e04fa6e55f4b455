"""`qwenport perplexity`: how well a package or an engine predicts a text."""

from __future__ import annotations

from pathlib import Path

import click

from qwenport import QwenportError
from qwenport.commands._common import PATH, note, output_options, print_json, runnable_kind
from qwenport.commands._progress import progress_bar

WINDOW = 2048
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("perplexity")
@click.argument("target", type=PATH)
@click.argument("file", type=FILE)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens that are read together.",
    show_default=f"{WINDOW}, or what the target allows",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens from one window's beginning to the next.",
    show_default="half of the window",
)
@output_options
def command(
    target: Path, file: Path, window: int | None, stride: int | None, quiet: bool, as_json: bool
) -> None:
    """Compute the perplexity of FILE, a text in UTF-8, with TARGET, a package or an engine directory.

    The text is read in windows that overlap, as in the documentation of transformers. Each token is scored once,
    given at least window - stride tokens before it in its window; in the first window it is as many as there are. The
    smaller the stride, the more context a token has and the longer it takes. Compare results only with the same window
    and stride.

    \b
    Examples:
      qwenport perplexity qwen.package wiki.txt
      qwenport perplexity qwen.engine wiki.txt --window 1024 --stride 256 --json
    """
    kind = runnable_kind(target)
    from qwenport.engines import Tokenizer, check_ids, load_engine, open_session, perplexity
    from qwenport.exporter import load_package

    opened = load_engine(target) if kind == "engine" else load_package(target)
    longest: int = opened.manifest["max_seq_len"]
    window = min(longest, WINDOW) if window is None else window
    stride = window // 2 if stride is None else stride
    if window > longest:
        raise QwenportError(f"--window {window}: {target} has {longest} positions")
    if stride > window:
        raise QwenportError(f"--stride {stride} is more than the window of {window} tokens")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise QwenportError(f"{file} is not valid UTF-8: {error}") from error
    notes: list[str] = []
    with progress_bar("loading the model", quiet) as progress:
        ids = Tokenizer(target).encode(text)
        check_ids(ids, opened.manifest["model"]["vocab_size"], str(file))
        if len(ids) < 2:
            raise QwenportError(
                f"{file} has {len(ids)} tokens; the first is only read, so 2 are needed"
            )
        session = open_session(target, capacity=window, progress=progress, note=notes.append)
        found = perplexity(session, ids, window=window, stride=stride, progress=progress)
    for said in notes:
        note(said, quiet)
    if as_json:
        print_json({"target": str(target), "file": str(file), **vars(found)})
        return
    click.echo(
        f"perplexity {found.perplexity:.4f}, mean negative log-likelihood {found.mean_nll:.6f}\n"
        f"{found.scored} of {found.tokens} tokens scored, in {found.windows} windows of {window} tokens, "
        f"stride {stride}"
    )
