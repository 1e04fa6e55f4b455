"""The judged side: opens sessions on a package, on TensorRT's network of it, or on an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from qwenport import QwenportError
from qwenport.engines import CachedSession, OnnxRuntimeSession, open_session
from qwenport.validate.errors import NetworkError
from qwenport.validate.streaming import Geometry, Progress, stream
from qwenport.validate.target import ENGINE, NETWORK, Target

Rehearse = Callable[[CachedSession], None]


class Refused(Exception):  # noqa: N818 - a verdict on the target, no error of ours
    """The runtime does not take the target, or fails while it runs; the message is its own."""


class Candidate:
    """Opens sessions on a target, as often as it is asked to.

    Attributes:
        complaints: what the checks of `build` find in the network that the parser made.
    """

    def __init__(
        self,
        target: Target,
        *,
        max_batch: int,
        capacity: int,
        layers: int,
        streamed: bool,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Look at the target; a network is parsed here.

        Args:
            target: what is judged.
            max_batch, capacity: of the sessions.
            layers: decoder layers to run; less than all needs `streamed`.
            streamed: load one decoder layer at a time.
            progress: called with (what, done, total) while a streamed target runs.

        Raises:
            Refused: TensorRT's parser refuses the model, or makes a layer of it that nobody knows.
            MissingExtraError: what is needed is not installed.
        """
        self._target, self._streamed = target, streamed
        self._layers, self._progress = layers, progress
        self._max_batch, self._capacity = max_batch, capacity
        self.complaints: tuple[str, ...] = ()
        self._interpreter: Any = None
        if target.judged_as == NETWORK:
            self._parse()

    def _parse(self) -> None:
        from qwenport.validate.network import Interpreter, parse_package

        assert self._target.package is not None
        exact = self._target.compute_dtype == "fp32" and self._target.dtype != "fp32"
        try:
            parsed = parse_package(self._target.package, self._capacity, exact=exact)
            self._interpreter = Interpreter(parsed, exact=exact)
        except NetworkError as error:
            raise Refused(str(error)) from error
        self.complaints = parsed.complaints

    @property
    def can_be_tapped(self) -> bool:
        """Whether values inside it can be seen. An engine's are inside its plan."""
        return self._target.judged_as != ENGINE

    def uses(self, name: str) -> bool:
        """Whether its graph has a value of that name, and an output depends on it."""
        return name in self._used

    @cached_property
    def _used(self) -> frozenset[str]:
        import onnx_ir as ir

        if self._interpreter is not None:
            return frozenset(self._interpreter.used())
        if self._target.package is None:
            return frozenset()
        graph = ir.load(self._target.package.model).graph
        found: set[str] = set()
        pending = list(graph.outputs)
        while pending:
            value = pending.pop()
            producer = value.producer()
            if producer is not None and value.name not in found:
                found.update(str(output.name) for output in producer.outputs)
                pending += [given for given in producer.inputs if given is not None]
        return frozenset(found)

    def open(self, rehearse: Rehearse, observe: Sequence[str] = ()) -> CachedSession:
        """A session that is going to be used exactly as `rehearse` uses one.

        Args:
            rehearse: see `streaming.stream`; a session that is not streamed does not need it.
            observe: values of the graph that each step leaves in `observed`.

        Raises:
            Refused: the runtime does not take the graph, or fails while it runs.
            MissingExtraError, SessionError, EngineError: it cannot run here, whatever it computes.
        """
        try:
            return self._stream(rehearse, observe) if self._streamed else self._whole(observe)
        except NetworkError as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        except QwenportError:
            raise  # it cannot run here, which says nothing about parity
        except Exception as error:  # a runtime that refuses the graph is a verdict on the graph
            text = " ".join(str(error).split())
            raise Refused(f"the target does not load: {type(error).__name__}: {text}") from error

    def _whole(self, observe: Sequence[str]) -> CachedSession:
        target, package = self._target, self._target.package
        size: dict[str, Any] = {"max_batch": self._max_batch, "capacity": self._capacity}
        if self._interpreter is not None:
            from qwenport.validate.network import NetworkSession

            return NetworkSession(
                self._interpreter,
                target.config,
                **size,
                max_positions=target.capacity,
                observe=observe,
            )
        if package is None:
            return open_session(target.path, **size)
        return OnnxRuntimeSession(package, **size, device=target.device, observe=observe)

    def _stream(self, rehearse: Rehearse, observe: Sequence[str]) -> CachedSession:
        from qwenport.validate.network.parts import NetworkParts
        from qwenport.validate.package_parts import PackageParts

        target = self._target
        assert target.package is not None, "an engine cannot be streamed"
        parts: Any
        if self._interpreter is not None:
            parts = NetworkParts(self._interpreter, self._layers, target.config.num_hidden_layers)
        else:
            parts = PackageParts(target.package, self._layers, self._capacity)
        geometry = Geometry(
            self._max_batch, self._capacity, target.config.vocab_size, target.capacity
        )
        return stream(parts, geometry, rehearse, observe, self._progress)
