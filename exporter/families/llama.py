"""llama: Llama 2, 3 and 3.1, and models built like them (SmolLM, TinyLlama)."""

from __future__ import annotations

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.families.family import Biases, Family
from qwenport.exporter.keys import Keys


class Llama(Family):
    """Biases are optional; transformers requires hidden_size to be a multiple of the number of heads."""

    model_type = "llama"
    defaults = Family.defaults | {
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }

    def check_window(self, keys: Keys, layers: int, context: int) -> None:
        """Nothing to check: transformers' LlamaModel and LlamaAttention have no window, whatever config.json says."""

    def biases(self, keys: Keys) -> Biases:
        if keys.take("pretraining_tp", int, null=1) != 1:
            raise ConfigError("pretraining_tp other than 1 is not supported")
        attention = keys.take("attention_bias", bool)
        return Biases(attention, attention, keys.take("mlp_bias", bool))


FAMILY = Llama()
