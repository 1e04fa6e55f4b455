"""Parity: does a package, TensorRT's network of it, or an engine compute what transformers computes?

`validate` returns a `Report`. Importing this module is cheap; torch and transformers load when it is called.
"""

from qwenport.validate.candidate import open_candidate
from qwenport.validate.errors import NetworkError, ValidationError
from qwenport.validate.localisation import Fault, OperatorError
from qwenport.validate.proof_making import BUILD_SECONDS as PROOF_SECONDS
from qwenport.validate.proof_making import KeptProof, keep_proof, make_proof
from qwenport.validate.report import Check, Report, ScenarioResult
from qwenport.validate.report import prepare as prepare_report
from qwenport.validate.target import Sources, Target, check_source, open_target
from qwenport.validate.thresholds import parse_overrides
from qwenport.validate.validation import Options, Validation, validate

__all__ = [
    "PROOF_SECONDS",
    "Check",
    "Fault",
    "KeptProof",
    "NetworkError",
    "OperatorError",
    "Options",
    "Report",
    "ScenarioResult",
    "Sources",
    "Target",
    "Validation",
    "ValidationError",
    "check_source",
    "keep_proof",
    "make_proof",
    "open_candidate",
    "open_target",
    "parse_overrides",
    "prepare_report",
    "validate",
]
