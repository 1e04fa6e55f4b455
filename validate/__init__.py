"""Parity: does a package or an engine compute what transformers computes from the same checkpoint?

`validate` asks, a `Report` answers. Importing this is cheap; torch and transformers load when it is called.
"""

from qwenport.validate.errors import ValidationError
from qwenport.validate.report import Check, Report, ScenarioResult
from qwenport.validate.validation import validate

__all__ = ["Check", "Report", "ScenarioResult", "ValidationError", "validate"]
