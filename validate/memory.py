"""Whether both sides fit completely into memory."""

from __future__ import annotations

from pathlib import Path

from qwenport.contract import DTYPES
from qwenport.validate.target import Target

# Both sides hold every weight in fp32, and a runtime needs about half as much again while loading (measured with
# onnxruntime: 2.7 GB for 2.0 GB of fp32 weights).
BYTES_A_WEIGHT = 4 * 2.5
SHARE = 0.8  # of free memory; the rest is left to other processes


def available_bytes() -> int | None:
    """Memory available without swapping, or None if the system does not report it."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def must_stream(target: Target) -> bool:
    """Whether loading both sides completely would need more memory than is available."""
    available = available_bytes()
    if target.package is None or available is None:
        return False
    stored = target.package.manifest["weights"]["bytes"]
    quantization = target.config.quantization
    bits = 8 * DTYPES[target.dtype].itemsize if quantization is None else quantization.least_bits
    weights = 8 * stored / bits  # of a quantized model rather too many: not all of it is
    return weights * BYTES_A_WEIGHT > SHARE * available
