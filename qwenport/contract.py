"""Names and constants shared by every package, the command line and the C++ sources. Imports only the standard library.

The C++ runtime and the CUDA plugins get the part that they need as a header: `python contract.py` prints it, and
contract.cmake writes it into their build folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# --- dtypes


@dataclass(frozen=True)
class Dtype:
    """A floating-point type and its names.

    Attributes:
        name: our name, on the command line and in manifests.
        torch_name: in torch, and in config.json.
        safetensors: in a safetensors header.
        onnx: in ONNX's enumeration; in lower case, a binding's dtype.
        number: in ONNX's enumeration.
        itemsize: bytes.
    """

    name: str
    torch_name: str
    safetensors: str
    onnx: str
    number: int
    itemsize: int

    @property
    def schema(self) -> str:
        """The name of a tensor of the dtype in an ONNX schema."""
        return f"tensor({self.onnx.lower()})"

    @property
    def binding(self) -> str:
        """The name of the dtype in a manifest's bindings."""
        return self.onnx.lower()

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def ir(self) -> ir.DataType:
        """The onnx_ir dtype."""
        import onnx_ir as ir

        return ir.DataType[self.onnx]


BF16 = Dtype("bf16", "bfloat16", "BF16", "BFLOAT16", 16, 2)
FP16 = Dtype("fp16", "float16", "F16", "FLOAT16", 10, 2)
FP32 = Dtype("fp32", "float32", "F32", "FLOAT", 1, 4)
FP64 = Dtype(
    "fp64", "float64", "F64", "DOUBLE", 11, 8
)  # the oracle's arithmetic; no package has it

FP8 = "F8_E4M3"
"""Codes of 8 bits that are numbers themselves, in a safetensors header: ONNX's FLOAT8E4M3FN."""
CODE_BYTES = {"U8": 1, "I32": 4, "I64": 8, FP8: 1}
"""The types of quantized weights in a safetensors header that no other tensor has, and their bytes."""

DTYPES = {dtype.name: dtype for dtype in (BF16, FP16, FP32)}
"""The dtypes that a package may have, by name."""
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES.values()}
BY_ONNX = {dtype.onnx: dtype for dtype in DTYPES.values()}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values()}
HALF = (BF16, FP16)
INT8 = "int8"
"""What some engines round the activations of products to, in blocks with a scale each."""
E4M3 = "fp8"
"""What the linears of some models round their inputs to, wherever they run: FP8, e4m3."""

# --- bindings of a graph

INPUT_IDS, POSITION_IDS = "input_ids", "position_ids"
WRITE_INDICES, KEY_POSITIONS, LOGITS_INDICES = "write_indices", "key_positions", "logits_indices"
REQUEST_LENGTHS = "request_lengths"
"""Only with dual chunk attention that scales by length: see docs/architecture.md."""
SCORE_BYTES = 40
"""Memory that a step with dual chunk attention needs, at most, per head, token and slot of the span."""
MOST_SCORES = 1 << 30
"""Bytes that all of that may take in a step of several tokens; one token of 7B takes as much at 1,010,000 positions."""
MOST_POSITIONS = 1 << 22
"""More than any model has."""
LOGITS = "logits"
CAPACITY = "capacity"
"""The cache axis whose size engines fix."""
_PAST, _PRESENT, _QUERY = "past_key_values.", "present.", "query."
_PARTS = ("key", "value")


def caches(layer: int) -> tuple[str, str]:
    """The names of a layer's two caches, without the prefix for before or after the step."""
    return f"{layer}.{_PARTS[0]}", f"{layer}.{_PARTS[1]}"


def past(cache: str) -> str:
    """The input binding of a cache: past("3.key") is "past_key_values.3.key"."""
    return _PAST + cache


def present(cache: str) -> str:
    """The output binding of a cache, which shares the input's memory."""
    return _PRESENT + cache


def is_past(name: str) -> bool:
    """Whether a binding is a cache input."""
    return name.startswith(_PAST)


def is_present(name: str) -> bool:
    """Whether a binding is a cache output."""
    return name.startswith(_PRESENT)


def present_of(name: str) -> str:
    """The output that shares an input's memory."""
    return _PRESENT + name.removeprefix(_PAST)


def past_of(name: str) -> str:
    """The input that shares an output's memory."""
    return _PAST + name.removeprefix(_PRESENT)


def query(layer: int) -> str:
    """The output binding of a layer's queries, which some forms of attention have; its values are not used."""
    return f"{_QUERY}{layer}"


def is_query(name: str) -> bool:
    """Whether a binding is a layer's queries."""
    return name.startswith(_QUERY)


# --- attention of an engine

ATTENTIONS = MASKED, DIRECT, CHUNKED, SPLIT = ("masked", "direct", "chunked", "split")
"""The forms of attention over the cache; docs/attention-forms.md says what they are."""
AUTO = "auto"
"""In place of a form: the one that moves the fewest bytes on the GPUs of an engine."""
WITH_QUERIES = (DIRECT, SPLIT)
"""The forms whose engines have `query` outputs."""
SPAN_MULTIPLE = 64
"""Spans of the form MASKED begin with this many slots, and are multiples of it."""
CHUNK = 256
"""The same of CHUNKED and SPLIT, whose caches are multiples of it too: the keys of one partial sum."""

# --- directories

MANIFEST = "qwenport.json"
PACKAGE_FORMAT, PACKAGE_VERSION = "qwenport-package", 5
ENGINE_FORMAT, ENGINE_VERSION = "qwenport-engine", 6
CACHE_FORMAT, CACHE_VERSION = "qwenport-cache-entry", 1
TOKENIZER_FORMAT, TOKENIZER_VERSION = "qwenport-tokenizer", 1
PROOF_FORMAT, PROOF_VERSION = "qwenport-proof", 2
SELF_TEST_FORMAT, SELF_TEST_VERSION = "qwenport-self-test", 1
"""Of the file that remembers a self-test that passed."""
SELF_TESTS = "self-tests"
"""The folder of those files in the cache."""
MODEL, ROPE, PLAN = "model.onnx", "rope.safetensors", "engine.plan"
ENGINE_WEIGHTS = "weights.safetensors"
"""The weights and rope tables of an onnxruntime engine, which its model.onnx refers to."""
SYMMETRIC_ZEROS = "symmetric-zero-points.safetensors"
"""The file in a package of the zero points of symmetric weights: all are the middle code."""
CHECKPOINT = "checkpoint"
"""The folder in a package that `export` quantized: the quantized checkpoint."""
PROOF = "proof.safetensors"
"""What an engine must reproduce; docs/reference/proof.md."""
TOKENIZER = "tokenizer.qwenport"
"""In an engine: what the C++ library reads in place of tokenizer.json."""
JIT_CACHE = "kernels.bin"
"""In an entry of the cache: what TensorRT-RTX compiled for one engine on one GPU."""
COS_TABLE, SIN_TABLE = "rope.cos", "rope.sin"

# --- choices

WEIGHT_MODES = LINK, COPY, PACK = ("link", "copy", "pack")
ADAPTERS = IGNORE, MERGE = ("ignore", "merge")
QUANTIZE = INT8, INT4 = ("int8", "int4")
"""What `export` rounds linears to."""
GROUPS = (32, 64, 128)
"""Values that share a scale, of which int4 has a choice; the first is the default."""
DEFAULT_MAX_BATCH = 8
"""Batch rows that a package is exported for by default."""
TARGETS = ONNXRUNTIME, TENSORRT_RTX, TENSORRT = ("onnxruntime", "tensorrt-rtx", "tensorrt")
"""What `build` makes engines for."""
OLDEST_ONNXRUNTIME = "1.26"
"""The first release that has TensorScatter-24."""
MOST_THREADS = 1024
"""CPU threads of an onnxruntime session; each waits actively, so thousands bring a machine to a standstill."""
OLDEST_ONNXRUNTIME_API = int(OLDEST_ONNXRUNTIME.partition(".")[2])
"""The same as the number that C programs pass to `GetApi`."""
PACKAGE, NETWORK, ENGINE = "package", "tensorrt-network", "engine"
"""What `validate` judges: a package in onnxruntime, the network that TensorRT's parser reads from it, or an engine."""
BUDGETS = QUICK, STANDARD, THOROUGH = ("quick", "standard", "thorough")

# --- operators

DOMAIN, DOMAIN_VERSION = "qwenport", 1
"""The custom operators' domain in a graph; one version covers all operators."""
ROTARY_EMBEDDING, MOE_ROUTER, MOE_EXPERTS = "RotaryEmbedding", "MoERouter", "MoEExperts"
PLUGIN_NAMESPACE, PLUGIN_VERSION = "qwenport", "1"
ROTARY_EMBEDDING_QK = "RotaryEmbeddingQK"
"""The plugin for two RotaryEmbedding nodes. The other operators' plugins have the operators' names."""
MOST_EXPERTS, MOST_CHOSEN = 512, 16
"""Limits of the kernels: experts per layer, and experts per token."""
GPUS = {
    TENSORRT_RTX: ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    TENSORRT: tuple("sm80 sm86 sm87 sm89 sm90 sm100 sm103 sm110 sm120 sm121".split()),
    "plugins": ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120"),
}
"""The architectures that each target has code for; the plugins' code also runs on newer GPUs of a generation."""
OLDEST_PLUGIN_GPU = 80

# --- progress

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


# --- C++

FOR_CPP = {
    "manifest_name": MANIFEST,
    "plan_name": PLAN,
    "model_name": MODEL,
    "weights_name": ENGINE_WEIGHTS,
    "oldest_onnxruntime_api": OLDEST_ONNXRUNTIME_API,
    "most_threads": MOST_THREADS,
    "engine_format": ENGINE_FORMAT,
    "engine_version": ENGINE_VERSION,
    "proof_name": PROOF,
    "proof_format": PROOF_FORMAT,
    "proof_version": PROOF_VERSION,
    "tokenizer_name": TOKENIZER,
    "tokenizer_format": TOKENIZER_FORMAT,
    "tokenizer_version": TOKENIZER_VERSION,
    "self_test_format": SELF_TEST_FORMAT,
    "self_test_version": SELF_TEST_VERSION,
    "self_tests_folder": SELF_TESTS,
    "plugin_namespace": PLUGIN_NAMESPACE,
    "plugin_version": PLUGIN_VERSION,
    "rotary_embedding_qk": ROTARY_EMBEDDING_QK,
    "moe_router": MOE_ROUTER,
    "moe_experts": MOE_EXPERTS,
    "most_experts": MOST_EXPERTS,
    "most_chosen": MOST_CHOSEN,
    "input_ids": INPUT_IDS,
    "position_ids": POSITION_IDS,
    "write_indices": WRITE_INDICES,
    "key_positions": KEY_POSITIONS,
    "logits_indices": LOGITS_INDICES,
    "request_lengths": REQUEST_LENGTHS,
    "score_bytes": SCORE_BYTES,
    "most_scores": MOST_SCORES,
    "most_positions": MOST_POSITIONS,
    "logits": LOGITS,
    "capacity_axis": CAPACITY,
    "query_prefix": _QUERY,
    "masked": MASKED,
    "direct": DIRECT,
    "chunked": CHUNKED,
    "split": SPLIT,
    "span_multiple": SPAN_MULTIPLE,
    "int8": INT8,
    "e4m3": E4M3,
    "onnxruntime": ONNXRUNTIME,
    "tensorrt": TENSORRT,
    "tensorrt_rtx": TENSORRT_RTX,
    "oldest_plugin_gpu": OLDEST_PLUGIN_GPU,
    "plugin_gpus": ";".join(gpu.removeprefix("sm") for gpu in GPUS["plugins"]),
}


def header() -> str:
    """The header for C++ and CUDA."""
    lines = [
        f"constexpr int {name} = {value};"
        if isinstance(value, int)
        else f'constexpr char {name}[] = "{value}";'
        for name, value in FOR_CPP.items()
    ]
    dtypes = ", ".join(
        f'{{"{dtype.name}", "{dtype.binding}", {dtype.itemsize}}}' for dtype in DTYPES.values()
    )
    return "\n".join(
        [
            "// Generated from qwenport/contract.py.",
            "#pragma once",
            "",
            "namespace qwenport::contract {",
            "",
            *lines,
            "",
            "/// The names of a dtype of weights and cache, and of a binding of it.",
            "struct Dtype {",
            "  const char* name;",
            "  const char* binding;",
            "  int itemsize;",
            "};",
            f"constexpr Dtype dtypes[] = {{{dtypes}}};",
            "",
            "}  // namespace qwenport::contract",
            "",
        ]
    )


if __name__ == "__main__":
    print(header(), end="")
