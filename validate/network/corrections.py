"""What corrected products of quantized linears subtract: the second product that lowering makes of zero points."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray

from qwenport.contract import MODEL
from qwenport.exporter import CODES, Package
from qwenport.validate.network.parse import ParsedNetwork
from qwenport.validate.quantized_parts import Orders

_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
Array = NDArray[Any]


@dataclass(frozen=True)
class Subtracted:
    """The second product of one linear.

    Attributes:
        values: fp32 [blocks, N].
        order: the input's columns as the codes have them, int64 [K]; None if they are in their own order.
    """

    values: Array
    order: Array | None

    def of(self, x: Array) -> Array:
        """Inputs [S, K] -> what is subtracted [S, N]."""
        x = x if self.order is None else x[:, self.order]
        sums: Array = x.reshape(len(x), len(self.values), -1).sum(axis=-1)
        return sums @ self.values


def subtracted(parsed: ParsedNetwork, package: Package) -> dict[int, dict[str, Subtracted]]:
    """Layer -> path of a linear in it -> what its product by signed codes is corrected by; experts are none of them."""
    found: dict[int, dict[str, Subtracted]] = {}
    orders = Orders(onnx.load(package.path / MODEL, load_external_data=False), package.path)
    for weight in parsed.signed.values():
        correction = weight.correction
        if correction is None or correction.of_experts:
            continue
        values, at = correction.values()[: correction.blocks], 0
        for name, part in zip(weight.weights, correction.weights, strict=True):
            linear = _WEIGHT.fullmatch(name)
            mine, at = values[:, at : at + part.n], at + part.n
            if linear is not None:
                order = orders.of(f"{name}.{CODES}", part.k)
                made = Subtracted(mine, None if order is None else order.numpy())
                found.setdefault(int(linear[1]), {})[linear[2]] = made
    return found
