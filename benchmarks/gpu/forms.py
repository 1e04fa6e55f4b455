"""The forms of attention against each other, in engines of the shape of Qwen2.5-0.5B that are built here.

    python benchmarks/gpu/forms.py WORK

Runs where a flavour of TensorRT is installed that has engines for this GPU. Bytes per second are those of roofline.py's
step over the measured time of one, so that they compare with the memory's bandwidth. 2 without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from no_gpu import NO_GPU
from roofline import FORMS, step
from shapes import make_checkpoint

from qwenport.contract import GPUS
from qwenport.engines.targets import FLAVOURS

SHAPE, TINY = "qwen2.5-0.5b-instruct", "tiny"
PROMPTS = (1000, 30000)
NEW = 32


def qwenport(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    command = [sys.executable, "-m", "qwenport", *map(str, arguments), "--json", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed complained of."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def measure(package: Path, engine: Path, target: str, gpu: str, form: str) -> dict[str, Any]:
    """Build with a form, test, and time decoding at each context; "refused" if it cannot be built."""
    found: dict[str, Any] = {"target": target, "form": form}
    attention = ("--attention", form, "--max-batch", "1")
    built = qwenport("build", package, engine, "--target", target, "--gpu", gpu, *attention)
    if built.returncode:
        return {**found, "refused": last_line(built)}
    tested = qwenport("selftest", engine)
    found["self_test"] = tested.returncode == 0
    for tokens in PROMPTS:
        timed = qwenport("bench", engine, "--prompt-tokens", str(tokens), "--new-tokens", str(NEW))
        if timed.returncode:
            found[f"{tokens}"] = last_line(timed)
            continue
        seconds = json.loads(timed.stdout)["decode_seconds"]
        moved = step(SHAPE, tokens + NEW // 2, 1).bytes[form]
        found[f"{tokens}"] = {"decode_seconds": seconds, "bytes_per_second": moved / seconds}
    return found


def main() -> int:
    """Measure every form of every flavour that runs here."""
    work, stopped = Path(sys.argv[1]), not torch.cuda.is_available()
    checkpoint = make_checkpoint(TINY if stopped else SHAPE, work / "checkpoint", sparse=False)
    exported = qwenport("export", checkpoint, work / "package")
    if exported.returncode:
        print(last_line(exported))
        return 1
    if stopped:
        print(NO_GPU)
        return 2
    major, minor = torch.cuda.get_device_capability()
    gpu = f"sm{major}{minor}"
    targets = [
        name
        for name, flavour in FLAVOURS.items()
        if importlib.util.find_spec(flavour.module) and gpu in GPUS[name]
    ]
    if not targets:
        print(f"skipped: no TensorRT is installed that has engines for {gpu}")
        return 2
    wrong = 0
    for target in targets:
        for form in FORMS:
            engine = work / f"{target}-{form}"
            found = measure(work / "package", engine, target, gpu, form)
            wrong += found.get("self_test") is False
            print(json.dumps(found), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
