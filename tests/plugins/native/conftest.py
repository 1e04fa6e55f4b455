"""The plugins' drivers: the kernels on the CPU, plain and under sanitizers, and the library that TensorRT loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpp.builds import built
from plugin_driver import Driver


def _on_cpu(setting: str, gpu: str) -> Driver:
    build = built(setting)
    return Driver(build / "drive", build / "libqwenport_plugins_cpu.so", gpu=gpu)


@pytest.fixture(scope="session")
def on_cpu() -> Driver:
    return _on_cpu("plugins", "90")


@pytest.fixture(scope="session", params=["80", "90"])
def on_each(request: pytest.FixtureRequest) -> Driver:
    """The CPU as GPUs whose kernels differ."""
    return _on_cpu("plugins", request.param)


@pytest.fixture(scope="session")
def sanitized() -> Driver:
    """Under AddressSanitizer and UBSan."""
    return _on_cpu("plugins-address", "90")


@pytest.fixture(scope="session")
def release() -> Path:
    """The C++ library's release build."""
    return built("release")
