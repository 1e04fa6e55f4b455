"""`qwenport.RotaryEmbedding`, version 1: rotate x by the angles of its positions (half-split layout).

    x            T [batch, heads, seq, head_dim]
    cos_cache    T [positions, head_dim/2]
    sin_cache    T [positions, head_dim/2]
    position_ids int64 [batch, seq], each below `positions`
    y            T [batch, heads, seq, head_dim]

    y = concat(x1*cos - x2*sin, x2*cos + x1*sin) with x1, x2 the halves of x along head_dim.

T is fp32, fp16 or bf16. Source: RoFormer (arXiv 2104.09864) in the layout of transformers' rotate_half.
"""

from qwenport.plugins.rotary_embedding.function import function_body
from qwenport.plugins.rotary_embedding.reference import rotary_embedding
from qwenport.plugins.rotary_embedding.schema import NAME, VERSION, schema

__all__ = ["NAME", "VERSION", "function_body", "rotary_embedding", "schema"]
