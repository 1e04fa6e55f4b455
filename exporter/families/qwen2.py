"""qwen2: Qwen2 and Qwen2.5, dense. Only q, k and v have a bias, whatever config.json says."""

from __future__ import annotations

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.families.family import Biases, Family
from qwenport.exporter.keys import Keys


class Qwen2(Family):
    """Layers from max_window_layers on have a sliding window, if use_sliding_window is true."""

    model_type = "qwen2"
    defaults = Family.defaults | {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    null_heads = (True, False)

    def biases(self, keys: Keys) -> Biases:
        attention = keys.take("attention_bias", bool, default=True, null=True)
        mlp = keys.take("mlp_bias", bool, default=False, null=False)
        if not attention or mlp:
            raise ConfigError(
                f"attention_bias {attention} with mlp_bias {mlp} is not a qwen2 model: "
                "its q, k and v projections have a bias and nothing else has"
            )
        return Biases(qkv=True)

    def check_window(self, keys: Keys, layers: int, context: int) -> None:
        window = keys.take("sliding_window", int, null=None)
        first = keys.take("max_window_layers", int)
        used = keys.take("use_sliding_window", bool) and first < layers
        if used and keys.raw.get("layer_types") is None:  # layer_types decide if present
            self.refuse_window(window, context)


FAMILY = Qwen2()
