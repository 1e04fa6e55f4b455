"""`qwenport.MoEExperts`, version 1: each token's chosen experts, weighted and summed.

    x       T [..., hidden]; the leading axes are tokens
    indices int64 [..., k], each token's experts; or, with by_expert=1, [E, c], each expert's tokens of
            x [tokens, hidden]
    weights fp32, of the shape of indices
    gate_up T [E, 2*inner, hidden]: an expert's gate projection, then its up projection
    down    T [E, hidden, inner]
    input_scales  T [E, 3], optional: of each expert's gate, up and down
    y       T [..., hidden]

    y[t] = sum over j of weights[t, j] * f(indices[t, j], x[t]), or over all (e, j) with indices[e, j] = t
    f(e, v) = down[e] @ (silu(gate[e] @ v) * (up[e] @ v))

With round_inner=1, what down[e] multiplies is rounded to FP8 first: a = silu(gate[e] @ v) * (up[e] @ v) becomes
e4m3(a / s) * s, with s = max |a| / 448, or T's epsilon if that is 0; e4m3 saturates, each operation is in T.
With input_scales, what gate[e], up[e] and down[e] multiply is rounded in this way, with s = input_scales[e]; then
round_inner is 0.

T is fp32, fp16 or bf16; the weighting and the sum are fp32. Source: the sparse block of transformers' Qwen2Moe,
Qwen3Moe and Mixtral.
"""

from qwenport.plugins.moe_experts.emission import emit
from qwenport.plugins.moe_experts.function import body_by_columns, function_body, tensorrt_body
from qwenport.plugins.moe_experts.lowering import use_plugin
from qwenport.plugins.moe_experts.reference import moe_experts
from qwenport.plugins.moe_experts.schema import (
    BY_COLUMNS,
    INPUT_SCALES,
    INPUTS,
    LARGEST_FP8,
    NAME,
    VERSION,
    schema,
)
from qwenport.plugins.operator import Operator, Plugin

OPERATOR = Operator(
    name=NAME,
    torch_name="moe_experts",
    schema=schema,
    function_body=function_body,
    emit=emit,
    plugin=Plugin(NAME, use_plugin),
)

__all__ = [
    "BY_COLUMNS",
    "INPUTS",
    "INPUT_SCALES",
    "LARGEST_FP8",
    "NAME",
    "OPERATOR",
    "VERSION",
    "body_by_columns",
    "function_body",
    "moe_experts",
    "schema",
    "tensorrt_body",
]
