"""Networks that must be refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from .models import (
    Array,
    parse,
    proto,
)

ROW = np.arange(4, dtype=np.float32)


def network_of(**inputs: Array) -> tuple[Any, list[Any]]:
    """A network of identities to which a test adds a layer, and its inputs."""
    nodes = [helper.make_node("Identity", [name], [f"{name}.same"]) for name in inputs]
    parsed = parse(proto(nodes, inputs, [f"{name}.same" for name in inputs]))
    network = parsed.network
    return parsed, [network.get_input(index) for index in range(network.num_inputs)]
