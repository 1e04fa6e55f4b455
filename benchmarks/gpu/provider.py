"""Packages on onnxruntime's CUDA provider: which operators it runs, and decoding as a share of the memory's bandwidth.

    python benchmarks/gpu/provider.py WORK

tests/gpu/test_on_gpu.py checks parity there. Without a GPU the same runs on the CPU, in a tiny shape, and the exit code
is 2.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from no_gpu import NO_GPU
from shapes import BYTES, config_of, make_checkpoint, matrices

from qwenport import engines, exporter
from qwenport.engines.onnxruntime_session import PROVIDERS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINTS = ("tiny-qwen2.5", "tiny-qwen2-moe")
DTYPES = {"fp32": np.float32, "fp16": np.float16}  # NumPy has no bf16
SIZES = {"batch": 1, "seq": 4, "span": 64, "n": 1, "capacity": 64}
PROMPT, WARM, TIMED = 128, 4, 48


def operators(package: exporter.Package, dtype: str, provider: str, work: Path) -> dict[str, int]:
    """How often each operator of one step ran on each provider, as onnxruntime's profile has it."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 3
    options.profile_file_prefix = str(work / "profile")
    session = onnxruntime.InferenceSession(str(package.model), options, providers=[provider])
    feeds: dict[str, Any] = {}
    for binding in session.get_inputs():
        shape = [SIZES[size] if isinstance(size, str) else size for size in binding.shape]
        kind = np.int64 if "int64" in binding.type else DTYPES[dtype]
        feeds[binding.name] = np.zeros(shape, kind)
    for name in ("position_ids", "key_positions"):
        feeds[name] += np.arange(feeds[name].shape[-1])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = Counter(
        f"{event['args']['op_name']}: {event['args']['provider']}"
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    )
    return dict(sorted(ran.items()))


def read_bandwidth() -> float:
    """Bytes per second of a sum over 4 GiB on the GPU, the best of five."""
    words = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    best = math.inf
    for _ in range(6):  # the first loads the kernel
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        words.sum()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return words.nbytes / best


def decode_seconds(package: exporter.Package, device: str) -> float:
    """The median decode step of one row."""
    session = engines.OnnxRuntimeSession(package, device=device, capacity=PROMPT + 64)
    session.prefill([list(range(100, 100 + PROMPT))])
    times = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        session.decode([7])
        times.append(time.perf_counter() - start)
    return median(times[WARM:])


def main() -> int:
    """Measure; 2 without a GPU."""
    work, gpu = Path(sys.argv[1]), torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        print("skipped: onnxruntime here has no CUDA provider")
        return 2
    for name in CHECKPOINTS:
        for dtype in DTYPES:
            package = exporter.export(EXAMPLES / name, work / f"{name}-{dtype}", dtype=dtype)
            ran = operators(package, dtype, PROVIDERS[device], work)
            print(json.dumps({"package": name, "dtype": dtype, "operators": ran}), flush=True)
    shape = "qwen2.5-0.5b-instruct" if gpu else "tiny"
    checkpoint = make_checkpoint(shape, work / shape, sparse=False)
    package = exporter.export(checkpoint, work / f"{shape}.package")
    seconds = decode_seconds(package, device)
    weights = sum(math.prod(matrix) for matrix in matrices(config_of(shape))) * BYTES
    if not gpu:
        print(NO_GPU)
        return 2
    bandwidth = read_bandwidth()
    share = weights / seconds / bandwidth
    found = {"shape": shape, "decode_seconds": seconds, "read_bytes_per_second": bandwidth}
    print(json.dumps({**found, "share_of_read_bandwidth": share}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
