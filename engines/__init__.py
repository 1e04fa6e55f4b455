"""package -> engine -> session. Lowering per target, the builder, and the sessions that run either."""

from qwenport.engines.errors import (
    BuildError,
    CapacityError,
    EngineError,
    LoweringError,
    SessionError,
)
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession
from qwenport.engines.session import Session

__all__ = [
    "BuildError",
    "CapacityError",
    "EngineError",
    "LoweringError",
    "OnnxRuntimeSession",
    "Session",
    "SessionError",
]
