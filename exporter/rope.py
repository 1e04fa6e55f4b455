"""Rotary position embeddings: config.json's settings -> inverse frequencies -> cos/sin tables.

Everything is computed in fp32, as transformers does, and equals its ROPE_INIT_FUNCTIONS. Two kinds depend
on the length of the text at hand (dynamic, longrope); a table is for one stated length, the package's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenport.exporter.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEFAULT_THETA = 10000.0  # transformers', for configs from before rope_theta existed
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
OVERRIDE_KINDS = ("linear", "dynamic", "yarn")  # the others need more than one factor

_OPTIONAL_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
}


@dataclass(frozen=True)
class RopeConfig:
    """One model's rotary settings, with every default of transformers filled in.

    `max_position_embeddings` is the config's; `original_max_position_embeddings` the length before
    scaling (yarn, llama3, longrope; elsewhere the same number).
    """

    kind: str
    theta: float
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether transformers changes the frequencies with the length of the text."""
        return self.kind in ("dynamic", "longrope")


def parse_rope(
    *,
    rope_theta: float | None,
    rope_scaling: dict[str, Any] | None,
    rope_parameters: dict[str, Any] | None,
    original_max_position_embeddings: int | None,
    max_position_embeddings: int,
    head_dim: int,
    override: str | None,
) -> tuple[RopeConfig, int]:
    """Read either spelling of the rope settings; return them and the context length they allow.

    `rope_scaling` is transformers 4's (with `type` or `rope_type`, theta beside it), `rope_parameters`
    transformers 5's (theta inside). `override` is "KIND:FACTOR" and needs a checkpoint without scaling.

    Raises:
        ConfigError: an unknown kind, a missing or unknown parameter, spellings that disagree.
    """
    settings = _one_spelling(rope_theta, rope_scaling, rope_parameters)
    theta = settings.pop("rope_theta", None)
    theta = _number(DEFAULT_THETA if theta is None else theta, "rope_theta", above=1)
    kind = settings.pop("rope_type", "default")
    if kind not in KINDS:
        raise ConfigError(f"rope type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    if settings.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    settings = {key: value for key, value in settings.items() if value is not None}
    context = max_position_embeddings
    if override is not None:
        if kind != "default":
            raise ConfigError(f"--rope-scaling: the checkpoint already scales its rope ({kind})")
        kind, factor = _parse_override(override)
        settings = {"factor": factor}
        context = int(factor * max_position_embeddings)
    unknown = sorted(set(settings) - _OPTIONAL_KEYS[kind])
    if unknown:
        raise ConfigError(f"rope type {kind!r} does not know {', '.join(unknown)}")

    rope = _build(
        kind, theta, head_dim, max_position_embeddings, original_max_position_embeddings, settings
    )
    if kind == "yarn" or (kind == "dynamic" and override is None):
        # The model card's yarn form leaves max_position_embeddings at the original length.
        context = max(context, int(rope.factor * rope.original_max_position_embeddings))
    return rope, context


def _one_spelling(
    rope_theta: float | None,
    rope_scaling: dict[str, Any] | None,
    rope_parameters: dict[str, Any] | None,
) -> dict[str, Any]:
    if rope_scaling and rope_parameters:
        raise ConfigError("config.json has both rope_scaling and rope_parameters; keep one")
    settings = dict(rope_scaling or rope_parameters or {})
    nested = [key for key, value in settings.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"rope settings per layer type are not supported: {', '.join(nested)}")
    old = settings.pop("type", None)
    new = settings.get("rope_type")
    if old is not None and new is not None and old != new:
        raise ConfigError(f"rope settings name two types: {old!r} and {new!r}")
    settings["rope_type"] = new or old or "default"
    inner = settings.get("rope_theta")
    if rope_theta is not None and inner is not None and inner != rope_theta:
        raise ConfigError(f"rope_theta is given twice: {rope_theta} and {inner}")
    settings["rope_theta"] = inner if inner is not None else rope_theta
    return settings


def _parse_override(text: str) -> tuple[str, float]:
    kind, colon, factor = text.partition(":")
    if kind not in OVERRIDE_KINDS or not colon:
        raise ConfigError(
            f"--rope-scaling {text!r}: expected KIND:FACTOR with KIND one of {', '.join(OVERRIDE_KINDS)}"
        )
    try:
        return kind, _number(float(factor), "factor", above=1)
    except ValueError as error:
        raise ConfigError(f"--rope-scaling {text!r}: {factor!r} is not a number") from error


def _number(value: Any, name: str, above: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"rope settings: {name} must be a number, found {value!r}")
    if above is not None and not value > above:
        # A scaling factor of exactly 1 scales nothing and is harmless.
        if name == "factor" and value == above:
            return float(value)
        raise ConfigError(f"rope settings: {name} must be greater than {above:g}, found {value!r}")
    return float(value)


def _build(
    kind: str,
    theta: float,
    head_dim: int,
    max_positions: int,
    outer_original: int | None,
    settings: dict[str, Any],
) -> RopeConfig:
    original = max_positions
    if kind in ("yarn", "llama3", "longrope"):
        original = settings.get("original_max_position_embeddings", max_positions)
        original = original if outer_original is None else outer_original
        if isinstance(original, bool) or not isinstance(original, int) or original <= 0:
            raise ConfigError(
                f"original_max_position_embeddings must be positive, found {original!r}"
            )
    values: dict[str, Any] = {}
    if kind != "default":
        factor = settings.get("factor")
        if factor is None and kind in ("yarn", "longrope"):
            factor = max_positions / original
        if factor is None:
            raise ConfigError(f"rope type {kind!r} needs a factor")
        values["factor"] = _number(factor, "factor", above=0 if kind == "longrope" else 1)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if key in settings:
            values[key] = _number(settings[key], key)
    for key in ("beta_fast", "beta_slow"):
        if settings.get(key):  # transformers takes 0 for "not given"
            values[key] = _number(settings[key], key, above=0)
    if "truncate" in settings:
        if not isinstance(settings["truncate"], bool):
            raise ConfigError(
                f"rope settings: truncate must be true or false, found {settings['truncate']!r}"
            )
        values["truncate"] = settings["truncate"]
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            if key not in settings:
                raise ConfigError(f"rope type 'llama3' needs {key}")
            values[key] = _number(settings[key], key, above=0)
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ConfigError("rope type 'llama3': high_freq_factor must exceed low_freq_factor")
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            factors = settings.get(key)
            if not isinstance(factors, list) or len(factors) != head_dim // 2:
                raise ConfigError(f"rope type 'longrope' needs {head_dim // 2} numbers in {key}")
            values[key] = tuple(_number(value, key, above=0) for value in factors)
    return RopeConfig(
        kind=kind,
        theta=theta,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=original,
        **values,
    )


def inverse_frequencies(rope: RopeConfig, length: int) -> tuple[torch.Tensor, float]:
    """Return (inv_freq fp32 [head_dim/2], attention_scaling), for texts up to `length` tokens.

    Source: transformers `modeling_rope_utils.ROPE_INIT_FUNCTIONS`; the order of fp32 operations is the
    same, so the results agree to rounding.
    """
    import torch

    dim = rope.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    theta = rope.theta
    if rope.kind == "dynamic":
        seen = max(length, rope.max_position_embeddings)
        stretch = rope.factor * seen / rope.max_position_embeddings - (rope.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    wavelengths = theta**exponents  # in positions per radian
    inv_freq = 1.0 / wavelengths
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "yarn":
        extrapolated = 1 - _yarn_ramp(rope)
        inv_freq = (1.0 / (rope.factor * wavelengths)) * (
            1 - extrapolated
        ) + inv_freq * extrapolated
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif rope.kind == "longrope":
        is_long = length > rope.original_max_position_embeddings
        factors = torch.tensor(
            rope.long_factor if is_long else rope.short_factor, dtype=torch.float32
        )
        inv_freq = 1.0 / (factors * wavelengths)
    return inv_freq, _attention_scaling(rope)


def _yarn_ramp(rope: RopeConfig) -> torch.Tensor:
    """0 where a frequency keeps its value, 1 where it is divided by the factor [head_dim/2]."""
    import torch

    def correction_dim(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (rope.head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    steps = torch.arange(rope.head_dim // 2, dtype=torch.float32)
    return torch.clamp((steps - low) / (high - low), 0, 1)


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    import torch

    wavelength = 2 * math.pi / inv_freq
    original = rope.original_max_position_embeddings
    long_wave = wavelength > original / rope.low_freq_factor
    short_wave = wavelength < original / rope.high_freq_factor
    scaled = torch.where(long_wave, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where(~long_wave & ~short_wave, blended, scaled)


def _attention_scaling(rope: RopeConfig) -> float:
    """The number that cos and sin are multiplied with."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        if rope.factor <= 1.0:
            return 1.0
        return math.sqrt(
            1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings)
        )

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_tables(rope: RopeConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin), fp32 [length, head_dim/2]: row p is for position p, scaling included."""
    import torch

    inv_freq, scaling = inverse_frequencies(rope, length)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
    return angles.cos() * scaling, angles.sin() * scaling
