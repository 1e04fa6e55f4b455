"""Packages and engines of the bundled checkpoint, made once a test session and only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwenport import engines, exporter

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-qwen2.5"


@pytest.fixture(scope="session")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], exporter.Package]:
    """dtype -> the bundled checkpoint's package in that dtype."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def make(dtype: str) -> exporter.Package:
        if dtype not in made:
            made[dtype] = exporter.export(CHECKPOINT, folder / dtype, dtype=dtype)
        return made[dtype]

    return make


@pytest.fixture(scope="session")
def engine_of(
    tmp_path_factory: pytest.TempPathFactory, package_of: Callable[[str], exporter.Package]
) -> Callable[[str], engines.Engine]:
    """dtype -> a TensorRT-RTX engine of that package."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def make(dtype: str) -> engines.Engine:
        if dtype not in made:
            made[dtype] = engines.build(
                package_of(dtype).path, folder / dtype, target="tensorrt-rtx", max_batch=3
            )
        return made[dtype]

    return make
