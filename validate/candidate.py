"""The judged side: opens sessions on a package, on TensorRT's network of it, or on an engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport.contract import (
    AUTO,
    ENGINE,
    MASKED,
    NETWORK,
    SCORE_BYTES,
    SPAN_MULTIPLE,
    Progress,
    no_progress,
)
from qwenport.engines import (
    MAX_STEP_LOGITS,
    MAX_STEP_TOKENS,
    CachedSession,
    OnnxRuntimeSession,
    load_engine,
    open_session,
)
from qwenport.engines.attention import attention_of
from qwenport.engines.onnxruntime_session import MAX_STEP_TOKENS as PACKAGE_STEP_TOKENS
from qwenport.engines.spans import Spans
from qwenport.validate.errors import NetworkError
from qwenport.validate.failures import reported
from qwenport.validate.run import CandidateError
from qwenport.validate.streaming import Geometry, Parts, Use, stream
from qwenport.validate.target import Target, open_target

if TYPE_CHECKING:
    from qwenport.validate.network.corrections import Subtracted

Rehearse = Callable[[CachedSession], None]


class Refused(Exception):  # noqa: N818 - a verdict on the target, not an error of ours
    """TensorRT's parser or the interpreter refuses the target; the message is theirs."""


_LINEAR = re.compile(r"model\.layers\.(\d+)\.(.+)\.MatMul")
_HEAD = "model.lm_head.MatMul"
_ROUNDED = re.compile(r"\.rounded(_\d+)?$")  # exporter/rounded_activations.py


class Candidate:
    """Opens sessions on a target, as many as requested.

    Attributes:
        complaints: what the checks of `build` find in the parsed network.
        parsed: the network; None for other targets.
    """

    def __init__(
        self,
        target: Target,
        *,
        layers: int,
        streamed: bool,
        progress: Progress = no_progress,
    ) -> None:
        """Inspect the target; a network is parsed here.

        Args:
            target: the target to judge.
            layers: decoder layers to run; fewer than all needs `streamed`.
            streamed: load one decoder layer at a time.
            progress: called with (what, done, total) while a streamed target runs.

        Raises:
            Refused: TensorRT's parser refuses the model, or produces a layer that is not known here.
            ValidationError: model.onnx cannot be read.
            MissingExtraError: a needed dependency is not installed.
        """
        self._target, self._streamed = target, streamed
        self._layers, self._progress = layers, progress
        self.complaints: tuple[str, ...] = ()
        self.parsed: Any = None
        self._interpreter: Any = None
        self._loaded: dict[tuple[str, ...], OnnxRuntimeSession] = {}
        if target.judged_as == NETWORK:
            self._parse()

    def _parse(self) -> None:
        from qwenport.validate.network import Interpreter, parse_package

        package = self._target.package
        assert package is not None
        try:
            with reported(package.model, "cannot be read as a model"):
                assert self._target.attention is not None
                self.parsed = parse_package(package, self._target.capacity, self._target.attention)
                self._interpreter = Interpreter(self._exactly(self.parsed), exact=True)
        except NetworkError as error:
            raise Refused(str(error)) from error
        self.complaints = self.parsed.complaints

    def _exactly(self, parsed: Any) -> Any:
        from qwenport.validate.network.parse import with_exact_tables

        assert self._target.package is not None
        return with_exact_tables(parsed, self._target.package)

    def declared(self) -> Candidate:
        """The same network in the types that it declares, not in exact arithmetic.

        Raises:
            Refused: as in the constructor.
        """
        from qwenport.validate.network import Interpreter

        other = object.__new__(Candidate)
        other.__dict__ |= self.__dict__
        other._interpreter = Interpreter(self.parsed, exact=False)
        return other

    @property
    def can_be_observed(self) -> bool:
        """Whether its inner values can be observed. An engine is judged as it is, by its logits."""
        return self._target.judged_as != ENGINE

    def uses(self, name: str) -> bool:
        """Whether its graph has a value of that name, and an output depends on it."""
        return name in self._used

    @cached_property
    def _used(self) -> frozenset[str]:

        if self._interpreter is not None:
            return frozenset(self._interpreter.used())
        if self._target.package is None:
            return frozenset()
        with reported(self._target.package.model, "cannot be read as a model"):
            graph = self._target.package.read_model().graph
        found: set[str] = set()
        pending = list(graph.outputs)
        while pending:
            value = pending.pop()
            producer = value.producer()
            if producer is not None and value.name not in found:
                found.update(str(output.name) for output in producer.outputs)
                pending += [given for given in producer.inputs if given is not None]
        return frozenset(found)

    def rounded_inputs(self, layers: int) -> dict[int, dict[str, str]]:
        """Layer -> path of a linear in it -> the value that is its input, where the graph has rounded it to FP8.

        Args:
            layers: the first layers to look at.
        """
        found: dict[int, dict[str, str]] = {}
        for name, given in self._rounded.items():
            linear = _LINEAR.fullmatch(name)
            if linear is not None and (layer := int(linear[1])) < layers:
                found.setdefault(layer, {})[linear[2]] = given
        return found

    @property
    def rounded_head(self) -> str | None:
        """The value that is the head's input, if the graph has rounded it to FP8."""
        return self._rounded.get(_HEAD)

    @cached_property
    def _rounded(self) -> dict[str, str]:
        """Node -> its first input, where the graph has rounded that to FP8."""
        if self._target.package is None:
            return {}
        with reported(self._target.package.model, "cannot be read as a model"):
            graph = self._target.package.read_model().graph
        given = {str(n.name): str(n.inputs[0].name) for n in graph if n.inputs and n.inputs[0]}
        return {node: name for node, name in given.items() if _ROUNDED.search(name)}

    def corrections(self) -> dict[int, dict[str, Subtracted]]:
        """Layer -> path of a linear in it -> what its product by signed codes is corrected by."""
        from qwenport.validate.network.corrections import subtracted

        if self._target.package is None or self._interpreter is None:
            return {}
        return subtracted(self.parsed, self._target.package)

    def geometry(self, max_batch: int, capacity: int) -> Geometry:
        """The geometry of a session of that size and of its steps, as `generate` and C++ run this target."""
        target = self._target
        tokens, logits = PACKAGE_STEP_TOKENS, PACKAGE_STEP_TOKENS
        if target.judged_as == NETWORK:  # as an engine built from it
            tokens = min(MAX_STEP_TOKENS, target.capacity)
            logits = min(MAX_STEP_LOGITS, tokens)
        elif target.judged_as == ENGINE:
            engine = load_engine(target.path)
            tokens, logits = engine.max_step_tokens, engine.max_step_logits
        vocabulary = target.config.vocab_size
        spans = self._spans(capacity)
        chunks = target.config.dual_chunk
        heads = target.config.num_attention_heads
        return Geometry(
            max_batch,
            capacity,
            vocabulary,
            tokens,
            logits,
            target.capacity,
            spans,
            None if chunks is None else chunks.original_max_position_embeddings,
            0 if chunks is None else SCORE_BYTES * heads,
        )

    def _spans(self, capacity: int) -> Spans:
        """The spans of a session of that many usable slots."""
        if self._target.attention not in (None, MASKED):
            assert self._target.attention is not None
            attention = attention_of(self._target.attention, self._target.capacity)
            return Spans(attention.span_multiple, attention.slots)
        if self._target.for_onnxruntime is None and self._target.judged_as == ENGINE:
            attention = load_engine(self._target.path).manifest["attention"]
            return Spans(attention["span_multiple"], attention["slots"])
        return Spans(SPAN_MULTIPLE, capacity)

    def open(
        self, uses: Sequence[tuple[int, int, Rehearse]], observe: Sequence[str] = ()
    ) -> list[CachedSession]:
        """Open sessions that will be used exactly as they are rehearsed.

        Args:
            uses: for each session its rows, its cache slots and what will be done with it (only streamed sessions
                need that).
            observe: values of the graph that each step leaves in `observed`.

        Raises:
            Refused: the network cannot be evaluated.
            ValidationError: the runtime does not load the graph.
            MissingExtraError, SessionError, EngineError: the target cannot run here, whatever it computes.
        """
        try:
            if self._streamed:
                wanted = [Use(self.geometry(rows, slots), act) for rows, slots, act in uses]
                return stream(self.parts(), wanted, observe, self._progress)
            with reported(self._target.path, "does not load"):  # that says nothing about parity
                return [self._whole(rows, slots, observe) for rows, slots, _ in uses]
        except (NetworkError, CandidateError) as error:
            raise Refused(f"{type(error).__name__}: {error}") from error

    def _whole(self, max_batch: int, capacity: int, observe: Sequence[str]) -> CachedSession:
        target, source = self._target, self._target.for_onnxruntime
        if self._interpreter is not None:
            from qwenport.validate.network import NetworkSession

            return NetworkSession(
                self._interpreter,
                target.config,
                max_batch=max_batch,
                capacity=capacity,
                max_positions=target.capacity,
                spans=self._spans(capacity),
                observe=observe,
            )
        if source is None:
            return open_session(target.path, max_batch=max_batch, capacity=capacity)
        names = tuple(observe)
        if names not in self._loaded:
            if names:  # at most one model that shows its inner values stays in memory
                self._loaded = {known: s for known, s in self._loaded.items() if not known}
            self._loaded[names] = OnnxRuntimeSession(
                source, max_batch=1, capacity=1, device=target.device, observe=names
            )
        return self._loaded[names].beside(max_batch=max_batch, capacity=capacity)

    def parts(self) -> Parts:
        """The target in parts, to run one of them alone."""
        from qwenport.validate.network.parts import NetworkParts
        from qwenport.validate.package_parts import PackageParts

        target = self._target
        assert target.package is not None, "an engine cannot be taken apart"
        if self._interpreter is not None:
            return NetworkParts(self._interpreter, self._layers, target.config.num_hidden_layers)
        return PackageParts(target.package, self._layers)


def open_candidate(
    path: Path,
    *,
    judged_as: str | None = None,
    gpus: str | None = None,
    attention: str = AUTO,
    max_batch: int = 1,
    capacity: int | None = None,
) -> CachedSession:
    """A session of a target as `validate` runs it: a package, TensorRT's network of it, or an engine.

    Args:
        path: the package or engine directory.
        judged_as: as in `open_target`. A network's arithmetic is in fp32, as its scenarios are judged.
        gpus: as in `open_target`.
        attention: as in `open_target`.
        max_batch: rows.
        capacity: cache slots per row; the target's by default.

    Raises:
        ValidationError: and the other errors of `open_target`.
        Refused: TensorRT's parser refuses the network.
    """
    target = open_target(path, judged_as=judged_as, gpus=gpus, attention=attention)
    candidate = Candidate(target, layers=target.config.num_hidden_layers, streamed=False)
    use = (max_batch, capacity or target.capacity, lambda session: None)
    (session,) = candidate.open([use])
    return session
