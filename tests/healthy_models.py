"""Small checkpoints that are right by construction, drawn over everything that the exporter supports.

Whatever is drawn here must export, and validate must find nothing wrong with it: a model that fails is a false alarm
or a mistake of the exporter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    MINI,
    Raw,
    bias_switches,
    config_fields,
    mini,
    tensor_shapes,
    write_checkpoint,
)
from hypothesis import strategies as st

from qwenport.exporter.rope import KINDS

MODEL_TYPES = tuple(MINI)
ROPE_KINDS = tuple(KINDS)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# (query heads, key/value heads): odd and even, grouped and not, one group and many
HEADS = ((1, 1), (2, 1), (3, 1), (7, 1), (2, 2), (3, 3), (5, 5), (4, 2), (6, 2), (6, 3), (8, 4))
THETAS = (1e4, 5e4, 5e5, 1e6)
CONTEXT = (16, 256)  # positions of a package
# Trained models have a few channels of the residual stream that are about so many times the rest, and much the same for
# every token: Dettmers et al., "LLM.int8()", arXiv:2208.07339; Sun et al., "Massive Activations", arXiv:2402.17762.
OUTLIERS = (0, 1, 2, 3)  # channels
OUTLIER_SIZE = 100.0
ADDED = 0.25  # of what a layer adds otherwise, where there are outliers


@dataclass(frozen=True)
class HealthyModel:
    """A checkpoint and what its export is asked for.

    Attributes:
        config: config.json as published.
        dtype: of the weights: "fp32", "bf16" or "fp16".
        max_seq_len: for `export`; None for all that the rope settings allow, which is then at most 256.
        options: the rest of `export`'s keywords, those that differ from its defaults.
        seed: of the weights.
        shards: files of the weights.
        outliers: channels of the residual stream that are OUTLIER_SIZE times the others.
    """

    config: Raw
    dtype: str
    max_seq_len: int | None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    shards: int = 1
    outliers: int = 0

    @property
    def export_arguments(self) -> dict[str, Any]:
        """Keywords for `export`."""
        return {"max_seq_len": self.max_seq_len, **self.options}


def write(folder: Path, model: HealthyModel) -> Path:
    """Write the checkpoint."""
    tensors = healthy_tensors(model)
    return write_checkpoint(folder, model.config, tensors, shards=model.shards)


def healthy_tensors(model: HealthyModel) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near 1: 1/sqrt(fan in), norms around 1, biases that matter.

    Outlier channels are large in every embedding, and much the same, so that no token's norm depends on the others
    alone. What a norm makes of the others is small then, and of the outliers large: its weight divides them and makes
    up for the others. It no longer evens out what layers add to the others, so that is kept small: else values and
    attention scores would grow from layer to layer, as no trained model's do, and rounding with them.
    """
    generator = torch.Generator().manual_seed(model.seed)
    tensors = {}
    hidden = model.config["hidden_size"]
    size = torch.ones(hidden)
    large = torch.randperm(hidden, generator=generator)[: model.outliers]
    size[large] = OUTLIER_SIZE
    evened = size.square().mean().sqrt() / size
    for name, shape in tensor_shapes(model.config).items():
        values = torch.randn(*shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
            if len(values) == hidden and not name.endswith(("q_norm.weight", "k_norm.weight")):
                values = values * evened
        elif len(shape) == 1:
            values = 0.3 * values
        elif "embed_tokens" in name:
            values[:, large] = 1 + 0.2 * values[:, large]
            values = 0.5 * values * size
        else:
            values = values / shape[-1] ** 0.5
            if model.outliers and ("o_proj" in name or "down_proj" in name):
                values = ADDED * values
        tensors[name] = values.to(TORCH_DTYPES[model.dtype])
    return tensors


@st.composite
def healthy_models(
    draw: st.DrawFn,
    *,
    model_types: tuple[str, ...] = MODEL_TYPES,
    rope_kinds: tuple[str, ...] = ROPE_KINDS,
    least_head_dim: int = 8,
) -> HealthyModel:
    """A small model of any kind that is supported.

    Args:
        draw: hypothesis'.
        model_types: kinds of models to draw from.
        rope_kinds: kinds of rope settings to draw from.
        least_head_dim: 8 to 32; TensorRT-RTX's attention builds for 32.
    """
    model_type = draw(st.sampled_from(model_types))
    layers = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(sorted(TORCH_DTYPES)))
    changes = draw(_sizes(model_type, least_head_dim)) | {
        "num_hidden_layers": layers,
        "max_window_layers": layers if "max_window_layers" in MINI[model_type] else ...,
        "rms_norm_eps": draw(st.sampled_from((1e-5, 1e-6))),
        "tie_word_embeddings": draw(st.booleans()),
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    changes |= {key: draw(_flag()) for key in bias_switches(model_type)}
    if model_type.endswith("_moe"):
        changes |= draw(_experts(model_type, layers))
    head_dim = changes["head_dim"]
    if head_dim is ...:
        head_dim = changes["hidden_size"] // changes["num_attention_heads"]
    rope, context = draw(_rope(head_dim, rope_kinds))
    changes |= rope
    if model_type == "qwen2":
        changes["sliding_window"] = changes["max_position_embeddings"]
    options = draw(_export_options(dtype, scaled="rope_scaling" in rope, sparse=_sparse(changes)))
    if scaling := options.get("rope_scaling"):
        context = int(float(scaling.partition(":")[2]) * context)
    least, most = CONTEXT
    length = st.integers(least, min(most, context))
    return HealthyModel(
        config=mini(model_type, **changes),
        dtype=dtype,
        max_seq_len=draw(st.none() | length if context <= most else length),
        options=options,
        seed=draw(st.integers(0, 2**31 - 1)),
        shards=draw(st.integers(1, 3)),
        outliers=draw(st.sampled_from(OUTLIERS)),
    )


def _flag() -> st.SearchStrategy[Any]:
    """A switch, or `...` for a key that is left out."""
    return st.sampled_from((True, False, ...))


@st.composite
def _sizes(draw: st.DrawFn, model_type: str, least_head_dim: int) -> dict[str, Any]:
    heads, kv_heads = draw(st.sampled_from(HEADS))
    head_dim = 2 * draw(st.integers(least_head_dim // 2, 16))
    if model_type == "llama":  # transformers wants a multiple there, stated head_dim or not
        hidden = heads * draw(st.integers(-(-16 // heads), 64 // heads))
    else:
        hidden = draw(st.integers(16, 64))
    # what need not be stated is left out half the time
    default = getattr(config_fields(model_type).get("head_dim"), "default", None)
    if default is None and 16 <= heads * head_dim <= 64 and draw(st.booleans()):
        hidden, stated = heads * head_dim, ...
    else:
        stated = head_dim
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": stated,
        "intermediate_size": draw(st.integers(16, 96)),
        "vocab_size": draw(st.integers(17, 200)),
    }


@st.composite
def _experts(draw: st.DrawFn, model_type: str, layers: int) -> dict[str, Any]:
    experts = draw(st.integers(2, 9))
    dense = st.lists(st.integers(0, layers - 1), unique=True, max_size=layers - 1)
    changes = {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.integers(8, 40)),
        "norm_topk_prob": draw(st.booleans()),
        "mlp_only_layers": sorted(draw(dense)),
        "decoder_sparse_step": draw(st.integers(1, min(2, layers))),
    }
    if model_type == "qwen2_moe":
        changes["shared_expert_intermediate_size"] = draw(st.integers(8, 48))
    return changes


def _sparse(changes: Raw) -> bool:
    """Whether a layer has experts."""
    if "num_experts" not in changes:
        return False
    layers = set(range(changes["num_hidden_layers"])) - set(changes["mlp_only_layers"])
    return any((layer + 1) % changes["decoder_sparse_step"] == 0 for layer in layers)


@st.composite
def _rope(draw: st.DrawFn, head_dim: int, kinds: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """Changes to a config.json, and how many positions they allow."""
    kind = draw(st.sampled_from(kinds))
    maximum = context = draw(st.integers(*CONTEXT))
    changes = {"max_position_embeddings": maximum, "rope_theta": draw(st.sampled_from(THETAS))}
    if kind == "default":
        return changes, context
    factor = draw(st.floats(1.0, 8.0))
    original = draw(st.integers(16, maximum))
    settings: dict[str, Any] = {"factor": factor}
    if kind == "dynamic":
        context = int(factor * maximum)
    elif kind == "yarn":
        settings |= {
            "original_max_position_embeddings": original,
            "beta_fast": draw(st.just(...) | st.floats(8.0, 64.0)),
            "beta_slow": draw(st.just(...) | st.floats(0.25, 4.0)),
            "attention_factor": draw(st.just(...) | st.floats(0.5, 2.0)),
            "truncate": draw(_flag()),
        }
        context = max(maximum, int(factor * original))
    elif kind == "llama3":
        low = draw(st.floats(0.5, 2.0))
        settings |= {
            "original_max_position_embeddings": original,
            "low_freq_factor": low,
            "high_freq_factor": low + draw(st.floats(0.5, 4.0)),
        }
    elif kind == "longrope":
        stretches = st.lists(st.floats(1.0, 8.0), min_size=head_dim // 2, max_size=head_dim // 2)
        settings |= {
            "original_max_position_embeddings": original,
            "attention_factor": draw(st.just(...) | st.floats(0.5, 2.0)),
            "short_factor": draw(stretches),
            "long_factor": draw(stretches),
        }
    spelling = draw(st.sampled_from(("rope_type", "type")))
    given = {key: value for key, value in settings.items() if value is not ...}
    return {**changes, "rope_scaling": {spelling: kind, **given}}, context


@st.composite
def _export_options(draw: st.DrawFn, dtype: str, *, scaled: bool, sparse: bool) -> dict[str, Any]:
    modes = ("link", "copy", "pack") if sparse else ("link", "copy")
    options = {
        "dtype": draw(st.none() | st.sampled_from(sorted(TORCH_DTYPES))),
        "max_batch": draw(st.sampled_from((4, 3, 2, 1))),
        "weights": draw(st.sampled_from(modes)),
    }
    if not scaled and draw(st.booleans()):
        kind, factor = draw(st.sampled_from(("linear", "dynamic", "yarn"))), draw(st.integers(2, 4))
        options["rope_scaling"] = f"{kind}:{factor}"
    return options
