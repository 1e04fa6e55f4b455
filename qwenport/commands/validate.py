"""`qwenport validate`: does a package or an engine compute what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwenport.commands._common import (
    EXIT_NO_PARITY,
    PATH,
    note,
    output_options,
    print_json,
    runnable_kind,
)
from qwenport.commands._progress import progress_bar
from qwenport.contract import ATTENTIONS, AUTO, BUDGETS, NETWORK, PACKAGE, STANDARD, Progress

if TYPE_CHECKING:
    from qwenport.validate import Report, ScenarioResult, Validation


@click.command("validate")
@click.argument("target", type=PATH)
@click.option(
    "--reference",
    type=PATH,
    required=True,
    metavar="CHECKPOINT",
    help="The checkpoint that TARGET was made from; transformers runs it. For a package that export quantized: the "
    "checkpoint before, or checkpoint/ in the package.",
)
@click.option(
    "--original",
    type=PATH,
    metavar="CHECKPOINT",
    help="The checkpoint before it was quantized: also report what quantization cost. It changes no verdict.",
)
@click.option(
    "--as",
    "judged_as",
    type=click.Choice([NETWORK]),
    help="Judge the network that `build` gives TensorRT, layer by layer, without a GPU.",
    show_default="onnxruntime runs a package, and an engine what it was built for",
)
@click.option(
    "--exact",
    is_flag=True,
    help="With --as tensorrt-network: judge the arithmetic only, not the rounding of the declared types.",
)
@click.option(
    "--gpu",
    "gpus",
    metavar="sm86,sm89",
    help="With --as tensorrt-network: judge the network of an engine for these architectures.",
    show_default="all that can run the model, as for `qwenport build`",
)
@click.option(
    "--attention",
    type=click.Choice((AUTO, *ATTENTIONS)),
    default=AUTO,
    help="With --as tensorrt-network: judge the network of an engine with this form of attention.",
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
    "--budget",
    type=click.Choice(BUDGETS),
    default=STANDARD,
    help="How much is run: how far the context, how many widths, edges and single tokens.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Of the step widths and the random walk, which are drawn.",
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=VALUE",
    help="Tighten a bound, as in rel_l2=1e-5; an unknown name lists them all. Loosening one is printed in the report.",
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
    original: Path | None,
    judged_as: str | None,
    exact: bool,
    gpus: str | None,
    attention: str,
    stream: bool,
    layers: int | None,
    prompts: Path | None,
    budget: str,
    seed: int,
    thresholds: tuple[str, ...],
    report_dir: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare TARGET, a package or an engine directory, with transformers on its checkpoint.

    Weights, graph and files are compared with the checkpoint's byte for byte. Then prompts are run
    through both in every way a program could: with the last logits or all, steps of many widths,
    token by token, batches, small caches, to the end of the context, at random. If they differ, the
    operator where the error starts is named. The verdict says what was judged. A package that passes gets
    a proof, which engines built from it carry (`qwenport selftest`).

    Exit codes: 0 parity holds, 1 it does not, 2 the two cannot be compared.

    \b
    Examples:
      qwenport validate qwen.package --reference Qwen2.5-0.5B-Instruct
      qwenport validate qwen.package --reference Qwen2.5-0.5B-Instruct --as tensorrt-network
      qwenport validate qwen.package --reference Qwen2.5-0.5B-Instruct --as tensorrt-network --gpu sm89
      qwenport validate qwen.package --reference Qwen2.5-7B-Instruct --budget thorough --report parity/
      qwenport validate qwen.package --reference Qwen2.5-7B-Instruct-AWQ --original Qwen2.5-7B-Instruct
    """
    runnable_kind(target)
    from qwenport.validate import (
        Options,
        Validation,
        check_source,
        open_target,
        parse_overrides,
        prepare_report,
    )

    overrides = parse_overrides(thresholds)
    if report_dir is not None:
        prepare_report(report_dir)  # before any work, so that no old report survives a failure
    opened = open_target(target, judged_as=judged_as, exact=exact, gpus=gpus, attention=attention)
    sources = check_source(opened, reference)
    options = Options(stream or None, layers, prompts, overrides, budget, seed, original)
    with progress_bar("loading", quiet) as progress:
        validation = Validation(opened, sources, options, progress=progress)
        try:
            validation.run()
        except KeyboardInterrupt:
            if report_dir is not None:  # what is known so far, marked as incomplete
                validation.report().write(report_dir)
            raise
        report = validation.report()
        said = _keep_proof(validation, report, progress)
    if report_dir is not None:
        report.write(report_dir)
    if as_json:
        print_json(report.to_json())
    else:
        for line in lines_of(report):
            click.echo(line)
    note(said, quiet)
    if not report.passed:
        raise click.exceptions.Exit(EXIT_NO_PARITY)


def _keep_proof(validation: Validation, report: Report, progress: Progress) -> str | None:
    """Keep a proof in a package of which everything was judged, and all of it passed."""
    from qwenport.validate import keep_proof

    package, judged = validation.target.package, validation.target.judged_as
    if not report.passed or package is None or judged != PACKAGE:
        return None
    if report.layers_judged < report.layers:
        return None
    return keep_proof(package, streamed=validation.streamed, progress=progress).note


def lines_of(report: Report) -> list[str]:
    """One line per scenario with its failures below it, then the verdict."""
    width = max(len(scenario.name) for scenario in report.scenarios)
    lines = []
    for scenario in report.scenarios:
        status = scenario.status.upper() if scenario.status == "failed" else scenario.status
        line = f"{status:<8} {scenario.name:<{width}}"
        line += f"  {_told(scenario, report)}"
        lines.append(line.rstrip())
        lines += [f"{'':<8}   {failure}" for failure in scenario.failures]
    lines += [f"threshold loosened: {line}" for line in report.loosened]
    if report.coverage is not None:
        lines += [f"not judged: {sentence}" for sentence in report.coverage.left_out]
    if report.cost is not None:
        lines.append(f"quantization {report.cost}")
    if report.fault is not None:
        lines.append(report.fault.text)
    elif report.unexplained is not None:
        lines.append(f"Where the error starts was not found: {report.unexplained}.")
    if report.script is not None:
        whole = " whole, as it was streamed," if report.reference_mode == "streamed" else ""
        lines += [f"The random walk fails; this shows it{whole} (put the two paths in):"]
        lines += [f"    {line}" for line in report.script.splitlines()]
    return [*lines, report.verdict]


def _told(scenario: ScenarioResult, report: Report) -> str:
    """The rest of a scenario's line."""
    if scenario.metrics is not None:
        text = f"rel-L2 {scenario.metrics.rel_l2:.1e}, {scenario.metrics.positions} positions"
        interval = scenario.metrics.own_ratio_interval
        if interval is not None and scenario.metrics.own_ratio is not None:
            text += (
                f", {scenario.metrics.own_ratio:.2f} x transformers' own error "
                f"({interval.low:.2f} to {interval.high:.2f})"
            )
        return text
    if scenario.name == "routing" and report.routing:
        same = sum(band.agreeing for band in report.routing)
        return f"same experts in {same} of {sum(b.choices for b in report.routing)} choices"
    if scenario.status == "not run":
        return scenario.reason or ""
    if scenario.status == "passed" and scenario.checks:
        check = scenario.checks[-1]
        exact = check.relation == "=="
        told = f"{check.value:g} {check.metric}" if exact else f"{check.metric}: {check.value:.2g}"
        return told + (f", {check.where}" if check.where else "")
    return ""
