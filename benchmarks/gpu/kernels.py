"""The plugins' kernels at the sizes of real models' layers, compared with their operators in torch on the same GPU.

    python benchmarks/gpu/kernels.py [--tiny]

Outputs and workspace are filled with two patterns, and the results must be the same bits; memory around them must stay
as it was. fp32 must be within 1e-5 of fp64, and 16-bit no further away than torch's own by more than a rounding.
One line of JSON per case goes to stdout. Exit code 2 without a GPU: the plugins are opened, and nothing is launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contenders.plugin_calls import PluginCall
from no_gpu import NO_GPU
from plugin_checks import FP32_BAR, ROUNDING, distance

from plugins import LAYERS, TINY, Layer, built
from qwenport.plugins.moe_router import moe_router
from qwenport.plugins.rotary_embedding import rotary_embedding

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 8, 9, 64, 512, 4096)
GUARD = 4096  # bytes on both sides of what a kernel may write
PATTERNS = (0xFF, 0x7B)  # the first is NaN in every dtype

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A plugin's call, and its results in fp64 and in torch's own arithmetic; integers must be equal."""

    name: str
    plugin: str
    fields: dict[str, int]
    inputs: Tensors
    exact: Callable[[], Tensors]
    own: Callable[[], Tensors]


class Guarded:
    """Memory for a tensor between two guards."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self._all = torch.empty(size + 2 * GUARD, dtype=torch.uint8, device=device)
        self.tensor = self._all[GUARD : GUARD + size].view(dtype).reshape(shape)

    def fill(self, pattern: int) -> None:
        """Fill everything."""
        self._all.fill_(pattern)

    def intact(self, pattern: int) -> bool:
        """Whether the guards still hold the pattern."""
        guards = torch.cat((self._all[:GUARD], self._all[-GUARD:]))
        return bool((guards == pattern).all())


def experts_in(dtype: torch.dtype, given: Tensors) -> torch.Tensor:
    """The experts' function with products in a dtype, one expert's weights at a time; the sum is fp64."""
    x, indices, weights, gate_up, down = given
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in indices.unique().tolist():
        token, place = torch.where(indices == expert)
        gate, up = functional.linear(x[token].to(dtype), gate_up[expert].to(dtype)).chunk(2, -1)
        part = functional.linear(functional.silu(gate) * up, down[expert].to(dtype)).double()
        total.index_add_(0, token, part * weights[token, place, None])
    return total


def cases(
    layers: Sequence[Layer], tokens: Sequence[int], dtypes: Sequence[torch.dtype], device: str
) -> Iterator[Case]:
    """All cases; a layer's weights are made once per dtype."""
    for layer in layers:
        for dtype in dtypes:
            draw: dict[str, Any] = {"dtype": dtype, "device": device}
            wide = (layer.experts, 2 * layer.inner, layer.hidden)
            gate_up = torch.randn(*wide, **draw).div_(layer.hidden**0.5)
            down = torch.randn(layer.experts, layer.hidden, layer.inner, **draw)
            down.div_(layer.inner**0.5)
            for count in tokens:
                where = f"{layer.name}, {str(dtype).removeprefix('torch.')}, {count} tokens"
                yield _rotary(layer, count, where, draw)
                yield _router(layer, count, where, draw)
                yield _experts(layer, count, where, draw, gate_up, down)


def _rotary(layer: Layer, count: int, where: str, draw: dict[str, Any]) -> Case:
    q, k = (torch.randn(1, heads, count, layer.head_dim, **draw) for heads in layer.heads)
    angles = torch.rand(8192, layer.head_dim // 2, device=draw["device"]) * 6.3
    cos, sin = angles.cos().to(draw["dtype"]), angles.sin().to(draw["dtype"])
    at = torch.randint(0, 8192, (1, count), device=draw["device"])

    def rotated(dtype: torch.dtype) -> Tensors:
        tables = cos.to(dtype), sin.to(dtype)
        return [rotary_embedding(x.to(dtype), *tables, at) for x in (q, k)]

    inputs = (q, k, cos, sin, at)
    return Case(
        f"rope, {where}",
        "RotaryEmbeddingQK",
        {},
        inputs,
        lambda: rotated(torch.float64),
        lambda: rotated(draw["dtype"]),
    )


def _router(layer: Layer, count: int, where: str, draw: dict[str, Any]) -> Case:
    # no two logits of a token differ by so little that rounding could swap them; some are equal
    logits = torch.randint(-200, 200, (count, layer.experts), device=draw["device"]) / 16
    logits = logits.to(draw["dtype"])

    def routed() -> Tensors:
        return moe_router(logits.cpu(), k=layer.k, normalize=layer.normalize)

    fields = {"k": layer.k, "normalize": int(layer.normalize)}
    return Case(f"router, {where}", "MoERouter", fields, (logits,), routed, routed)


def _experts(
    layer: Layer,
    count: int,
    where: str,
    draw: dict[str, Any],
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> Case:
    x = torch.randn(count, layer.hidden, **draw)
    scores = torch.rand(count, layer.experts, device=draw["device"])
    weights, indices = scores.topk(layer.k)
    given = (x, indices, weights, gate_up, down)
    return Case(
        f"experts, {where}",
        "MoEExperts",
        {},
        given,
        lambda: [experts_in(torch.float64, given)],
        lambda: [experts_in(draw["dtype"], given).to(draw["dtype"])],
    )


def outputs_of(case: Case, device: str) -> list[Guarded]:
    """Memory for a plugin's outputs."""
    if case.plugin == "MoERouter":
        shape = (len(case.inputs[0]), case.fields["k"])
        described = [(shape, torch.float32), (shape, torch.int64)]
    else:
        like = case.inputs[:2] if case.plugin == "RotaryEmbeddingQK" else case.inputs[:1]
        described = [(tuple(tensor.shape), tensor.dtype) for tensor in like]
    return [Guarded(shape, dtype, device) for shape, dtype in described]


def check(case: Case, call: PluginCall, outputs: Sequence[Guarded]) -> dict[str, Any]:
    """Run a case; what was found, with "wrong" if anything is."""
    workspace = Guarded(call.workspace.shape, torch.uint8, str(outputs[0].tensor.device))
    call.workspace = workspace.tensor
    found: list[list[torch.Tensor]] = []
    for pattern in PATTERNS:
        for memory in (*outputs, workspace):
            memory.fill(pattern)
        call(case.inputs, [memory.tensor for memory in outputs])
        if outputs[0].tensor.is_cuda:
            torch.cuda.synchronize()
        found.append([memory.tensor.clone() for memory in outputs])
        if not all(memory.intact(pattern) for memory in (*outputs, workspace)):
            return {"case": case.name, "wrong": "wrote outside its outputs or its workspace"}
    for first, second in zip(*found, strict=True):
        if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            return {"case": case.name, "wrong": "depends on what its memory held before"}
    return {"case": case.name, **judged(found[0], case.exact(), case.own())}


def judged(found: Tensors, exact: Tensors, own: Tensors) -> dict[str, Any]:
    """The worst distance from fp64 and its bound; "wrong" if it is beyond, or an integer differs."""
    worst: dict[str, Any] = {"error": 0.0, "bound": FP32_BAR}
    for mine, precise, theirs in zip(found, exact, own, strict=True):
        if not mine.is_floating_point():
            if not torch.equal(mine.cpu(), precise.cpu()):
                return {"wrong": "other indices than torch"}
            continue
        bound = FP32_BAR
        if mine.dtype != torch.float32:
            bound = distance(theirs, precise) + ROUNDING[mine.dtype]
        error = distance(mine.to(precise.device), precise)
        if not error <= bound:
            return {"error": error, "bound": bound, "wrong": "further from fp64 than it may be"}
        if error / bound >= worst["error"] / worst["bound"]:
            worst = {"error": error, "bound": bound}
    return worst


def main() -> int:
    """Check every case; 0 if all are right, 1 if one is not, 2 without a GPU."""
    gpu = torch.cuda.is_available()
    tiny = "--tiny" in sys.argv or not gpu
    device = "cuda" if gpu else "cpu"
    library = built("plugins-cuda") / "libqwenport_plugins.so"
    calls = built("plugins") / "libplugin_calls.so"
    layers, tokens = (TINY, (1, 9)) if tiny else (LAYERS, TOKENS)
    torch.manual_seed(0)
    wrong = 0
    for case in cases(layers, tokens, DTYPES, device):
        outputs = outputs_of(case, device)
        tensors = [memory.tensor for memory in outputs]
        call = PluginCall(calls, library, case.plugin, case.fields, case.inputs, tensors)
        if not gpu:
            print(NO_GPU)
            return 2
        result = check(case, call, outputs)
        wrong += "wrong" in result
        print(json.dumps(result), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
