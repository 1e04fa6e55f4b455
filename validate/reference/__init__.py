"""The oracle that targets are held against: transformers' own model, whole in memory or a layer at a time."""

from qwenport.validate.reference.oracle import Reference
from qwenport.validate.text import Choices, Text

__all__ = ["Choices", "Reference", "Text"]
