"""A call of the operator in torch -> its node in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qwenport.contract import DOMAIN
from qwenport.plugins.operator import Emitter
from qwenport.plugins.rotary_embedding.schema import NAME


def emit(e: Emitter, x: Any, cos: Any, sin: Any, position_ids: Any) -> Sequence[ir.Value]:
    """See `Operator.emit`."""
    return e.ops(NAME, x, cos, sin, position_ids, domain=DOMAIN)
