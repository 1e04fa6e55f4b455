"""How well `validate` judges: seeded defects that it must catch and localise, healthy models that it must pass.

    python benchmarks/sensitivity.py
    python benchmarks/sensitivity.py --families rounding,span --models 0
    python benchmarks/sensitivity.py --quick

Every defect of the catalogue (tests/defects) is put into a package of a bundled checkpoint, and that package is
judged in each of the defect's forms: run by onnxruntime, as the network that TensorRT's parser makes from it in exact
arithmetic, or in the types that the network declares. It claims that another version wrote it, so that it is judged by
numbers alone. Results are recorded at once, under the commit, and a later run does not judge them again. Then models
that are correct by construction are drawn (tests/healthy_models.py) and judged in all three forms. There are no peers:
none has a parity command that can fail.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from measure import ROOT, cores
from report import Bar, Columns, Report, Result, benchmark, figure, qwenport_version, table

sys.path.insert(0, str(ROOT / "tests"))

FORMS: dict[str, dict[str, Any]] = {
    "package": {},
    "network, exact": {"judged_as": "tensorrt-network", "exact": True},
    "network": {"judged_as": "tensorrt-network"},
}
HEALTHY_MODELS = 300
SPARE = 5  # draw a fifth more, since some are drawn twice
AT_ONCE = 20  # healthy models that one task draws
SEED = 2026
QUICK_DEFECTS, QUICK_MODELS = 1, 3
IDENTITY = {"weights", "files"}  # rows that compare bytes, not numbers
TUPLES = ("lives_in", "failed")  # the tuple fields of a `Judged`

Task = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One defect, judged in one form.

    Attributes:
        defect, family, form: the defect, its family and the judged form.
        caught: whether parity did not hold.
        lives_in: decoder layers that contain the mistake; None if none does.
        layer, operator: where the report says that the error starts; None if it does not say.
        failed: rows that failed.
        seconds: CPU time.
        error: what `validate` raised in place of a verdict.
    """

    defect: str
    family: str
    form: str
    caught: bool
    lives_in: tuple[int, ...] | None
    layer: int | None = None
    operator: str | None = None
    failed: tuple[str, ...] = ()
    seconds: float
    error: str | None = None

    @property
    def placed(self) -> bool:
        """Whether the report names a layer that contains the mistake."""
        return self.lives_in is not None and self.layer in self.lives_in

    @property
    def by_numbers(self) -> bool:
        """Whether a row failed that compares numbers, not only bytes."""
        return bool(set(self.failed) - IDENTITY)


def judge_defect(name: str, form: str, budget: str) -> dict[str, Any]:
    """Seed a defect into a package made for it, and validate; return the fields of a `Judged`."""
    import torch
    from defects.catalogue import DEFECTS
    from defects.tools import seed

    from qwenport.exporter import export
    from qwenport.validate import validate

    torch.set_num_threads(1)
    (defect,) = [defect for defect in DEFECTS if defect.name == name]
    where = None if defect.layers is None else tuple(sorted(defect.layers))
    work, started = Path(tempfile.mkdtemp()), time.process_time()

    def judged(**found: Any) -> dict[str, Any]:
        facts = {**found, "seconds": time.process_time() - started, "lives_in": where}
        return asdict(Judged(defect=name, family=defect.family, form=form, **facts))

    try:
        checkpoint = defect.write_checkpoint(work / "checkpoint")
        wanted: dict[str, Any] = {"rope_scaling": defect.rope_scaling, "dtype": defect.dtype}
        weights = "link" if defect.dtype else "copy"
        export(checkpoint, work / "package", weights=weights, **wanted)
        seed(work / "package", work / "faulty", defect.change)
        report = validate(work / "faulty", checkpoint, budget=budget, **FORMS[form])
    except Exception as error:  # no verdict counts as a miss, and is reported
        return judged(caught=False, error=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(work)
    fault = report.fault
    layer, operator = (None, None) if fault is None else (fault.layer, fault.operator)
    failed = tuple(s.name for s in report.scenarios if s.status == "failed")
    return judged(caught=not report.passed, layer=layer, operator=operator, failed=failed)


def judge_healthy(count: int, seed: int, budget: str) -> list[dict[str, Any]]:
    """Draw models, export them and validate each in every form; return one record each."""
    import torch
    from healthy_models import HealthyModel, healthy_models, write
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from qwenport.exporter import export

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
            for form, options in FORMS.items():
                record = {
                    "form": form,
                    "model": drawn,
                    "model_type": model.config["model_type"],
                    "dtype": package.dtype,
                    "outliers": model.outliers,
                    "rope_scaling": model.config.get("rope_scaling"),
                    "export": model.export_arguments,
                }
                said = _verdict(work / "package", checkpoint, options | {"budget": budget})
                # the draw depends on what this process has loaded, so a rejected model is kept whole
                accused = {} if said["passed"] else {"drawn": repr(model)}
                found.append(record | said | accused)
        finally:
            shutil.rmtree(work)

    draw()
    return found


def _verdict(package: Path, checkpoint: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`validate`'s verdict on a healthy model; no verdict is a false alarm too."""
    from qwenport.validate import validate

    try:
        report = validate(package, checkpoint, **options)
    except Exception as error:
        return {"passed": False, "failures": [f"{type(error).__name__}: {error}"]}
    measured = [s.metrics for s in report.scenarios if s.metrics is not None]
    return {
        "passed": report.passed,
        "failures": list(report.failures),
        "worst_rel_l2": max((m.rel_l2 for m in measured), default=None),
        "worst_own_ratio": max((m.own_ratio or 0.0 for m in measured), default=None),
        "worst_rounding": max((error.excess for error in report.rounding), default=None),
        "replayed": report.replayed,
    }


@dataclass(frozen=True)
class Journal:
    """The results for a commit so far, one line per task; None records nothing."""

    path: Path | None

    def known(self) -> dict[str, Any]:
        """Task -> its result."""
        if self.path is None or not self.path.is_file():
            return {}
        text = self.path.read_text(encoding="utf-8")
        whole, end, half = text.rpartition("\n")
        if half:  # from a run that was killed while writing: judged again
            self.path.write_text(whole + end, encoding="utf-8")
        return {line["task"]: line["result"] for line in map(json.loads, whole.splitlines())}

    def add(self, task: str, result: Any) -> None:
        """Append one result."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"task": task, "result": result}) + "\n")

    def run(self, pool: Executor, function: Callable[..., Any], tasks: list[Task]) -> Iterator[Any]:
        """The results of all tasks in order; only unknown ones are run."""
        known = self.known()
        running = {
            task: pool.submit(function, *task) for task in tasks if json.dumps(task) not in known
        }
        for task in tasks:
            if task not in running:
                yield known[json.dumps(task)]
                continue
            result = running.pop(task).result()
            self.add(json.dumps(task), result)
            yield result


def batches(count: int) -> list[int]:
    """`count` split into parts of AT_ONCE; the last may be smaller."""
    return [min(AT_ONCE, count - start) for start in range(0, count, AT_ONCE)]


def scores(judged: Sequence[Judged], healthy: list[dict[str, Any]], asked: int) -> list[Bar]:
    """The bars; the first three are the main ones."""
    caught = 100 * sum(j.caught for j in judged) / len(judged) if judged else None
    inside = [j for j in judged if j.lives_in is not None]
    placed = 100 * sum(j.placed for j in inside) / len(inside) if inside else None
    models = len({record["model"] for record in healthy})
    alarms = len({record["model"] for record in healthy if not record["passed"]})
    return [
        Bar("defects caught", caught, 100, "at least", "%"),
        Bar("placed in the right layer, of those that live in one", placed, 90, "at least", "%"),
        Bar("false alarms", alarms if healthy else None, 0, "at most", "models"),
        Bar("healthy models judged", models if asked else None, asked, "at least", "models"),
    ]


def counts(judged: Iterable[Judged]) -> dict[str, Any]:
    """How many were caught and localised."""
    judged = list(judged)
    inside = [j for j in judged if j.lives_in is not None]
    return {
        "defects": len(judged),
        "caught": sum(j.caught for j in judged),
        "caught_by_numbers": sum(j.caught and j.by_numbers for j in judged),
        "live_in_a_layer": len(inside),
        "placed": sum(j.placed for j in inside),
        "missed": sorted(j.defect for j in judged if not j.caught),
        "misplaced": sorted(j.defect for j in inside if not j.placed),
    }


def by_family(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """The counts of each family in each form."""
    pairs = dict.fromkeys((j.family, j.form) for j in judged)
    return [
        {"family": family, "form": form}
        | counts(j for j in judged if (j.family, j.form) == (family, form))
        for family, form in pairs
    ]


def alarms_of(healthy: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models and false alarms of each form."""
    found = []
    for form in FORMS:
        records = [record for record in healthy if record["form"] == form]
        ratios = [record.get("worst_own_ratio") or 0.0 for record in records]
        roundings = [record.get("worst_rounding") or 0.0 for record in records]
        found.append(
            {
                "form": form,
                "models": len({record["model"] for record in records}),
                "false_alarms": len({r["model"] for r in records if not r["passed"]}),
                "with_outliers": len({r["model"] for r in records if r["outliers"]}),
                "worst_own_ratio": max(ratios, default=None),
                "worst_rounding": max(roundings, default=None),
            }
        )
    return found


FAMILY_COLUMNS: Columns = {
    "family, judged as": lambda row: f"{row['family']}, {row['form']}",
    "caught": lambda row: f"{row['caught']} of {row['defects']}",
    "placed": lambda row: (
        f"{row['placed']} of {row['live_in_a_layer']}" if row["live_in_a_layer"] else ""
    ),
    "missed or misplaced": lambda row: ", ".join(sorted({*row["missed"], *row["misplaced"]})),
}
HEALTHY_COLUMNS: Columns = {
    "judged as": figure("form"),
    "false alarms": lambda row: f"{row['false_alarms']} of {row['models']}",
    "worst, x transformers' own error": figure("worst_own_ratio", "{:.2f}"),
}


def _names(families: str | None) -> list[str]:
    """The defects to judge.

    Raises:
        click.BadParameter: no such family.
    """
    from defects.catalogue import DEFECTS

    known = dict.fromkeys(defect.family for defect in DEFECTS)
    asked = list(known) if families is None else [name.strip() for name in families.split(",")]
    for name in asked:
        if name not in known:
            raise click.BadParameter(f"no family {name!r}; there are {', '.join(known)}")
    return [defect.name for defect in DEFECTS if defect.family in asked]


@benchmark("sensitivity", bars_must_hold=True)
@click.option(
    "--families",
    metavar="A,B",
    show_default="all",
    help="Only the defects of these families.",
)
@click.option(
    "--models",
    type=click.IntRange(min=0),
    default=HEALTHY_MODELS,
    help="Healthy models to draw.",
)
def main(report: Report, families: str | None, models: int) -> Result:
    """Judge every seeded defect and many healthy models: `validate` must reject the former and pass the latter."""
    from defects.catalogue import DEFECTS

    names = _names(families)
    if report.quick:
        names, models = names[:QUICK_DEFECTS], min(models, QUICK_MODELS)
    asked = {"defects": len(names), "families": families, "models": models, "seed": SEED}
    report.settings |= asked
    forms = {defect.name: defect.forms for defect in DEFECTS}
    budget = "quick" if report.quick else "standard"
    tasks = [(name, form, budget) for name in names for form in forms[name]]
    version = qwenport_version()
    clean = "(" in version and "changes" not in version  # a commit, and nothing else
    recorded = report.work / "sensitivity" / f"{version}.jsonl"
    journal = Journal(recorded if clean and not report.quick else None)
    judged: list[Judged] = []
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        for facts in journal.run(pool, judge_defect, tasks):
            tuples = {key: None if facts[key] is None else tuple(facts[key]) for key in TUPLES}
            judged.append(Judged(**facts | tuples))
            report.add_run(facts["defect"], **{k: v for k, v in facts.items() if k != "defect"})
        sizes = batches(models + -(-models // SPARE))
        drawn = [(count, SEED + index, budget) for index, count in enumerate(sizes)]
        healthy = [r for records in journal.run(pool, judge_healthy, drawn) for r in records]
    rows, alarms = by_family(judged), alarms_of(healthy)
    report.data |= {"healthy": healthy, "by_family": rows, "false_alarms": alarms}
    for record in healthy:
        if not record["passed"]:
            report.say(f"  FALSE ALARM {record}")
    bars = scores(judged, healthy, models)
    summary = [{"contender": bar.name, "value": bar.value, "error": None} for bar in bars]
    tables = [
        table("Seeded defects", FAMILY_COLUMNS, rows),
        table("Healthy models", HEALTHY_COLUMNS, [row for row in alarms if row["models"]]),
    ]
    return Result(tables, summary, bars)


if __name__ == "__main__":
    main()
