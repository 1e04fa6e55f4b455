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
capacities are counted over it.

In switch and expert_choice a token's experts depend on tokens outside its own past, so a decoder that runs in steps
over a KV cache could not agree with itself: see `is_stepwise`.
"""

from functools import partial

from qwenport.plugins.moe_router.emission import NOT_STEPWISE, emit, is_stepwise
from qwenport.plugins.moe_router.function import function_body
from qwenport.plugins.moe_router.lowering import use_plugin
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
from qwenport.plugins.operator import Operator, Plugin

OPERATOR = Operator(
    name=NAME,
    torch_name="moe_router",
    schema=schema,
    function_body=partial(function_body, kind=TOP_K),  # the kind that decoders use
    emit=emit,
    plugin=Plugin(NAME, use_plugin),
)

__all__ = [
    "EXPERT_CHOICE",
    "KINDS",
    "NAME",
    "NOT_STEPWISE",
    "OPERATOR",
    "SWITCH",
    "TOP_K",
    "VERSION",
    "capacity",
    "function_body",
    "is_stepwise",
    "moe_router",
    "schema",
]
