"""benchmarks/plugins.py without a GPU: its contenders compute the same, and it says that it needs one."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cpp.builds import ROOT, built

SCRIPT = ROOT / "benchmarks" / "plugins.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delitem(sys.modules, "plugins", raising=False)
    return importlib.import_module("plugins")


def test_all_contenders_compute_the_same(benchmark: ModuleType) -> None:
    build = built("plugins")
    library, many = (
        built(name) / "libqwenport_plugins_cpu.so" for name in ("plugins", "plugins-many")
    )
    setup = benchmark.Setup("cpu", build / "libplugin_calls.so", library, many, 0, 1)
    torch.manual_seed(0)
    names = set()
    for case in benchmark.cases(setup, benchmark.TINY, (1, 16)):
        names.add(case.name.partition(",")[0])
        assert case.bytes > 0 and len(case.inputs) >= 2
        for given in case.inputs[:2]:
            results = []
            for who, (call, _) in case.contenders.items():
                if who != "torch.compile":  # which compiles what "torch" runs
                    found = call(given)
                    found = found if isinstance(found, list | tuple) else [found]
                    results.append([tensor.clone() for tensor in found])
            assert len(results) >= 2
            for other in results[1:]:
                for mine, theirs in zip(results[0], other, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)
    assert names == {"rope", "router", "experts"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--quick", "--work", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU, and there is none here" in done.stderr
    assert not list(tmp_path.iterdir())
