"""qwen2_moe: Qwen1.5-MoE and Qwen2-57B-A14B: experts and a shared expert."""

from __future__ import annotations

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.families.family import Biases, Family, MoEConfig, experts_of_qwen
from qwenport.exporter.keys import Keys


class Qwen2Moe(Family):
    """transformers releases disagree on which layers have a sliding window, so any window is refused."""

    model_type = "qwen2_moe"
    defaults = Family.defaults | {
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
    }
    sparse = True
    null_heads = (False, False)

    def biases(self, keys: Keys) -> Biases:
        return Biases(qkv=keys.take("qkv_bias", bool))

    def experts(self, keys: Keys, layers: int) -> MoEConfig | None:
        count = keys.take("num_experts", int)
        if count:
            keys.positive("num_experts")
        return experts_of_qwen(
            keys, layers, count, keys.positive("shared_expert_intermediate_size")
        )

    def check_window(self, keys: Keys, layers: int, context: int) -> None:
        keys.take("sliding_window", int, null=None)
        if keys.take("use_sliding_window", bool):
            raise ConfigError(
                f"use_sliding_window is true: sliding-window attention is not supported for {self.model_type}"
            )


FAMILY = Qwen2Moe()
