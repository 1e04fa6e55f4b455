"""What a defect is, as data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from defects.runs import USUAL, Run

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
DENSE, MIXTURE = "tiny-qwen2.5", "tiny-qwen2-moe"

PACKAGE, EXACT_NETWORK, NETWORK = "package", "network, exact", "network"
FORMS = (PACKAGE, EXACT_NETWORK)


@dataclass(frozen=True)
class Defect:
    """A mistake in a package's graph.

    Attributes:
        name: unique, the name of `change`.
        change: makes the mistake in a package's graph, in place.
        family: what it is about.
        checkpoint: the folder under examples/ that the package is made from.
        layers: decoder layers in which the mistake lives; None where it lives in none, but in the embedding, the
            mask, the tables, the head or another value that all layers are given.
        forms: what may be judged to find it: the package, TensorRT's network of it in exact arithmetic, or that
            network in its declared types.
        config: changes to the checkpoint's config.json before the export; the weights stay.
        rope_scaling, dtype: what the export is asked for.
        shown_by: a way of running that shows it, where most do not.
        hidden_in: one in which logits are right; None where it was not asked.
    """

    name: str
    change: Callable[[ir.Model], None]
    family: str
    checkpoint: str
    layers: frozenset[int] | None
    forms: tuple[str, ...] = FORMS
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rope_scaling: str | None = None
    dtype: str | None = None
    shown_by: Run | None = None
    hidden_in: Run | None = None

    def write_checkpoint(self, folder: Path) -> Path:
        """The checkpoint with this defect's config.json: the example itself, or a copy at `folder`."""
        source = EXAMPLES / self.checkpoint
        if not self.config:
            return source
        shutil.copytree(source, folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **self.config}))
        return folder


def defect(
    family: str,
    change: Callable[[ir.Model], None],
    layers: Iterable[int] | None,
    *,
    checkpoint: str = DENSE,
    forms: tuple[str, ...] = FORMS,
    **settings: Any,
) -> Defect:
    """A defect named after its change; `layers` are their numbers, or None."""
    where = None if layers is None else frozenset(layers)
    return Defect(change.__name__, change, family, checkpoint, where, forms, **settings)


def hidden(
    family: str,
    change: Callable[[ir.Model], None],
    layers: Iterable[int] | None,
    shown_by: Run,
    hidden_in: Run = USUAL,
    **settings: Any,
) -> Defect:
    """A defect that depends on the way of running."""
    return defect(family, change, layers, shown_by=shown_by, hidden_in=hidden_in, **settings)
