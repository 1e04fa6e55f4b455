"""config.json -> ModelConfig, strictly.

Every key that changes the mathematics is honoured or refused (`keys`). Each family defines its own differences
(`families`), and so does each kind of rope scaling (`rope`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenport.contract import BY_TORCH_NAME
from qwenport.exporter.dual_chunk import DualChunk, parse_dual_chunk
from qwenport.exporter.errors import ConfigError
from qwenport.exporter.families import FAMILIES, MoEConfig
from qwenport.exporter.json_file import read_json
from qwenport.exporter.keys import MOST, Keys, short
from qwenport.exporter.quantization import Quantization, Storage, parse_quantization
from qwenport.exporter.rope import Rope, parse_rope

__all__ = ["MoEConfig", "ModelConfig", "parse_config", "read_config_json"]

MOST_EXPERTS = 1 << 17  # over all layers; the largest published model has 15,000


@dataclass(frozen=True)
class ModelConfig:
    """The part of a decoder-only model's config that its graph depends on.

    Attributes:
        model_type, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: config.json's.
        num_key_value_heads, head_dim, rms_norm_eps, tie_word_embeddings: config.json's, or the family's default.
        qkv_bias, output_bias, mlp_bias: whether q, k and v; o; gate, up and down have a bias.
        qk_norm: whether each query and key head passes an RMSNorm.
        max_position_embeddings: config.json's.
        max_context: positions that the rope settings, and a sliding window, allow.
        context_note: a sentence on what limits or changes the context; None if there is nothing to say.
        rope: the rotary settings.
        dual_chunk: the settings of dual chunk attention; None if attention is plain at all positions that are used.
        sparse_attention: the key that asks to approximate it, which nothing here does; None if none does.
        moe: the sparse layers; None for a dense model.
        quantization: which weights are quantized, and how; None if none are.
        dtype: the checkpoint's ("bf16", "fp16", "fp32"), or None if config.json names none.
        unread_keys: keys of config.json that nothing reads.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    max_context: int
    context_note: str | None
    rope: Rope
    dual_chunk: DualChunk | None
    moe: MoEConfig | None
    dtype: str | None
    quantization: Quantization | None = None
    unread_keys: tuple[str, ...] = ()
    sparse_attention: str | None = None

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of a decoder layer; None if its MLP is dense."""
        return self.moe if self.moe is not None and layer in self.moe.layers else None

    def is_quantized(self, parameter: str) -> bool:
        """Whether a parameter, in transformers' names, is quantized."""
        return self.storage(parameter) is not None

    def storage(self, parameter: str) -> Storage | None:
        """How a quantized parameter is stored; None if it is stored as it is computed with."""
        return None if self.quantization is None else self.quantization.storage(parameter)

    @property
    def rounds_head(self) -> bool:
        """Whether the head rounds its input to FP8."""
        storage = None if self.tie_word_embeddings else self.storage("lm_head.weight")
        return storage is not None and storage.activations is not None

    @property
    def rounds_experts(self) -> bool:
        """Whether experts round their inputs to FP8."""
        layers = () if self.moe is None else self.moe.layers
        names = (f"model.layers.{layer}.mlp.experts.0.down_proj.weight" for layer in layers)
        return any((s := self.storage(name)) is not None and s.activations for name in names)

    @property
    def scales_by_length(self) -> bool:
        """Whether queries and keys are scaled by the length of the request, an input of the graph."""
        return (
            self.dual_chunk is not None
            and self.dual_chunk.original_max_position_embeddings is not None
        )

    def rope_rows(self, length: int) -> int:
        """Rows of the rope tables for `length` positions; dual chunk attention rotates by others than a text has."""
        return length if self.dual_chunk is None else self.dual_chunk.rope_rows

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of KV cache per token, over all layers."""
        return (
            2
            * self.num_hidden_layers
            * self.num_key_value_heads
            * self.head_dim
            * bytes_per_element
        )


def read_config_json(checkpoint: Path | str) -> dict[str, Any]:
    """Return config.json of a checkpoint directory as a dict.

    Raises:
        ConfigError: there is no such file, or it is not a JSON object.
    """
    path = Path(checkpoint) / "config.json"
    if not os.path.lexists(path):
        raise ConfigError(
            f"{checkpoint}: no config.json; is this a Hugging Face checkpoint directory?"
        )
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def parse_config(
    raw: dict[str, Any], rope_scaling: str | None = None, max_seq_len: int | None = None
) -> ModelConfig:
    """Interpret the contents of a config.json.

    Args:
        raw: the parsed JSON object, as published (either spelling of the rope settings).
        rope_scaling: "KIND:FACTOR" of `--rope-scaling`, for a checkpoint without scaling.
        max_seq_len: positions that will be used; by default all that the rope settings allow. A sliding window at
            least as long has no effect.

    Raises:
        ConfigError: a key is missing, has an unsupported value, or is read by transformers and not honoured here.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    keys = Keys(raw, family.defaults)
    if keys.take("auto_map", object, default=None, null=None) not in (None, {}):
        raise ConfigError(
            "config.json asks for custom code (auto_map); Qwenport runs no remote code"
        )
    activation = keys.take("hidden_act", str)
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported; supported: silu")

    hidden_size = keys.positive("hidden_size")
    heads = keys.positive("num_attention_heads")
    kv_heads = family.kv_heads(keys, heads)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = family.head_dim(keys, hidden_size, heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd; rotary embeddings need it even")
    layers = keys.positive("num_hidden_layers")
    _refuse_layer_types(keys, layers)
    biases = family.biases(keys)
    eps = keys.take("rms_norm_eps", (int, float))
    if not 0 < eps < 1:
        raise ConfigError(f"rms_norm_eps must be between 0 and 1, found {eps}")
    max_position_embeddings = keys.positive("max_position_embeddings")
    rope, max_context, unread = _rope(keys, max_position_embeddings, head_dim, rope_scaling)
    family.check_window(keys, layers, min(max_context, max_seq_len or max_context))
    chunks, sparse = parse_dual_chunk(keys)
    dual_chunk, max_context, note = _limit_by_dual_chunk(chunks, rope, max_context, max_seq_len)
    moe = family.experts(keys, layers)
    if moe is not None and moe.num_experts * len(moe.layers) > MOST_EXPERTS:
        raise ConfigError(
            f"{moe.num_experts} experts in each of {len(moe.layers)} layers are more than any model has"
        )
    return ModelConfig(
        model_type=model_type,
        vocab_size=keys.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.positive("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(eps),
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        qk_norm=family.qk_norm,
        tie_word_embeddings=keys.take("tie_word_embeddings", bool),
        max_position_embeddings=max_position_embeddings,
        max_context=max_context,
        context_note=note,
        rope=rope,
        dual_chunk=dual_chunk,
        moe=moe,
        dtype=_dtype(raw),
        quantization=_quantization(keys),
        unread_keys=(*keys.unread(), *unread),
        sparse_attention=sparse,
    )


def _quantization(keys: Keys) -> Quantization | None:
    if keys.take("compression_config", object, default=None, null=None) is not None:
        raise ConfigError(
            "config.json: compression_config is an old name of quantization_config; rename it"
        )
    return parse_quantization(keys.take("quantization_config", object, default=None, null=None))


def _refuse_layer_types(keys: Keys, layers: int) -> None:
    kinds = keys.take("layer_types", list, default=None, null=None)
    if kinds is not None:
        other = sorted({str(kind) for kind in kinds if kind != "full_attention"})
        if other or len(kinds) != layers:
            raise ConfigError(
                f"layer_types must be {layers} times 'full_attention'; found {len(kinds)} entries"
                + (f", among them {', '.join(other)}" if other else "")
            )


def _rope(
    keys: Keys, positions: int, head_dim: int, override: str | None
) -> tuple[Rope, int, tuple[str, ...]]:
    rope, context, unread = parse_rope(
        rope_theta=keys.take("rope_theta", (int, float)) if "rope_theta" in keys.raw else None,
        rope_scaling=keys.take("rope_scaling", dict, default=None, null=None),
        rope_parameters=keys.take("rope_parameters", dict, default=None, null=None),
        original_max_position_embeddings=keys.positive(
            "original_max_position_embeddings", default=None, null=None
        ),
        max_position_embeddings=positions,
        head_dim=head_dim,
        override=override,
        default_theta=keys.defaults["rope_theta"],
    )
    if context > (most := MOST["max_position_embeddings"]):
        raise ConfigError(f"the rope settings reach {context} positions, more than {most}")
    return rope, context, unread


def _limit_by_dual_chunk(
    chunks: DualChunk | None, rope: Rope, context: int, asked: int | None
) -> tuple[DualChunk | None, int, str | None]:
    """(the settings if any position used needs them, the context, a note on it).

    Up to `plain_context` positions it is plain attention; beyond, only plain rope is defined with it.
    """
    if chunks is None or (plain := chunks.plain_context) >= context:
        return None, context, None
    if rope.kind != "default":
        note = (
            f"dual chunk attention is not supported with rope type {rope.kind}: "
            f"context limited to {plain} of {context} positions"
        )
        return None, plain, note
    if asked is not None and asked <= plain:
        return None, context, None
    note = (
        f"attention beyond {plain} positions is dual chunk attention, which takes more memory and time; "
        f"a package of at most so many (--max-seq-len {plain}) has plain attention"
    )
    return chunks, context, note


def _dtype(raw: dict[str, Any]) -> str | None:
    """config.json's dtype; None for "auto", which means the weights' own."""
    spelled = {
        key: raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) not in (None, "auto")
    }
    names = {str(value).removeprefix("torch.") for value in spelled.values()}
    if len(names) > 1:
        told = " and ".join(f"{key} {short(value)}" for key, value in spelled.items())
        raise ConfigError(f"config.json: {told} disagree; keep one of them")
    if not names:
        return None
    if (name := names.pop()) not in BY_TORCH_NAME:
        key, value = next(iter(spelled.items()))
        raise ConfigError(
            f"config.json: {key} {short(value)} is not supported; supported: {', '.join(BY_TORCH_NAME)}, or no such key"
        )
    return BY_TORCH_NAME[name].name
