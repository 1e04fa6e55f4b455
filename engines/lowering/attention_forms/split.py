"""Single tokens as in `chunked`, several as in `direct`.

The direct form has one block of threads per head and row for a single token. Where that leaves a GPU idle, the chunks
give it more of them; prefill has enough and reads the caches as they lie.
"""

from __future__ import annotations

from typing import Any

from qwenport.engines.lowering.attention_forms.chunked import Chunked
from qwenport.engines.lowering.attention_forms.direct import Direct, lengths_after
from qwenport.engines.lowering.attention_forms.surgery import CachedAttention, Surgery


class Split:
    """IAttention(q, k, v, mask) -> chunks for one token, and lengths for several."""

    def __init__(self, surgery: Surgery) -> None:
        self._chunked = Chunked(surgery)
        # a step of one token leaves one key to the other branch
        several = surgery.elementwise(lengths_after(surgery), "PROD", self._chunked.prefills)
        self._direct = Direct(surgery, surgery.elementwise(several, "MAX", surgery.sizes(1)))

    def replace(self, found: CachedAttention) -> Any:
        """The attention's result, [batch, heads, seq, head_dim]; its queries become the output `query.{layer}`."""
        prefilled = self._direct.replace(found)
        return self._chunked.join(self._chunked.of_one(found, scaled=True), prefilled)
