"""A family's description of itself; the base class describes Llama, and a family overrides what differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.keys import Keys, short


@dataclass(frozen=True)
class MoEConfig:
    """The sparse layers of a mixture of experts: softmax top-k routing, SwiGLU experts.

    `layers` are the indices of the sparse layers, `expert_size` is an expert's inner width, `normalize` says whether a
    token's weights are normalized to sum to 1, and `shared_expert_size` is None if there is no shared expert.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    normalize: bool
    shared_expert_size: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Biases:
    """Which linears have a bias: q, k and v; o; gate, up and down."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


class Family:
    """A decoder: pre-norm attention with rotary embeddings and grouped queries, and a SwiGLU or sparse MLP.

    Attributes:
        model_type: as config.json names it.
        defaults: transformers' defaults for missing keys; a key without one is required.
        qk_norm: whether queries and keys are normalised, per head.
        sparse: whether layers may have experts.
        null_heads: whether transformers accepts a null num_key_value_heads (as many as query heads) and a null
            head_dim (hidden_size split evenly).
    """

    model_type: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "head_dim": None,
        "sliding_window": None,
        "rope_theta": 10000.0,
    }
    qk_norm: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    null_heads: ClassVar[tuple[bool, bool]] = (True, True)

    def kv_heads(self, keys: Keys, heads: int) -> int:
        """Number of key/value heads."""
        allowed = {"null": heads} if self.null_heads[0] else {}
        count: int = keys.positive("num_key_value_heads", **allowed)
        return count

    def head_dim(self, keys: Keys, hidden_size: int, heads: int) -> int:
        """Width of a head."""
        missing = "head_dim" not in keys.raw and self.defaults["head_dim"] is None
        allowed = {"null": None} if self.null_heads[1] or missing else {}
        found: int | None = keys.positive("head_dim", **allowed)
        if found is not None:
            return found
        if hidden_size % heads:
            raise ConfigError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
            )
        return hidden_size // heads

    def biases(self, keys: Keys) -> Biases:
        """Which linears have a bias."""
        return Biases()

    def experts(self, keys: Keys, layers: int) -> MoEConfig | None:
        """The sparse layers; None if there are none."""
        return None

    def check_window(self, keys: Keys, layers: int, context: int) -> None:
        """Refuse sliding-window attention that would hide any position.

        Args:
            keys: config.json's keys.
            layers: number of decoder layers.
            context: positions that will be used.

        Raises:
            ConfigError: some layer would not see all positions.
        """
        window = keys.take("sliding_window", int, null=None)
        self.refuse_window(window, context)

    def refuse_window(self, window: int | None, context: int) -> None:
        """Refuse a window that is smaller than the context."""
        if window is not None and window < context:
            raise ConfigError(
                f"sliding-window attention is not supported: sliding_window {window} is smaller than the "
                f"context of {context} positions; --max-seq-len {window} exports as many as it holds"
            )


def experts_of_qwen(
    keys: Keys, layers: int, num_experts: int, shared_expert_size: int | None
) -> MoEConfig | None:
    """Read the keys that qwen2_moe and qwen3_moe have in common.

    Source: transformers' Qwen2MoeDecoderLayer and Qwen3MoeDecoderLayer, and their configurations.
    """
    if (routing := keys.take("router_type", str, default=None, null=None)) is not None:
        _refuse_routing(routing)
    chosen = keys.positive("num_experts_per_tok")
    step = keys.positive("decoder_sparse_step")
    listed = keys.take("mlp_only_layers", list, null=[])
    if not all(type(index) is int and 0 <= index < layers for index in listed):
        raise ConfigError(
            f"mlp_only_layers must be layers from 0 to {layers - 1}, found {short(listed)}"
        )
    dense = set(listed)
    expert_size = keys.positive("moe_intermediate_size")
    normalize = keys.take("norm_topk_prob", bool)
    sparse = tuple(
        index for index in range(layers) if index not in dense and (index + 1) % step == 0
    )
    if not sparse or num_experts == 0:
        return None
    if chosen > num_experts:
        raise ConfigError(
            f"num_experts_per_tok {chosen} is more than num_experts {num_experts}: "
            "a token cannot go to more experts than there are"
        )
    return MoEConfig(num_experts, chosen, expert_size, normalize, shared_expert_size, sparse)


def _refuse_routing(kind: str) -> None:
    """Refuse `router_type`, a key of no published model: a custom checkpoint uses it to say how it was trained."""
    from qwenport.plugins import (
        moe_router,  # imports torch, which reading a config otherwise does not need
    )

    if kind not in moe_router.KINDS:
        raise ConfigError(
            f"router_type {kind!r} is not supported; supported: {', '.join(moe_router.KINDS)}"
        )
    if not moe_router.is_stepwise(kind):
        raise ConfigError(f"router_type {kind!r} is not supported: {moe_router.NOT_STEPWISE}")
