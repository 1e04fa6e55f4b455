"""Evaluates tensors of a parsed network, in the types that TensorRT declares or exactly.

Strongly typed, as the engine will be: every layer's result is rounded to its declared type and no further; sums and
products inside a layer are fp32. With `exact` the model's dtype stands for fp32 and nothing is rounded to it, which
checks the network's meaning, whatever its precision; a Cast to any other type still rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qwenport import contract
from qwenport.engines.lowering import Correction, SignedWeight
from qwenport.validate.errors import NetworkError
from qwenport.validate.network.layers import KINDS, Compute, Context, inputs_of, refuse
from qwenport.validate.network.parse import ParsedNetwork, WeightFiles, floating_types
from qwenport.validate.network.quantized import restored, unpacked

HALF = tuple(dtype.torch for dtype in contract.HALF)


@dataclass(frozen=True)
class _Output:
    """What TensorRT declares for a tensor: its name, its type as stored here, its sizes (-1: any)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Step:
    """One layer, ready to run.

    Attributes:
        static: it depends only on constants.
        updates: it changes its first input in place.
        dead: tensors not needed after it.
    """

    name: str
    compute: Compute
    moves: bool
    inputs: tuple[str | None, ...]
    outputs: tuple[_Output, ...]
    static: bool
    updates: bool = False
    dead: tuple[str, ...] = ()


class Interpreter:
    """A network's layers, indexed by the tensors that they produce."""

    def __init__(self, parsed: ParsedNetwork, *, exact: bool = False) -> None:
        """Read every layer once.

        Args:
            parsed: the network.
            exact: compute in fp32 where it declares the model's dtype; for both half types, if it has none.

        Raises:
            NetworkError: a layer is of a kind not known here.
        """
        self.parsed, self.exact = parsed, exact
        widened = HALF if parsed.dtype is None else (contract.DTYPES[parsed.dtype].torch,)
        half = {dtype: torch.float32 if exact and dtype in widened else dtype for dtype in HALF}
        self._types = {
            **{ours: half.get(dtype, dtype) for ours, dtype in floating_types(parsed.trt).items()},
            parsed.trt.DataType.INT32: torch.int32,
            parsed.trt.DataType.INT64: torch.int64,
            parsed.trt.DataType.BOOL: torch.bool,
        }
        types = parsed.trt.DataType
        self._codes = {
            (types.INT8, "CONSTANT"): torch.int8,
            (types.INT4, "CONSTANT"): torch.int8,
            (types.FP8, "CONSTANT"): torch.float8_e4m3fn,
            (types.FP8, "QUANTIZE"): torch.float8_e4m3fn,
        }
        self._makers: dict[str, tuple[Any, str]] = {}
        self._scaled = dict(parsed.scaled)
        corrections = [weight.correction for weight in parsed.signed.values()]
        self._corrections = {c.name: c for c in corrections if c is not None}
        for layer, kind in parsed.layers():
            if kind not in KINDS and kind != "CONSTANT":
                raise NetworkError(f"layer {layer.name} is of kind {kind}, which is not known here")
            for index in range(layer.num_outputs):
                self._makers[layer.get_output(index).name] = (layer, kind)
        self.inputs = tuple(
            parsed.network.get_input(i).name for i in range(parsed.network.num_inputs)
        )

    def has(self, name: str) -> bool:
        """Whether a layer produces a tensor of that name."""
        return name in self._makers or name in self._scaled

    def used(self) -> set[str]:
        """The tensors that the network's outputs depend on, without its inputs.

        And the inputs rounded to FP8 whose codes they depend on: products multiply the codes.
        """
        network = self.parsed.network
        pending = [network.get_output(index).name for index in range(network.num_outputs)]
        found: set[str] = set()
        while pending:
            name = pending.pop()
            if name in self._makers and name not in found:
                layer, _ = self._makers[name]
                found.update(layer.get_output(index).name for index in range(layer.num_outputs))
                pending += [tensor.name for tensor in inputs_of(layer) if tensor is not None]
        found |= {name for name, (made, _) in self._scaled.items() if made in found}
        return found | {name for name in self._makers if self._codes_of(name) in found}

    def _codes_of(self, name: str) -> str | None:
        """The FP8 codes that a tensor is dequantized from, also if another layer scales it; None for others."""
        layer, kind = self._makers[name]
        if kind == "ELEMENTWISE":
            given = next((t.name for t in inputs_of(layer) if t is not None), "")
            layer, kind = self._makers.get(given, (None, ""))
        codes = inputs_of(layer)[0] if kind == "DEQUANTIZE" else None
        return None if codes is None or codes.name not in self._makers else codes.name

    def type_of(self, tensor: Any) -> torch.dtype:
        """The type in which a tensor is stored here; codes are constants, or those of FP8 rounded inputs."""
        _, kind = self._makers.get(tensor.name, (None, ""))
        if (tensor.dtype, kind) in self._codes:
            return self._codes[tensor.dtype, kind]
        if tensor.dtype not in self._types:
            raise NetworkError(f"tensor {tensor.name} has type {tensor.dtype}, not known here")
        return self._types[tensor.dtype]

    def program(self, known: Collection[str], wanted: Sequence[str]) -> Program:
        """The program that computes some tensors from others.

        Args:
            known: names of tensors that will be given.
            wanted: names of tensors to compute.

        Raises:
            NetworkError: no layer produces a tensor, or a layer uses something not supported here.
        """
        steps: list[_Step] = []
        static: set[str] = set()
        done: set[str] = set(known)
        pending = [(name, False) for name in reversed(wanted)]
        while pending:
            name, ready = pending.pop()
            if name in done:
                continue
            if name in self._scaled:
                source, _ = self._scaled[name]
                if source in done:
                    steps.append(self._unscaled(name))
                    done.add(name)
                else:
                    pending += [(name, True), (source, False)]
                continue
            if name not in self._makers:
                raise NetworkError(f"tensor {name} is made by no layer and was not given")
            layer, kind = self._makers[name]
            inputs = [None if tensor is None else tensor.name for tensor in inputs_of(layer)]
            if not ready:
                pending.append((name, True))
                pending += [(i, False) for i in reversed(inputs) if i is not None]
                continue
            fixed = all(i is None or i in static for i in inputs)
            step = self._step(layer, kind, tuple(inputs), fixed)
            made = {output.name for output in step.outputs}.difference(known)
            done |= made
            if fixed:
                static |= made
            steps.append(step)
        steps = _without_hazards(steps, wanted)
        steps = _with_deaths(steps, set(wanted) | static)
        return Program(tuple(steps), frozenset(known), tuple(wanted), self.parsed.files)

    def _step(self, layer: Any, kind: str, inputs: tuple[str | None, ...], static: bool) -> _Step:
        tensors = [layer.get_output(index) for index in range(layer.num_outputs)]
        outputs = tuple(_Output(t.name, self.type_of(t), tuple(t.shape)) for t in tensors)
        if kind == "CONSTANT":
            made = self._made(layer, outputs[0])
            if made is None:
                values = self._constant(layer, outputs[0])
                made = lambda: values  # noqa: E731
            return _Step(layer.name, made, True, (), outputs, True)
        half = outputs[0].dtype
        rounds = half in HALF
        context = Context(
            self.parsed.trt, (lambda x: x.to(half).float()) if rounds else (lambda x: x), rounds
        )
        layer.__class__ = getattr(self.parsed.trt, KINDS[kind].interface)
        compute = KINDS[kind].read(context, layer)
        weight = self.parsed.signed.get(outputs[0].name)
        if self.exact and weight is not None:
            compute = self._restored(compute, weight)
        updates = kind == "KV_CACHE_UPDATE"
        return _Step(layer.name, compute, KINDS[kind].moves, inputs, outputs, static, updates)

    def _made(self, layer: Any, output: _Output) -> Compute | None:
        """What makes a constant whose values are not stored as they are; nothing is read before it runs."""
        correction = self._corrections.get(layer.name)
        if self.exact and correction is not None:
            return lambda: _laid_out(correction, output)
        data = self.parsed.constants.get(layer.name)
        if data is None or data.dtype != torch.uint8:
            return None
        return lambda: unpacked(data, signed=True).view(output.shape)

    def _restored(self, compute: Compute, weight: SignedWeight) -> Compute:
        assert self.parsed.dtype is not None
        dtype = contract.DTYPES[self.parsed.dtype].torch

        def computed(*inputs: torch.Tensor) -> torch.Tensor:
            values = compute(*inputs)
            assert isinstance(values, torch.Tensor)
            return restored(values, weight, dtype)

        return computed

    def _unscaled(self, name: str) -> _Step:
        """What a tensor was before its scale was multiplied in earlier."""
        made, scale = self._scaled[name]
        layer, _ = self._makers[made]
        tensors = (layer.get_output(index) for index in range(layer.num_outputs))
        tensor = next(tensor for tensor in tensors if tensor.name == made)
        output = _Output(name, self.type_of(tensor), tuple(tensor.shape))
        return _Step(name, lambda x: x / scale, False, (made,), (output,), False)

    def _constant(self, layer: Any, output: _Output) -> torch.Tensor:
        """A constant's values. NumPy has no bf16, so those come from the model, by name."""
        if layer.name in self.parsed.constants:
            values = self.parsed.constants[layer.name]
        else:
            layer.__class__ = self.parsed.trt.IConstantLayer
            weights = layer.weights
            try:
                values = torch.tensor(weights.numpy() if hasattr(weights, "numpy") else weights)
            except (TypeError, RuntimeError):
                raise refuse(
                    layer, "a bf16 constant that is not an initializer of the model"
                ) from None
        return values.reshape(output.shape).to(output.dtype)


def _laid_out(correction: Correction, output: _Output) -> torch.Tensor:
    values = torch.from_numpy(correction.values())
    return (values.T if correction.of_experts else values).reshape(output.shape)


def _without_hazards(steps: list[_Step], wanted: Sequence[str]) -> list[_Step]:
    """Copy a tensor that is also used elsewhere before it is changed in place."""
    readers = Counter([name for step in steps for name in step.inputs if name] + list(wanted))

    def copying(step: _Step) -> _Step:
        def compute(first: torch.Tensor, *rest: torch.Tensor) -> Any:
            return step.compute(first.clone(), *rest)

        return replace(step, compute=compute)

    return [
        copying(step) if step.updates and readers[step.inputs[0] or ""] > 1 else step
        for step in steps
    ]


def _with_deaths(steps: list[_Step], kept: set[str]) -> list[_Step]:
    """Mark at each step the tensors that it is the last to need."""
    seen, result = set(kept), []
    for step in reversed(steps):
        names = {n for n in step.inputs if n is not None} | {o.name for o in step.outputs}
        result.append(replace(step, dead=tuple(names - seen)))
        seen |= names
    return result[::-1]


class Program:
    """A sequence of layers. What depends only on constants is computed once and kept until `release`."""

    def __init__(
        self,
        steps: tuple[_Step, ...],
        given: frozenset[str],
        wanted: tuple[str, ...],
        files: WeightFiles,
    ) -> None:
        self._steps, self._given, self._wanted, self._files = steps, given, wanted, files
        self._static: dict[str, torch.Tensor] = {}
        self._widened: dict[str, torch.Tensor] = {}
        self._folded: set[int] = set()
        self._shapes: dict[str, torch.Size] = {}  # the last checked shape of each output

    def run(self, known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the wanted tensors.

        Args:
            known: name -> tensor, all those that the program was made for.

        Raises:
            NetworkError: a result's type or shape differs from TensorRT's declaration, or indices are out of range.
        """
        values = dict(known)
        with torch.inference_mode():
            for index, step in enumerate(self._steps):
                if index in self._folded:
                    continue
                inputs = [self._input(step, name, values) for name in step.inputs]
                while inputs and inputs[-1] is None:
                    inputs.pop()
                try:
                    made = step.compute(*inputs)
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    raise NetworkError(f"layer {step.name}: {error}") from error
                results = made if isinstance(made, tuple) else (made,)
                for output, result in zip(step.outputs, results, strict=True):
                    stored = result if result.dtype == output.dtype else result.to(output.dtype)
                    if stored.shape != self._shapes.get(output.name):
                        self._check(step, output, stored)
                        self._shapes[output.name] = stored.shape
                    if output.name not in self._given:
                        (self._static if step.static else values)[output.name] = stored
                if step.static:
                    self._folded.add(index)
                for name in step.dead:
                    values.pop(name, None)
        return {n: values[n] if n in values else self._static[n] for n in self._wanted}

    def _input(
        self, step: _Step, name: str | None, values: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        if name is None:
            return None
        value = values.get(name)
        if value is not None:
            return value.float() if not step.moves and value.dtype in HALF else value
        value = self._static[name]
        if step.moves or value.dtype not in HALF:
            return value
        if name not in self._widened:
            self._widened[name] = value.float()
        return self._widened[name]

    @staticmethod
    def _check(step: _Step, output: _Output, value: torch.Tensor) -> None:
        sizes = tuple(value.shape)
        if len(sizes) != len(output.shape) or any(
            stated not in (-1, size) for stated, size in zip(output.shape, sizes, strict=True)
        ):
            raise NetworkError(
                f"layer {step.name}: its output is {list(sizes)}, and TensorRT states {list(output.shape)}"
            )

    def release(self) -> None:
        """Drop everything that can be computed again: weights and what was computed from them."""
        self._static.clear()
        self._widened.clear()
        self._folded.clear()
        self._files.release()
