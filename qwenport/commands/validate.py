"""`qwenport validate`: does a package or an engine compute what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwenport import QwenportError
from qwenport.commands._common import PATH, output_options, print_json, runnable_kind
from qwenport.commands._progress import progress_bar

if TYPE_CHECKING:
    from qwenport.validate import Report

EXIT_NO_PARITY = 1
WAYS = ("tensorrt-network",)


@click.command()
@click.argument("target", type=PATH)
@click.option(
    "--reference",
    type=PATH,
    required=True,
    metavar="CHECKPOINT",
    help="The checkpoint that TARGET was made from; transformers runs it.",
)
@click.option(
    "--as",
    "judged_as",
    type=click.Choice(WAYS),
    help="Judge what TensorRT's parser makes of a package, layer by layer, without a GPU.",
    show_default="onnxruntime runs a package, TensorRT an engine",
)
@click.option(
    "--exact",
    is_flag=True,
    help="With --as tensorrt-network: compute in fp32, not in the types that the network declares.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Hold one decoder layer in memory at a time, on both sides.",
    show_default="where memory demands it",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    metavar="N",
    help="A quick look: only the first N decoder layers, on both sides. Implies --stream.",
    show_default="all",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="UTF-8 text to take prompts from.",
    show_default="a text in nine languages",
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=VALUE",
    help="Tighten a bound; docs/validate.md lists the names. Loosening one is printed in the report.",
)
@click.option(
    "--report",
    "report_dir",
    type=PATH,
    metavar="DIR",
    help="Also write report.json and report.html into this directory.",
    show_default="no files",
)
@output_options
def command(
    target: Path,
    reference: Path,
    judged_as: str | None,
    exact: bool,
    stream: bool,
    layers: int | None,
    prompts: Path | None,
    thresholds: tuple[str, ...],
    report_dir: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare TARGET, a package or an engine directory, with transformers on its checkpoint.

    Prompts are run through both in several ways (at once, token by token, in chunks, in a ragged
    batch, at the end of the context) and the logits are compared. If they differ, the operator where
    the error starts is named. Exit codes: 0 parity holds, 1 it does not, 2 the two cannot be compared.

    \b
    Examples:
      qwenport validate qwen.package --reference Qwen2.5-0.5B-Instruct
      qwenport validate qwen.package --reference Qwen2.5-0.5B-Instruct --as tensorrt-network
      qwenport validate qwen.package --reference Qwen2.5-7B-Instruct --layers 4 --report parity/
    """
    runnable_kind(target)
    if report_dir is not None and report_dir.exists() and not report_dir.is_dir():
        raise QwenportError(f"--report {report_dir}: not a directory")
    from qwenport.validate import Options, Validation, check_source, open_target, parse_overrides

    opened = open_target(target, judged_as=judged_as, exact=exact)
    check_source(opened, reference)
    options = Options(stream or None, layers, prompts, parse_overrides(thresholds))
    with progress_bar("loading", quiet) as progress:
        validation = Validation(opened, reference, options, progress=progress)
        try:
            validation.run()
        except KeyboardInterrupt:
            if report_dir is not None:  # what is known by now, marked as incomplete
                validation.report().write(report_dir)
            raise
    report = validation.report()
    if report_dir is not None:
        report.write(report_dir)
    if as_json:
        print_json(report.to_json())
    else:
        for line in lines_of(report):
            click.echo(line)
    if not report.passed:
        raise click.exceptions.Exit(EXIT_NO_PARITY)


def lines_of(report: Report) -> list[str]:
    """One line a scenario with what failed under it, then the verdict."""
    width = max(len(scenario.name) for scenario in report.scenarios)
    lines = []
    for scenario in report.scenarios:
        status = scenario.status.upper() if scenario.status == "failed" else scenario.status
        line = f"{status:<8} {scenario.name:<{width}}"
        if scenario.metrics is not None:
            line += (
                f"  rel-L2 {scenario.metrics.rel_l2:.1e}, {scenario.metrics.positions} positions"
            )
            if report.compute_dtype != "fp32" and scenario.metrics.own_ratio is not None:
                line += f", {scenario.metrics.own_ratio:.2f} x transformers' own error"
        elif scenario.name == "routing" and report.routing:
            same = sum(band.agreeing for band in report.routing)
            line += f"  same experts in {same} of {sum(b.choices for b in report.routing)} choices"
        elif scenario.status == "not run":
            line += f"  {scenario.reason}"
        lines.append(line.rstrip())
        lines += [f"{'':<8}   {failure}" for failure in scenario.failures]
    counts = {
        status: sum(scenario.status == status for scenario in report.scenarios)
        for status in ("passed", "failed", "not run")
    }
    verdict = "parity holds" if report.passed else "parity does NOT hold"
    if report.layers_judged < report.layers:
        verdict += f" for the first {report.layers_judged} of {report.layers} layers"
    lines += [f"threshold loosened: {line}" for line in report.loosened]
    if report.fault is not None:
        lines.append(report.fault.text)
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return [*lines, f"{verdict}: {told}"]
