"""package -> engine -> session. Lowering per target, the builder, and the sessions that run either."""

from qwenport.engines.builder import build
from qwenport.engines.cache import (
    MOST_CACHE_BYTES,
    CacheError,
    Entry,
    cache_entries,
    cache_folder,
    cache_key,
    cached,
    clear_cache,
    keep,
)
from qwenport.engines.cpp_library import CppLibrary, InstallError, install_cpp_library
from qwenport.engines.engine import Engine, load_engine
from qwenport.engines.errors import (
    BuildError,
    CapacityError,
    EngineError,
    LoweringError,
    MeasuringError,
    ProofError,
    SessionError,
    SnapshotError,
)
from qwenport.engines.generate_options import (
    Cancellation,
    FinishReason,
    Generated,
    GenerateOptions,
    GenerationError,
    OnLogits,
    Piece,
)
from qwenport.engines.generation import Generation, generate
from qwenport.engines.measuring import Measurement, measure
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession, start_onnxruntime
from qwenport.engines.open import open_session
from qwenport.engines.perplexity import Perplexity, perplexity
from qwenport.engines.proof import (
    MOST_PROOF_BYTES,
    PROJECTIONS,
    TOP,
    Fingerprints,
    Kind,
    Operation,
    Proof,
    kept_proof,
    read_proof,
    write_proof,
)
from qwenport.engines.sampling import (
    Sampler,
    SamplingError,
    SamplingParams,
    SamplingParamsError,
    TokenLogprob,
)
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.self_test import (
    SelfTest,
    SelfTestFailure,
    engine_proof,
    fitting_cases,
    run_proof,
    self_test,
)
from qwenport.engines.self_test_passes import count_passes, has_passed
from qwenport.engines.session import CachedSession, Session, Step
from qwenport.engines.targets import FLAVOURS, serves
from qwenport.engines.tensorrt_builder import MAX_STEP_LOGITS, MAX_STEP_TOKENS
from qwenport.engines.tensorrt_session import TensorRTSession
from qwenport.engines.text.chat import Chat, ChatOptions, OnText, Reply
from qwenport.engines.text.chat_format import ChatError, ChatFormat, Message
from qwenport.engines.text.stop_strings import StopStrings
from qwenport.engines.text.stream_decoder import StreamDecoder
from qwenport.engines.text.text_generation import GeneratedText, TextGeneration
from qwenport.engines.text.tokenizer import Tokenizer, check_ids

__all__ = [
    "FLAVOURS",
    "MAX_STEP_LOGITS",
    "MAX_STEP_TOKENS",
    "MOST_CACHE_BYTES",
    "MOST_PROOF_BYTES",
    "PROJECTIONS",
    "TOP",
    "BuildError",
    "CacheError",
    "CachedSession",
    "Cancellation",
    "CapacityError",
    "Chat",
    "ChatError",
    "ChatFormat",
    "ChatOptions",
    "CppLibrary",
    "Engine",
    "EngineError",
    "Entry",
    "Fingerprints",
    "FinishReason",
    "GenerateOptions",
    "Generated",
    "GeneratedText",
    "Generation",
    "GenerationError",
    "InstallError",
    "Kind",
    "LoweringError",
    "Measurement",
    "MeasuringError",
    "Message",
    "OnLogits",
    "OnText",
    "OnnxRuntimeSession",
    "Operation",
    "Perplexity",
    "Piece",
    "Proof",
    "ProofError",
    "Reply",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "SamplingParamsError",
    "SavedSession",
    "SelfTest",
    "SelfTestFailure",
    "Session",
    "SessionError",
    "SnapshotError",
    "Step",
    "StopStrings",
    "StreamDecoder",
    "TensorRTSession",
    "TextGeneration",
    "TokenLogprob",
    "Tokenizer",
    "build",
    "cache_entries",
    "cache_folder",
    "cache_key",
    "cached",
    "check_ids",
    "clear_cache",
    "count_passes",
    "engine_proof",
    "fitting_cases",
    "generate",
    "has_passed",
    "install_cpp_library",
    "keep",
    "kept_proof",
    "load_engine",
    "measure",
    "open_session",
    "perplexity",
    "read_proof",
    "run_proof",
    "self_test",
    "serves",
    "start_onnxruntime",
    "write_proof",
]
