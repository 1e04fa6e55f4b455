"""A call of the operator in torch -> its node in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qwenport.contract import DOMAIN
from qwenport.plugins.moe_experts.schema import NAME
from qwenport.plugins.operator import Emitter


def emit(
    e: Emitter, x: Any, indices: Any, weights: Any, gate_up: Any, down: Any, by_expert: bool
) -> Sequence[ir.Value]:
    """See `Operator.emit`."""
    assert by_expert is False
    return e.ops(NAME, x, indices, weights, gate_up, down, domain=DOMAIN)
