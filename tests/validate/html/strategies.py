"""Any report at all: strategies for every key of report.json."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from qwenport.validate.localisation import WHOLE_LAYER

from .pieces import coverage, metrics
from .reports import HOSTILE, passing

SCENARIO_NAMES = [each["name"] for each in passing()["scenarios"]]

# hypothesis tries the source's own words too, and a page says this of its verdict alone
texts = st.text(max_size=20).filter(lambda text: "parity holds" not in text.lower())
texts |= st.sampled_from(HOSTILE)
counts = st.integers(0, 10**9)


def as_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


numbers = (
    st.floats() | st.sampled_from([0.0, -0.0, 1e-6, math.nan, math.inf]) | st.integers(-5, 10**9)
).map(as_json)


def lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(items, max_size=4)


def rows(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    return lists(st.fixed_dictionaries(fields))


texts_or_none = texts | st.none()
errors = {"accumulated": numbers, "local": numbers, "own": numbers}
names = texts | st.sampled_from(["embedding", *(f"layer {i}" for i in range(4))])
any_interval = st.none() | st.fixed_dictionaries(
    {"low": numbers, "high": numbers, "confidence": numbers}
)
any_metrics = st.fixed_dictionaries(
    {
        key: any_interval
        if key.endswith("_interval")
        else counts
        if isinstance(value, int)
        else numbers
        if value is not None
        else st.none() | numbers
        for key, value in metrics(8).items()
    }
)
numbered = st.lists(counts, max_size=30)
any_coverage = st.fixed_dictionaries(
    {
        **{key: counts for key, value in coverage().items() if isinstance(value, int)},
        "budget": texts,
        **dict.fromkeys(("step_widths", "batches", "rows", "spans", "capacities"), numbered),
        **dict.fromkeys(
            ("positions", "single_positions"), lists(st.tuples(counts, counts).map(sorted))
        ),
        "layer_distance": st.dictionaries(texts, counts, max_size=3),
        "experts": rows(
            layer=counts, experts=counts, without_tokens=st.lists(st.integers(0, 127), max_size=9)
        ),
        "left_out": lists(texts),
    }
)
spreads = rows(quantile=numbers, made=numbers, own=numbers, times_own=numbers, least=numbers)
any_report = st.fixed_dictionaries(
    {
        key: texts
        if isinstance(value, str)
        else st.booleans()
        if isinstance(value, bool)
        else counts
        for key, value in passing().items()
        if isinstance(value, str | bool | int)
    }
    | {
        "judged_as": st.sampled_from(["package", "tensorrt-network", "engine"]),
        "reference_mode": st.sampled_from(["whole", "streamed"]),
        "own_rounding": st.none() | numbers,
        "cost": st.none()
        | st.fixed_dictionaries(
            {
                "original": texts,
                "tokens": counts,
                "warning": st.none() | texts,
                **dict.fromkeys(
                    ("kl_mean", "same_top1", "perplexity", "original_perplexity"), numbers
                ),
            }
        ),
        "coverage": st.none() | any_coverage,
        "rounding": rows(
            layer=st.none() | st.integers(0, 3),
            operator=texts | st.just(WHOLE_LAYER),
            positions=counts,
            nonfinite=counts | st.just(0),
            relative=spreads,
            systematic=spreads,
        ),
        "unexplained": texts_or_none,
        "script": texts_or_none,
        "weights_sha256": st.dictionaries(texts, texts, max_size=3),
        "loosened": lists(texts),
        "scenarios": rows(
            name=texts | st.sampled_from(SCENARIO_NAMES),
            summary=texts,
            status=st.sampled_from(["passed", "failed", "not run"]),
            reason=texts_or_none,
            seconds=numbers,
            checks=rows(
                metric=texts | st.just("rel-L2"),
                value=numbers,
                relation=st.sampled_from(["<=", ">=", "=="]),
                bound=numbers,
                where=texts_or_none,
                passed=st.booleans(),
            ),
            metrics=st.none() | any_metrics,
            by_position=st.none()
            | st.fixed_dictionaries(dict.fromkeys(("rel_l2", "kl", "difference"), lists(numbers))),
        ),
        "layers_error": rows(name=names, **errors),
        "fault": st.none()
        | st.fixed_dictionaries(
            {
                "scenario": texts,
                "layer": st.none() | st.integers(0, 3),
                "operator": texts,
                **dict.fromkeys(
                    ("input_error", "output_error", "local_error", "own_error"), numbers
                ),
                "text": texts,
                "operators": rows(name=texts, **errors | {"accumulated": st.none() | numbers}),
            }
        ),
        "routing": rows(least=numbers, most=numbers, choices=counts, agreeing=counts),
        "environment": st.dictionaries(texts | st.just("date"), texts, max_size=3),
        "hashes": st.dictionaries(texts, texts, max_size=3),
    }
)
