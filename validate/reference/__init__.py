"""The oracle that targets are compared with: transformers' own model, whole in memory or one layer at a time."""

from qwenport.validate.reference.layers import OpenLayer
from qwenport.validate.reference.oracle import Reference
from qwenport.validate.text import Choices, Text

__all__ = ["Choices", "OpenLayer", "Reference", "Text"]
