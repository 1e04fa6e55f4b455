"""A package or an engine run by onnxruntime, with the KV cache's past and present in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenport import import_extra
from qwenport.contract import (
    CAPACITY,
    DTYPES,
    FP32,
    INPUT_IDS,
    INT8,
    LOGITS,
    MANIFEST,
    MOST_THREADS,
    OLDEST_ONNXRUNTIME,
    ONNXRUNTIME,
    SCORE_BYTES,
    caches,
    is_past,
    past,
    present,
)
from qwenport.engines.engine import Engine
from qwenport.engines.errors import EngineError, SessionError
from qwenport.engines.huge_pages import huge_pages
from qwenport.engines.memory import poison, untouched_zeros
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.session import Bytes, Float32, Int64
from qwenport.engines.session_arguments import whole
from qwenport.exporter import Package, damaged, sha256

# Attention scores take heads x tokens x span numbers, so a long prompt runs in chunks.
MAX_STEP_TOKENS = 512
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class _Memory:
    """The memory of one cache and the object that keeps it alive."""

    owner: Any
    address: int


class OnnxRuntimeSession(SavedSession):
    """`Session` over a package, or over an engine for onnxruntime.

    On the CPU everything is computed in fp32 whatever the package's dtype; on CUDA in the package's. An engine holds
    the graph and the weights that a package is lowered to for the CPU, so it loads in less time and runs only there.
    The cache is allocated once, zeroed, and bound as past and as present: TensorScatter then writes the
    new slots in place.
    """

    def __init__(
        self,
        source: Package | Engine,
        *,
        max_batch: int = 1,
        capacity: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        observe: Sequence[str] = (),
        load: Callable[[], Any] | None = None,
    ) -> None:
        """Load the model.

        Args:
            source: the package or engine to run.
            max_batch: rows, at most the source's.
            capacity: cache slots per row, at most the source's max_seq_len (the default).
            device: "cpu", or for a package "cuda".
            threads: CPU threads per operator, 1 to MOST_THREADS; by default onnxruntime's own choice.
            observe: values of a package's graph that each step leaves in `observed`.
            load: returns an onnxruntime session of the lowered source, or None; by default the source is lowered and
                loaded here.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            EngineError: an engine that is not for onnxruntime, or whose graph is not what its manifest says.
            SessionError: more rows or slots than the source has, no thread, the device is not available, or the
                graph has no such value to observe.
        """
        max_batch = whole(max_batch, "rows")
        manifest = source.manifest
        model, longest = manifest["model"], manifest["max_seq_len"]
        chunks = model.get("dual_chunk")
        kind = "engine" if isinstance(source, Engine) else "package"
        capacity = longest if capacity is None else whole(capacity, "slots")
        if device not in list(PROVIDERS):
            raise SessionError(
                f"device must be one of {', '.join(PROVIDERS)}, found {device!r:.60}"
            )
        if threads is not None and not 1 <= whole(threads, "threads") <= MOST_THREADS:
            raise SessionError(f"threads must be in [1, {MOST_THREADS}], found {threads}")
        if capacity > longest:
            raise SessionError(f"capacity {capacity} is beyond the {kind}'s max_seq_len {longest}")
        if max_batch > manifest["max_batch"]:
            raise SessionError(
                f"{max_batch} rows, but the {kind} was made for {manifest['max_batch']}"
            )
        super().__init__(
            max_batch=max_batch,
            capacity=capacity,
            vocab_size=model["vocab_size"],
            max_step_tokens=MAX_STEP_TOKENS,
            max_step_logits=MAX_STEP_TOKENS,
            max_positions=longest,
            unscaled_length=None if chunks is None else chunks["original_max_position_embeddings"],
            score_bytes=0 if chunks is None else SCORE_BYTES * model["num_attention_heads"],
        )
        self._ort = import_extra("onnxruntime", "cpu", f"run this {kind}")
        self.device = device
        self._source, self._observe = source, tuple(observe)
        self._dtype = FP32.name if device == "cpu" else manifest["dtype"]
        loaded = None if load is None else load()
        self._session = self._load(threads) if loaded is None else loaded
        # zeros, not uninitialised memory: a masked slot is still multiplied, and 0 x NaN is NaN
        dtype = DTYPES[self._dtype]
        bits = np.dtype(f"u{dtype.itemsize}")  # NumPy has no bf16, and zero has the same bits
        shape = (max_batch, model["num_key_value_heads"], capacity, model["head_dim"])
        self._element = dtype.number
        self._cache: dict[str, _Memory] = {
            cache: self._allocate(shape, bits)
            for layer in range(model["num_hidden_layers"])
            for cache in caches(layer)
        }
        self._row_shape = list(shape[1:])
        self._bound_rows = 0
        self._binding: Any = None

    def beside(self, *, max_batch: int, capacity: int) -> OnnxRuntimeSession:
        """Another session over the same loaded model, with its own cache.

        Args:
            max_batch: as in the constructor.
            capacity: as in the constructor.

        Raises:
            SessionError: more rows or slots than the source has.
        """
        return OnnxRuntimeSession(
            self._source,
            max_batch=max_batch,
            capacity=capacity,
            device=self.device,
            observe=self._observe,
            load=lambda: self._session,
        )

    def _identity(self) -> str:
        return f"{sha256(self._source.path / MANIFEST)} {self._dtype}"

    def _cache_names(self) -> Sequence[str]:
        return tuple(self._cache)

    def _read_slots(self, name: str, row: int, count: int) -> Bytes:
        return np.ascontiguousarray(self._values(name)[row, :, :count]).view(np.uint8)

    def _write_slots(self, name: str, row: int, data: Bytes) -> None:
        values = self._values(name)
        values[row, :, : data.shape[1]] = data.view(values.dtype)
        if self.device != "cpu":
            self._cache[name].owner.update_inplace(values)

    def _poison_slots(self, name: str, row: int, start: int) -> None:
        values = self._values(name)
        values[row, :, start:] = poison(DTYPES[self._dtype], start, values.shape[2])[:, None]
        if self.device != "cpu":
            self._cache[name].owner.update_inplace(values)

    def _values(self, name: str) -> Any:
        """A cache [rows, heads, slots, head_dim]: its memory on the CPU, a copy of it elsewhere."""
        owner = self._cache[name].owner
        return owner if self.device == "cpu" else owner.numpy()

    def _load(self, threads: int | None) -> Any:
        source = self._source
        if isinstance(source, Engine):
            return self._load_engine(source, threads)
        model = source.read_model()
        with damaged(source.model):
            return self._load_package(model, source, threads)

    def _load_engine(self, engine: Engine, threads: int | None) -> Any:
        if engine.flavour != ONNXRUNTIME:
            raise EngineError(f"{engine.path}: built for {engine.flavour}, not for {ONNXRUNTIME}")
        if self.device != "cpu":
            raise SessionError(f"{engine.path}: an engine for {ONNXRUNTIME} runs on the CPU only")
        if self._observe:
            raise SessionError(f"{engine.path}: values of an engine cannot be observed")
        check_onnxruntime("cpu", engine.manifest["runtime_version"])
        quantized = engine.manifest["quantization"]
        few_bits = quantized is not None and quantized["activations"] == INT8
        with huge_pages() if few_bits else nullcontext():
            session = start_onnxruntime(str(engine.model), engine.path, threads=threads)
        check_bindings(engine, session)
        return session

    def _load_package(self, model: Any, package: Package, threads: int | None) -> Any:
        values = {value.name: value for node in model.graph for value in node.outputs}
        for name in self._observe:
            if name not in values:
                raise SessionError(f"{package.model} has no value {name} that could be observed")
            model.graph.outputs.append(values[name])
        import onnx_ir as ir  # takes long to import, and an engine does without

        from qwenport.engines.lowering import for_onnxruntime

        model = for_onnxruntime(model, on_cpu=self.device == "cpu")
        serialized = ir.to_proto(model).SerializeToString()
        return start_onnxruntime(serialized, package.path, device=self.device, threads=threads)

    def _allocate(self, shape: tuple[int, ...], bits: Any) -> _Memory:
        if self.device == "cpu":
            zeros = untouched_zeros(shape, bits)
            return _Memory(zeros, zeros.ctypes.data)
        value = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, bits), self.device, 0)
        return _Memory(value, value.data_ptr())

    def cache_addresses(self) -> dict[str, tuple[int, int]]:
        """Binding name, past or present -> (address, bytes) of its memory."""
        size = self.max_batch * int(np.prod(self._row_shape)) * DTYPES[self._dtype].itemsize
        return {
            binding: (memory.address, size)
            for name, memory in self._cache.items()
            for binding in (past(name), present(name))
        }

    def _bind_cache(self, rows: int) -> None:
        """Bind the first `rows` rows of every cache as past and as present."""
        self._binding = self._session.io_binding()
        shape = [rows, *self._row_shape]
        for name, memory in self._cache.items():
            place = (self.device, 0, self._element, shape, memory.address)
            self._binding.bind_input(past(name), *place)
            self._binding.bind_output(present(name), *place)
        self._bound_rows = rows

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        rows = len(feeds[INPUT_IDS])
        if rows != self._bound_rows:
            self._bind_cache(rows)
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        for name in (LOGITS, *self._observe):
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        # outputs are in the order in which they were first bound: the caches, then these
        results = self._binding.get_outputs()[len(self._cache) :]
        logits: Float32 = results[0].numpy()
        self.observed = {
            name: value.numpy() for name, value in zip(self._observe, results[1:], strict=True)
        }
        return logits


def check_onnxruntime(device: str, oldest: str = OLDEST_ONNXRUNTIME) -> Any:
    """The module onnxruntime, if its release is at least `oldest` and it can run packages on a device.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        SessionError: it is too old, or the device is not available.
    """
    ort = import_extra("onnxruntime", "cpu", "run packages")
    if [*map(int, ort.__version__.split(".")[:2])] < [*map(int, oldest.split("."))]:
        raise SessionError(
            f"onnxruntime here is {ort.__version__}; {oldest} or newer is needed "
            f"(pip install 'onnxruntime>={oldest}')"
        )
    if PROVIDERS[device] not in ort.get_available_providers():
        raise SessionError(
            f"onnxruntime here has no {device} provider; "
            "for CUDA install qwenport[gpu] in place of qwenport[cpu]"
        )
    return ort


def start_onnxruntime(
    model: bytes | str, folder: Path, *, device: str = "cpu", threads: int | None = None
) -> Any:
    """An onnxruntime InferenceSession for a lowered model, serialized or by its path.

    Args:
        model: the model.
        folder: where its external data is.
        device: "cpu" or "cuda".
        threads: CPU threads per operator; by default onnxruntime's own choice.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        SessionError: onnxruntime is too old or does not load the model, or the device is not available.
    """
    ort = check_onnxruntime(device)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are in the exception
    for key, value in {
        "session.model_external_initializers_file_folder_path": str(folder),
        # a large model's fp32 vocabulary matrix exceeds the default limit and would be recomputed in each step
        "optimization.constant_folding_max_output_size_in_bytes": str(1 << 62),
    }.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(model, options, providers=[PROVIDERS[device]])
    except Exception as error:  # onnxruntime's exceptions have no base class
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionError(f"{folder}: onnxruntime does not load it: {said}") from error


def check_bindings(engine: Engine, session: Any) -> None:
    """Compare the inputs and outputs of a loaded engine with its manifest.

    Raises:
        EngineError: they differ.
    """
    for side, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        found = [
            {
                "name": value.name,
                "dtype": value.type.removeprefix("tensor(").removesuffix(")"),
                "shape": value.shape,
            }
            for value in values
        ]
        if found != engine.manifest["bindings"][side]:
            raise EngineError(f"{engine.model}: its {side} are not those in {MANIFEST}")
    model = engine.manifest["model"]
    cache = ["batch", model["num_key_value_heads"], CAPACITY, model["head_dim"]]
    stated = {
        **{past(name): cache for n in range(model["num_hidden_layers"]) for name in caches(n)},
        LOGITS: ["batch", "n", model["vocab_size"]],
    }
    bindings = engine.manifest["bindings"]
    shapes = {b["name"]: b["shape"] for b in (*bindings["inputs"], *bindings["outputs"])}
    if {name: shapes[name] for name in shapes if is_past(name) or name == LOGITS} != stated:
        raise EngineError(f"{engine.path / MANIFEST}: its model does not have its bindings' shapes")
