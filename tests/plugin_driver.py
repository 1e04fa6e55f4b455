"""Plugins driven as TensorRT would drive them: by a program that speaks TensorRT's interfaces, TensorRT not needed.

On "host" the kernels' own sources run on the CPU (native/cuda_on_cpu.hpp); on "device" the library is the one that
TensorRT loads.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "int64",
    torch.int32: "int32",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


@dataclass(frozen=True)
class Driver:
    """The driving program, a library of plugins, and where its kernels run.

    Attributes:
        gpu: that a CPU plays, "80".
        launches: where a CPU writes of each kernel its bytes of shared memory, and those of what it reads once.
    """

    program: Path
    library: Path
    memory: str = "host"
    gpu: str = "90"
    launches: Path | None = None

    def drive(
        self,
        plugin: str,
        inputs: Sequence[torch.Tensor],
        fields: Mapping[str, int] | Sequence[Mapping[str, Any]] = (),
        *,
        dynamic: Sequence[Sequence[int]] = (),
        most: Mapping[int, Sequence[int]] | None = None,
        enqueue: bool = True,
    ) -> Driven:
        """Drive a plugin through its life, and run it.

        Args:
            inputs: on the CPU.
            fields: attribute -> int32, or the driver's own form.
            dynamic: axes of each input that the build does not know.
            most: input -> its largest shape, where it is not the given one.
        """
        if isinstance(fields, Mapping):
            fields = [{"name": n, "type": "int32", "values": [v]} for n, v in fields.items()]
        with TemporaryDirectory() as folder:
            request: dict[str, Any] = {"plugin": plugin, "fields": list(fields), "inputs": []}
            for index, tensor in enumerate(inputs):
                path = Path(folder) / f"in{index}"
                path.write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                given = {
                    "type": TYPES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "file": str(path),
                }
                if index < len(dynamic):
                    given["dynamic"] = list(dynamic[index])
                if most and index in most:
                    given["most"] = list(most[index])
                request["inputs"].append(given)
            paths = [Path(folder) / f"out{index}" for index in range(4)]
            if enqueue:
                request["outputs"] = list(map(str, paths))
            (Path(folder) / "request").write_text(json.dumps(request))
            done = subprocess.run(
                [self.program, self.library, Path(folder) / "request", self.memory],
                capture_output=True,
                text=True,
                env={
                    **os.environ,
                    "QWENPORT_TEST_GPU": self.gpu,
                    "QWENPORT_TEST_LAUNCHES": str(self.launches or os.devnull),
                },
            )
            if done.returncode:
                raise AssertionError(f"the driver failed: {done.stderr[-4000:]}")
            report = json.loads(done.stdout)
            outputs = []
            if report.get("finished"):
                for described, path in zip(report["outputs"], paths, strict=False):
                    dtype, shape = DTYPES[described["type"]], described["shape"]
                    content = bytearray(path.read_bytes())
                    empty = torch.empty(shape, dtype=dtype)
                    outputs.append(
                        torch.frombuffer(content, dtype=dtype).reshape(shape) if content else empty
                    )
        return Driven(report, outputs)


@dataclass(frozen=True)
class Driven:
    """What the driver reported, and the outputs if the plugin ran to its end."""

    report: dict[str, Any]
    outputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def log(self) -> list[str]:
        return self.report["log"] or []
