"""The memory of self-tests that passed: one small file per engine, device, driver and runtime.

The C++ library reads and writes the same files; docs/reference/proof.md defines them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from qwenport.contract import MANIFEST, ONNXRUNTIME, SELF_TEST_FORMAT, SELF_TEST_VERSION, SELF_TESTS
from qwenport.engines.cache import CacheError, cache_folder
from qwenport.engines.engine import Engine
from qwenport.exporter import sha256


def has_passed(engine: Engine) -> bool:
    """Whether this engine passed its self-test on this device, driver and runtime."""
    key = _key(engine)
    try:
        found = json.loads(_file(key).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, CacheError):
        return False
    return (
        isinstance(found, dict)
        and (found.get("format"), found.get("format_version"))
        == (SELF_TEST_FORMAT, SELF_TEST_VERSION)
        and found.get("key") == key
    )


def remember_pass(engine: Engine, cases: int, left_out: int, marks: int) -> bool:
    """Remember that a self-test passed here; False if there is no place for it."""
    key = _key(engine)
    data = {
        "format": SELF_TEST_FORMAT,
        "format_version": SELF_TEST_VERSION,
        "key": key,
        "cases": cases,
        "left_out": left_out,
        "marks": marks,
    }
    with suppress(OSError, CacheError):
        file = _file(key)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            scratch.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            scratch.replace(file)
            return True
        finally:
            scratch.unlink(missing_ok=True)
    return False


def forget_pass(engine: Engine) -> None:
    """Forget that a self-test passed here.

    Raises:
        OSError: it cannot be forgotten.
    """
    with suppress(CacheError):
        _file(_key(engine)).unlink(missing_ok=True)


def count_passes() -> int:
    """How many passes are remembered here.

    Raises:
        CacheError: there is no place for a cache.
    """
    return sum(1 for _ in (cache_folder() / SELF_TESTS).glob("[!.]*.json"))


def _file(key: list[str]) -> Path:
    """Where a pass is remembered.

    Raises:
        CacheError: there is no place for a cache.
    """
    name = hashlib.sha256("".join(f"{line}\n" for line in key).encode()).hexdigest()
    return cache_folder() / SELF_TESTS / f"{name}.json"


def _key(engine: Engine) -> list[str]:
    """The lines that a pass is for."""
    flavour = engine.flavour
    if flavour == ONNXRUNTIME:
        import onnxruntime

        device, driver, version = "cpu", "-", onnxruntime.__version__
    else:
        device, driver, version = _gpu(), _driver(), engine.manifest["runtime_version"]
    return [
        f"{SELF_TEST_FORMAT} {SELF_TEST_VERSION}",
        sha256(engine.path / MANIFEST),
        device,
        driver,
        f"{flavour} {version}",
    ]


def _gpu() -> str:
    """The UUID of the GPU that engines run on, as nvidia-smi -L prints it; "none" without one."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    return f"GPU-{str(torch.cuda.get_device_properties(0).uuid).removeprefix('GPU-').lower()}"


def _driver() -> str:
    """The driver's version by NVML, or else the CUDA version that it supports."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0:
            try:
                if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
                    return text.value.decode()
            finally:
                nvml.nvmlShutdown()
    with suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            return f"cuda {number.value}"
    return "none"
