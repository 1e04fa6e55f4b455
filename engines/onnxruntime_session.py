"""A package run by onnxruntime, with the KV cache's past and present in the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenport import import_extra
from qwenport.contract import DTYPES, INPUT_IDS, LOGITS, MANIFEST, caches, past, present
from qwenport.engines.errors import SessionError
from qwenport.engines.lowering import for_onnxruntime
from qwenport.engines.memory import untouched_zeros
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.session import Bytes, Float32, Int64, whole
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
    """`Session` over a package.

    On the CPU everything is computed in fp32 whatever the package's dtype; on CUDA in the package's.
    The cache is allocated once, zeroed, and bound as past and as present: TensorScatter then writes the
    new slots in place.
    """

    def __init__(
        self,
        package: Package,
        *,
        max_batch: int = 1,
        capacity: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        observe: Sequence[str] = (),
        loaded: Any = None,
    ) -> None:
        """Load the package.

        Args:
            package: the package to run.
            max_batch: rows, at most the package's.
            capacity: cache slots per row, at most the package's max_seq_len (the default).
            device: "cpu" or "cuda".
            threads: CPU threads per operator; by default onnxruntime's own choice.
            observe: values of the package's graph that each step leaves in `observed`.
            loaded: the onnxruntime session that `beside` shares.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            SessionError: more rows or slots than the package has, the device is not available, or the
                graph has no such value to observe.
        """
        max_batch = whole(max_batch, "rows")
        capacity = package.max_seq_len if capacity is None else whole(capacity, "slots")
        if device not in list(PROVIDERS):
            raise SessionError(
                f"device must be one of {', '.join(PROVIDERS)}, found {device!r:.60}"
            )
        if capacity > package.max_seq_len:
            raise SessionError(
                f"capacity {capacity} is beyond the package's max_seq_len {package.max_seq_len}"
            )
        if max_batch > package.max_batch:
            raise SessionError(
                f"{max_batch} rows, but the package was made for {package.max_batch}"
            )
        config = package.config
        super().__init__(
            max_batch=max_batch,
            capacity=capacity,
            vocab_size=config.vocab_size,
            max_step_tokens=MAX_STEP_TOKENS,
            max_step_logits=MAX_STEP_TOKENS,
            max_positions=package.max_seq_len,
        )
        self._ort = import_extra("onnxruntime", "cpu", "run packages")
        self.device = device
        self._package, self._observe = package, tuple(observe)
        self._dtype = "fp32" if device == "cpu" else package.dtype
        self._session = self._load(package, threads) if loaded is None else loaded
        # zeros, not uninitialised memory: a masked slot is still multiplied, and 0 x NaN is NaN
        dtype = DTYPES[self._dtype]
        bits = np.dtype(f"u{dtype.itemsize}")  # NumPy has no bf16, and zero has the same bits
        shape = (max_batch, config.num_key_value_heads, capacity, config.head_dim)
        self._element = int(dtype.ir)
        self._cache: dict[str, _Memory] = {
            cache: self._allocate(shape, bits)
            for layer in range(config.num_hidden_layers)
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
            SessionError: more rows or slots than the package has.
        """
        return OnnxRuntimeSession(
            self._package,
            max_batch=max_batch,
            capacity=capacity,
            device=self.device,
            observe=self._observe,
            loaded=self._session,
        )

    def _identity(self) -> str:
        return f"{sha256(self._package.path / MANIFEST)} {self._dtype}"

    def _cache_names(self) -> Sequence[str]:
        return tuple(self._cache)

    def _read_slots(self, name: str, row: int, count: int) -> Bytes:
        return np.ascontiguousarray(self._values(name)[row, :, :count]).view(np.uint8)

    def _write_slots(self, name: str, row: int, data: Bytes) -> None:
        values = self._values(name)
        values[row, :, : data.shape[1]] = data.view(values.dtype)
        if self.device != "cpu":
            self._cache[name].owner.update_inplace(values)

    def _values(self, name: str) -> Any:
        """A cache [rows, heads, slots, head_dim]: its memory on the CPU, a copy of it elsewhere."""
        owner = self._cache[name].owner
        return owner if self.device == "cpu" else owner.numpy()

    def _load(self, package: Package, threads: int | None) -> Any:

        model = package.read_model()
        with damaged(package.model):
            return self._start(model, package, threads)

    def _start(self, model: Any, package: Package, threads: int | None) -> Any:
        values = {value.name: value for node in model.graph for value in node.outputs}
        for name in self._observe:
            if name not in values:
                raise SessionError(f"{package.model} has no value {name} that could be observed")
            model.graph.outputs.append(values[name])
        model = for_onnxruntime(model, on_cpu=self.device == "cpu")
        return start_onnxruntime(model, package.path, device=self.device, threads=threads)

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


def start_onnxruntime(
    model: Any, folder: Path, *, device: str = "cpu", threads: int | None = None
) -> Any:
    """An onnxruntime InferenceSession for a lowered model whose external data is below `folder`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        SessionError: the device is not available, or onnxruntime does not load the model.
    """
    import onnx_ir as ir

    ort = import_extra("onnxruntime", "cpu", "run packages")
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise SessionError(
            f"onnxruntime here has no {device} provider; "
            "for CUDA install qwenport[gpu] in place of qwenport[cpu]"
        )
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
    proto = ir.to_proto(model)
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions have no base class
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionError(f"{folder}: onnxruntime does not load it: {said}") from error
