"""Every family: models that are right by construction, drawn over all that its config.json can say, hold parity."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from healthy_models import HealthyModel, healthy_models, write
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.exporter import export
from qwenport.exporter.families import FAMILIES
from qwenport.validate import validate

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def check_parity(family: str, data: st.DataObject, **way: Any) -> None:
    model: HealthyModel = data.draw(healthy_models(model_types=(family,)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(Path(folder) / "checkpoint", model)
        export(checkpoint, Path(folder) / "package", **model.export_arguments)
        report = validate(Path(folder) / "package", checkpoint, budget="quick", **way)
        assert report.passed, report.failures


@FAMILY
@settings(max_examples=2)
@given(data=st.data())
def test_parity_holds_for_whatever_the_family_allows(family: str, data: st.DataObject) -> None:
    check_parity(family, data)


@pytest.mark.slow
@FAMILY
@settings(max_examples=1)
@given(data=st.data())
def test_the_network_of_whatever_the_family_allows_has_parity(
    family: str, data: st.DataObject
) -> None:
    """benchmarks/sensitivity.py judges hundreds."""
    check_parity(family, data, judged_as="tensorrt-network")
