"""Read bandwidth of the main memory: read-only reductions over a buffer far larger than any cache.

    python bandwidth.py '{"bytes": 2147483648, "repeats": 5}'

Every method uses all cores and reads every byte once. Prints the best repeat of each method in bytes per
second; the best method's number is the machine's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

ROW = 4096


def methods(data: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name -> a function that reads `data` (fp32 [rows, ROW]) once."""
    threads = torch.get_num_threads()
    vector = torch.ones(ROW)
    parts = np.array_split(data.numpy(), threads)
    ones = np.ones(ROW, dtype=np.float32)
    pool = ThreadPoolExecutor(threads)
    return {
        "torch.sum of fp32": data.sum,
        "torch.amax of fp32": data.amax,
        "torch.mv, fp32 matrix by vector": lambda: torch.mv(data, vector),
        "numpy matrix by vector, a part a thread": lambda: list(
            pool.map(lambda part: part @ ones, parts)
        ),
    }


def main() -> None:
    """Measure and print."""
    request = json.loads(sys.argv[1])
    data = torch.ones(request["bytes"] // 4 // ROW, ROW)
    size = data.numel() * 4
    best = {}
    for name, read in methods(data).items():
        read()
        times = []
        for _ in range(request["repeats"]):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
        best[name] = size / min(times)
    print(json.dumps({"bytes_per_second": best, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
