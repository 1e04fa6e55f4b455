"""Which weights of a checkpoint are quantized, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from qwenport.exporter.quantization.storage import WEIGHT, ZEROS, Storage

LINEAR, EMBEDDING = "Linear", "Embedding"
"""Targets: every linear, and the embedding."""
ROUTERS = r"re:.*\.mlp\.(gate|shared_expert_gate)$"
"""The small linears of a mixture that choose: AWQ's and GPTQ's tools leave them out, whatever a config says."""


@dataclass(frozen=True)
class Group:
    """Weights that are stored alike.

    Attributes:
        targets: each a module's name, "re:" and a pattern that its name begins with, LINEAR or EMBEDDING.
        storage: how.
    """

    targets: tuple[str, ...]
    storage: Storage


@dataclass(frozen=True)
class Quantization:
    """The `quantization_config` of a checkpoint.

    Attributes:
        groups: names of modules go before patterns, and patterns before kinds.
        ignore: modules whose weights are stored as they are, by names and patterns.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def storage(self, parameter: str) -> Storage | None:
        """How a parameter is stored; None if as it is.

        Args:
            parameter: in transformers' names; the experts of a layer are single linears.
        """
        if parameter not in self._known:
            self._known[parameter] = self._find(parameter)
        return self._known[parameter]

    @cached_property
    def _known(self) -> dict[str, Storage | None]:
        """What `storage` has found: patterns are many, and an export asks for each weight several times."""
        return {}

    def _find(self, parameter: str) -> Storage | None:
        module = parameter.removesuffix(WEIGHT)
        if module == parameter or module.endswith("norm"):
            return None
        kind = EMBEDDING if module.endswith("embed_tokens") else LINEAR
        if any(_names(rule, module) for rule in self.ignore):
            return None
        for matches in (_is_name, _is_pattern, lambda rule, _: rule == kind):
            for group in self.groups:
                if any(matches(rule, module) for rule in group.targets):
                    return group.storage
        return None

    @property
    def least_bits(self) -> int:
        """Of a value in a package, where they are fewest."""
        return min(16 if g.storage.is_whole else g.storage.bits for g in self.groups)

    @property
    def has_integers(self) -> bool:
        """Whether some weights are integers with zero points, rather than FP8."""
        return any(ZEROS in group.storage.part_names for group in self.groups)

    @property
    def rounds_inputs(self) -> bool:
        """Whether linears round their inputs to FP8."""
        return any(group.storage.activations is not None for group in self.groups)

    def in_words(self) -> str:
        """For people: the formats and what they are of."""
        found = [group.storage.in_words() for group in self.groups]
        if len(found) > 1:
            targets = (", ".join(group.targets) for group in self.groups)
            found = [f"{words} ({of})" for words, of in zip(found, targets, strict=True)]
        return "; ".join(found)


def _names(rule: str, module: str) -> bool:
    return _is_pattern(rule, module) or _is_name(rule, module)


def _is_name(rule: str, module: str) -> bool:
    return module == rule or module.startswith(f"{rule}.")


def _is_pattern(rule: str, module: str) -> bool:
    return rule.startswith("re:") and re.match(rule.removeprefix("re:"), module) is not None
