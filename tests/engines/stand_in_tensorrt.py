"""A stand-in for the TensorRT runtime and a GPU, for machines without one.

It implements the calls that a session makes, and is as unforgiving as a GPU: work given to the stream runs when
somebody waits for it, copies are between page-locked and device memory, and a context checks its profile, workspace and
addresses. A step is run by onnxruntime on the memory that the session registered, so a wrong address, shape, dtype or
alias gives wrong numbers or an error.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from qwenport import engines, exporter
from qwenport.engines.lowering import for_tensorrt

STREAM = 7


class HostGpu:
    """In place of `qwenport.engines.gpu.Gpu`.

    Attributes:
        allocations: how often memory was allocated.
        copied: bytes that were copied to the host.
        identity: as the real one's.
    """

    stream = STREAM

    def __init__(self) -> None:
        self.identity = ["stand-in", "0.0", "12000", ""]
        self.allocations = self.copied = 0
        self._device: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        self._queue: list[Callable[[], Any]] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(shape, dtype=dtype)
        self.allocations += memory.nbytes > 0
        self._device.append(memory)
        return memory

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.full(shape, 77, dtype=dtype)  # nobody may count on zeros
        self.allocations += 1
        self._pinned.append(memory)
        return memory

    @contextmanager
    def used(self) -> Iterator[None]:
        assert not self._queue, "the session reads what is not computed yet"
        yield

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        kinds = [self._kind(to), self._kind(source)]
        assert sorted(kinds) == ["device", "pinned"]
        if kinds[0] == "pinned":
            self.copied += to.nbytes
        assert to.shape == source.shape
        self.submit(lambda: to.copy_(source))

    def _kind(self, memory: torch.Tensor) -> str:
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        for kind, known in (("device", self._device), ("pinned", self._pinned)):
            for one in known:
                if one.data_ptr() <= begin and end <= one.data_ptr() + one.nbytes:
                    return kind
        return "neither"

    def submit(self, work: Callable[[], Any]) -> None:
        self._queue.append(work)

    def synchronize(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()


def stand_in(engine: engines.Engine, package: exporter.Package) -> Any:
    """An object that a session can use in place of the `tensorrt` module (fp32 engines); its `gpu` replaces the GPU.

    Its `calls` are those that were made, its `contexts` the execution contexts.
    """
    gpu, calls = HostGpu(), []
    trt = SimpleNamespace(gpu=gpu, calls=calls, contexts=[])

    class Runtime:
        def __init__(self, logger: object) -> None:
            del logger

        def deserialize_cuda_engine(self, reader: Any) -> Any:
            assert isinstance(reader, IStreamReaderV2)
            calls.append(("deserialize",))
            plan = reader.read(16, 0)
            assert reader.seek(-8, SeekPosition.CUR) and reader.read(8, 0) == plan[8:]
            assert reader.seek(-1, SeekPosition.END) and len(reader.read(10, 0)) == 1
            assert reader.seek(0, SeekPosition.SET)
            plan = b""
            while piece := reader.read(1 << 30, 0):
                assert len(piece) <= 1 << 24
                plan += piece
            return Engine() if plan == engine.plan.read_bytes() else None

    class Engine:
        def create_runtime_config(self) -> Any:
            return RuntimeConfig()

        def create_execution_context(self, settings: Any) -> Any:
            if isinstance(settings, RuntimeConfig):
                calls.append(("create_execution_context", dict(vars(settings))))
            else:
                calls.append(("create_execution_context", settings))
            trt.contexts.append(Context(engine, package, gpu, calls))
            return trt.contexts[-1]

        def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
            return 1 << 20

    class RuntimeConfig:
        def create_runtime_cache(self) -> Any:
            return RuntimeCache(trt)

        def set_runtime_cache(self, cache: Any) -> bool:
            self.cache = cache
            return True

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self.strategy = strategy

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            del severity

    class IStreamReaderV2:
        def __init__(self) -> None:
            self.constructed = True

    trt.Runtime, trt.Logger, trt.IStreamReaderV2 = Runtime, Logger, IStreamReaderV2
    trt.SeekPosition, trt.CudaGraphStrategy = SeekPosition, CudaGraphStrategy
    trt.ExecutionContextAllocationStrategy = AllocationStrategy
    trt.DynamicShapesKernelSpecializationStrategy = Specialization
    trt.__version__ = engine.manifest["runtime_version"]
    return trt


SeekPosition = enum.Enum("SeekPosition", ["SET", "CUR", "END"])
AllocationStrategy = enum.Enum("AllocationStrategy", ["STATIC", "USER_MANAGED"])
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
Specialization = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])


class RuntimeCache:
    """Holds a line for each shape that was run; refuses what does not begin as one."""

    MAGIC = b"kernels"

    def __init__(self, trt: Any) -> None:
        self._trt, self._before = trt, set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.MAGIC):
            return False
        self._before = set(blob.split(b"\n")[1:])
        self._trt.calls.append(("kernels", len(self._before)))
        return True

    def serialize(self) -> memoryview:
        run = {str(shape).encode() for context in self._trt.contexts for shape in context.ran}
        return memoryview(b"\n".join([self.MAGIC, *sorted(self._before | run)]))


_sessions: dict[tuple[Path, int], ort.InferenceSession] = {}


def _loaded(package: exporter.Package, slots: int) -> ort.InferenceSession:
    """The network, loaded once."""
    key = package.path, slots
    if key not in _sessions:
        model, _ = for_tensorrt(
            ir.load(package.model),
            dtype="fp32",
            capacity=slots,
            rope_rows=package.config.rope_rows(slots),
            kv_heads=package.config.num_key_value_heads,
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(package.path)
        )
        model = ir.to_proto(model).SerializeToString()
        _sessions[key] = ort.InferenceSession(model, options)
    return _sessions[key]


class Context:
    """An IExecutionContext over onnxruntime.

    Attributes:
        ran: the shapes of input_ids and key_positions that were run.
        extra: bytes of workspace that single-token steps need in addition.
    """

    def __init__(
        self, engine: engines.Engine, package: exporter.Package, gpu: HostGpu, calls: list[Any]
    ) -> None:
        self.manifest, self.gpu, self.calls = engine.manifest, gpu, calls
        self.session = _loaded(package, self.manifest["attention"]["slots"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile, self.workspace, self.extra = 0, (0, 0), 0
        self.ran: set[Any] = set()

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM and not self.shapes, "shapes are of the profile"
        self.profile = profile
        self.calls.append(("profile", profile))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self.manifest["profiles"][self.profile][name]
        inside = all(
            low <= size <= high
            for low, size, high in zip(limits["min"], shape, limits["max"], strict=True)
        )
        self.shapes[name] = shape
        return inside

    def update_device_memory_size_for_shapes(self) -> int:
        inputs = {b["name"] for b in self.manifest["bindings"]["inputs"]}
        assert set(self.shapes) == inputs, "all shapes first"
        (rows, width), (span,) = self.shapes["input_ids"], self.shapes["key_positions"]
        return 256 + rows * width * span + (self.extra if width == 1 else 0)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address
        self.workspace = (address, size)

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address, name
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert self.workspace[1] >= self.update_device_memory_size_for_shapes()
        self.ran.add((self.shapes["input_ids"], self.shapes["key_positions"]))
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.gpu.submit(lambda: self.run(shapes, addresses))
        return True

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        bindings = self.manifest["bindings"]
        assert set(addresses) == {b["name"] for side in bindings.values() for b in side}
        queries = {name: at for name, at in addresses.items() if name.startswith("query.")}
        assert len(set(queries.values())) <= 1
        for at in set(queries.values()):  # what a network writes there is not used
            model = self.manifest["model"]
            size = model["num_attention_heads"] * model["head_dim"] * 4
            ctypes.memset(at, 0x55, int(np.prod(shapes["input_ids"])) * size)
        binding = self.session.io_binding()
        for b in bindings["inputs"]:
            dtype = {"int64": np.int64, "float": np.float32}[b["dtype"]]
            binding.bind_input(b["name"], "cpu", 0, dtype, shapes[b["name"]], addresses[b["name"]])
        for present, past in self.manifest["aliases"].items():
            assert addresses[present] == addresses[past]
            binding.bind_output(present, "cpu", 0, np.float32, shapes[past], addresses[present])
        rows, wanted = shapes["logits_indices"]
        shape = (rows, wanted, self.manifest["model"]["vocab_size"])
        binding.bind_output("logits", "cpu", 0, np.float32, shape, addresses["logits"])
        self.session.run_with_iobinding(binding)


def read(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """fp32 memory at an address, as the session left it."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)
