"""mistral: Mistral 7B and its successors: Llama's shape without biases, and a window that must not cut anything off."""

from __future__ import annotations

from qwenport.exporter.families.family import Family


class Mistral(Family):
    """A missing sliding_window is one of 4096 positions; null is none."""

    model_type = "mistral"
    defaults = Family.defaults | {"num_key_value_heads": 8, "sliding_window": 4096}
    null_heads = (False, True)


FAMILY = Mistral()
