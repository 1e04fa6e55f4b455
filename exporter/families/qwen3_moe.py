"""qwen3_moe: Qwen3-30B-A3B and similar: normalised queries and keys, and experts, none of them shared."""

from __future__ import annotations

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.families.family import Biases, MoEConfig, experts_of_qwen
from qwenport.exporter.families.qwen2_moe import Qwen2Moe
from qwenport.exporter.keys import Keys


class Qwen3Moe(Qwen2Moe):
    """The number of experts has two spellings."""

    model_type = "qwen3_moe"
    defaults = {key: value for key, value in Qwen2Moe.defaults.items() if key != "qkv_bias"} | {
        "attention_bias": False
    }
    qk_norm = True

    def biases(self, keys: Keys) -> Biases:
        attention = keys.take("attention_bias", bool)
        return Biases(attention, attention)

    def experts(self, keys: Keys, layers: int) -> MoEConfig | None:
        spellings = [k for k in ("num_experts", "num_local_experts") if keys.raw.get(k) is not None]
        counts = {keys.take(key, int) for key in spellings}
        if len(counts) != 1:
            raise ConfigError(
                "num_experts and num_local_experts disagree"
                if counts
                else "config.json has no num_experts"
            )
        (count,) = counts
        if count:
            keys.positive(spellings[0])
        return experts_of_qwen(keys, layers, count, None)


FAMILY = Qwen3Moe()
