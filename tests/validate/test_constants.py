"""TensorRT's constants against the package's initializers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenport.exporter import Package, export
from qwenport.validate.network import constants
from qwenport.validate.network.constants import check_constants
from qwenport.validate.network.parse import ParsedNetwork, parse_package, with_exact_tables

EXAMPLES = Path(__file__).parents[2] / "examples"
Parsed = tuple[Package, ParsedNetwork]


@pytest.fixture
def parsed_of(tmp_path: Path) -> Callable[..., Parsed]:
    def parsed(name: str = "tiny-qwen2.5", *, exact: bool = False, **options: Any) -> Parsed:
        package = export(EXAMPLES / name, tmp_path / "package", **options)
        made = parse_package(package, 64)
        return package, with_exact_tables(made, package) if exact else made

    return parsed


@pytest.mark.parametrize("name", ["tiny-qwen2.5", "tiny-qwen2-moe"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("exact", [False, True])
def test_every_constant_is_the_package_s(
    parsed_of: Callable[..., Parsed], name: str, dtype: str, exact: bool
) -> None:
    package, parsed = parsed_of(name, exact=exact, dtype=dtype)
    row = check_constants(parsed, package, exact)
    assert row.status == "passed" and row.reason is None, row.failures
    assert row.checks[-1].value == len(parsed.constants) or dtype == "fp32"


def test_bf16_that_python_does_not_show_is_said(
    parsed_of: Callable[..., Parsed], monkeypatch: pytest.MonkeyPatch
) -> None:
    package, parsed = parsed_of()
    monkeypatch.setattr(constants, "_layout_is_known", lambda trt: False)
    row = check_constants(parsed, package, False)
    assert row.status == "passed"
    assert "does not show the values of 64 constants" in (row.reason or "")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_another_value_in_the_network_is_named(
    parsed_of: Callable[..., Parsed], dtype: str
) -> None:
    package, parsed = parsed_of(dtype=dtype)
    layer = next(x for x, _ in parsed.layers() if x.name == "model.norm.weight")
    layer.__class__ = parsed.trt.IConstantLayer
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    mine = np.ones(192 * size, np.uint8)
    kind = {"bf16": "BF16", "fp16": "HALF", "fp32": "FLOAT"}[dtype]
    layer.weights = parsed.trt.Weights(getattr(parsed.trt.DataType, kind), mine.ctypes.data, 192)
    row = check_constants(parsed, package, False)
    assert row.status == "failed"
    assert "constants that differ 1," in row.failures[0] and "model.norm.weight" in row.failures[0]


def test_a_large_constant_of_its_own_and_a_missing_one_are_named(
    parsed_of: Callable[..., Parsed],
) -> None:
    package, parsed = parsed_of()
    layer = next(x for x, _ in parsed.layers() if x.name == "model.norm.weight")
    layer.name = "mine"
    row = check_constants(parsed, package, False)
    text = "; ".join(row.failures)
    assert "network lacks 1, must be == 0 (first: model.norm.weight)" in text
    assert "more than 64 numbers 1, must be == 0 (first: mine)" in text


def test_values_that_the_interpreter_has_instead_are_named(
    parsed_of: Callable[..., Parsed],
) -> None:
    package, parsed = parsed_of(exact=True)
    assert check_constants(parsed, package, False).status == "failed"  # tables in fp32
    parsed.constants["model.norm.weight"] = parsed.constants["model.norm.weight"] + 1
    row = check_constants(parsed, package, True)
    assert row.status == "failed" and "evaluated with other values 1" in row.failures[0]
