"""The machine a process runs on, and the memory it takes. No names of people or machines."""

from __future__ import annotations

import os
import platform
from pathlib import Path

STATUS = Path("/proc/self/status")


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int | None:
    """Memory that this process has now, file-backed pages included; None if the system does not report it."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that `resident_bytes` has been since the program started."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    if STATUS.is_file():
        for line in STATUS.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
