"""The one run on a GPU machine, rehearsed: what prepare.py packs runs elsewhere, up to the first launch.

Its check of the kernels at real sizes is tried on the kernels that run on the CPU, and with kernels that are wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cpp.builds import ROOT, built

GPU = ROOT / "benchmarks" / "gpu"
MIB = 1 << 20

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    path = list(sys.path)
    monkeypatch.syspath_prepend(GPU)
    for name in ("plugins", "kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("kernels")
    sys.path[:] = path


def opened(kernels: ModuleType, case: Any) -> tuple[Any, list[Any]]:
    """A case's plugin on the CPU, and memory for its outputs."""
    outputs = kernels.outputs_of(case, "cpu")
    build = built("plugins")
    call = kernels.PluginCall(
        build / "libplugin_calls.so",
        build / "libqwenport_plugins_cpu.so",
        case.plugin,
        case.fields,
        case.inputs,
        [memory.tensor for memory in outputs],
    )
    return call, outputs


def test_right_kernels_pass(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    names = set()
    for case in kernels.cases(kernels.TINY, (1, 9), kernels.DTYPES, "cpu"):
        found = kernels.check(case, *opened(kernels, case))
        assert "wrong" not in found, found
        assert 0 <= found["error"] <= found["bound"]
        names.add(case.name.partition(",")[0])
    assert names == {"rope", "router", "experts"}


def scaled(given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    outputs[0].mul_(1.02)


def swapped(given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    outputs[-1].copy_(outputs[-1].flip(-1).clone())


def unwritten(given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    outputs[0].view(torch.uint8).flatten()[-1] = 0x7B if CALLS[0] % 2 else 0xFF


def beyond(given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    first = outputs[0].view(torch.uint8).flatten()
    first.as_strided((1,), (1,), first.storage_offset() + first.numel()).fill_(1)


CALLS = [0]


@pytest.mark.parametrize(
    ("kind", "fault", "wrong"),
    [
        ("rope", scaled, "further from fp64"),
        ("router", scaled, "further from fp64"),
        ("router", swapped, "other indices"),
        ("experts", scaled, "further from fp64"),
        ("experts", unwritten, "depends on what its memory held"),
        ("rope", beyond, "wrote outside"),
        ("experts", beyond, "wrote outside"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_kernel_is_found(
    kernels: ModuleType, dtype: torch.dtype, kind: str, fault: Callable[..., None], wrong: str
) -> None:
    torch.manual_seed(0)
    cases = kernels.cases(kernels.TINY, (9,), (dtype,), "cpu")
    case = next(case for case in cases if case.name.startswith(kind))
    call, outputs = opened(kernels, case)

    class Faulty:
        workspace = call.workspace

        def __call__(self, given: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
            CALLS[0] += 1
            call(given, found)
            fault(given, found)

    assert wrong in kernels.check(case, Faulty(), outputs)["wrong"]


@without_gpu
def test_what_is_packed_runs_elsewhere_up_to_the_first_launch(tmp_path: Path) -> None:
    """On a machine that has nothing of this checkout."""
    out = tmp_path / "out"
    command = [sys.executable, GPU / "prepare.py", out, "--quick", "--part-size", "5"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = sorted(out.iterdir())
    assert len(parts) > 1
    assert all(part.stat().st_size <= 5 * MIB for part in parts)
    archive = tmp_path / "archive"
    archive.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    run = tmp_path / "gpu-run" / "benchmarks" / "gpu" / "run.py"
    done = subprocess.run(
        [sys.executable, run, "--output", tmp_path / "run.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    data = json.loads((tmp_path / "run.json").read_text())
    states = {step["name"]: step["status"] for step in data["steps"]}
    assert done.returncode == 2, data["steps"]
    assert states.pop("cpp-tests") in ("skipped", "rehearsed")  # where TensorRT is installed
    assert set(states.values()) == {"rehearsed"}, data["steps"]
    assert "no GPU: stopped before the first launch" in done.stdout
    assert str(ROOT) not in json.dumps(data)


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--gpu", "sm75"), "sm75: the plugins are for sm80"), (("--part-size", "0"), "0.1")],
)
def test_prepare_refuses_what_it_cannot_make(tmp_path: Path, options: tuple[str, ...], said: str):
    command = [sys.executable, GPU / "prepare.py", tmp_path / "out", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
