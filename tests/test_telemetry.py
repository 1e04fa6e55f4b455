"""onnxruntime reports what it loads only to users who ask for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "ORT_DISABLE_TELEMETRY"
START = "from qwenport import import_extra; import_extra('onnxruntime', 'cpu', 'be started')"


@pytest.mark.parametrize("wanted", [False, True])
def test_onnxruntime_reports_nothing_unless_it_is_wanted(tmp_path: Path, wanted: bool) -> None:
    """What it would report it first keeps in the user's cache."""
    env = {key: value for key, value in os.environ.items() if key not in ("CI", VARIABLE)}
    env |= {"XDG_CACHE_HOME": str(tmp_path)} | ({VARIABLE: "0"} if wanted else {})
    subprocess.run([sys.executable, "-c", START], env=env, check=True)
    assert any(tmp_path.iterdir()) == wanted
