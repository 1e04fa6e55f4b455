"""The pages for C++: their commands run, their examples compile, the table of errors is the header's."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from .builds import ROOT, run, tensorrt_headers, tool

PAGE = (ROOT / "docs" / "embedding.md").read_text()
TEXT_PAGES = [ROOT / "docs" / name for name in ("tokenizer.md", "chat.md")]


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_build_a_program(tmp_path: Path) -> None:
    for folder in ("engines", "examples", "qwenport"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "sdk").mkdir()
    (tmp_path / "sdk" / "include").symlink_to(tensorrt_headers())
    environment = {
        **os.environ,
        "TENSORRT": str(tmp_path / "sdk"),
        "PREFIX": str(tmp_path / "prefix"),
        "CMAKE_BUILD_TYPE": "None",  # compiles in less time than what is optimised
        "PATH": f"{Path(tool('cmake')).parent}:{os.environ['PATH']}",
    }
    commands = "".join(blocks("sh"))
    assert commands.count("cmake ") == 5 and commands.count("qwenport cpp install ") == 2
    run("bash", "-euc", commands, cwd=tmp_path, env=environment)
    assert (tmp_path / "build" / "minimal" / "minimal").exists()
    assert blocks("cmake")[0] in (ROOT / "examples/cpp/minimal/CMakeLists.txt").read_text()

    program = tmp_path / "page.cpp"  # each example in a function of its own
    functions = [f"void example_{n}() {{\n{code}\n}}" for n, code in enumerate(blocks("cpp"))]
    outside = "qwenport::Session& session = *static_cast<qwenport::Session*>(nullptr);\n"
    outside += "std::vector<qwenport::Token> prompt;\n"
    headers = "#include <limits>\n#include <qwenport/qwenport.hpp>\n"
    program.write_text(headers + outside + "\n".join(functions))
    run("g++", "-std=c++17", "-fsyntax-only", f"-I{tmp_path}/prefix/include", program)
    (in_c,) = blocks("c")
    (tmp_path / "page.c").write_text(in_c)
    run("gcc", "-std=c99", "-fsyntax-only", f"-I{tmp_path}/prefix/include", tmp_path / "page.c")


@pytest.mark.parametrize("page", TEXT_PAGES, ids=lambda path: path.stem)
def test_the_examples_of_the_pages_on_text_compile(
    page: Path, release: Path, tmp_path: Path
) -> None:
    headers = [f"-I{folder}/include" for folder in (ROOT / "engines" / "cpp", release / "runtime")]
    for compiler, standard, language in (("g++", "c++17", "cpp"), ("gcc", "c99", "c")):
        found = blocks(language, page.read_text())
        assert found
        file = tmp_path / f"page.{language}"
        file.write_text("\n".join(found))
        run(compiler, f"-std={standard}", "-Wall", "-Werror", "-fsyntax-only", *headers, file)


def test_the_page_has_the_codes_of_the_headers() -> None:
    header = (ROOT / "engines/cpp/include/qwenport/qwenport.hpp").read_text()
    enum = re.search(r"enum class ErrorCode.*?};", header, re.DOTALL)
    assert enum
    codes = re.findall(r"(\w+) = (\d+),", enum[0])
    assert len(codes) == 11
    assert re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.MULTILINE) == codes
    c_header = (ROOT / "engines/cpp/include/qwenport/qwenport.h").read_text()
    for name, number in codes:
        assert f"QWENPORT_{name.upper()} = {number}" in c_header
