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

WAYS: dict[str, dict[str, Any]] = {
    "package": {},
    "network": {"judged_as": "tensorrt-network"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["package", pytest.param("network", marks=pytest.mark.slow)])
@settings(max_examples=2)
@given(data=st.data())
def test_parity_holds_for_whatever_the_family_allows(
    family: str, way: str, data: st.DataObject
) -> None:
    model: HealthyModel = data.draw(healthy_models(model_types=(family,)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(Path(folder) / "checkpoint", model)
        export(checkpoint, Path(folder) / "package", **model.export_arguments)
        report = validate(Path(folder) / "package", checkpoint, budget="quick", **WAYS[way])
        assert report.passed, report.failures
