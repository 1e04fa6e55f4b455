"""qwen3: Qwen3, dense: Qwen2 with normalised queries and keys, and head_dim 128 unless config.json says otherwise."""

from __future__ import annotations

from qwenport.exporter.families.family import Biases
from qwenport.exporter.families.qwen2 import Qwen2
from qwenport.exporter.keys import Keys


class Qwen3(Qwen2):
    """One switch for the biases of all four projections."""

    model_type = "qwen3"
    defaults = Qwen2.defaults | {"head_dim": 128, "attention_bias": False}
    qk_norm = True

    def biases(self, keys: Keys) -> Biases:
        attention = keys.take("attention_bias", bool)
        return Biases(attention, attention)


FAMILY = Qwen3()
