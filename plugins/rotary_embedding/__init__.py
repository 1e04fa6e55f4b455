"""`qwenport.RotaryEmbedding`, version 1: rotate x by the angles of its positions (half-split layout).

    x            T [batch, heads, seq, head_dim]
    cos_cache    T [positions, head_dim/2]
    sin_cache    T [positions, head_dim/2]
    position_ids int64 [batch, seq], each below `positions`
    y            T [batch, heads, seq, head_dim]

    y = concat(x1*cos - x2*sin, x2*cos + x1*sin) with x1, x2 the halves of x along head_dim.

T is fp32, fp16 or bf16. Source: RoFormer (arXiv 2104.09864) in the layout of transformers' rotate_half.
"""

from qwenport.contract import ROTARY_EMBEDDING_QK
from qwenport.plugins.operator import Operator, Plugin
from qwenport.plugins.rotary_embedding.emission import emit
from qwenport.plugins.rotary_embedding.function import function_body
from qwenport.plugins.rotary_embedding.lowering import use_plugin
from qwenport.plugins.rotary_embedding.reference import rotary_embedding
from qwenport.plugins.rotary_embedding.schema import NAME, VERSION, schema

OPERATOR = Operator(
    name=NAME,
    torch_name="rotary_embedding",
    schema=schema,
    function_body=function_body,
    emit=emit,
    plugin=Plugin(ROTARY_EMBEDDING_QK, use_plugin),
)

__all__ = ["NAME", "OPERATOR", "VERSION", "function_body", "rotary_embedding", "schema"]
