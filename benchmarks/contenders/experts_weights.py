"""Random fp32 weights for one layer's experts, tokens for them, and the outputs of transformers' eager loop.

    python experts_weights.py '{"folder": ..., "sizes": {"experts": 60, "k": 4, "hidden": 2048, "inner": 1408},
                                "seed": 2025, "tokens": 64, "prompt": 512}'

Writes gate_up.bin, gate_up_interleaved.bin (rows gate, up, gate, up: com.microsoft.MoE's order) and down.bin, and
tokens.npz and prompt.npz: x, the router's logits, its choice (weights, indices) and the expected y. Existing files
from the same request are kept. Always writes function.pb, the operator's current function body, so that a process
that runs it needs no torch, as with a package.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from experts_graphs import DOWN, FUNCTION, GATE_UP, INTERLEAVED, OPSET, Sizes
from experts_layer import transformers_experts

from qwenport.plugins.moe_experts import function_body
from qwenport.plugins.moe_router import moe_router

SPREAD = 0.02  # the models' initializer_range
ROUTER_SPREAD = (
    0.05  # logits about 2 apart: neither the same experts for all tokens nor equal weights
)


def write_weights(sizes: Sizes, folder: Path, generator: torch.Generator) -> None:
    """Write the weights, expert by expert."""
    shapes = sizes.stacks()
    with (
        (folder / f"{GATE_UP}.bin").open("wb") as plain,
        (folder / f"{INTERLEAVED}.bin").open("wb") as interleaved,
        (folder / f"{DOWN}.bin").open("wb") as down,
    ):
        for _ in range(sizes.experts):
            gate_up = torch.randn(shapes[GATE_UP][1:], generator=generator) * SPREAD
            plain.write(gate_up.numpy().data)
            pairs = gate_up.view(2, sizes.inner, sizes.hidden).transpose(0, 1).contiguous()
            interleaved.write(pairs.numpy().data)
            out = torch.randn(shapes[DOWN][1:], generator=generator) * SPREAD
            down.write(out.numpy().data)


def write_inputs(request: dict[str, Any], folder: Path, generator: torch.Generator) -> None:
    """Write tokens, a random router's results for them, and the outputs."""
    sizes = Sizes(**request["sizes"])
    router = torch.randn(sizes.experts, sizes.hidden, generator=generator) * ROUTER_SPREAD
    forward = transformers_experts(sizes, folder, "eager")()
    for name in ("tokens", "prompt"):
        x = torch.randn(request[name], sizes.hidden, generator=generator)
        logits = x @ router.T
        weights, indices = moe_router(logits, k=sizes.k)
        tensors = {"x": x, "logits": logits, "weights": weights, "indices": indices}
        case = {key: tensor.numpy() for key, tensor in tensors.items()}
        np.savez(folder / f"{name}.npz", **case, y=forward(case))


def main() -> None:
    """Write what is missing."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    folder = Path(request.pop("folder"))
    done = folder / "request.json"  # written last
    if not done.is_file() or json.loads(done.read_text(encoding="utf-8")) != request:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(request["seed"])
        write_weights(Sizes(**request["sizes"]), folder, generator)
        write_inputs(request, folder, generator)
        done.write_text(json.dumps(request), encoding="utf-8")
    body = ir.serde.serialize_function(function_body(OPSET))
    (folder / FUNCTION).write_bytes(body.SerializeToString())


if __name__ == "__main__":
    main()
