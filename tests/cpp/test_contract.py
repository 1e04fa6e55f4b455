"""The header that the C++ sources are compiled with says what Python says."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenport import contract

from .builds import built, run

PROGRAM = """
#include <cstdio>
#include "contract.hpp"
int main() {{
  using namespace qwenport::contract;
  {prints}
}}
"""


@pytest.mark.parametrize("build", ["release", "plugins"])
def test_the_header_says_what_python_says(build: str, tmp_path: Path) -> None:
    (header,) = {path.parent for path in built(build).rglob("contract/contract.hpp")}
    prints = "\n  ".join(
        f'std::printf("{name} %{"d" if isinstance(value, int) else "s"}\\n", {name});'
        for name, value in contract.FOR_CPP.items()
    )
    (tmp_path / "program.cpp").write_text(PROGRAM.format(prints=prints))
    program = tmp_path / "program"
    run("c++", "-std=c++17", "-I", header, tmp_path / "program.cpp", "-o", program)
    assert run(program).stdout == "".join(f"{k} {v}\n" for k, v in contract.FOR_CPP.items())
