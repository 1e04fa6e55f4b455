"""Model families, one file each: how its config.json is read, and how it differs from Llama.

A family is found by its file, which defines FAMILY; there is no list of families. docs/adding-a-family.md shows how.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from qwenport.exporter.families.family import Biases, Family, MoEConfig

__all__ = ["FAMILIES", "Biases", "Family", "MoEConfig"]


def _discover() -> dict[str, Family]:
    names = sorted(module.name for module in iter_modules(__path__) if module.name != "family")
    families = [import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in families}


FAMILIES: dict[str, Family] = _discover()
