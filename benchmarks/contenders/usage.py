"""What a contender's process uses: wall and CPU time, and resident memory. Imports only the standard library."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

Times = tuple[float, float]


class Clock:
    """Wall and CPU seconds since it was made; the CPU's are of all threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Times:
        """The seconds so far."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def resident_bytes(key: str = "VmRSS") -> int | None:
    """Resident memory now or, with "VmHWM", at its highest; None if the system does not report it."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def print_results(
    load: Times,
    loaded_bytes: int | None,
    prefills: Sequence[Times],
    decodes: Sequence[Times],
    tokens: Sequence[int],
) -> None:
    """Print one JSON object: what ours_decode.py prints, and CPU times, the load and memory besides."""
    result = {
        "decode": [wall for wall, _ in decodes],
        "decode_cpu": [cpu for _, cpu in decodes],
        "prefill": [wall for wall, _ in prefills],
        "prefill_cpu": [cpu for _, cpu in prefills],
        "tokens": tokens,
        "load_seconds": load[0],
        "load_cpu_seconds": load[1],
        "loaded_bytes": loaded_bytes,
        "peak_bytes": resident_bytes("VmHWM"),
    }
    print(json.dumps(result))
