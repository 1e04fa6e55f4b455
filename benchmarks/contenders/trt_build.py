"""Build any ONNX decoder with TensorRT-RTX as our builder does: strongly typed, one dynamic profile.

    python trt_build.py '{"model": ..., "plan": ..., "gpus": [...], "batch": 8, "tokens": 2048,
                          "capacity": 32768, "typical": 1024}'

Prints one JSON object: seconds, layers and plan_bytes, or the parser's first error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
import tensorrt_rtx as trt


class Collector(trt.ILogger):  # type: ignore[misc]
    """Keeps TensorRT's errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(" ".join(message.split()))
            print(message, file=sys.stderr)


class Writer(trt.IStreamWriter):  # type: ignore[misc]
    """Writes the plan as it is serialized."""

    def __init__(self, path: Path) -> None:
        trt.IStreamWriter.__init__(self)
        self.stream = path.open("wb")

    def write(self, data: Any) -> int:
        return self.stream.write(data)


def axes(name: str, rank: int, request: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(min, opt, max) of an input's axes, by the names common to ONNX exporters."""
    batch = (1, 1, request["batch"])
    tokens = (1, 1, request["tokens"])
    capacity, typical = request["capacity"], request["typical"]
    if name == "attention_mask":
        return [batch, (1, typical, capacity)]
    if name.startswith("past_key_values."):
        return [batch, (0, 0, 0), (0, typical - 1, capacity - 1), (0, 0, 0)]
    if rank == 2:
        return [batch, tokens]
    raise SystemExit(f"no profile for input {name}")


def profile_of(builder: Any, network: Any, request: dict[str, Any]) -> Any:
    """One dynamic profile: every axis that the model fixes stays fixed."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        ranges = axes(value.name, len(value.shape), request)
        shapes = [
            [
                size if size >= 0 else wanted[bound]
                for size, wanted in zip(value.shape, ranges, strict=True)
            ]
            for bound in range(3)
        ]
        profile.set_shape(value.name, *shapes)
    return profile


def main() -> None:
    """Parse and build."""
    request = json.loads(sys.argv[1])
    start = time.perf_counter()
    log = Collector()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["model"]):
        error = parser.get_error(0)
        print(json.dumps({"error": " ".join(f"{error.node_operator()}: {error.desc()}".split())}))
        return
    config = builder.create_builder_config()
    config.add_optimization_profile(profile_of(builder, network, request))
    config.num_compute_capabilities = len(request["gpus"])
    for index, gpu in enumerate(request["gpus"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index)
    writer = Writer(Path(request["plan"]))
    built = builder.build_serialized_network_to_stream(network, config, writer)
    writer.stream.close()
    if not built:
        errors = [e for e in log.errors if "catchCudaError" not in e] or ["it gave no reason"]
        print(json.dumps({"error": errors[0]}))
        return
    result = {
        "seconds": round(time.perf_counter() - start, 3),
        "layers": network.num_layers,
        "plan_bytes": Path(request["plan"]).stat().st_size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
