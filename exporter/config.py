"""config.json -> ModelConfig, strictly.

Every field that changes the mathematics is honoured or refused, and a field nobody has classified is
refused too: a wrong graph must not be one unread key away. Fields that cannot change what the model
computes (training, generation and bookkeeping settings) are listed by name in `NEUTRAL_KEYS`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.rope import RopeConfig, parse_rope

MODEL_TYPES = ("qwen2", "qwen2_moe", "qwen3_moe", "llama")
MOE_TYPES = ("qwen2_moe", "qwen3_moe")

# Accepted without effect. Anything that is in neither this set nor read below is an error.
NEUTRAL_KEYS = frozenset(
    # identity and files
    "architectures model_type transformers_version _name_or_path name_or_path torch_dtype dtype "
    "tokenizer_class use_cache "
    # training
    "attention_dropout hidden_dropout embd_pdrop resid_pdrop initializer_range "
    "output_router_logits router_aux_loss_coef "
    # outputs of the Python model, not of the function it computes
    "return_dict output_attentions output_hidden_states return_dict_in_generate torchscript "
    "use_return_dict chunk_size_feed_forward "
    # token ids and generation settings (generation_config.json decides those)
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens "
    # heads for other tasks
    "finetuning_task id2label label2id task_specific_params problem_type num_labels "
    # has a meaning only together with a key that is checked
    "max_window_layers".split()
)


@dataclass(frozen=True)
class MoEConfig:
    """The sparse layers of a mixture of experts: softmax top-k routing, SwiGLU experts.

    `layers` are the indices of the sparse layers, `expert_size` is the inner width of an expert, `normalize` says
    whether a token's weights are made to sum to 1, and `shared_expert_size` is None where there is no shared expert.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    normalize: bool
    shared_expert_size: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder-only model computes, as far as its graph depends on it.

    `dtype` is the checkpoint's ("bf16", "fp16", "fp32") or None where config.json does not say;
    `max_context` is the number of positions that the rope settings allow.
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
    rope: RopeConfig
    moe: MoEConfig | None
    dtype: str | None

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of a decoder layer; None where its MLP is dense."""
        return self.moe if self.moe is not None and layer in self.moe.layers else None

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of KV cache that one token occupies over all layers."""
        return (
            2
            * self.num_hidden_layers
            * self.num_key_value_heads
            * self.head_dim
            * bytes_per_element
        )


def read_config_json(checkpoint: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint directory as a dict.

    Raises:
        ConfigError: no such file, not JSON, or not an object.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{checkpoint}: no config.json; is this a Hugging Face checkpoint directory?"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def parse_config(raw: dict[str, Any], rope_scaling: str | None = None) -> ModelConfig:
    """Interpret the contents of a config.json.

    Args:
        raw: the parsed JSON object, as published (either spelling of the rope settings).
        rope_scaling: "KIND:FACTOR", what `--rope-scaling` asks for on a checkpoint without scaling.

    Raises:
        ConfigError: a key is missing, has a value that is not supported, or is not known.
    """
    fields = _Fields(raw)
    model_type = fields.take("model_type", str)
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
        )
    if "auto_map" in raw:
        raise ConfigError(
            "config.json asks for code of its own (auto_map); Qwenport runs no remote code"
        )
    activation = fields.take("hidden_act", str)
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported; supported: silu")

    hidden_size = fields.positive("hidden_size")
    heads = fields.positive("num_attention_heads")
    # Llama's default is one key/value head a query head; Qwen2's is a number that fits no real model.
    kv_heads = (
        fields.positive("num_key_value_heads", default=heads)
        if model_type == "llama"
        else fields.positive("num_key_value_heads")
    )
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = fields.positive("head_dim", default=None)
    if head_dim is None:
        if hidden_size % heads:
            raise ConfigError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = hidden_size // heads
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd; rotary embeddings need it even")

    layers = fields.positive("num_hidden_layers")
    max_position_embeddings = fields.positive("max_position_embeddings")
    _refuse_sliding_window(fields, model_type, layers)
    qkv_bias, output_bias, mlp_bias = _biases(fields, model_type)
    eps = fields.take("rms_norm_eps", (int, float))
    if not 0 < eps < 1:
        raise ConfigError(f"rms_norm_eps must be between 0 and 1, found {eps}")
    if fields.take("pretraining_tp", int, default=1) != 1:
        raise ConfigError("pretraining_tp other than 1 is not supported")
    if fields.take("partial_rotary_factor", (int, float), default=1.0) != 1:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")

    rope, max_context = parse_rope(
        rope_theta=fields.take("rope_theta", (int, float), default=None),
        rope_scaling=fields.take("rope_scaling", dict, default=None),
        rope_parameters=fields.take("rope_parameters", dict, default=None),
        original_max_position_embeddings=fields.positive(
            "original_max_position_embeddings", default=None
        ),
        max_position_embeddings=max_position_embeddings,
        head_dim=head_dim,
        override=rope_scaling,
    )
    max_context, note = _limit_by_dual_chunk(fields, max_context)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(eps),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=model_type == "qwen3_moe",
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, default=False),
        max_position_embeddings=max_position_embeddings,
        max_context=max_context,
        context_note=note,
        rope=rope,
        moe=_moe(fields, model_type, layers) if model_type in MOE_TYPES else None,
        dtype=_dtype(raw),
    )
    fields.refuse_unknown()
    return config


def _refuse_sliding_window(fields: _Fields, model_type: str, layers: int) -> None:
    window = fields.take("sliding_window", int, default=None)
    use = fields.take("use_sliding_window", bool, default=False)
    first = fields.raw.get("max_window_layers", layers if window is None else 0)
    kinds = fields.take("layer_types", list, default=None)
    if kinds is not None:
        other = sorted({str(kind) for kind in kinds if kind != "full_attention"})
        if other or len(kinds) != layers:
            raise ConfigError(
                f"layer_types must be {layers} times 'full_attention'; found {len(kinds)} entries"
                + (f", among them {', '.join(other)}" if other else "")
            )
    if use and model_type in MOE_TYPES:
        # Releases of transformers disagree on which layers of these models slide, so all are refused.
        raise ConfigError(
            "use_sliding_window is true: sliding-window attention is not supported for this model_type"
        )
    if use and window is not None and (not isinstance(first, int) or first < layers):
        raise ConfigError(
            f"sliding-window attention is in use (sliding_window {window} from layer {first}); "
            "it is not supported"
        )


def _biases(fields: _Fields, model_type: str) -> tuple[bool, bool, bool]:
    """(q/k/v, o, mlp) biases: Qwen2 fixes them, the other models' switches set them."""
    if model_type == "qwen2_moe":
        return fields.take("qkv_bias", bool, default=True), False, False
    if model_type == "qwen3_moe":
        attention = fields.take("attention_bias", bool, default=False)
        return attention, attention, False
    attention = fields.take("attention_bias", bool, default=model_type == "qwen2")
    mlp = fields.take("mlp_bias", bool, default=False)
    if model_type == "qwen2":
        if not attention or mlp:
            raise ConfigError(
                f"attention_bias {attention} with mlp_bias {mlp} is not a qwen2 model: "
                "its q, k and v projections have a bias and nothing else has"
            )
        return True, False, False
    return attention, attention, mlp


def _moe(fields: _Fields, model_type: str, layers: int) -> MoEConfig | None:
    """Source: transformers' Qwen2MoeDecoderLayer and Qwen3MoeDecoderLayer, and their configurations."""
    names = ("num_experts", "num_local_experts") if model_type == "qwen3_moe" else ("num_experts",)
    spellings = [key for key in names if fields.raw.get(key) is not None]
    counts = {fields.take(key, int) for key in spellings}
    if len(counts) != 1:
        raise ConfigError(
            "num_experts and num_local_experts disagree"
            if counts
            else "config.json has no num_experts"
        )
    (experts,) = counts
    if experts < 0:
        raise ConfigError(f"config.json: num_experts must not be negative, found {experts}")
    if (routing := fields.take("router_type", str, default=None)) is not None:
        _refuse_routing(routing)
    chosen = fields.positive("num_experts_per_tok")
    step = fields.positive("decoder_sparse_step", default=1)
    dense = fields.take("mlp_only_layers", list, default=[])
    if not all(type(index) is int and 0 <= index < layers for index in dense):
        raise ConfigError(f"mlp_only_layers must be layers from 0 to {layers - 1}, found {dense}")
    expert_size = fields.positive("moe_intermediate_size")
    shared = (
        fields.positive("shared_expert_intermediate_size") if model_type == "qwen2_moe" else None
    )
    normalize = fields.take("norm_topk_prob", bool, default=False)
    sparse = tuple(
        index for index in range(layers) if index not in dense and (index + 1) % step == 0
    )
    if not sparse or experts == 0:
        return None
    if chosen > experts:
        raise ConfigError(
            f"num_experts_per_tok {chosen} is more than num_experts {experts}: "
            "a token cannot go to more experts than there are"
        )
    return MoEConfig(experts, chosen, expert_size, normalize, shared, sparse)


def _refuse_routing(kind: str) -> None:
    """`router_type` is nobody's published key: it is how a checkpoint of one's own says what it was trained with."""
    from qwenport.plugins import (
        moe_router,  # brings torch, which reading a config otherwise does without
    )

    if kind not in moe_router.KINDS:
        raise ConfigError(
            f"router_type {kind!r} is not supported; supported: {', '.join(moe_router.KINDS)}"
        )
    if not moe_router.is_stepwise(kind):
        raise ConfigError(f"router_type {kind!r} is not possible here: {moe_router.NOT_STEPWISE}")


def _limit_by_dual_chunk(fields: _Fields, max_context: int) -> tuple[int, str | None]:
    """Qwen2.5-1M's dual chunk attention equals plain attention up to one chunk; stop there."""
    chunks = fields.take("dual_chunk_attention_config", dict, default=None)
    if chunks is None:
        return max_context, None
    try:
        limit = int(chunks["chunk_size"]) - int(chunks["local_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "dual_chunk_attention_config needs integers chunk_size and local_size"
        ) from error
    if limit >= max_context:
        return max_context, None
    note = (
        f"dual chunk attention is supported within its first chunk only: "
        f"context limited to {limit} of {max_context} positions"
    )
    return limit, note


def _dtype(raw: dict[str, Any]) -> str | None:
    spelled = {str(raw[key]) for key in ("torch_dtype", "dtype") if raw.get(key) is not None}
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    if len(spelled) > 1:
        raise ConfigError(f"torch_dtype and dtype disagree: {', '.join(sorted(spelled))}")
    if not spelled:
        return None
    (name,) = spelled
    if name not in names:
        raise ConfigError(f"torch_dtype {name!r} is not supported; supported: {', '.join(names)}")
    return names[name]


_MISSING: Any = object()


class _Fields:
    """Reads keys with their types and remembers which were read."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.used: set[str] = set()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        self.used.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"config.json has no {key}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"config.json: {key} must be {expected}, found {value!r}")
        return value

    def positive(self, key: str, default: Any = _MISSING) -> Any:
        value = self.take(key, int, default)
        if value is not None and value <= 0:
            raise ConfigError(f"config.json: {key} must be positive, found {value}")
        return value

    def refuse_unknown(self) -> None:
        unknown = [
            key
            for key, value in self.raw.items()
            # None and False switch a feature off; a leading underscore marks bookkeeping.
            if key not in self.used | NEUTRAL_KEYS and not key.startswith("_")
            if value is not None and value is not False
        ]
        if unknown:
            raise ConfigError(
                f"config.json has keys Qwenport does not know: {', '.join(sorted(unknown))}; "
                "they may change what the model computes, so it is not exported"
            )
