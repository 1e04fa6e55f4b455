"""How well `validate` judges: seeded defects that it must catch and place, healthy models that it must let pass.

    python benchmarks/sensitivity.py
    python benchmarks/sensitivity.py --quick

Every defect of the catalogue (tests/defects) is put into a package of a bundled checkpoint, and that package is
judged twice: run by onnxruntime, and as the network that TensorRT's parser makes of it, in exact arithmetic. Then
models that are right by construction are drawn (tests/healthy_models.py) and judged, as networks in the types that
they declare as well. There are no peers: none has a parity command that can fail.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from measure import ROOT, WORK
from report import Bar, Report, output_path
from rich.table import Table

sys.path.insert(0, str(ROOT / "tests"))

WAYS: dict[str, dict[str, Any]] = {
    "package": {},
    "network, exact": {"judged_as": "tensorrt-network", "exact": True},
    "network": {"judged_as": "tensorrt-network"},
}
FOR_DEFECTS = ("package", "network, exact")
HEALTHY_MODELS = 200
SPARE = 5  # one in five more is drawn, since some are drawn twice
SEED = 2026
QUICK_DEFECTS, QUICK_MODELS = 3, 3


@dataclass(frozen=True)
class Judged:
    """One defect, judged in one way.

    Attributes:
        defect, way: which.
        caught: parity did not hold.
        lives_in: decoder layers that the mistake is in; None where it is in none.
        layer, operator: where the report says that the error starts; None where it does not say.
        failed: scenarios that failed.
        error: what `validate` raised in place of a verdict.
    """

    defect: str
    way: str
    caught: bool
    lives_in: tuple[int, ...] | None
    layer: int | None
    operator: str | None
    failed: tuple[str, ...]
    error: str | None = None

    @property
    def placed(self) -> bool:
        """Whether the report names a layer that the mistake is in."""
        return self.lives_in is not None and self.layer in self.lives_in


def judge_defect(name: str, way: str) -> Judged:
    """Seed a defect into a package made for it, and validate."""
    import torch
    from defects.catalogue import DEFECTS
    from defects.tools import seed

    from qwenport.exporter import export
    from qwenport.validate import validate

    torch.set_num_threads(1)
    (defect,) = [defect for defect in DEFECTS if defect.name == name]
    where = None if defect.layers is None else tuple(sorted(defect.layers))
    work = Path(tempfile.mkdtemp())
    try:
        checkpoint = defect.write_checkpoint(work / "checkpoint")
        wanted = {"rope_scaling": defect.rope_scaling, "dtype": defect.dtype}
        export(checkpoint, work / "package", weights="copy", **wanted)
        seed(work / "package", work / "faulty", defect.change)
        report = validate(work / "faulty", checkpoint, **WAYS[way])
    except Exception as error:  # no verdict is a miss, and is said
        text = f"{type(error).__name__}: {error}"
        return Judged(name, way, False, where, None, None, (), text)
    finally:
        shutil.rmtree(work)
    fault = report.fault
    layer, operator = (None, None) if fault is None else (fault.layer, fault.operator)
    failed = tuple(s.name for s in report.scenarios if s.status == "failed")
    return Judged(name, way, not report.passed, where, layer, operator, failed)


def judge_healthy(count: int, seed: int) -> list[dict[str, Any]]:
    """Draw models, export them and validate each in every way; a record each."""
    import torch
    from healthy_models import HealthyModel, healthy_models, write
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from qwenport.exporter import export
    from qwenport.validate import validate

    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(healthy_models())
    def draw(model: HealthyModel) -> None:
        work = Path(tempfile.mkdtemp())
        try:
            checkpoint = write(work / "checkpoint", model)
            package = export(checkpoint, work / "package", **model.export_arguments)
            drawn = hashlib.sha256(repr(model).encode()).hexdigest()[:16]
            for way, options in WAYS.items():
                report = validate(work / "package", checkpoint, **options)
                measured = [s.metrics for s in report.scenarios if s.metrics is not None]
                found.append(
                    {
                        "way": way,
                        "model": drawn,
                        "model_type": model.config["model_type"],
                        "dtype": package.dtype,
                        "passed": report.passed,
                        "failures": list(report.failures),
                        "worst_rel_l2": max(m.rel_l2 for m in measured),
                        "worst_own_ratio": max(m.own_ratio or 0.0 for m in measured),
                        "replayed": report.replayed,
                    }
                )
        finally:
            shutil.rmtree(work)

    draw()
    return found


def spread(count: int, workers: int) -> list[int]:
    """`count` in `workers` parts that are as equal as can be, without empty ones."""
    parts = [count // workers + (index < count % workers) for index in range(workers)]
    return [part for part in parts if part]


def scores(judged: Iterable[Judged], healthy: list[dict[str, Any]], asked: int) -> list[Bar]:
    """The bars, of which the first three are what this is about."""
    judged = list(judged)
    caught = sum(j.caught for j in judged) / len(judged)
    inside = [j for j in judged if j.lives_in is not None]
    placed = 100 * sum(j.placed for j in inside) / len(inside) if inside else None
    alarms = len({record["model"] for record in healthy if not record["passed"]})
    models = len({record["model"] for record in healthy})
    return [
        Bar("defects caught", 100 * caught, 100, "at least", "%"),
        Bar("placed in the right layer, of those that live in one", placed, 90, "at least", "%"),
        Bar("false alarms", alarms, 0, "at most", "models"),
        Bar("healthy models judged", models, asked, "at least", "models"),
    ]


def table(judged: list[Judged], healthy: list[dict[str, Any]]) -> Table:
    """For people: a line a way."""
    made = Table("judged as", "defects caught", "placed", "healthy models", "false alarms", "worst")
    for way in WAYS:
        mine = [j for j in judged if j.way == way]
        inside = [j for j in mine if j.lives_in is not None]
        records = [record for record in healthy if record["way"] == way]
        worst = max((record["worst_own_ratio"] for record in records), default=0.0)
        made.add_row(
            way,
            f"{sum(j.caught for j in mine)} of {len(mine)}" if mine else "",
            f"{sum(j.placed for j in inside)} of {len(inside)}" if mine else "",
            str(len(records)),
            str(sum(not record["passed"] for record in records)),
            f"{worst:.2f} x transformers' own error",
        )
    return made


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="A few of each: a smoke test.")
@click.option(
    "--models",
    type=click.IntRange(min=1),
    default=HEALTHY_MODELS,
    help="Healthy models to draw.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=WORK,
    show_default="benchmarks/work",
    help="Where --quick writes its JSON.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="benchmarks/results/sensitivity-DATE.json; with --quick in the work folder",
    help="Where the JSON goes.",
)
def main(quick: bool, models: int, work: Path, output: Path | None) -> None:
    """Judge every seeded defect, and many healthy models."""
    from defects.catalogue import DEFECTS

    names = [defect.name for defect in DEFECTS]
    if quick:
        names, models = names[:QUICK_DEFECTS], QUICK_MODELS
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    settings = {"defects": len(names), "models": models, "seed": SEED, "ways": list(WAYS)}
    report = Report("sensitivity", quick, settings)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tasks = list(itertools.product(names, FOR_DEFECTS))
        judged = list(pool.map(judge_defect, *zip(*tasks, strict=True)))
        for one in judged:
            report.add_run(
                one.defect,
                way=one.way,
                caught=one.caught,
                lives_in=None if one.lives_in is None else list(one.lives_in),
                layer=one.layer,
                operator=one.operator,
                failed=list(one.failed),
                error=one.error,
            )
        parts = spread(models + models // SPARE, workers)
        seeds = [SEED + index for index in range(len(parts))]
        healthy = [r for records in pool.map(judge_healthy, parts, seeds) for r in records]
    report.data["healthy"] = healthy
    for record in healthy:
        if not record["passed"]:
            report.say(f"  FALSE ALARM {record}")
    bars = scores(judged, healthy, models)
    summary = [{"contender": bar.name, "value": bar.value, "error": None} for bar in bars]
    report.finish(
        table(judged, healthy), summary, bars, output_path("sensitivity", quick, work, output)
    )
    if not quick and not all(bar.holds for bar in bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
