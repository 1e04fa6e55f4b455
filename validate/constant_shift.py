"""Quantized weights that are all moved to one side of the original's: zero points that were read off by one, mostly.

Rounding moves values to both sides. AWQ's scaling and GPTQ's compensation move them by more, and to both sides too.
"""

from __future__ import annotations

from itertools import islice

from qwenport.exporter import Checkpoint, quantized_weights
from qwenport.validate.quantized_identity import ROWS, StoredTensors
from qwenport.validate.quantized_origin import source_of
from qwenport.validate.reference.dequantization import read_quantization

WEIGHTS = 7
"""That are looked at: those of a dense layer. Whatever moves them is in how a format is read, so it moves all."""
MOST_SPREADS = 1.0
"""Of the differences' mean, in units of their standard deviation. A whole step is 3.5, since rounding is uniform in one
step; the random mean of a few rows is below 0.01."""


def constant_shift(quantized: Checkpoint, original: Checkpoint) -> str | None:
    """What moves the weights, in words; None if nothing does.

    Args:
        quantized: the checkpoint, in a format that `read_quantization` knows.
        original: the checkpoint before; if it is quantized too, nothing is compared.

    Raises:
        ValidationError: the original lacks a weight.
    """
    quantization = read_quantization(quantized.path)
    if quantization is None or original.config.quantization is not None:
        return None
    held = StoredTensors.of(quantized)
    for weight, (_, shape) in islice(quantized_weights(quantized.config).items(), WEIGHTS):
        source = source_of(original, weight, shape)
        stop = min(ROWS, shape[0])
        before = StoredTensors(original.path, {source.name: source}).rows(source.name, 0, stop)
        moved = quantization.rows(weight, shape, 0, stop, held).double() - before.double()
        if moved.mean().abs() > MOST_SPREADS * moved.std():
            size = (moved.mean() / before.double().square().mean().sqrt()).item()
            return (
                f"{weight} is moved to one side, by {size:+.2g} of its typical value: are zero points off by one? GPTQ "
                "stores them in two ways (checkpoint_format gptq and gptq_v2)"
            )
    return None
