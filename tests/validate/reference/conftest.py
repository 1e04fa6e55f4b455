"""References made once a session; tests must not change them."""

from __future__ import annotations

from collections.abc import Callable

import checkpoints
import pytest

from qwenport.validate.reference import Reference

from .pairs import CASES, MIXTURES, Pair, target_of


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Checkpoint, package and references of a case."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            case = CASES[name]
            path = tmp_path_factory.mktemp("reference") / "checkpoint"
            checkpoints.write_checkpoint(path, case.raw, case.tensors(), shards=case.shards)
            target = target_of(case, path)
            whole = Reference(target, path)
            made[name] = Pair(case, path, target, whole, Reference(target, path, streamed=True))
        return made[name]

    return pair


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    """Each case."""
    return pair_of(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    """Each case with experts."""
    return pair_of(request.param)
