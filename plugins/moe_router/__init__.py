"""`qwenport.MoERouter`, version 1: which experts a token goes to, and with what weight.

    logits  T [..., E]
    weights fp32 and indices int64, by `kind`:

    top_k          [..., k]: the k experts of the largest softmax probabilities p, weights p; with
                   normalize=1 divided by their sum. Source: transformers' Qwen2Moe, Qwen3Moe, Mixtral.
    switch         logits [tokens, E] -> [tokens, 1]: the one expert of the largest p, weight p; 0 for a token that
                   comes after the first c tokens of its expert. Source: Switch Transformers (arXiv 2101.03961).
    expert_choice  logits [tokens, E] -> [E, c]: each expert's c tokens of the largest p; indices are tokens.
                   Source: Expert Choice (arXiv 2202.09368).

    c = ceil(tokens * capacity_factor / E), at least 1 and, for expert_choice, at most `tokens`

Everything is computed in fp32; among equals the lowest index wins. T is fp32, fp16 or bf16. `tokens` is one group:
capacities count over it.

switch and expert_choice look at other tokens than a token's own past, so that a decoder that runs in steps over
a KV cache could not agree with itself: see `is_stepwise`.
"""

from qwenport.plugins.moe_router.function import function_body
from qwenport.plugins.moe_router.reference import capacity, moe_router
from qwenport.plugins.moe_router.schema import (
    EXPERT_CHOICE,
    KINDS,
    NAME,
    SWITCH,
    TOP_K,
    VERSION,
    schema,
)

NOT_STEPWISE = (
    "a token's experts depend on the tokens beside it in the same step, so prefill and decoding over a KV cache "
    "could not agree; it serves graphs that see a whole text at once"
)


def is_stepwise(kind: str) -> bool:
    """Whether a token's experts depend on that token alone, so that a KV-cache decoder may use the kind."""
    return kind == TOP_K


__all__ = [
    "EXPERT_CHOICE",
    "KINDS",
    "NAME",
    "NOT_STEPWISE",
    "SWITCH",
    "TOP_K",
    "VERSION",
    "capacity",
    "function_body",
    "is_stepwise",
    "moe_router",
    "schema",
]
