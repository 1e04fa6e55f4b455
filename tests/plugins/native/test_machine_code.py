"""What nvcc made of the kernels, which needs no GPU to be read: what speed needs and a compiler may not do."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import nvidia
import pytest
from cpp.builds import built

TOOLS = next(
    tool.parent for folder in nvidia.__path__ for tool in Path(folder).glob("cu*/bin/cuobjdump")
)
GPUS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
every_gpu = pytest.mark.parametrize("gpu", GPUS)
Code = Callable[[str], dict[str, list[str]]]


@pytest.fixture(scope="module")
def code() -> Code:
    """GPU -> kernel, by its mangled name -> its instructions."""
    library, known = built("plugins-cuda") / "libqwenport_plugins.so", {}

    def of(gpu: str) -> dict[str, list[str]]:
        if gpu not in known:
            command = [TOOLS / "cuobjdump", "-sass", "-arch", gpu, library]
            path = f"{TOOLS}:{os.environ['PATH']}"
            done = subprocess.run(
                [*map(str, command)],
                capture_output=True,
                text=True,
                env={**os.environ, "PATH": path},
            )
            assert done.returncode == 0, done.stderr
            _, *functions = re.split(r"Function : ", done.stdout)
            known[gpu] = {
                text.partition("\n")[0].strip(): re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", text)
                for text in functions
            }
        return known[gpu]

    return of


def kernels(code: dict[str, list[str]], *parts: str) -> list[list[str]]:
    found = [lines for name, lines in code.items() if all(part in name for part in parts)]
    assert found, parts
    return found


@every_gpu
def test_every_kernel_is_there_and_keeps_its_numbers_in_registers(code: Code, gpu: str) -> None:
    assert len(code(gpu)) == 56
    for name, lines in code(gpu).items():
        spills = [line for line in lines if re.search(r"\b(STL|LDL)\b", line)]
        assert not spills, name


@every_gpu
def test_16_bit_products_run_on_tensor_cores(code: Code, gpu: str) -> None:
    for lines in kernels(code(gpu), "4sm80"):
        assert sum("HMMA.16816.F32" in line for line in lines) == 64  # a step's
    for lines in kernels(code(gpu), "4sm90"):
        assert any("HGMMA" in line for line in lines) == (gpu == "sm_90a")


def test_products_on_hopper_follow_each_other_without_waiting(code: Code) -> None:
    """And neither operand is transposed; registers go from producer warps to consumer warps."""
    for lines in kernels(code("sm_90a"), "4sm90"):
        steps = [line.split()[0] for line in lines if re.search(r"HGMMA|WARPGROUP", line)]
        products = [line for line in lines if "HGMMA" in line]
        assert steps == [
            "WARPGROUP.ARRIVE",
            *[products[0].split()[0]] * 4,
            *["WARPGROUP.DEPBAR.LE"] * 2,
        ]
        for line in products:
            assert re.fullmatch(
                r"HGMMA\.64x192x16\.F32(\.BF16)? R24, gdesc\[UR\d+\], R24(, gsb0)?", line
            )
        registers = {line.split()[-1] for line in lines if "USETMAXREG" in line}
        assert registers == {hex(152), hex(56)}
        assert any("FENCE.VIEW.ASYNC" in line for line in lines)


def asked_for_at_once(lines: list[str]) -> int:
    """Reads of weights and the like, 16 bytes each, before the first of them is used."""
    reads: set[str] = set()
    for line in lines:
        if read := re.search(r"LDG\S*\.128\S*\.CONSTANT R(\d+),", line):
            reads |= {f"R{int(read[1]) + i}" for i in range(4)}
        elif reads & set(re.findall(r"\bR\d+\b", line)):
            break
    return len(reads) // 4


@every_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "6__half", "If"])
@pytest.mark.parametrize(
    ("kernel", "numbers", "least"),
    [("few_swiglu", "Li{}E", 8), ("few_down", "Li{}E", 6), ("rotate_kernel", "Li{}E", 8),
     ("combine", "Li{}E", 4)],
)  # fmt: skip
def test_reads_are_asked_for_together(
    code: Code, gpu: str, dtype: str, kernel: str, numbers: str, least: int
) -> None:
    widest = numbers.format(4 if dtype == "If" else 8)
    (lines,) = kernels(code(gpu), kernel, dtype, widest)
    assert asked_for_at_once(lines) >= least


def test_the_second_kernel_of_few_tokens_begins_early_on_hopper(code: Code) -> None:
    """It asks for weights, waits, and only then reads what the first has written."""
    for lines in kernels(code("sm_90a"), "few_down", "Li8E"):
        (wait,) = [i for i, line in enumerate(lines) if line.startswith("ACQBULK")]
        before = [line for line in lines[:wait] if "LDG" in line]
        assert sum(".128" in line and "CONSTANT" in line for line in before) == 6
        assert not any(".128" in line and "CONSTANT" not in line for line in before)
        assert any(".128" in line and "CONSTANT" not in line for line in lines[wait:])
    for lines in kernels(code("sm_90a"), "few_swiglu"):
        assert any(line.startswith("PREEXIT") for line in lines)
