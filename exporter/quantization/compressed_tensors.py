"""compressed-tensors' `quantization_config`: groups of modules, each stored in one of the library's formats.

Source: compressed-tensors, quantization/quant_config.py and quant_scheme.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.keys import short
from qwenport.exporter.quantization import float_quantized, pack_quantized
from qwenport.exporter.quantization.quantization import EMBEDDING, LINEAR, Group, Quantization
from qwenport.exporter.quantization.settings import Settings, refused
from qwenport.exporter.quantization.storage import Storage

METHOD = "compressed-tensors"
MIXED = "mixed-precision"
"""The format of a checkpoint whose groups have formats of their own."""
FORMATS: Mapping[str, Callable[[Settings, Settings | None], Storage]] = {
    pack_quantized.FORMAT: pack_quantized.parse_weights,
    **dict.fromkeys(float_quantized.FORMATS, float_quantized.parse_weights),
}
"""Format -> (a group's weights, its input_activations) -> how it stores weights."""


def parse_compressed_tensors(raw: Mapping[str, Any]) -> Quantization:
    """Read a `quantization_config` whose method is "compressed-tensors".

    Raises:
        ConfigError: it asks for what is not supported; says which key.
    """
    settings = Settings("", raw)
    settings.only("quant_method", METHOD)
    settings.only("quantization_status", "compressed", "frozen")
    for key in ("kv_cache_scheme", "transform_config"):
        settings.only(key, None, {})
    for key in ("sparsity_config", "moe_sparsity_config"):
        sparsity = settings.take(key)
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            raise refused(key, sparsity)
    settings.neutral("global_compression_ratio", "version")
    whole: str = settings.required("format", *FORMATS, MIXED)
    ignore = settings.names("ignore")
    groups = settings.take("config_groups")
    settings.finish()
    if not isinstance(groups, dict) or not groups:
        raise ConfigError("quantization_config: config_groups has no group")
    return Quantization(tuple(_group(n, given, whole) for n, given in groups.items()), ignore)


def _group(name: str, given: Any, whole: str) -> Group:
    where = f"config_groups.{short(name)}."
    settings = Settings(where, given)
    own = settings.only("format", None, *FORMATS)
    method: str = own or whole
    if method not in FORMATS:
        raise ConfigError(f"quantization_config: {where}format is missing")
    if whole not in (method, MIXED):
        raise refused(f"{where}format", own)
    settings.only("output_activations", None)
    activations = settings.take("input_activations")
    targets = settings.names("targets")
    classes = {t for t in targets if not t.startswith("re:") and "." not in t and t != "lm_head"}
    if not targets or not classes <= {LINEAR, EMBEDDING}:
        raise refused(f"{where}targets", list(targets))
    weights = settings.take("weights")
    settings.finish()
    rounded = None if activations is None else Settings(f"{where}input_activations.", activations)
    return Group(targets, FORMATS[method](Settings(f"{where}weights.", weights), rounded))
