"""A lowered ONNX model -> engine.plan, with TensorRT driven through Polygraphy's loaders; and back into TensorRT.

The plan is written as it is serialized and read as it is loaded, so it is never whole in this process's memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport.contract import Progress
from qwenport.engines.apart import run_apart
from qwenport.engines.errors import BuildError
from qwenport.engines.layer_check import HEADING, check_layers
from qwenport.engines.request import Profile
from qwenport.exporter import CHUNK_BYTES

if TYPE_CHECKING:
    from qwenport.engines.lowering import SignedWeight


def build_plan(
    trt: Any,
    model: Path,
    plan: Path,
    gpus: tuple[str, ...],
    profiles: Sequence[Profile],
    attention: str,
    weights: Sequence[SignedWeight],
    progress: Progress,
) -> dict[str, Any]:
    """Parse, check, change the attention, check again, build, and check what became of quantized weights.

    Args:
        trt: the TensorRT module, as returned by `load_tensorrt`.
        model: lowered ONNX file, next to its external data.
        plan: file to write.
        gpus: architectures to build for; empty for the local GPU.
        profiles: as in the manifest.
        attention: the form of attention.
        weights: the quantized ones; if there are none, TensorRT's list of layers is not read.
        progress: called with (what, done, total).

    Returns:
        "sha256" of the plan and "layers", the number of layers in the parsed network.

    Raises:
        LoweringError: something was lost in parsing, or the attention cannot have that form.
        BuildError: TensorRT refused the model; the message is its first error. Or it would expand a quantized weight.
    """
    from polygraphy.backend.trt import (
        CreateConfig,
        PostprocessConfig,
        network_from_onnx_path,
    )
    from polygraphy.backend.trt import Profile as TensorRTProfile
    from polygraphy.exception import PolygraphyException

    from qwenport.engines.lowering import change_attention, check_changed, check_network

    shapes = []
    for profile in profiles:
        shapes.append(TensorRTProfile())
        for name, ranges in profile.items():
            shapes[-1].add(name, min=ranges["min"], opt=ranges["opt"], max=ranges["max"])

    def choose_gpus(builder: Any, network: Any, config: Any) -> None:
        if gpus:
            config.num_compute_capabilities = len(gpus)
        for index, gpu in enumerate(gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index)

    monitor = _monitor(trt, progress)
    writer = _plan_writer(trt, plan)

    def build() -> int | None:
        """The number of layers in the network; None if TensorRT refused it."""
        builder, network, parser = network_from_onnx_path(str(model), strongly_typed=True)
        check_network(network, trt)
        changed = change_attention(network, trt, attention)
        check_changed(network, trt, attention)
        create = CreateConfig(profiles=shapes, progress_monitor=monitor)
        config = PostprocessConfig(create, choose_gpus)(builder, network)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        layers: int = network.num_layers
        del parser, changed  # they own the weights and constants that the network references
        return layers if built else None

    with _tensorrt_messages(layers=bool(weights)) as messages:
        try:
            layers = run_apart(build, monitor.stop)
        except PolygraphyException:
            layers = None
        finally:
            writer.close()
        for failure in (monitor.failure, writer.failure):
            if failure is not None:
                raise failure
        if layers is None:
            raise BuildError(f"TensorRT could not build the engine: {_first_error(messages)}")
    if weights:
        check_layers(messages, weights)
    return {"sha256": writer.hexdigest(), "layers": layers}


@contextmanager
def _tensorrt_messages(*, layers: bool) -> Iterator[list[str]]:
    """Collect TensorRT's warnings and errors, which Polygraphy would print; with `layers` also its list of layers."""
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.levelno >= logging.WARNING or HEADING in message:
                messages.append(message)

    logger, collector = logging.getLogger("Polygraphy"), Collector()
    propagate, logger.propagate = logger.propagate, False
    level, disabled = logger.level, logging.root.manager.disable
    logging.disable(logging.NOTSET)  # the command line has disabled all
    logger.setLevel(1 if layers else logging.WARNING)
    logger.addHandler(collector)
    G_LOGGER.use_python_logging_system = True
    try:
        with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE if layers else G_LOGGER.WARNING):
            yield messages
    finally:
        G_LOGGER.use_python_logging_system = False
        logging.disable(disabled)
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate


def _first_error(messages: list[str]) -> str:
    """The first message that is an error, without the complaint that this machine has no GPU."""
    errors = [m for m in messages if m.startswith("[E]") and "catchCudaError" not in m]
    return " ".join(errors[0].removeprefix("[E]").split()) if errors else "it gave no reason"


def _plan_writer(trt: Any, path: Path) -> Any:
    class PlanWriter(trt.IStreamWriter):
        """Writes and hashes the plan as TensorRT serializes it; keeps the first exception (disk full)."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.stream = path.open("wb")
            self.hash = hashlib.sha256()
            self.failure: BaseException | None = None

        def write(self, data: Any) -> int:
            try:
                if self.failure is None:
                    self.hash.update(data)
                    return self.stream.write(data)
            except BaseException as error:  # must not cross into C++, where it would be lost
                self.failure = error
            return 0

        def close(self) -> None:
            self.stream.close()

        def hexdigest(self) -> str:
            return self.hash.hexdigest()

    return PlanWriter()


def load_plan(trt: Any, runtime: Any, plan: Path) -> Any:
    """The ICudaEngine of a plan, which is read in pieces: TensorRT copies them to the GPU.

    Args:
        trt: the TensorRT module.
        runtime: its IRuntime.
        plan: the file.

    Returns:
        None if TensorRT refuses it.

    Raises:
        OSError: the file cannot be read.
    """
    reader = _plan_reader(trt, plan)
    try:
        engine = runtime.deserialize_cuda_engine(reader)
    finally:
        reader.close()
    if reader.failure is not None:
        raise reader.failure
    return engine


def _plan_reader(trt: Any, path: Path) -> Any:
    whence = {
        trt.SeekPosition.SET: os.SEEK_SET,
        trt.SeekPosition.CUR: os.SEEK_CUR,
        trt.SeekPosition.END: os.SEEK_END,
    }

    class PlanReader(trt.IStreamReaderV2):
        """Reads the plan as TensorRT asks for it; keeps the first exception."""

        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)
            self.stream = path.open("rb")
            self.failure: BaseException | None = None

        def read(self, num_bytes: int, stream: int) -> bytes:
            try:
                return self.stream.read(min(num_bytes, CHUNK_BYTES))  # it asks again for the rest
            except BaseException as error:  # must not cross into C++, where it would be lost
                self.failure = self.failure or error
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            try:
                self.stream.seek(offset, whence[where])
            except BaseException as error:
                self.failure = self.failure or error
                return False
            return True

        def close(self) -> None:
            self.stream.close()

    return PlanReader()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports TensorRT's outermost phases; stops the build when asked to, or when that raises an exception."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps and self.failure is None:
                self.tell(phase_name, step + 1)
            return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps and self.failure is None:
                self.tell(phase_name, self.steps[phase_name])

        def stop(self, reason: BaseException) -> None:
            self.failure = self.failure or reason

        def tell(self, phase_name: str, done: int) -> None:
            try:
                progress(f"TensorRT: {phase_name}", done, self.steps[phase_name])
            except BaseException as error:  # must not cross into C++
                self.failure = error

    return Monitor()
