"""Packages of the bundled checkpoints, made once a session; tests must not change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwenport.exporter import export

from .bundled import DENSE, MIXTURE


@pytest.fixture(scope="session")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A bundled checkpoint's package, with weights of its own."""
    made: dict[Path, Path] = {}

    def package(checkpoint: Path) -> Path:
        if checkpoint not in made:
            folder = tmp_path_factory.mktemp(checkpoint.name)
            made[checkpoint] = export(checkpoint, folder / "package", weights="copy").path
        return made[checkpoint]

    return package


@pytest.fixture(scope="session")
def dense(package_of: Callable[[Path], Path]) -> Path:
    """The package of the bundled dense model."""
    return package_of(DENSE)


@pytest.fixture(scope="session")
def mixture(package_of: Callable[[Path], Path]) -> Path:
    """The package of the bundled mixture of experts."""
    return package_of(MIXTURE)
