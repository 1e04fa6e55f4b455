"""One layer's experts in fp32 on the CPU, one contender: times for one token and for many, and its error.

    python experts_layer.py '{"contender": "qwenport", "folder": ..., "sizes": {"experts": 60, "k": 4,
                              "hidden": 2048, "inner": 1408}, "warmup": 4, "prefills": 6}'

`folder` was written by experts_weights.py. Many tokens come first, so that every expert's weights have been touched
before single tokens, all different, are timed. `rel_l2` is the larger of the two outputs' distances to transformers'
eager loop.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from experts_graphs import (
    DOWN,
    GATE_UP,
    Sizes,
    every_expert,
    fused_operator,
    operator,
)
from onnx import ModelProto

Case = Mapping[str, np.ndarray]
Forward = Callable[[Case], np.ndarray]
Load = Callable[[], Forward]
"""Reads the weights. A loader's imports happen when the loader is made."""


def onnxruntime_session(make: Callable[[], ModelProto], folder: Path) -> Load:
    """Load a graph with the options of our own session."""
    import onnxruntime

    def load() -> Forward:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for key, value in {
            "session.model_external_initializers_file_folder_path": str(folder),
            "optimization.constant_folding_max_output_size_in_bytes": str(1 << 62),
        }.items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(
            make().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_inputs()]

        def forward(case: Case) -> np.ndarray:
            (y,) = session.run(None, {name: case[name] for name in names})
            result: np.ndarray = y
            return result

        return forward

    return load


def qwenport(sizes: Sizes, folder: Path, lowered: bool) -> Load:
    """Our operator, lowered as in our session or left to its function body."""
    import onnx_ir as ir

    from qwenport.engines.lowering import for_onnxruntime

    def make() -> ModelProto:
        proto = operator(sizes, folder)
        if not lowered:
            return proto
        model = for_onnxruntime(ir.serde.deserialize_model(proto), on_cpu=True)
        return ir.serde.serialize_model(model)

    return onnxruntime_session(make, folder)


def transformers_experts(sizes: Sizes, folder: Path, implementation: str) -> Load:
    """transformers' module for Qwen2-MoE's experts."""
    import torch
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    def load() -> Forward:
        config = Qwen2MoeConfig(
            hidden_size=sizes.hidden,
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.k,
            moe_intermediate_size=sizes.inner,
            experts_implementation=implementation,
        )
        with torch.device("meta"):
            module = Qwen2MoeExperts(config)
        for name in (GATE_UP, DOWN):
            array = np.fromfile(folder / f"{name}.bin", dtype=np.float32)
            weight = torch.from_numpy(array).view(sizes.stacks()[name])
            setattr(module, f"{name}_proj", torch.nn.Parameter(weight, requires_grad=False))

        @torch.inference_mode()
        def forward(case: Case) -> np.ndarray:
            tensors = (torch.from_numpy(case[name]) for name in ("x", "indices", "weights"))
            result: np.ndarray = module(*tensors).numpy()
            return result

        return forward

    return load


CONTENDERS: dict[str, Callable[[Sizes, Path], Load]] = {
    "qwenport": lambda sizes, folder: qwenport(sizes, folder, lowered=True),
    "qwenport, function body": lambda sizes, folder: qwenport(sizes, folder, lowered=False),
    "every expert for every token": lambda sizes, folder: onnxruntime_session(
        lambda: every_expert(sizes), folder
    ),
    "com.microsoft.MoE": lambda sizes, folder: onnxruntime_session(
        lambda: fused_operator(sizes), folder
    ),
    "transformers eager": lambda sizes, folder: transformers_experts(sizes, folder, "eager"),
    "transformers grouped_mm": lambda sizes, folder: transformers_experts(
        sizes, folder, "grouped_mm"
    ),
}


def timed(forward: Forward, case: Case) -> tuple[float, np.ndarray]:
    """The time in seconds and the result of one call."""
    start = time.perf_counter()
    result = forward(case)
    return time.perf_counter() - start, result


def rel_l2(value: np.ndarray, expected: np.ndarray) -> float:
    """|value - expected| / |expected|."""
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def main() -> None:
    """Load, time and print."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    folder = Path(request["folder"])
    load = CONTENDERS[request["contender"]](Sizes(**request["sizes"]), folder)
    start = time.perf_counter()
    forward = load()
    loaded = time.perf_counter() - start
    prompt, tokens = dict(np.load(folder / "prompt.npz")), dict(np.load(folder / "tokens.npz"))
    prefill = [timed(forward, prompt) for _ in range(request["prefills"])]
    steps = [
        timed(forward, {name: array[index : index + 1] for name, array in tokens.items()})
        for index in range(len(tokens["x"]))
    ]
    outputs = np.concatenate([y for _, y in steps])
    result = {
        "load": loaded,
        "prefill": [seconds for seconds, _ in prefill],
        "decode": [seconds for seconds, _ in steps[request["warmup"] :]],
        "rel_l2": max(rel_l2(prefill[-1][1], prompt["y"]), rel_l2(outputs, tokens["y"])),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
