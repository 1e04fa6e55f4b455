"""package -> engine -> session. Lowering per target, the builder, and the sessions that run either."""

from qwenport.engines.build import MAX_STEP_LOGITS, MAX_STEP_TOKENS, build
from qwenport.engines.engine import Engine, load_engine
from qwenport.engines.errors import (
    BuildError,
    CapacityError,
    EngineError,
    LoweringError,
    SessionError,
)
from qwenport.engines.generation import GenerationResult, StreamDecoder, generate
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession, start_onnxruntime
from qwenport.engines.open import open_session
from qwenport.engines.sampling import Sampler, SamplingParams
from qwenport.engines.session import CachedSession, Session, Step
from qwenport.engines.targets import FLAVOURS, FP16_ONLY, RTX_GPUS, TENSORRT_GPUS
from qwenport.engines.tensorrt_session import TensorRTSession

__all__ = [
    "FLAVOURS",
    "FP16_ONLY",
    "MAX_STEP_LOGITS",
    "MAX_STEP_TOKENS",
    "RTX_GPUS",
    "TENSORRT_GPUS",
    "BuildError",
    "CachedSession",
    "CapacityError",
    "Engine",
    "EngineError",
    "GenerationResult",
    "LoweringError",
    "OnnxRuntimeSession",
    "Sampler",
    "SamplingParams",
    "Session",
    "SessionError",
    "Step",
    "StreamDecoder",
    "TensorRTSession",
    "build",
    "generate",
    "load_engine",
    "open_session",
    "start_onnxruntime",
]
