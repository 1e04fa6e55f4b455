"""The catalogue of seeded defects: each is what it says it is. No verdict of `validate`'s is asked for here.

A defect that depends on the way of running is wrong in the run that shows it and right in the one that hides it, as a
package in onnxruntime and as a network that TensorRT parsed. A rounding defect is right in exact arithmetic and
further from it than the healthy model at the operator in question.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from defects.catalogue import AS_TRANSFORMERS, DEFECTS, ROUNDING, RUN_DEPENDENT, Defect
from defects.defect import EXACT_NETWORK, NETWORK, PACKAGE
from defects.rounding import ROUNDED
from defects.runs import USUAL, Run, prefill, run
from defects.tools import OTHER_VERSION, seed

from qwenport.engines import OnnxRuntimeSession
from qwenport.exporter import Package, export, load_package
from qwenport.validate.network import Interpreter, NetworkSession, parse_package
from qwenport.validate.network.parse import with_exact_tables

SHOWN = 1e-4  # relative L2 of all logits of a run
HIDDEN = 1e-6  # the same nodes on the same numbers, but for those that choose
NETWORK_NOISE = 1e-5  # onnxruntime and the interpreter sum in different orders
ALIKE = 1e-5  # exact arithmetic in another order of operations
COARSER = 1.5  # times the healthy operator's own error
NO_ERROR = 1e-7  # of an operator that is fp32 in the declared types

# one or two of a family in the fast tests
FAST = {
    "one_of_many_picked_a_position_early", "steps_of_65_to_127_turned",
    "third_of_three_rows_reads_the_second", "idle_rows_overwrite_their_last_slot",
    "decoding_between_100_and_200_turned", "span_of_192_loses_its_last_block",
    "smaller_caches_damped", "window_of_100_in_one_layer", "one_token_is_nan",
    "last_expert_ignored", "slots_behind_the_span_leak", "a_key_left_behind_is_seen",
}  # fmt: skip
# each expert of the example gets some token of any longer text
SEEN_USUALLY = {
    "last_expert_ignored_as_third_choice",
    "last_expert_ignored",
    "one_expert_without_weights",
}

FAST_NETWORK = {"two_tokens_lose_their_third_choice", "a_key_left_behind_is_seen"}
FAST_ROUNDING = {"query_projection_in_8_pieces", "softmax_in_bf16"}

Healthy = Callable[[Defect], Package]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """The package that a defect is put into; made once."""
    made: dict[tuple[str, str | None], Package] = {}

    def package(defect: Defect) -> Package:
        key = (defect.checkpoint, defect.rope_scaling)
        assert not defect.config and not defect.dtype
        if key not in made:
            folder = tmp_path_factory.mktemp("healthy") / "package"
            checkpoint = defect.write_checkpoint(folder)
            export(checkpoint, folder, rope_scaling=defect.rope_scaling, weights="copy")
            made[key] = load_package(folder)
        return made[key]

    return package


@pytest.fixture
def faulty(healthy: Healthy, tmp_path: Path) -> Iterator[Healthy]:
    """The same package with the defect in it."""
    folder = tmp_path / "faulty"
    yield lambda defect: load_package(seed(healthy(defect).path, folder, defect.change))
    shutil.rmtree(folder)


def cases(defects: tuple[Defect, ...], fast: set[str], form: str) -> list[Any]:
    assert fast <= {defect.name for defect in defects}
    return [
        pytest.param(d, id=d.name, marks=() if d.name in fast else pytest.mark.slow)
        for d in defects
        if form in d.forms
    ]


def given(defect: Defect) -> tuple[Run, Run]:
    """The run that shows a defect and the one that hides it."""
    assert defect.shown_by is not None and defect.hidden_in is not None
    return defect.shown_by, defect.hidden_in


def in_onnxruntime(package: Package, *runs: Run) -> list[list[np.ndarray]]:
    """The logits of each run, from a session of its own."""
    first = OnnxRuntimeSession(package, threads=1)
    return [
        r.play(first.beside(max_batch=r.rows, capacity=r.capacity or package.max_seq_len))
        for r in runs
    ]


def in_a_network(package: Package, *runs: Run, exact: bool = True) -> list[list[np.ndarray]]:
    """The same of TensorRT's network."""
    interpreter = interpreted(package, exact=exact)
    length = package.max_seq_len
    return [
        r.play(
            NetworkSession(
                interpreter,
                package.config,
                max_batch=r.rows,
                capacity=length,
                max_positions=length,
            )
        )
        for r in runs
    ]


def interpreted(package: Package, *, exact: bool) -> Interpreter:
    parsed = parse_package(package, package.max_seq_len)
    assert parsed.complaints == ()
    return Interpreter(with_exact_tables(parsed, package) if exact else parsed, exact=exact)


def difference(logits: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Relative L2 over all logits; infinite where one is no number."""
    a, b = (np.concatenate([x.ravel() for x in xs]).astype(np.float64) for xs in (logits, others))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if np.isfinite(a).all() else np.inf


# ---- the catalogue


def test_the_catalogue_has_every_family_and_unique_names() -> None:
    names = [defect.name for defect in DEFECTS]
    assert len(names) == len(set(names)) >= 115
    assert len(RUN_DEPENDENT) >= 40 and len(ROUNDING) >= 10
    assert {d.family for d in DEFECTS} >= {
        "norms", "attention", "cache", "rope", "tables", "layers", "ends", "experts", "n < seq", "width", "batch",
        "row", "position", "span", "capacity", "distance", "token id", "expert", "reset", "truncation", "rounding",
    }  # fmt: skip
    assert all(d.forms and set(d.forms) <= {PACKAGE, EXACT_NETWORK, NETWORK} for d in DEFECTS)
    assert {d.forms for d in ROUNDING} == {(NETWORK,)}


def test_a_seeded_package_says_that_another_version_wrote_it(
    healthy: Healthy, tmp_path: Path
) -> None:
    package = healthy(RUN_DEPENDENT[0])
    copies = {
        other: seed(package.path, tmp_path / str(other), lambda model: None, other_version=other)
        for other in (True, False)
    }
    versions = {other: load_package(copy).manifest for other, copy in copies.items()}
    assert versions[True]["qwenport_version"] == OTHER_VERSION
    assert versions[False]["qwenport_version"] == package.manifest["qwenport_version"]


# ---- that depend on the way of running


@pytest.mark.parametrize("defect", cases(RUN_DEPENDENT, FAST, PACKAGE))
def test_a_package_is_wrong_in_one_way_of_running_and_right_in_another(
    defect: Defect, healthy: Healthy, faulty: Healthy
) -> None:
    (wrong, right, usual), (shown, hidden, as_usual) = (
        in_onnxruntime(package, *given(defect), USUAL)
        for package in (healthy(defect), faulty(defect))
    )
    assert difference(shown, wrong) > SHOWN
    assert difference(hidden, right) < HIDDEN
    assert (difference(as_usual, usual) < HIDDEN) == (defect.name not in SEEN_USUALLY)


@pytest.mark.parametrize("defect", cases(RUN_DEPENDENT, FAST_NETWORK, EXACT_NETWORK))
def test_the_parsed_network_has_the_same_defect(
    defect: Defect, healthy: Healthy, faulty: Healthy
) -> None:
    package = faulty(defect)
    runs = given(defect)
    shown, hidden = in_a_network(package, *runs)
    as_package, _ = in_onnxruntime(package, *runs)
    wrong, right = in_onnxruntime(healthy(defect), *runs)
    assert difference(shown, wrong) > SHOWN
    assert difference(hidden, right) < NETWORK_NOISE
    if all(np.isfinite(x).all() for x in as_package):
        assert difference(shown, as_package) < NETWORK_NOISE


# ---- of rounding

TEXT = run(prefill(60, all_logits=True))


@pytest.mark.parametrize("defect", cases((*ROUNDING, *AS_TRANSFORMERS), FAST_ROUNDING, NETWORK))
def test_rounding_shows_in_declared_types_only(
    defect: Defect, healthy: Healthy, faulty: Healthy, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = healthy(defect), faulty(defect)
    (logits,), (others,) = (in_a_network(package, TEXT) for package in (right, wrong))
    assert difference(others, logits) < ALIKE

    names, result = ROUNDED[defect.change](ir.load(right.model))
    values = operands(right, names)
    exact = evaluate(right, values, result, exact=True)
    own, more = (
        difference([evaluate(package, values, result, exact=False)], [exact])
        for package in (right, wrong)
    )
    with capsys.disabled():
        factor = more / max(own, NO_ERROR)
        print(f"\n{defect.name}: {more:.1e} where {own:.1e} is its own, {factor:.1f} x", end=" ")
    assert factor > COARSER


def operands(package: Package, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What an operator is given in that text: integers and masks as they are, the rest rounded to bf16."""
    interpreter = interpreted(package, exact=True)
    feeds: dict[str, Any] = {}

    class Listening(NetworkSession):
        def _step(self, step: Any) -> Any:
            feeds.update(step)
            return super()._step(step)

    length = package.max_seq_len
    observe = [name for name in names if interpreter.has(name)]
    session = Listening(
        interpreter,
        package.config,
        max_batch=1,
        capacity=length,
        max_positions=length,
        observe=observe,
    )
    TEXT.play(session)
    values = {**feeds, **session.observed}
    tensors = {name: torch.from_numpy(np.array(values[name])) for name in names}
    return {
        name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in tensors.items()
    }


def evaluate(
    package: Package, values: dict[str, torch.Tensor], result: str, *, exact: bool
) -> np.ndarray:
    """One operator, given the same values in either arithmetic. Both have the same tables."""
    parsed = parse_package(package, package.max_seq_len)
    program = Interpreter(parsed, exact=exact).program([*values], [result])
    given = {n: x.float() if exact and x.is_floating_point() else x for n, x in values.items()}
    made = program.run(given)[result]
    return np.asarray(made.float().numpy())
