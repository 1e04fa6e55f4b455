"""A torch module, run on the meta device, as a list of calls: `trace` it once, then stamp it with `emission.emit`.

The module runs twice, with different sizes for its dynamic axes. A number that differs between the runs is a
dynamic size and gets its axis's name; one that is neither constant nor the size of an axis is an error. So is
a tensor of unknown origin: nothing a module does can be missed. A module names a result with `named`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from qwenport.exporter.errors import TracingError

Shape = tuple[int | str, ...]

# Sizes of the dynamic axes in the two runs. The meta device allocates nothing.
_FIRST_SIZES = (1009, 1013, 1019, 1021, 1031, 1033)
_SECOND_SIZES = (1109, 1117, 1123, 1129, 1151, 1153)


@dataclass(frozen=True)
class Ref:
    """A tensor by number: inputs first, then parameters, then results in order."""

    index: int


@dataclass(frozen=True)
class Sym:
    """The size of a dynamic axis."""

    name: str


@dataclass(frozen=True)
class Span:
    """x[start:stop:step] along one axis."""

    start: Any
    stop: Any
    step: Any


@dataclass(frozen=True)
class TensorType:
    """The dtype and shape of a traced tensor; a name in the shape is a dynamic axis."""

    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Call:
    """One torch function call that returns tensors. `scope` is the submodule that made it."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Ref, ...]
    scope: str


@dataclass(frozen=True)
class Trace:
    """A traced module. `types[i]` belongs to Ref(i); `names` holds the names that `named` gave to results."""

    calls: tuple[Call, ...]
    types: tuple[TensorType, ...]
    num_inputs: int
    parameters: tuple[str, ...]
    outputs: tuple[Ref, ...]
    names: dict[Ref, str]


def named(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Name a value of the graph: "residual_1" in submodule "mlp" of layer 3 is "model.layers.3.mlp.residual_1".

    Args:
        tensor: an operator's result; not an input, a parameter or a value already named.
        name: lower case, unlike an operator's; unique within its submodule.

    Returns:
        `tensor` itself; no operator is added. Outside `trace` nothing else happens.

    Raises:
        TracingError: the name or the tensor breaks these rules.
    """
    if has_torch_function_unary(tensor):
        handle_torch_function(named, (tensor,), tensor, name)
    return tensor


def trace(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    dynamic_axes: Sequence[dict[int, str]],
) -> Trace:
    """Trace `module` on the meta device.

    Args:
        module: its parameters on the meta device; buffers are not supported.
        inputs: example inputs; only their dtypes and static sizes matter.
        dynamic_axes: for each input, axis -> name; axes of the same name have the same size.

    Raises:
        TracingError: the computation depends on a dynamic size other than as the size of an axis, or a tensor
            appears that is neither input, parameter nor result.
    """
    names = list(dict.fromkeys(name for axes in dynamic_axes for name in axes.values()))
    if len(names) > len(_FIRST_SIZES):
        raise TracingError(f"at most {len(_FIRST_SIZES)} dynamic axes, not {len(names)}")
    first, second = (
        _record(module, inputs, dynamic_axes, dict(zip(names, sizes, strict=False)))
        for sizes in (_FIRST_SIZES, _SECOND_SIZES)
    )
    kind = type(module).__name__
    if [(c.function, c.scope, len(c.results)) for c in first.calls] != [
        (c.function, c.scope, len(c.results)) for c in second.calls
    ]:
        raise TracingError(f"{kind}: which operators run depends on a dynamic size")
    if first.names != second.names:
        raise TracingError(f"{kind}: what `named` is given depends on a dynamic size")
    merge = _Merge(
        dict(zip(zip(_FIRST_SIZES, _SECOND_SIZES, strict=True), names, strict=False)), kind
    )
    return Trace(
        calls=tuple(
            Call(a.function, merge(a.args, b.args), merge(a.kwargs, b.kwargs), a.results, a.scope)
            for a, b in zip(first.calls, second.calls, strict=True)
        ),
        types=tuple(
            TensorType(
                a.dtype, tuple(s.name if isinstance(s, Sym) else s for s in merge(a.shape, b.shape))
            )
            for a, b in zip(first.types, second.types, strict=True)
        ),
        num_inputs=len(inputs),
        parameters=first.parameters,
        outputs=merge(first.outputs, second.outputs),
        names=first.names,
    )


def _record(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    dynamic_axes: Sequence[dict[int, str]],
    sizes: dict[str, int],
) -> Trace:
    """Run the module once; sizes in the result are plain numbers."""
    tensors = [
        torch.empty(
            [sizes[axes[i]] if i in axes else size for i, size in enumerate(example.shape)],
            dtype=example.dtype,
            device="meta",
        )
        for example, axes in zip(inputs, dynamic_axes, strict=True)
    ]
    parameters = dict(module.named_parameters())
    recorder = _Recorder([*tensors, *parameters.values()], parameters)
    handles = [
        handle
        for name, part in module.named_modules()
        if name
        for handle in (
            part.register_forward_pre_hook(lambda *_, name=name: recorder.scopes.append(name)),
            part.register_forward_hook(lambda *_: recorder.leave()),
        )
    ]
    try:
        with torch.no_grad(), recorder:
            outputs = module(*tensors)
    except RuntimeError as error:  # torch: the sizes do not fit one another
        raise TracingError(f"{type(module).__name__} does not run with {sizes}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    return Trace(
        tuple(recorder.calls),
        tuple(TensorType(t.dtype, tuple(t.shape)) for t in recorder.tensors),
        len(tensors),
        tuple(parameters),
        tuple(recorder.encode(output) for output in outputs),
        recorder.names,
    )


class _Recorder(TorchFunctionMode):
    """Sees every torch function that the module calls, before torch decomposes it."""

    def __init__(self, known: Sequence[torch.Tensor], taken: Collection[str]) -> None:
        super().__init__()
        self.num_known, self.taken = len(known), taken
        self.tensors = list(known)  # kept alive, so that no id is reused
        self.refs = {id(tensor): Ref(i) for i, tensor in enumerate(known)}
        self.calls: list[Call] = []
        self.names: dict[Ref, str] = {}
        self.scopes: list[str] = [""]

    def leave(self) -> None:
        self.scopes.pop()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is named:
            return self.give_name(*args)
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else (result,)
        if not any(isinstance(r, torch.Tensor) for r in results):
            return result
        if not all(isinstance(r, torch.Tensor) for r in results):
            raise TracingError(f"{name_of(func)} returns more than tensors; that is not translated")
        if all(id(r) in self.refs for r in results):  # x.to(its own dtype) is x
            return result
        encoded = self.encode(args), {k: self.encode(v) for k, v in kwargs.items()}
        refs = []
        for tensor in results:
            if id(tensor) in self.refs:
                raise TracingError(f"{name_of(func)} returns one of its inputs among its results")
            refs.append(Ref(len(self.tensors)))
            self.tensors.append(tensor)
            self.refs[id(tensor)] = refs[-1]
        self.calls.append(Call(func, *encoded, tuple(refs), self.scopes[-1]))
        return result

    def give_name(self, tensor: torch.Tensor, name: str) -> None:
        ref: Ref = self.encode(tensor)
        path = f"{self.scopes[-1]}.{name}" if self.scopes[-1] else name
        if not (name.isidentifier() and name.islower()):
            raise TracingError(f"{path!r}: a name has lower-case letters, digits and underscores")
        if ref.index < self.num_known:
            raise TracingError(f"{path}: only a result can be named, no input and no parameter")
        if ref in self.names:
            raise TracingError(f"{path}: the tensor is already named {self.names[ref]}")
        if path in self.names.values() or path in self.taken:
            raise TracingError(f"{path}: the name is taken")
        self.names[ref] = path

    def encode(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.refs:
                raise TracingError(
                    f"a tensor of shape {list(value.shape)} is neither input, parameter nor result"
                )
            return self.refs[id(value)]
        if isinstance(value, list | tuple):
            return tuple(self.encode(item) for item in value)
        if isinstance(value, slice):
            return Span(self.encode(value.start), self.encode(value.stop), self.encode(value.step))
        return value


@dataclass(frozen=True)
class _Merge:
    """Merges two runs: equal numbers stay, the two sizes of an axis become its name."""

    names: dict[tuple[int, int], str]
    kind: str

    def __call__(self, a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(self(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {key: self(value, b[key]) for key, value in a.items()}
        if isinstance(a, Span):
            return Span(self(a.start, b.start), self(a.stop, b.stop), self(a.step, b.step))
        if a == b:
            return a
        if (a, b) in self.names:
            return Sym(self.names[a, b])
        raise TracingError(f"{self.kind}: a number is computed from a dynamic size ({a} and {b})")


def name_of(function: Callable[..., Any]) -> str:
    """A torch function's name for a message."""
    return str(getattr(function, "__qualname__", function)).replace("TensorBase", "Tensor")
