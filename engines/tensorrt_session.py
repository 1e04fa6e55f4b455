"""An engine run by TensorRT or TensorRT-RTX on a GPU, its KV cache updated in place.

Everything that a step needs is allocated before: device memory for inputs, caches, workspace and logits, and
page-locked host memory that inputs are copied from and logits to. All work is on one stream of the session's own.

Single-token steps have an execution context of their own, so that neither they nor wider steps change the other's
shapes and optimization profile. The contexts share one workspace, as large as the session's own steps need.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwenport.contract import (
    DTYPES,
    INPUT_IDS,
    KEY_POSITIONS,
    LOGITS,
    LOGITS_INDICES,
    PLAN,
    POSITION_IDS,
    REQUEST_LENGTHS,
    TENSORRT_RTX,
    WRITE_INDICES,
    is_query,
    present_of,
)
from qwenport.engines.engine import Engine
from qwenport.engines.errors import EngineError, SessionError
from qwenport.engines.gpu import Gpu
from qwenport.engines.jit_cache import JitCache
from qwenport.engines.memory import poison, poison_slots, read_slots, write_slots
from qwenport.engines.plan import load_plan
from qwenport.engines.plugin_library import register_for_run
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.session import Bytes, Float32, Int64
from qwenport.engines.session_arguments import whole
from qwenport.engines.spans import Spans
from qwenport.engines.step_profiles import StepProfiles, StepSizes
from qwenport.engines.targets import FLAVOURS, load_tensorrt

if TYPE_CHECKING:
    import torch

SPECIALIZATIONS = LAZY, EAGER, NONE = ("lazy", "eager", "none")
"""When TensorRT-RTX compiles kernels for a shape: in the background, before its first step, or never."""


@dataclass
class _Input:
    """An input's memory for the largest step; steps use its beginning."""

    device: torch.Tensor
    pinned: torch.Tensor
    values: Int64  # `pinned` for NumPy


@dataclass
class _Context:
    """An execution context, and the sizes that it is prepared for."""

    context: Any
    profile: int
    sizes: StepSizes | None = field(default=None)


class TensorRTSession(SavedSession):
    """`Session` over an engine directory."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 1,
        capacity: int | None = None,
        specialization: str = LAZY,
        cuda_graphs: bool = True,
        tensorrt: Any = None,
        gpu: Any = None,
    ) -> None:
        """Load the plan and allocate the cache.

        Args:
            engine: the engine to run.
            max_batch: rows, at most the engine's.
            capacity: usable slots per row, at most the engine's (the default). The memory is the
                engine's capacity either way: TensorRT fixes it.
            specialization: TensorRT-RTX: one of SPECIALIZATIONS.
            cuda_graphs: TensorRT-RTX: whether it captures single-token steps as CUDA graphs, each shape after its
                kernels are compiled, and replays them.
            tensorrt: module to use in place of the engine's flavour.
            gpu: what to use in place of a `Gpu`.

        Raises:
            MissingExtraError: the flavour is not installed.
            EngineError: no GPU, a GPU that the engine was not built for, another TensorRT version, or a plan that
                TensorRT refuses.
            SessionError: more rows or slots than the engine has, or no such specialization.
        """
        manifest = engine.manifest
        model, attention = manifest["model"], manifest["attention"]
        chunks = model.get("dual_chunk")
        max_batch = whole(max_batch, "rows")
        capacity = manifest["max_seq_len"] if capacity is None else whole(capacity, "slots")
        if capacity > manifest["max_seq_len"] or max_batch > manifest["max_batch"]:
            raise SessionError(
                f"{max_batch} rows of {capacity} slots, but the engine was built for "
                f"{manifest['max_batch']} rows of {manifest['max_seq_len']}"
            )
        if specialization not in SPECIALIZATIONS:
            raise SessionError(
                f"specialization must be one of {', '.join(SPECIALIZATIONS)}, "
                f"found {specialization!r:.60}"
            )
        super().__init__(
            max_batch=max_batch,
            capacity=capacity,
            vocab_size=model["vocab_size"],
            max_step_tokens=min(engine.max_step_tokens, max(capacity, 1)),
            max_step_logits=engine.max_step_logits,
            max_positions=manifest["max_seq_len"],
            spans=Spans(attention["span_multiple"], attention["slots"]),
            unscaled_length=None if chunks is None else chunks["original_max_position_embeddings"],
        )
        if tensorrt is None:
            check_gpu(engine)
            tensorrt = load_tensorrt(FLAVOURS[manifest["flavour"]], "run this engine")
        check_version(engine, tensorrt.__version__)
        self._trt, self._gpu = tensorrt, Gpu() if gpu is None else gpu
        self._profiles = StepProfiles(manifest["profiles"])
        self._plan_sha256 = manifest["files"][PLAN]["sha256"]
        self._row_shape = (model["num_key_value_heads"], attention["slots"], model["head_dim"])
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        for name in manifest["plugins"]:
            register_for_run(self._runtime, engine.path / name)
        try:
            self._engine = load_plan(tensorrt, self._runtime, engine.plan)
        except OSError as error:
            raise EngineError(f"{engine.plan}: cannot be read: {error.strerror}") from error
        if self._engine is None:
            raise EngineError(
                f"{engine.path}: TensorRT refused the plan; build it again on this version"
            )
        self._allocate(manifest)
        self._kernels = self._kept_kernels(engine)
        self._specialization, self._cuda_graphs = specialization, cuda_graphs
        self._contexts: dict[tuple[bool, int], _Context] = {}
        self._reserve_workspace()

    def _allocate(self, manifest: dict[str, Any]) -> None:
        """Everything but the workspace and the logits of more than one token per row."""
        import torch

        self._dtype, rows = DTYPES[manifest["dtype"]], self.max_batch
        dtype = self._dtype.torch
        # zeros, not uninitialised memory: a masked slot is still multiplied, and 0 x NaN is NaN
        self._cache = {
            past: self._gpu.zeros((rows, *self._row_shape), dtype)
            for past in manifest["aliases"].values()
        }
        tokens = rows * self.max_step_tokens
        outputs = [binding["name"] for binding in manifest["bindings"]["outputs"]]
        self._query_names = [name for name in outputs if is_query(name)]
        model = manifest["model"]
        heads = model["num_attention_heads"] * model["head_dim"] if self._query_names else 0
        self._queries = self._gpu.zeros((tokens * heads,), dtype)  # one for all: not used
        sizes = {
            INPUT_IDS: tokens,
            POSITION_IDS: tokens,
            WRITE_INDICES: rows,
            KEY_POSITIONS: self.spans.holding(self.capacity),
            LOGITS_INDICES: rows * self.max_step_logits,
        }
        if self._scale is not None:
            sizes[REQUEST_LENGTHS] = rows
        self._inputs = {name: self._make_input(count) for name, count in sizes.items()}
        self._uploaded_position: int | None = None  # of slot 0, in key_positions
        self._allocate_logits(1)
        self._workspace = self._gpu.zeros((0,), torch.uint8)

    def _make_input(self, count: int) -> _Input:
        import torch

        pinned = self._gpu.pinned((count,), torch.int64)
        return _Input(self._gpu.zeros((count,), torch.int64), pinned, pinned.numpy())

    def _allocate_logits(self, per_row: int) -> None:
        """Room for so many logits per row, on the device and the host."""
        import torch

        count = self.max_batch * per_row * self.vocab_size
        self._logits = self._gpu.zeros((count,), torch.float32)
        self._host_logits = self._gpu.pinned((count,), torch.float32)
        self._logits_per_row = per_row

    def _kept_kernels(self, engine: Engine) -> JitCache | None:
        """TensorRT-RTX's compiled kernels, which are saved when this session ends."""
        if engine.flavour != TENSORRT_RTX:
            return None
        self._config = self._engine.create_runtime_config()
        cache = self._config.create_runtime_cache()
        kernels = JitCache(engine, self._trt.__version__, self._gpu.identity, cache)
        # the arguments keep alive what the compiled kernels may depend on
        weakref.finalize(self, _save, kernels, self._config, self._engine, self._runtime)
        return kernels

    def _context_for(self, sizes: StepSizes) -> _Context:
        """The context that runs a step.

        Raises:
            EngineError: no profile of the engine admits it.
        """
        profile = self._profiles.of(sizes)
        if profile is None:
            raise EngineError(f"no profile of the engine admits steps of {sizes.width} tokens")
        key = (sizes.width == 1, profile)
        if key not in self._contexts:
            self._contexts[key] = self._make_context(profile, single=sizes.width == 1)
        return self._contexts[key]

    def _make_context(self, profile: int, single: bool) -> _Context:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            context = self._engine.create_execution_context(strategy)
        else:
            trt, config = self._trt, self._config
            config.set_execution_context_allocation_strategy(strategy)
            config.set_runtime_cache(self._kernels.runtime_cache)
            config.dynamic_shapes_kernel_specialization_strategy = getattr(
                trt.DynamicShapesKernelSpecializationStrategy, self._specialization.upper()
            )
            config.cuda_graph_strategy = (
                trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                if self._cuda_graphs and single
                else trt.CudaGraphStrategy.DISABLED
            )
            context = self._engine.create_execution_context(config)
        if context is None:
            raise EngineError("TensorRT refused an execution context; its log says why")
        if profile and not context.set_optimization_profile_async(profile, self._gpu.stream):
            raise EngineError(f"TensorRT refused profile {profile}; its log says why")
        addresses = {past: memory.data_ptr() for past, memory in self._cache.items()}
        addresses |= {present_of(past): address for past, address in addresses.items()}
        addresses |= {name: memory.device.data_ptr() for name, memory in self._inputs.items()}
        addresses |= dict.fromkeys(self._query_names, self._queries.data_ptr())
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        return _Context(context, profile)

    def _shapes(self, sizes: StepSizes) -> dict[str, tuple[int, ...]]:
        """Input name -> its shape."""
        rows, width, span, logits = sizes
        lengths = {} if self._scale is None else {REQUEST_LENGTHS: (rows,)}
        return {
            **lengths,
            INPUT_IDS: (rows, width),
            POSITION_IDS: (rows, width),
            WRITE_INDICES: (rows,),
            KEY_POSITIONS: (span,),
            LOGITS_INDICES: (rows, logits),
            **dict.fromkeys(self._cache, (rows, *self._row_shape)),
        }

    def _fits(self, rows: int, width: int, span: int) -> bool:
        """Whether a profile admits the step: they state what there is memory for."""
        return self._profiles.of(StepSizes(rows, width, span, 1)) is not None

    def _reserve_workspace(self) -> None:
        """Make the contexts, and allocate what their largest steps need, which is less than the engine's largest."""
        single, *several = self._profiles.largest(
            self.max_batch, self.max_step_tokens, self.spans.holding(self.capacity), self.spans
        )
        self._running = self._context_for(single)
        needed = [self._set_shapes(self._context_for(sizes), sizes) for sizes in (single, *several)]
        self._grow_workspace(max(needed))

    def _grow_workspace(self, size: int) -> None:
        """Replace the workspace; contexts have to be prepared again."""
        import torch

        self._prepare_again()
        self._gpu.synchronize()
        self._workspace = self._gpu.zeros((0,), torch.uint8)  # frees the old one first
        self._workspace = self._gpu.zeros((size,), torch.uint8)

    def _prepare_again(self) -> None:
        for running in self._contexts.values():
            running.sizes = None

    def _set_shapes(self, running: _Context, sizes: StepSizes) -> int:
        """Set the shapes of a step; return the bytes of workspace that it needs."""
        for name, shape in self._shapes(sizes).items():
            if not running.context.set_input_shape(name, shape):
                raise EngineError(f"{name} of shape {list(shape)} is outside the engine's profile")
        needed = int(running.context.update_device_memory_size_for_shapes())
        if needed == 0:  # it cannot say
            needed = int(self._engine.get_device_memory_size_for_profile_v2(running.profile))
        return needed

    def _prepare(self, running: _Context, sizes: StepSizes) -> None:
        if sizes.logits > self._logits_per_row:  # all logits, for the first time
            self._prepare_again()
            self._allocate_logits(self.max_step_logits)
        needed = self._set_shapes(running, sizes)
        if needed > len(self._workspace):
            self._grow_workspace(needed)
        running.context.set_device_memory(self._workspace.data_ptr(), len(self._workspace))
        running.context.set_tensor_address(LOGITS, self._logits.data_ptr())
        running.sizes = sizes

    def cache_addresses(self) -> dict[str, tuple[int, int]]:
        """Binding name -> (device address, bytes) of its memory; past and present are the same."""
        return {
            name: (memory.data_ptr(), memory.nbytes)
            for past, memory in self._cache.items()
            for name in (past, present_of(past))
        }

    def _identity(self) -> str:
        return str(self._plan_sha256)

    def _cache_names(self) -> Sequence[str]:
        return tuple(self._cache)

    def _read_slots(self, name: str, row: int, count: int) -> Bytes:
        with self._gpu.used():
            return read_slots(self._cache[name], row, count)

    def _write_slots(self, name: str, row: int, data: Bytes) -> None:
        with self._gpu.used():
            write_slots(self._cache[name], row, data)

    def _poison_slots(self, name: str, row: int, start: int) -> None:
        cache = self._cache[name]
        with self._gpu.used():
            poison_slots(cache, row, poison(self._dtype, start, cache.shape[2]))

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        rows, wanted = feeds[LOGITS_INDICES].shape
        sizes = StepSizes(rows, feeds[INPUT_IDS].shape[1], len(feeds[KEY_POSITIONS]), wanted)
        if self._running.sizes != sizes:
            self._running = self._context_for(sizes)
            if self._running.sizes != sizes:
                self._prepare(self._running, sizes)
        running = self._running
        self._upload(feeds)
        if not running.context.execute_async_v3(self._gpu.stream):
            raise EngineError("TensorRT refused to run a step; its log says why")
        return self._fetch(rows, wanted)

    def _upload(self, feeds: dict[str, Int64]) -> None:
        """Inputs to the device. key_positions is there already, unless slot 0 has another position."""
        for name, values in feeds.items():
            memory = self._inputs[name]
            if name == KEY_POSITIONS:
                if self._uploaded_position == values[0]:
                    continue
                self._uploaded_position = int(values[0])
                values = values[0] + np.arange(len(memory.values))
            count = values.size
            memory.values[:count] = values.reshape(-1)
            self._gpu.copy(memory.device[:count], memory.pinned[:count])

    def _fetch(self, rows: int, wanted: int) -> Float32:
        """Wait for the step, and return the logits of the rows that are asked for; the others' are zeros."""
        size = wanted * self.vocab_size
        asked = np.flatnonzero(self._asked).tolist()
        for row in asked:
            part = slice(row * size, (row + 1) * size)
            self._gpu.copy(self._host_logits[part], self._logits[part])
        self._gpu.synchronize()
        result: Float32 = np.zeros((rows, wanted, self.vocab_size), dtype=np.float32)
        found = self._host_logits[: rows * size].numpy().reshape(result.shape)
        for row in asked:
            result[row] = found[row]
        return result


def _save(kernels: JitCache, *alive: Any) -> None:
    kernels.save()


def check_gpu(engine: Engine) -> None:
    """Refuse to run an engine where it cannot run.

    Raises:
        EngineError: no GPU, or one that the engine was not built for; names the GPUs that it was built for.
    """
    import torch

    gpus = engine.manifest["gpus"]
    if not torch.cuda.is_available():
        raise EngineError(
            f"{engine.path}: an engine needs an NVIDIA GPU ({', '.join(gpus)}) and there is none here; "
            "the package it was built from runs on the CPU"
        )
    major, minor = torch.cuda.get_device_capability(0)
    if f"sm{major}{minor}" not in gpus:
        raise EngineError(
            f"{engine.path}: built for {', '.join(gpus)}, this GPU is sm{major}{minor}; build again with "
            f"--gpu sm{major}{minor}"
        )


def check_version(engine: Engine, version: str) -> None:
    """Refuse another TensorRT version: a plan is tied to the release that built it.

    Raises:
        EngineError: the versions differ.
    """
    built = engine.manifest["runtime_version"]
    if built != version:
        raise EngineError(
            f"{engine.path}: built by {engine.manifest['flavour']} {built}, installed is {version}; "
            "build it again or install that version"
        )
