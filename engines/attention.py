"""Which form of attention an engine gets: the one place where this is decided; docs/attention-forms.md has the forms.

What is known of them is read off the final layer lists of TensorRT-RTX's builder; tests/engines/layer_lists keeps them.
"""

from __future__ import annotations

from qwenport.contract import (
    ATTENTIONS,
    AUTO,
    CHUNK,
    CHUNKED,
    DIRECT,
    FP32,
    MASKED,
    SPAN_MULTIPLE,
    TENSORRT_RTX,
    WITH_QUERIES,
)
from qwenport.engines.errors import BuildError
from qwenport.engines.request import Attention
from qwenport.exporter import ModelConfig

READS_CACHES_IN_PLACE = ("sm89", "sm120", "sm121")
"""Architectures whose fused attention with lengths reads K and V as they lie, if the engine is for no other."""


def choose_attention(
    asked: str, *, flavour: str, gpus: tuple[str, ...], dtype: str, config: ModelConfig
) -> str:
    """The form of attention of an engine.

    Args:
        asked: one of ATTENTIONS, or AUTO for the form that moves the fewest bytes.
        flavour: the TensorRT flavour.
        gpus: the architectures that it is built for.
        dtype: the package's.
        config: the model's.

    Raises:
        BuildError: the form asked for cannot be had; says why.
    """
    if asked == AUTO:
        order = (DIRECT, CHUNKED, MASKED) if flavour == TENSORRT_RTX else (MASKED,)
        return next(
            form for form in order if _objection(form, flavour, gpus, dtype, config) is None
        )
    if asked not in ATTENTIONS:
        raise BuildError(f"attention {asked!r} is not one of {', '.join((AUTO, *ATTENTIONS))}")
    objection = _objection(asked, flavour, gpus, dtype, config)
    if objection is not None:
        raise BuildError(f"attention {asked} cannot be had: {objection}")
    return asked


def _objection(
    form: str, flavour: str, gpus: tuple[str, ...], dtype: str, config: ModelConfig
) -> str | None:
    """Why an engine cannot have a form; None if it can."""
    if form == MASKED:
        return None
    if config.dual_chunk is not None:
        if form == CHUNKED:
            return None
        return "dual chunk attention depends on the chunks of query and key, not on lengths"
    if dtype == FP32.name:
        return f"TensorRT has no fused attention in fp32; such an engine is {MASKED}"
    if form in WITH_QUERIES:
        if flavour != TENSORRT_RTX:
            return f"{flavour} has no attention with lengths"
        others = [gpu for gpu in gpus if gpu not in READS_CACHES_IN_PLACE]
        if others:
            return f"for {', '.join(others)} it copies the cache; it is for {', '.join(READS_CACHES_IN_PLACE)} alone"
        if config.num_attention_heads == config.num_key_value_heads:
            return "without groups of query heads it copies the cache"
    return None


def attention_of(form: str, capacity: int) -> Attention:
    """The form with its spans and slots, for a cache of `capacity` usable slots."""
    if form == MASKED:
        return Attention(form, SPAN_MULTIPLE, capacity)
    if form == DIRECT:
        return Attention(form, capacity, capacity)
    return Attention(form, CHUNK, -(-capacity // CHUNK) * CHUNK)
