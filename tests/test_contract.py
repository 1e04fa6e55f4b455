"""What every room agrees on stands in one module, means what torch and ONNX mean by it, and is what C++ is given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from safetensors.torch import save

from qwenport import contract
from qwenport.commands import doctor
from qwenport.engines import FLAVOURS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for room in ("qwenport", "exporter", "plugins", "engines", "validate")
    for path in (ROOT / room).rglob("*.py")
    if path != ROOT / "qwenport" / "contract.py"
]


@pytest.mark.parametrize("dtype", [*contract.DTYPES.values(), contract.FP64], ids=lambda d: d.name)
def test_a_dtype_s_names_are_torch_s_onnx_s_and_safetensors_own(dtype: contract.Dtype) -> None:
    assert isinstance(dtype.torch, torch.dtype) and str(dtype.torch) == f"torch.{dtype.torch_name}"
    assert dtype.ir is from_torch_dtype(dtype.torch) is ir.DataType[dtype.onnx]
    assert dtype.number == dtype.ir.value
    assert dtype.itemsize == dtype.torch.itemsize == dtype.ir.itemsize
    assert f'"dtype":"{dtype.safetensors}"'.encode() in save(
        {"a": torch.zeros(1, dtype=dtype.torch)}
    )
    assert dtype.binding == dtype.ir.name.lower()


def test_past_and_present_are_each_other_s() -> None:
    for cache in contract.caches(7):
        before, after = contract.past(cache), contract.present(cache)
        assert contract.present_of(before) == after and contract.past_of(after) == before
        assert contract.is_past(before) and not contract.is_present(before)
        assert contract.is_present(after) and not contract.is_past(after)
        assert not contract.is_query(before) and not contract.is_query(after)
    assert contract.is_query(contract.query(7)) and not contract.is_past(contract.query(7))


@pytest.mark.parametrize(
    "spelled",
    [
        r"past_key_values\.",
        r"[\"']present\.",
        r"[\"']query\.",
        r"[\"']bf16[\"']\s*:",
        r"bfloat16[\"']?\s*:",
        r"Progress\s*=\s*Callable",
        r"Callable\[\[str, int, int\], None\]",
        r"[\"']sm90[\"'],\s*[\"']",
        r"qwenport-(engine|package)[\"']",
        r"[\"'](engine\.plan|qwenport\.json|rope\.cos|weights\.safetensors)[\"']",
    ],
)
def test_nobody_else_spells_it(spelled: str) -> None:
    """Tables of dtypes, names of bindings, formats: one place each."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(spelled, line)
    ]
    assert found == []


def test_every_target_is_a_flavour_with_gpus_that_doctor_judges() -> None:
    on_gpus = set(contract.TARGETS) - {contract.ONNXRUNTIME}
    assert on_gpus == FLAVOURS.keys() == contract.GPUS.keys() - {"plugins"}
    assert set(contract.TARGETS) < {target.name for target in doctor.targets(doctor.collect())}


def test_it_imports_nothing_heavy() -> None:
    script = "import sys, qwenport.contract; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "onnx", "onnx_ir"} & set(run.stdout.split())


def test_any_python_prints_the_header() -> None:
    """The build of the C++ sources asks a Python that need not have the package."""
    file = ROOT / "qwenport" / "contract.py"
    run = subprocess.run(
        [sys.executable, "-I", file], capture_output=True, text=True, check=True, cwd="/"
    )
    assert run.stdout == contract.header()
