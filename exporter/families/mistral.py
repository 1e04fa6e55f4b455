"""mistral: Mistral 7B and its successors: Llama without biases, and a window that must cover the whole context."""

from __future__ import annotations

from qwenport.exporter.families.family import Family


class Mistral(Family):
    """A missing sliding_window means 4096 positions; null means no window."""

    model_type = "mistral"
    defaults = Family.defaults | {"num_key_value_heads": 8, "sliding_window": 4096}
    null_heads = (False, True)


FAMILY = Mistral()
