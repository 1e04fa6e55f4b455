"""A stand-in for the TensorRT runtime, for machines without a GPU.

It implements the few calls that a session makes: deserialize, set shapes and addresses, enqueue. A step is
run by onnxruntime on the memory that the session registered, so a wrong address, shape, dtype or alias
gives wrong numbers or an error, as on a GPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qwenport import engines, exporter
from qwenport.engines.lowering import for_tensorrt


def stand_in(engine: engines.Engine, package: exporter.Package) -> Any:
    """Return an object that a session can use in place of the `tensorrt` module (fp32 engines)."""

    class Runtime:
        def __init__(self, logger: object) -> None:
            del logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            assert plan == engine.plan.read_bytes()
            return SimpleNamespace(create_execution_context=lambda: Context(engine, package))

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            del severity

    version = engine.manifest["runtime_version"]
    return SimpleNamespace(Runtime=Runtime, Logger=Logger, __version__=version)


class Context:
    """An IExecutionContext over onnxruntime; `steps` counts what was run."""

    def __init__(self, engine: engines.Engine, package: exporter.Package) -> None:
        self.manifest = engine.manifest
        model = for_tensorrt(
            ir.load(package.model),
            dtype="fp32",
            capacity=self.manifest["max_seq_len"],
            positions=self.manifest["max_seq_len"],
            kv_heads=package.config.num_key_value_heads,
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(Path(package.path))
        )
        self.session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self.manifest["profiles"][0][name]
        inside = all(
            low <= size <= high
            for low, size, high in zip(limits["min"], shape, limits["max"], strict=True)
        )
        self.shapes[name] = shape
        return inside

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address, name
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0
        bindings = self.manifest["bindings"]
        assert set(self.addresses) == {b["name"] for side in bindings.values() for b in side}
        binding = self.session.io_binding()
        for b in bindings["inputs"]:
            dtype = {"int64": np.int64, "float": np.float32}[b["dtype"]]
            binding.bind_input(
                b["name"], "cpu", 0, dtype, self.shapes[b["name"]], self.addresses[b["name"]]
            )
        for present, past in self.manifest["aliases"].items():
            assert self.addresses[present] == self.addresses[past]
            binding.bind_output(
                present, "cpu", 0, np.float32, self.shapes[past], self.addresses[present]
            )
        rows, wanted = self.shapes["logits_indices"]
        shape = (rows, wanted, self.manifest["model"]["vocab_size"])
        binding.bind_output("logits", "cpu", 0, np.float32, shape, self.addresses["logits"])
        self.session.run_with_iobinding(binding)
        return True


def read(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """fp32 memory at an address, as the session left it."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)
