"""Every seeded fault turns the verdict, in the scenarios that are there to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from defects import attention, cache, ends, layers, norms_and_weights, rope, tables
from defects.tools import seed

from qwenport.exporter import export
from qwenport.validate.reference import Reference
from qwenport.validate.report import Report
from qwenport.validate.target import open_target
from qwenport.validate.validation import judge, open_candidate

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5"

ALL_LOGITS = frozenset(
    {"prefill", "full cache", "decode", "chunked prefill", "ragged batch", "greedy"}
)
CACHED = ALL_LOGITS - {"prefill"}


@dataclass(frozen=True)
class Fault:
    """A change to a graph, and the scenarios that must fail and pass with it."""

    change: Callable[[ir.Model], None]
    fails: frozenset[str]
    passes: frozenset[str] = frozenset()


_TABLES = frozenset({"rope tables"})

FAULTS = {
    fault.change.__name__: fault
    for fault in (
        Fault(norms_and_weights.wrong_epsilon, ALL_LOGITS, _TABLES),
        Fault(norms_and_weights.wrong_epsilon_in_one_norm, ALL_LOGITS),
        Fault(rope.swapped_cos_and_sin, ALL_LOGITS, _TABLES),
        Fault(rope.interleaved_rope, ALL_LOGITS, _TABLES),
        Fault(rope.rope_restarts_every_step, CACHED, frozenset({"prefill"})),
        Fault(norms_and_weights.missing_bias, ALL_LOGITS),
        Fault(attention.strict_mask, ALL_LOGITS),
        Fault(attention.permissive_mask, ALL_LOGITS),
        Fault(attention.causal_from_the_upper_left, CACHED, frozenset({"prefill"})),
        Fault(cache.cache_slot_off_by_one, ALL_LOGITS),
        Fault(
            cache.rows_share_the_first_rows_slots,
            frozenset({"ragged batch"}),
            ALL_LOGITS - {"ragged batch"},
        ),
        Fault(attention.doubled_attention_scale, ALL_LOGITS),
        Fault(ends.swapped_head_rows, ALL_LOGITS),
        Fault(norms_and_weights.swapped_key_and_value_weights, ALL_LOGITS),
        Fault(attention.swapped_kv_heads, ALL_LOGITS),
        Fault(layers.skipped_layer, ALL_LOGITS),
        Fault(ends.one_nan, ALL_LOGITS),
        Fault(ends.unknown_operator, ALL_LOGITS, _TABLES),
        Fault(tables.short_rope_table, _TABLES | {"full cache"}, frozenset({"prefill"})),
        Fault(tables.shifted_rope_table, _TABLES, frozenset({"prefill", "decode"})),
        Fault(tables.wrong_last_rope_row, _TABLES | {"full cache"}, frozenset({"prefill"})),
    )
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and parallel test workers would fight over cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(CHECKPOINT, tmp_path_factory.mktemp("faults") / "package", weights="copy").path


@pytest.fixture(scope="module")
def reference(package: Path) -> Reference:
    return Reference(open_target(package), CHECKPOINT)


def _judge(path: Path, reference: Reference) -> Report:
    target = open_target(path)
    return judge(target, CHECKPOINT, reference, open_candidate(target))


def test_an_unchanged_copy_passes(package: Path, reference: Reference, tmp_path: Path) -> None:
    report = _judge(seed(package, tmp_path / "copy", lambda model: None), reference)
    assert report.passed, report.failures


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, package: Path, reference: Reference, tmp_path: Path) -> None:
    fault = FAULTS[name]
    report = _judge(seed(package, tmp_path / name, fault.change), reference)
    status = {scenario.name: scenario.status for scenario in report.scenarios}
    assert not report.passed
    assert {n for n in fault.fails if status[n] != "failed"} == set()
    assert {n for n in fault.passes if status[n] != "passed"} == set()
    assert report.failures
