"""What the builders of all targets are given, and what they give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenport.contract import (
    INPUT_IDS,
    KEY_POSITIONS,
    LOGITS_INDICES,
    MASKED,
    POSITION_IDS,
    REQUEST_LENGTHS,
    WRITE_INDICES,
    caches,
    past,
)
from qwenport.exporter import Package

TYPICAL_SPAN = 1024
"""The span that a builder tunes decoding for, if the largest is not far longer."""
MOST_STRETCH = 8
"""The largest span over the one tuned for, at most. From 16 times the query heads per key head on, TensorRT-RTX does
not fuse the reading of K and V with their products, and writes both in fp32 in every step."""

Profile = dict[str, dict[str, list[int]]]
"""Input name -> its min, opt and max shape."""


@dataclass(frozen=True)
class Steps:
    """The steps that a profile is for, as far as the cache is as long.

    Attributes:
        tuned: tokens of a step of one row that it is tuned for.
        most: tokens per row in one step, at most.
        logits: positions per row whose logits one step returns, at most.
        least: tokens per row in one step, at least.
        longest: slots of the longest span; None for all.
    """

    tuned: int
    most: int
    logits: int
    least: int = 1
    longest: int | None = None


@dataclass(frozen=True)
class Attention:
    """How an engine attends to its cache.

    Attributes:
        form: one of ATTENTIONS.
        span_multiple: the first span, of which all others are multiples.
        slots: of a cache in the bindings, at least max_seq_len.
    """

    form: str
    span_multiple: int
    slots: int


@dataclass(frozen=True)
class Request:
    """A request to `build`.

    Attributes:
        package: the package to build from.
        target: one of TARGETS.
        capacity: cache slots per row.
        batch: rows.
        gpus: architectures, as on the command line.
        plugins: library of the CUDA plugins to use.
        attention: one of ATTENTIONS, or AUTO.
    """

    package: Package
    target: str
    capacity: int
    batch: int
    gpus: str | None
    plugins: Path | None
    attention: str

    def profile(self, steps: Steps, *, attention: Attention, fixed_cache: bool) -> Profile:
        """One dynamic profile: input name -> its min, opt and max shape.

        Args:
            steps: what it is for.
            attention: the engine's, with the slots of its caches.
            fixed_cache: whether a cache always has all slots, rather than at most.
        """
        config, slots, batch = self.package.config, attention.slots, self.batch
        tokens, tuned = min(steps.most, self.capacity), min(steps.tuned, self.capacity)
        longest = min(steps.longest or slots, slots)
        shortest = 1 if attention.form == MASKED else attention.span_multiple
        typical = max(TYPICAL_SPAN, -(-longest // MOST_STRETCH))
        span = min(-(-typical // shortest) * shortest, longest)

        def shapes(*least: int, opt: list[int], most: list[int]) -> dict[str, list[int]]:
            return {"min": list(least), "opt": opt, "max": most}

        profile = {
            INPUT_IDS: shapes(1, steps.least, opt=[1, tuned], most=[batch, tokens]),
            POSITION_IDS: shapes(1, steps.least, opt=[1, tuned], most=[batch, tokens]),
            WRITE_INDICES: shapes(1, opt=[1], most=[batch]),
            KEY_POSITIONS: shapes(shortest, opt=[span], most=[longest]),
            LOGITS_INDICES: shapes(1, 1, opt=[1, 1], most=[batch, min(steps.logits, tokens)]),
        }
        if config.scales_by_length:
            profile[REQUEST_LENGTHS] = shapes(1, opt=[1], most=[batch])
        heads, head_dim = config.num_key_value_heads, config.head_dim
        cache = [heads, slots, head_dim]
        smallest = cache if fixed_cache else [heads, 1, head_dim]
        for layer in range(config.num_hidden_layers):
            for name in caches(layer):
                profile[past(name)] = shapes(1, *smallest, opt=[1, *cache], most=[batch, *cache])
        return profile


@dataclass(frozen=True)
class Filled:
    """What a target's builder says of the files that it wrote.

    Attributes:
        runtime_version: the release that runs the engine, as in the manifest.
        gpus: the architectures that it was built for.
        dtype: of weights, activations and cache.
        layers: layers of the network, or nodes of the graph.
        attention: form and sizes of attention over the cache.
        profiles: as for the manifest; the first one that admits a step's shapes runs it.
        bindings: as for the manifest.
        plugins: names of the plugin libraries among the files.
        plugin_layers: plugin -> the number of its uses.
        activations: what products by quantized weights round activations to: INT8; None for what the model does.
        weights: the manifest's entry for weight files, whose data are not hashed; None if there are none.
        hashes: file -> its SHA-256, where it is known already.
    """

    runtime_version: str
    gpus: tuple[str, ...]
    dtype: str
    layers: int
    attention: Attention
    profiles: Sequence[Profile]
    bindings: dict[str, Any]
    plugins: tuple[str, ...] = ()
    plugin_layers: Mapping[str, int] = field(default_factory=dict)
    activations: str | None = None
    weights: dict[str, Any] | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
