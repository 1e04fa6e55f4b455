"""Where a decoder can be observed: the values of our graph, and what computes the same in transformers' layer.

Values have the names given in exporter/decoder.py (`named`); linears and norms, those of the module's path and the
operator. TensorRT's parser keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenport.exporter import ModelConfig

EMBEDDING = "model.embedding"
FINAL_NORM = "model.norm.RMSNormalization"
LOGITS = "logits"

# sites that are not modules of transformers' layer
ROPE = ("self_attn.rope of queries", "self_attn.rope of keys")
ATTENTION = "self_attn.attention"
ROUTER = "mlp.router"
RESIDUALS = ("first residual sum", "second residual sum")
GATED = "silu(gate) * up"  # after the path of its MLP


def layer_output(index: int) -> str:
    """The hidden states that a decoder layer returns, [B, S, hidden]."""
    return f"model.layers.{index}.residual_2"


def hidden_states(layers: int) -> tuple[str, ...]:
    """The hidden states after the embedding, then after every decoder layer."""
    return (EMBEDDING, *(layer_output(index) for index in range(layers)))


def router_choices(config: ModelConfig, layers: int) -> dict[int, str]:
    """Sparse layer -> the value that holds each token's experts, int64 [B, S, k]."""
    sparse = () if config.moe is None else config.moe.layers
    return {i: f"model.layers.{i}.mlp.router_indices" for i in sparse if i < layers}


@dataclass(frozen=True)
class Site:
    """An operator inside a decoder layer.

    Attributes:
        name: its path in transformers' layer, with "rope" and "attention" for what is not a module there.
        values: its result's name in our graph, after "model.layers.N."; a linear has two, with bias and without.
        inputs: the sites that it reads; "" is the layer's input.
        heads: the result is [B, heads, S, head_dim], not [B, S, ...].
    """

    name: str
    values: tuple[str, ...]
    inputs: tuple[str, ...]
    heads: bool = False


def _linear(path: str, *inputs: str) -> Site:
    return Site(path, (f"{path}.Add", f"{path}.MatMul"), inputs)


def _norm(path: str, *inputs: str) -> Site:
    return Site(path, (f"{path}.RMSNormalization",), inputs)


def _swiglu(path: str, norm: str) -> tuple[Site, ...]:
    return (
        _linear(f"{path}.gate_proj", norm),
        _linear(f"{path}.up_proj", norm),
        Site(f"{path}.{GATED}", (f"{path}.gated",), (f"{path}.gate_proj", f"{path}.up_proj")),
        _linear(f"{path}.down_proj", f"{path}.{GATED}"),
    )


def sites(config: ModelConfig, layer: int) -> tuple[Site, ...]:
    """The operators of a decoder layer, in execution order."""
    attention = "self_attn"
    first, second = "input_layernorm", "post_attention_layernorm"
    query, key, value = (f"{attention}.{part}_proj" for part in "qkv")
    found = [_norm(first, ""), *(_linear(path, first) for path in (query, key, value))]
    if config.qk_norm:
        found += [_norm(f"{attention}.{p}_norm", f"{attention}.{p}_proj") for p in "qk"]
        query, key = f"{attention}.q_norm", f"{attention}.k_norm"
    if config.dual_chunk is None:
        found += [
            Site(ROPE[0], (f"{attention}.rope_q",), (query,), heads=True),
            Site(ROPE[1], (f"{attention}.rope_k",), (key,), heads=True),
        ]
        query, key = ROPE  # dual chunk attention has a rotation for each pair of them
    found += [
        Site(ATTENTION, (f"{attention}.attention",), (query, key, value), heads=True),
        _linear(f"{attention}.o_proj", ATTENTION),
        Site(RESIDUALS[0], ("residual_1",), ("", f"{attention}.o_proj")),
        _norm(second, RESIDUALS[0]),
    ]
    if config.moe_of(layer) is None:
        found += _swiglu("mlp", second)
        last = "mlp.down_proj"
    else:
        found += _sparse(config, second)
        last = found[-1].name
    found.append(Site(RESIDUALS[1], ("residual_2",), (RESIDUALS[0], last)))
    return tuple(found)


def _sparse(config: ModelConfig, norm: str) -> list[Site]:
    assert config.moe is not None
    found = [
        _linear("mlp.gate", norm),
        Site(ROUTER, ("mlp.router_weights",), ("mlp.gate",)),
        Site("mlp.experts", ("mlp.experts_sum",), (norm, ROUTER)),
    ]
    if config.moe.shared_expert_size is not None:
        found += _swiglu("mlp.shared_expert", norm)
        found += [
            _linear("mlp.shared_expert_gate", norm),
            Site(
                "mlp",
                ("mlp.mixed",),
                ("mlp.experts", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"),
            ),
        ]
    return found
