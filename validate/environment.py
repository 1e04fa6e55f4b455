"""The environment of a report: versions, processor, date. No names of people or machines, and no paths."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata

from qwenport import __version__
from qwenport.machine import cpu_name

DISTRIBUTIONS = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx-ir", "numpy")
ENGINE_DISTRIBUTIONS = ("tensorrt", "tensorrt-rtx")


def describe_environment(with_tensorrt: bool, with_peft: bool) -> dict[str, str]:
    """Name -> value of everything that a result may depend on."""
    names = DISTRIBUTIONS + (ENGINE_DISTRIBUTIONS if with_tensorrt else ())
    names += ("peft",) if with_peft else ()
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "qwenport": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
    }
    for name in names:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return facts
