"""An engine run by TensorRT or TensorRT-RTX on a GPU, its KV cache updated in place.

torch owns the device memory; TensorRT gets addresses. A cache's past and present are one allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenport.contract import DTYPES, LOGITS, LOGITS_INDICES, PLAN, present_of
from qwenport.engines.engine import Engine
from qwenport.engines.errors import EngineError, SessionError
from qwenport.engines.memory import poison, poison_slots, read_slots, write_slots
from qwenport.engines.plugin_library import register_for_run
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.session import Bytes, Float32, Int64, whole
from qwenport.engines.targets import FLAVOURS, load_tensorrt


class TensorRTSession(SavedSession):
    """`Session` over an engine directory."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 1,
        capacity: int | None = None,
        device: str = "cuda",
        tensorrt: Any = None,
    ) -> None:
        """Load the plan and allocate the cache.

        Args:
            engine: the engine to run.
            max_batch: rows, at most the engine's.
            capacity: usable slots per row, at most the engine's (the default). The memory is the
                engine's capacity either way: TensorRT fixes it.
            device: torch device of all buffers.
            tensorrt: module to use in place of the engine's flavour.

        Raises:
            MissingExtraError: the flavour is not installed.
            EngineError: no GPU, a GPU that the engine was not built for, another TensorRT version, or a plan that
                TensorRT refuses.
            SessionError: more rows or slots than the engine has.
        """
        import torch

        manifest = engine.manifest
        model = manifest["model"]
        max_batch = whole(max_batch, "rows")
        capacity = manifest["max_seq_len"] if capacity is None else whole(capacity, "slots")
        if capacity > manifest["max_seq_len"] or max_batch > manifest["max_batch"]:
            raise SessionError(
                f"{max_batch} rows of {capacity} slots, but the engine was built for "
                f"{manifest['max_batch']} rows of {manifest['max_seq_len']}"
            )
        super().__init__(
            max_batch=max_batch,
            capacity=capacity,
            vocab_size=model["vocab_size"],
            max_step_tokens=engine.max_step_tokens,
            max_step_logits=engine.max_step_logits,
            max_positions=manifest["max_seq_len"],
        )
        if tensorrt is None:
            check_gpu(engine)
            tensorrt = load_tensorrt(FLAVOURS[manifest["flavour"]], "run this engine")
        check_version(engine, tensorrt.__version__)
        self._device = torch.device(device)
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        for name in manifest["plugins"]:
            register_for_run(self._runtime, engine.path / name)
        self._engine = self._runtime.deserialize_cuda_engine(engine.plan.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{engine.path}: TensorRT refused the plan; build it again on this version"
            )
        self._context = self._engine.create_execution_context()
        self._dtype = DTYPES[manifest["dtype"]]
        self._plan_sha256 = manifest["files"][PLAN]["sha256"]
        self._row_shape = (model["num_key_value_heads"], manifest["max_seq_len"], model["head_dim"])
        # zeros, not uninitialised memory: a masked slot is still multiplied, and 0 x NaN is NaN
        self._cache = {
            past: torch.zeros(
                (max_batch, *self._row_shape), dtype=self._dtype.torch, device=self._device
            )
            for past in manifest["aliases"].values()
        }
        for present, past in manifest["aliases"].items():
            for name in (past, present):
                self._context.set_tensor_address(name, self._cache[past].data_ptr())
        self._bound_rows = 0

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
        return read_slots(self._cache[name], row, count)

    def _write_slots(self, name: str, row: int, data: Bytes) -> None:
        write_slots(self._cache[name], row, data)

    def _poison_slots(self, name: str, row: int, start: int) -> None:
        cache = self._cache[name]
        poison_slots(cache, row, poison(self._dtype, start, cache.shape[2]))

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        import torch

        rows, wanted = feeds[LOGITS_INDICES].shape
        if rows != self._bound_rows:
            for past in self._cache:
                self._set_shape(past, (rows, *self._row_shape))
            self._bound_rows = rows
        # kept alive until the stream is done with them
        inputs = {
            name: torch.from_numpy(np.array(array)).to(self._device)
            for name, array in feeds.items()
        }
        for name, tensor in inputs.items():
            self._set_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        logits = torch.empty(
            (rows, wanted, self.vocab_size), dtype=torch.float32, device=self._device
        )
        self._context.set_tensor_address(LOGITS, logits.data_ptr())
        stream = torch.cuda.current_stream(self._device).cuda_stream if logits.is_cuda else 0
        if not self._context.execute_async_v3(stream):
            raise EngineError("TensorRT refused to run a step; its log says why")
        result: Float32 = logits.cpu().numpy()
        return result

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise EngineError(f"{name} of shape {list(shape)} is outside the engine's profile")


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
