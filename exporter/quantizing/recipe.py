"""What `export --quantize` may be asked for, and how a checkpoint states it: as compressed-tensors' settings.

Linears of attention, MLP and experts are rounded to the bits asked for. The vocabulary's matrices, embedding and head,
have 8 bits per row: a head costs no quality so, and much of it at 4 bits. Norms, biases and routers stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenport.contract import GROUPS, INT8, QUANTIZE
from qwenport.exporter.config import ModelConfig
from qwenport.exporter.errors import ExportError
from qwenport.exporter.quantization import Storage
from qwenport.exporter.quantization.compressed_tensors import METHOD
from qwenport.exporter.quantization.pack_quantized import FORMAT, PackQuantized
from qwenport.exporter.quantization.quantization import EMBEDDING, LINEAR

HEAD = "lm_head"
PER_ROW = PackQuantized(bits=8, group=None, symmetric=True)
"""Of the vocabulary, and of linears in 8 bits."""
ROUTERS = ("re:.*mlp\\.gate$", "re:.*shared_expert_gate$")
"""Linears that choose experts: small, and a rounded one chooses others."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized.

    Attributes:
        linears: how those of attention, MLP and experts are stored.
        vocabulary: how the embedding and the head are.
    """

    linears: PackQuantized
    vocabulary: PackQuantized = PER_ROW

    def settings(self, config: ModelConfig) -> dict[str, Any]:
        """The `quantization_config` of the quantized checkpoint of a model."""
        # A tied head has no tensors of its own, so nothing of it is to be loaded.
        vocabulary = [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]
        groups = [([LINEAR], self.linears), (vocabulary, self.vocabulary)]
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {
                    "targets": targets,
                    "weights": _weights(storage),
                    "input_activations": None,
                    "output_activations": None,
                    "format": FORMAT,
                }
                for index, (targets, storage) in enumerate(groups)
            },
            "ignore": [
                *([HEAD] if config.tie_word_embeddings else []),
                *(ROUTERS if config.moe is not None else []),
            ],
        }

    def describe(self) -> dict[str, Any]:
        """For a manifest."""
        return {"linears": _stated(self.linears), "vocabulary": _stated(self.vocabulary)}


def make_recipe(bits: str, *, group: int | None = None, symmetric: bool | None = None) -> Recipe:
    """The recipe of `export --quantize`.

    Args:
        bits: "int8" or "int4".
        group: values along K with one scale, for int4: 32 (the default), 64 or 128. int8 has a scale per row.
        symmetric: whether zero is the middle code, so that no zero points are needed; true by default.

    Raises:
        ExportError: there is no such recipe.
    """
    if bits not in QUANTIZE:
        raise ExportError(f"quantize must be one of {', '.join(QUANTIZE)}, not {bits!r}")
    symmetric = True if symmetric is None else symmetric
    if bits == INT8:
        if group is not None:
            raise ExportError(
                "--group is for int4; int8 has one scale per row, which costs no quality at 8 bits"
            )
        return Recipe(PackQuantized(8, None, symmetric))
    if group not in (None, *GROUPS):
        raise ExportError(f"group must be one of {', '.join(map(str, GROUPS))}, not {group!r}")
    return Recipe(PackQuantized(4, group or GROUPS[0], symmetric))


def _weights(storage: Storage) -> dict[str, Any]:
    return {
        "num_bits": storage.bits,
        "type": "int",
        "symmetric": storage.symmetric,
        "strategy": "channel" if storage.group is None else "group",
        "group_size": storage.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _stated(storage: Storage) -> dict[str, Any]:
    return {"bits": storage.bits, "group": storage.group, "symmetric": storage.symmetric}
