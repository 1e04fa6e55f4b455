"""Forms of attention over the cache, as passes over the network that TensorRT parsed; docs/attention-forms.md.

The package and its ONNX graph have one form, MASKED: over a slice of the cache, with an explicit mask. TensorRT copies
that slice in every step. The other forms do without the copy, and cannot be said in ONNX: the parser drops lengths and
misreads causal masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenport.contract import CHUNKED, DIRECT, MASKED, SPLIT
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.attention_forms.chunked import Chunked
from qwenport.engines.lowering.attention_forms.direct import Direct
from qwenport.engines.lowering.attention_forms.dual_chunks import (
    DualChunkAttention,
    DualChunks,
    dual_chunk_attentions,
)
from qwenport.engines.lowering.attention_forms.split import Split
from qwenport.engines.lowering.attention_forms.surgery import CachedAttention, Surgery

__all__ = ["Changed", "change_attention"]

_FORMS = {DIRECT: Direct, CHUNKED: Chunked, SPLIT: Split}


@dataclass(frozen=True)
class Changed:
    """What `change_attention` leaves besides the network.

    Attributes:
        constants: must live as long as the network.
        scaled: tensor of the parsed network -> the name that it has now, and what its values are now multiplied by.
    """

    constants: tuple[Any, ...] = ()
    scaled: Mapping[str, tuple[str, float]] = field(default_factory=dict)


def change_attention(network: Any, trt: Any, form: str) -> Changed:
    """Give every attention of a parsed network another form.

    Args:
        network: an INetworkDefinition, as parsed from a package's graph.
        trt: the module it comes from.
        form: one of ATTENTIONS.

    Raises:
        LoweringError: an attention is not as the exporter writes it, or the form cannot express it.
    """
    if form == MASKED:
        return Changed()
    surgery = Surgery(network, trt)
    attentions: Sequence[CachedAttention | DualChunkAttention] = surgery.attentions()
    change: Any
    if attentions:
        change = _FORMS[form](surgery)
    else:
        attentions = dual_chunk_attentions(surgery)
        if form != CHUNKED or not attentions:
            raise LoweringError(f"no attention that could have the form {form}")
        change = DualChunks(surgery, attentions)
    for found in attentions:
        surgery.replace(found.result, change.replace(found))
    return Changed(tuple(surgery.constants), surgery.scaled)
