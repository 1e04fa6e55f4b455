"""What `export --quantize` costs: how far the logits of a quantized model are from those of its checkpoint.

    python benchmarks/quantization.py
    python benchmarks/quantization.py benchmarks/work/smollm2-135m --tokens 2048
    python benchmarks/quantization.py --quick

Each recipe's package is run by onnxruntime in fp32 on windows of a text, as is the package of the checkpoint itself,
and the two distributions of every next token are compared. Only what rounding the weights does is in these figures:
activations are not rounded, and nothing is timed but the export. The text is tales of the grammar that the bundled
checkpoints learned, from a seed that they did not see, unless another is given. There are no peers: the recipes are
compared with each other.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import ROOT
from report import MB, Columns, Report, Result, benchmark, figure, table

sys.path.insert(0, str(ROOT / "examples"))
from tiny_tales import text_document
from transformers import AutoTokenizer

from qwenport.contract import GROUPS
from qwenport.engines import OnnxRuntimeSession
from qwenport.exporter import ExportError, Package, Recipe, export, make_recipe

TINY = ROOT / "examples" / "tiny-qwen2.5"
SEED = 2026
WINDOW = 256
QUICK_TOKENS = 64
BASE = "as it is"
COLUMNS: Columns = {
    "weights": figure("contender"),
    "MB": figure("weight_bytes", "{:.1f}", MB),
    "mean KL": figure("mean_kl", "{:.4f}"),
    "same top-1": figure("same_top", "{:.1%}"),
    "perplexity": figure("perplexity", "{:.3f}"),
    "rounded in": figure("seconds", "{:.1f} s"),
}


@dataclass(frozen=True)
class Entrant:
    """One way to store the weights."""

    name: str
    recipe: Recipe | None


def entrants(quick: bool) -> Iterator[Entrant]:
    """The checkpoint itself, and every recipe; those of int4 with the vocabulary in 4 bits too."""
    yield Entrant(BASE, None)
    for symmetric in (True, False):
        told = "symmetric" if symmetric else "asymmetric"
        yield Entrant(f"int8, {told}", make_recipe("int8", symmetric=symmetric))
    for group in GROUPS[:1] if quick else GROUPS:
        for symmetric in (True, False):
            told = f"int4, groups of {group}, {'symmetric' if symmetric else 'asymmetric'}"
            recipe = make_recipe("int4", group=group, symmetric=symmetric)
            yield Entrant(told, recipe)
            yield Entrant(f"{told}, vocabulary too", Recipe(recipe.linears, recipe.linears))


def tales(words: int) -> str:
    """At least that many words of tales."""
    rng, parts = random.Random(SEED), [""]
    while sum(len(part.split()) for part in parts) < words:
        parts.append(text_document(rng))
    return "\n\n".join(parts[1:])


def logits_of(package: Package, windows: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Each window's logits, fp32 [tokens, vocab]."""
    session = OnnxRuntimeSession(package, max_batch=1, capacity=max(map(len, windows)))
    for window in windows:
        session.reset()
        yield session.prefill([list(window)], all_logits=True)[0]


def log_softmax(logits: Any) -> Any:
    """In fp64."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


def compare(found: Any, base: Any, tokens: Sequence[int]) -> dict[str, Any]:
    """Sums over a window's positions but the last: KL of the two distributions, equal tops, log-likelihood."""
    own, theirs = log_softmax(found[:-1]), log_softmax(base[:-1])
    return {
        "kl": float((np.exp(theirs) * (theirs - own)).sum()),
        "same": int((own.argmax(1) == theirs.argmax(1)).sum()),
        "nll": float(-own[np.arange(len(own)), list(tokens[1:])].sum()),
        "count": len(own),
    }


def run(
    entrant: Entrant,
    checkpoint: Path,
    windows: Sequence[Sequence[int]],
    base: list[Any],
    report: Report,
) -> None:
    """Export, run and record one entrant; the first one's logits become `base`."""
    folder = report.work / "quantization"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    try:
        quantize = {"quantize": entrant.recipe} if entrant.recipe else {"weights": "copy"}
        package = export(checkpoint, folder / "package", **quantize)  # type: ignore[arg-type]
    except ExportError as error:  # groups that do not divide this model's rows
        report.say(f"  {entrant.name}: {error}")
        return
    seconds = time.perf_counter() - start
    sums = {"kl": 0.0, "same": 0, "nll": 0.0, "count": 0}
    for index, (window, found) in enumerate(zip(windows, logits_of(package, windows), strict=True)):
        if entrant.recipe is None:
            base.append(found)
        for key, value in compare(found, base[index], window).items():
            sums[key] += value
    shutil.rmtree(folder)
    count = sums["count"]
    report.add_run(
        entrant.name,
        weight_bytes=package.manifest["weights"]["bytes"],
        mean_kl=sums["kl"] / count,
        same_top=sums["same"] / count,
        perplexity=float(np.exp(sums["nll"] / count)),
        seconds=seconds if entrant.recipe else None,
        error=None,
    )


@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True), default=TINY)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=1024, help="Of the text, from its beginning."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    show_default="tales",
    help="UTF-8.",
)
@benchmark("quantization")
def main(report: Report, checkpoint: Path, tokens: int, text: Path | None) -> Result:
    """Compare the recipes of `export --quantize` on CHECKPOINT, by default the bundled tiny one."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    tokens = QUICK_TOKENS if report.quick else tokens
    written = tales(tokens) if text is None else text.read_text(encoding="utf-8")
    ids = tokenizer(written)["input_ids"][:tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    report.settings |= {"model": checkpoint.name, "tokens": len(ids), "window": WINDOW}
    report.settings |= {"text": "tales" if text is None else text.name}
    base: list[Any] = []
    for entrant in entrants(report.quick):
        run(entrant, checkpoint, windows, base, report)
    summary = report.data["runs"]
    title = f"{checkpoint.name}, {len(ids)} tokens of {report.settings['text']}"
    return Result([table(title, COLUMNS, summary)], summary, own=[r["contender"] for r in summary])


if __name__ == "__main__":
    main()
