"""Proof that TensorRT expands no quantized weight: its builder's own list of the engine's layers, read after a build.

TensorRT says nothing when it cannot fuse a DequantizeLinear with what uses it. It then writes the whole weight in half
precision in each step, or into the plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qwenport.engines.errors import BuildError

if TYPE_CHECKING:
    from qwenport.engines.lowering import SignedWeight

HEADING = "Layers:\n"
"""In the builder's message that has a line per layer of each profile."""
LOW_BIT = ("Int4", "Int8", "FP8")
_LAYER = re.compile(
    r"Name: [^,]*?_myl(\d+)_\d+, LayerType: .*?, Constants: \[(.*)\], Outputs: \[(.*)\], TacticName: .*?Metadata: (.*)"
)
_TENSOR = re.compile(r"Dimensions: \[([^\]]*)\], .*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def check_layers(messages: Iterable[str], weights: Sequence[SignedWeight]) -> None:
    """Refuse an engine in which a quantized weight is expanded.

    In every profile, a layer that dequantizes a weight must have its codes as a constant, and none may have an output
    of fixed sizes that is as large as the weight, its digits added: what they make of it depends on the tokens. With
    inputs in FP8 the weight's scales are in another layer than its codes.

    Args:
        messages: TensorRT's, with the one that has the layers.
        weights: of the lowered graph.

    Raises:
        BuildError: there is no list, or weights are expanded; names the first.
    """
    profiles: set[str] = set()
    fused: dict[str, set[str]] = {weight.node: set() for weight in weights}
    expanded: set[str] = set()
    elements = {weight.node: weight.elements for weight in weights}
    digits = {w.node: 1 if w.correction is None else w.correction.digits for w in weights}
    for message in messages:
        if HEADING not in message:
            continue
        for profile, constants, outputs, nodes in map(re.Match.groups, _layers(message)):
            profiles.add(profile)
            held = sum(size for size, dtype in _tensors(constants) if dtype in LOW_BIT)
            made = max((size for size, _ in _tensors(outputs)), default=0)
            for node in elements.keys() & set(_NODE.findall(nodes)):
                if made * digits[node] >= elements[node]:
                    expanded.add(node)
                elif held >= elements[node]:
                    fused[node].add(profile)
    if not profiles:
        raise BuildError(
            "TensorRT did not list the engine's layers, so nothing is known of its quantized weights"
        )
    wrong = [w for w in weights if w.node in expanded or fused[w.node] != profiles]
    if wrong:
        names = [name for weight in wrong for name in weight.weights]
        raise BuildError(
            f"TensorRT would expand {len(names)} quantized weights in every step, {names[0]} first: it has no kernel "
            "that multiplies by them as they are; --target onnxruntime runs the package"
        )


def _layers(message: str) -> list[re.Match[str]]:
    return [found for line in message.splitlines() if (found := _LAYER.search(line))]


def _tensors(text: str) -> list[tuple[int, str]]:
    """Elements and type of each tensor; 0 elements if a size is dynamic."""
    found = []
    for sizes, dtype in _TENSOR.findall(text):
        dims = [int(size) for size in sizes.split(",") if size]
        found.append((0 if min(dims, default=0) < 0 else math.prod(dims), dtype))
    return found
