"""Rotary position embeddings: config.json's settings -> a `Rope` -> cos/sin tables.

Each kind of scaling is one file here. Everything is computed in fp32, as in transformers, and equals its
ROPE_INIT_FUNCTIONS. Two kinds depend on the length of the text (dynamic, longrope); a table is for one fixed length,
the package's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.first_call import settle
from qwenport.exporter.keys import short
from qwenport.exporter.rope.rope import Rope, Settings, number

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "Rope", "parse_rope", "rope_tables"]

_OF_EVERY_KIND = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
ROWS_AT_ONCE = 1 << 16  # table rows in memory at a time


def _discover() -> Iterator[type[Rope]]:
    """Every class in this folder's modules that defines a kind."""
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Rope) and value is not Rope:
                yield value


KINDS: dict[str, type[Rope]] = {str(fields(kind)[0].default): kind for kind in _discover()}


def parse_rope(
    *,
    rope_theta: float | None,
    rope_scaling: dict[str, Any] | None,
    rope_parameters: dict[str, Any] | None,
    original_max_position_embeddings: int | None,
    max_position_embeddings: int,
    head_dim: int,
    override: str | None,
    default_theta: float = 10000.0,
) -> tuple[Rope, int, tuple[str, ...]]:
    """Read either spelling of the rope settings; return them, the context length they allow, and the unread settings.

    `rope_scaling` is transformers 4's spelling (with `type` or `rope_type`, theta outside), `rope_parameters`
    transformers 5's (theta inside). `override` is "KIND:FACTOR" and needs a checkpoint without scaling. A parameter
    that the kind does not have counts as unread.

    Raises:
        ConfigError: an unknown kind, a missing parameter, or spellings that disagree.
    """
    spelled = {"rope_scaling": rope_scaling, "rope_parameters": rope_parameters}
    given = [_normalised(rope_theta, settings) for settings in spelled.values() if settings]
    if len(given) == 2 and given[0] != given[1]:
        differ = sorted(
            key for key in given[0] | given[1] if given[0].get(key) != given[1].get(key)
        )
        raise ConfigError(
            f"rope_scaling and rope_parameters disagree about {', '.join(differ)}; keep one of them"
        )
    settings = given[0] if given else _normalised(rope_theta, {})
    theta, kind = settings.pop("rope_theta"), settings.pop("rope_type")
    theta = number(default_theta if theta is None else theta, "rope_theta", above=1)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"rope type {short(kind)} is not supported; supported: {', '.join(sorted(KINDS))}"
        )
    known = {*KINDS[kind].keys, *_OF_EVERY_KIND}
    unread = sorted(
        f"{where}.{key}" for where, found in spelled.items() for key in (found or {}).keys() - known
    )
    if override is not None:
        if kind != "default":
            raise ConfigError(f"--rope-scaling: the checkpoint already scales its rope ({kind})")
        kind, factor = _parse_override(override)
        settings = {"factor": factor}
    rope = KINDS[kind].parse(
        Settings(
            settings,
            kind=kind,
            theta=theta,
            head_dim=head_dim,
            max_positions=max_position_embeddings,
            outer_original=original_max_position_embeddings,
        )
    )
    return rope, rope.context(override is not None), tuple(unread)


def _normalised(rope_theta: float | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that include theta, with `type` renamed `rope_type` and without nulls except for a factor."""
    nested = [key for key, value in settings.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"rope settings per layer type are not supported: {', '.join(nested)}")
    found = {k: value for k, value in settings.items() if value is not None or k == "factor"}
    old, new = found.pop("type", None), found.get("rope_type")
    if old is not None and new is not None and old != new:
        raise ConfigError(
            f"rope settings: type {short(old)} and rope_type {short(new)} disagree; keep one"
        )
    inner = found.get("rope_theta")
    if rope_theta is not None and inner is not None and inner != rope_theta:
        raise ConfigError(
            f"config.json: rope_theta {short(rope_theta)} and the {short(inner)} among its rope settings disagree; "
            "keep one"
        )
    if found.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    return found | {
        "rope_type": next((kind for kind in (new, old) if kind is not None), "default"),
        "rope_theta": inner if inner is not None else rope_theta,
    }


def _parse_override(text: str) -> tuple[str, float]:
    kind, colon, factor = text.partition(":")
    possible = sorted(name for name, each in KINDS.items() if each.by_factor)
    if kind not in possible or not colon:
        raise ConfigError(
            f"--rope-scaling {text!r}: expected KIND:FACTOR with KIND one of {', '.join(possible)}"
        )
    try:
        return kind, float(factor)
    except ValueError as error:
        raise ConfigError(f"--rope-scaling {text!r}: {factor!r} is not a number") from error


def rope_tables(
    rope: Rope, length: int, start: int = 0, stop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [stop - start, head_dim/2], scaling included; row p is for position start + p.

    Args:
        rope: the settings.
        length: positions of the whole table; some kinds depend on it.
        start: the first row to compute.
        stop: one past the last row; the end of the table by default.

    Source: transformers `modeling_rope_utils.ROPE_INIT_FUNCTIONS`; the order of fp32 operations is the same, so the
    results agree to rounding.
    """
    import torch

    settle()
    positions = torch.arange(start, length if stop is None else stop, dtype=torch.float32)
    angles = positions[:, None] * rope.inverse_frequencies(length)
    scaling = rope.attention_scaling()
    return angles.cos() * scaling, angles.sin() * scaling
