"""The decoder that is traced: three small modules, whose parameter names are the checkpoint's.

    Prologue   token ids -> hidden states, attention mask, rotary tables in the model's dtype
    DecoderLayer   one block over the KV cache; traced once, stamped N times
    Epilogue   hidden states of the requested positions -> fp32 logits

Shapes: B batch, S tokens in this step, C cache capacity, N active span of the cache.

Values passed to `named` have that name in the graph, where validate/sites.py finds them. The rest are named after their
operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional

from qwenport.exporter.config import ModelConfig, MoEConfig
from qwenport.exporter.dual_chunk_attention import dual_chunk_attention
from qwenport.exporter.tracing import named
from qwenport.plugins import moe_experts, moe_router, rotary_embedding

_LIBRARY = torch.library.Library("qwenport", "FRAGMENT")
_LIBRARY.define("tensor_scatter(Tensor past, Tensor update, Tensor write_indices) -> Tensor")


def tensor_scatter(
    past: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor
) -> torch.Tensor:
    """ai.onnx TensorScatter-24 along axis 2: writes `update` into row b from slot write_indices[b] on.

    Args:
        past: [B, heads, C, head_dim].
        update: [B, heads, S, head_dim], dtype of past.
        write_indices: int64 [B].

    Returns:
        A new tensor of past's shape; in an engine it shares past's memory.
    """
    result: torch.Tensor = torch.ops.qwenport.tensor_scatter.default(past, update, write_indices)
    return result


def _scatter(past: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    slots = write_indices[:, None] + torch.arange(update.shape[2], device=update.device)
    index = slots[:, None, :, None].expand(update.shape)
    return past.scatter(2, index, update)


_LIBRARY.impl("tensor_scatter", _scatter, "CompositeExplicitAutograd")


class Attention(nn.Module):
    """Grouped-query attention over a KV cache of already rotated keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:  # per head
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys [B, S, heads, head_dim], not rotated yet, and values [B, kv_heads, S, head_dim]."""
        batch, seq, _ = x.shape
        q = self.q_proj(x).view(batch, seq, self.heads, self.head_dim)
        k = self.k_proj(x).view(batch, seq, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, seq, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(
        self,
        x: torch.Tensor,
        cos_cache: torch.Tensor,
        sin_cache: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        write_indices: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, seq, _ = x.shape
        rotate = rotary_embedding.rotary_embedding
        q, k, v = self.project(x)
        q = named(rotate(q.transpose(1, 2), cos_cache, sin_cache, position_ids), "rope_q")
        k = named(rotate(k.transpose(1, 2), cos_cache, sin_cache, position_ids), "rope_k")

        present_key = tensor_scatter(past_key, k, write_indices)
        present_value = tensor_scatter(past_value, v, write_indices)
        # A step's cost follows the active span of the cache, not its capacity.
        span = mask.shape[-1]
        y = functional.scaled_dot_product_attention(
            q,
            present_key[:, :, :span],
            present_value[:, :, :span],
            attn_mask=mask,
            scale=self.head_dim**-0.5,
            enable_gqa=True,
        )
        y = named(y, "attention").transpose(1, 2).reshape(batch, seq, self.heads * self.head_dim)
        return self.o_proj(y), present_key, present_value


class DualChunkAttention(Attention):
    """Dual chunk attention: keys are rotated by their position in their chunk, queries by three positions."""

    def forward(
        self, x: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Attention.forward`.

        Args:
            x: [B, S, hidden].
            inputs: what `DualChunkPrologue` returns after the hidden states, then write_indices, past key and value.
        """
        batch, seq, _ = x.shape
        rotate = rotary_embedding.rotary_embedding
        cos_cache, sin_cache, same, previous, older, mask, is_same, is_previous, *factor = inputs[
            :-3
        ]
        write_indices, past_key, past_value = inputs[-3:]
        q, k, v = self.project(x)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if factor:
            q, k = q * factor[0], k * factor[0]
        queries = (
            named(rotate(q, cos_cache, sin_cache, same), "rope_q"),
            named(rotate(q, cos_cache, sin_cache, previous), "rope_q_previous"),
            named(rotate(q, cos_cache, sin_cache, older), "rope_q_older"),
        )
        k = named(rotate(k, cos_cache, sin_cache, same), "rope_k")
        present_key = tensor_scatter(past_key, k, write_indices)
        present_value = tensor_scatter(past_value, v, write_indices)
        span = mask.shape[-1]
        y = dual_chunk_attention(
            queries,
            present_key[:, :, :span],
            present_value[:, :, :span],
            mask,
            is_same,
            is_previous,
            self.head_dim**-0.5,
        )
        y = named(y, "attention").transpose(1, 2).reshape(batch, seq, self.heads * self.head_dim)
        return self.o_proj(y), present_key, present_value


class MLP(nn.Module):
    """SwiGLU with `inner` units."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(named(gated, "gated"))


class Experts(nn.Module):
    """All experts of a layer, stacked: gate_up_proj [E, 2*inner, hidden], down_proj [E, hidden, inner]."""

    def __init__(self, hidden: int, moe: MoEConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.expert_size, hidden))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, hidden, moe.expert_size))

    def forward(
        self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return moe_experts.moe_experts(x, indices, weights, self.gate_up_proj, self.down_proj)


class SparseMLP(nn.Module):
    """Each token's top-k experts and, if the model has one, a shared expert behind a sigmoid gate."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.k, self.normalize = moe.experts_per_token, moe.normalize
        self.gate = nn.Linear(config.hidden_size, moe.num_experts, bias=False)
        self.experts = Experts(config.hidden_size, moe)
        self.shared_expert = None
        if moe.shared_expert_size is not None:
            self.shared_expert = MLP(config, moe.shared_expert_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, indices = moe_router.moe_router(self.gate(x), k=self.k, normalize=self.normalize)
        weights, indices = named(weights, "router_weights"), named(indices, "router_indices")
        y = named(self.experts(x, indices, weights), "experts_sum")
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
            y = named(y, "mixed")
        return y


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals. forward returns (hidden, present_key, present_value)."""

    def __init__(self, config: ModelConfig, moe: MoEConfig | None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        kind = Attention if config.dual_chunk is None else DualChunkAttention
        self.self_attn = kind(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, config.intermediate_size) if moe is None else SparseMLP(config, moe)

    def forward(
        self, hidden: torch.Tensor, *attention_inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, present_key, present_value = self.self_attn(
            self.input_layernorm(hidden), *attention_inputs
        )
        hidden = named(hidden + y, "residual_1")
        hidden = named(hidden + self.mlp(self.post_attention_layernorm(hidden)), "residual_2")
        return hidden, present_key, present_value


class Prologue(nn.Module):
    """Embedding, causal mask over the cache (true = attend), rotary tables cast once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        key_positions: torch.Tensor,
        cos_table: torch.Tensor,
        sin_table: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = self.embed_tokens.weight.dtype
        mask = key_positions <= position_ids.unsqueeze(1).unsqueeze(-1)
        hidden = named(self.embed_tokens(input_ids), "embedding")
        return hidden, mask, cos_table.to(dtype), sin_table.to(dtype)


class DualChunkPrologue(Prologue):
    """Embedding, rotary tables, and what dual chunk attention depends on, all from positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.dual_chunk is not None
        self.settings = config.dual_chunk

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        key_positions: torch.Tensor,
        cos_table: torch.Tensor,
        sin_table: torch.Tensor,
        request_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states; cos, sin; positions of a query for keys in its chunk, the one before and older ones [B, S];
        mask, is_same, is_previous: see `dual_chunk_attention`; with a length scale the factor [B, 1, 1, 1]."""
        hidden, mask, cos, sin = super().forward(
            input_ids, position_ids, key_positions, cos_table, sin_table
        )
        chunk, size, farthest = (
            self.settings.chunk,
            self.settings.chunk_size,
            self.settings.farthest,
        )
        same = torch.remainder(position_ids, chunk)
        previous = (same + chunk).clamp(max=size)
        older = same.clamp(min=farthest, max=farthest)
        chunks = torch.div(position_ids, chunk, rounding_mode="floor").unsqueeze(1).unsqueeze(-1)
        of_keys = torch.div(key_positions, chunk, rounding_mode="floor")
        found = (
            hidden,
            cos,
            sin,
            same,
            previous,
            older,
            mask,
            chunks <= of_keys,
            chunks <= of_keys + 1,
        )
        if request_lengths is None:
            return found
        original = self.settings.original_max_position_embeddings
        assert original is not None
        times = request_lengths.to(torch.float32).div(float(original))
        factor = (torch.log(times) * 0.1 + 1.0).clamp(min=1.0).to(hidden.dtype)
        return *found, factor.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1)


class Epilogue(nn.Module):
    """Final norm and vocabulary projection at the positions in logits_indices [B, n]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor, logits_indices: torch.Tensor) -> torch.Tensor:
        rows = logits_indices.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.lm_head(self.norm(hidden.gather(1, rows))).to(torch.float32)


@lru_cache(maxsize=4)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every decoder parameter, with a sparse layer's experts stacked."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            shapes[checkpoint_name(config, prefix + name)] = tuple(parameter.shape)

    with torch.device("meta"):
        kinds = {
            moe: DecoderLayer(config, moe)
            for moe in {config.moe_of(i) for i in range(config.num_hidden_layers)}
        }
        add("model.", Prologue(config))
        for index in range(config.num_hidden_layers):
            add(f"model.layers.{index}.", kinds[config.moe_of(index)])
        add("model.", Epilogue(config))
    return MappingProxyType(shapes)


def checkpoint_name(config: ModelConfig, name: str) -> str:
    """A parameter's name in the checkpoint; a tied head is the embedding."""
    if name == "model.lm_head.weight":
        return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return name
