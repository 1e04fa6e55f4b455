"""table.hpp, the part of onnxruntime's C API that we wrote down, agrees with a real header.

The header is in no package that `make cpp` installs. Where one can be had, QWENPORT_ONNXRUNTIME_INCLUDE is its folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qwenport.contract import OLDEST_ONNXRUNTIME_API

from .builds import ROOT, BuildError, run

SOURCES = ROOT / "engines" / "cpp" / "src"
TABLE = SOURCES / "onnxruntime" / "table.hpp"
PROGRAM = """
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <type_traits>

#include "onnxruntime/table.hpp"

namespace ort = qwenport::detail::ort;

// Two parameters agree if both are pointers, or both numbers of one size.
template <typename A, typename B>
constexpr bool alike = std::is_pointer_v<A> == std::is_pointer_v<B> && sizeof(A) == sizeof(B) &&
                       std::is_floating_point_v<A> == std::is_floating_point_v<B>;

template <typename A, typename B>
struct Agree : std::false_type {};
template <typename R, typename... A, bool N, typename S, typename... B, bool M>
struct Agree<R (*)(A...) noexcept(N), S (*)(B...) noexcept(M)> {
  static constexpr bool results() {
    if constexpr (std::is_void_v<R> || std::is_void_v<S>) {
      return std::is_void_v<R> && std::is_void_v<S>;
    } else {
      return alike<R, S>;
    }
  }
  static constexpr bool parameters() {
    if constexpr (sizeof...(A) == sizeof...(B)) {
      return (alike<A, B> && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = results() && parameters();
};

#define CHECK(name)                                                                       \\
  static_assert(offsetof(OrtApi, name) / sizeof(void*) == ort::name::index, #name);       \\
  static_assert(Agree<decltype(OrtApi::name), ort::name::Function>::value, #name)

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ort::ApiBase, get_api));
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ort::ApiBase, get_version_string));
static_assert(ort::log_fatal == ORT_LOGGING_LEVEL_FATAL);
static_assert(ort::device_allocator == OrtDeviceAllocator);
static_assert(ort::memory_default == OrtMemTypeDefault);
static_assert(static_cast<int>(ort::ElementType::float32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(static_cast<int>(ort::ElementType::int64) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(ORT_API_VERSION >= OLDEST);
CHECKS
"""


def test_indices_and_signatures_are_those_of_a_header(tmp_path: Path) -> None:
    folder = os.environ.get("QWENPORT_ONNXRUNTIME_INCLUDE")
    if not folder:
        pytest.skip("no header of onnxruntime's: QWENPORT_ONNXRUNTIME_INCLUDE is not set")
    text = TABLE.read_text()
    names = re.findall(r"^using (\w+) =\s+Slot<", text, re.MULTILINE)
    assert len(names) == len(re.findall(r"\bSlot<\d", text))

    def check(table: Path) -> None:
        program = PROGRAM.replace("OLDEST", str(OLDEST_ONNXRUNTIME_API))
        program = program.replace("CHECKS", "\n".join(f"CHECK({name});" for name in names))
        (tmp_path / "check.cpp").write_text(program)
        flags = ["-std=c++17", "-fsyntax-only", "-w", f"-I{table}", f"-I{folder}"]
        run("g++", *flags, tmp_path / "check.cpp")

    check(SOURCES)
    # and it would say so
    for right, wrong in (("Slot<133", "Slot<132"), ("const Value* value)", "int value)")):
        changed = tmp_path / "onnxruntime" / "table.hpp"
        changed.parent.mkdir(exist_ok=True)
        changed.write_text(text.replace(right, wrong))
        with pytest.raises(BuildError, match="static assertion failed"):
            check(tmp_path)
