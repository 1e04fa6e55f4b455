"""docs/plugins.md: its command runs, and its limits are the code's."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

from cpp.builds import ROOT, run, tensorrt_headers

from qwenport.contract import MOST_CHOSEN, MOST_EXPERTS
from qwenport.plugins import compiled

PAGE = (ROOT / "docs" / "plugins.md").read_text()


def test_the_command_of_the_page_makes_a_library(tmp_path: Path) -> None:
    (tmp_path / "sdk").mkdir()
    (tmp_path / "sdk" / "include").symlink_to(tensorrt_headers())
    (command,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    environment = {**os.environ, "TENSORRT": str(tmp_path / "sdk"), "PATH": path}
    run("bash", "-euc", command, cwd=tmp_path, env=environment)
    assert compiled.open_library(tmp_path / compiled.LIBRARY).gpus == ("sm90",)


def test_the_limits_are_those_of_the_kernels() -> None:
    assert f"up to {MOST_EXPERTS} experts, {MOST_CHOSEN} chosen" in PAGE
    assert f"up to {MOST_EXPERTS} experts, {MOST_CHOSEN} per token" in PAGE
    sources = "".join(path.read_text() for path in (ROOT / "plugins").rglob("kernel.hpp"))
    (few,) = re.findall(r"few_tokens = (\d+)", sources)
    assert f"up to {few} tokens: two launches" in PAGE
