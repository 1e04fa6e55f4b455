"""Where an error starts: the first operator whose result is worse than its input explains.

Each decoder layer of the target, and then each operator of the first bad layer, is compared with transformers' own,
given the *target's* input. What remains is the error made there (`local`), whatever the input's error. It is judged by
transformers' own rounding there in the target's dtype (`own`); both are measured against transformers in fp64 (whose
norms and softmaxes are fp32).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenport.exporter import ModelConfig
from qwenport.validate.run import Seen
from qwenport.validate.sites import (
    EMBEDDING,
    ROUTER,
    Site,
    hidden_states,
    layer_output,
    router_choices,
    sites,
)
from qwenport.validate.text import Choices, Text

if TYPE_CHECKING:
    from qwenport.validate.reference import Reference

Array = NDArray[Any]
Float64 = NDArray[np.float64]

TRUTH = "fp64"
WHOLE_LAYER = "the layer as a whole"

# Correct operators in the same dtype, summed in another order, measured 0.5 to 3 times transformers' own
# rounding; the catalogue's faults measure 20 times and above.
TIMES_OWN = 8.0
# transformers' own error can be zero by chance: half a unit in the last place of fp32 is always allowed.
LEAST_OWN = 6e-8
# Of several operators that stand out, the first counts unless a later one stands out this much more.
MUCH_MORE = 100.0


@dataclass(frozen=True)
class OperatorError:
    """The error of an operator's result, as rel-L2 over all tokens. NaN if it cannot be determined.

    Attributes:
        name: name of the operator or the layer.
        accumulated: against transformers in fp32 on its own values; includes the input's error.
        local: against transformers, given the target's input.
        own: transformers' rounding there, in the target's dtype.
    """

    name: str
    accumulated: float
    local: float
    own: float

    @property
    def times_own(self) -> float:
        """`local` in units of rounding; infinite if the target itself produces NaN or infinities."""
        return self.local / max(self.own, LEAST_OWN)


@dataclass(frozen=True)
class Fault:
    """Where an error starts.

    Attributes:
        scenario: the scenario that was investigated.
        layer: the decoder layer; None before and after the layers.
        operator: the operator in it, as transformers names its modules.
        input_error, output_error: accumulated, before and after it.
        local_error, own_error: see `OperatorError`.
        text: the same as a sentence.
        operators: the layer's operators, in execution order.
    """

    scenario: str
    layer: int | None
    operator: str
    input_error: float
    output_error: float
    local_error: float
    own_error: float
    text: str
    operators: tuple[OperatorError, ...] = ()


class _Sum:
    """rel-L2 over several pieces: ||a - b|| / ||b||."""

    def __init__(self) -> None:
        self.difference = self.norm = 0.0

    def add(self, made: Array, expected: Array) -> None:
        a, b = made.astype(np.float64).reshape(-1), expected.astype(np.float64).reshape(-1)
        if a.size != b.size:  # another shape is entirely wrong
            a = np.full_like(b, np.inf)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = float(np.sum((a - b) ** 2))
        finite = np.isfinite(a).all()
        # broken by the operator itself, if the expected value is finite
        self.difference += difference if finite else float("inf")
        self.norm += float(np.sum(b**2))

    @property
    def value(self) -> float:
        if not np.isfinite(self.norm):
            return float("nan")
        if self.norm == 0.0:
            return 0.0 if self.difference == 0.0 else float("inf")
        return float(np.sqrt(self.difference / self.norm))


def worst(errors: Sequence[OperatorError]) -> int | None:
    """The first error that stands out, or None."""
    times = [0.0 if np.isnan(error.local) else error.times_own for error in errors]
    most = max(times, default=0.0)
    if most < TIMES_OWN:
        return None
    if np.isinf(most):
        return next(i for i, t in enumerate(times) if t >= TIMES_OWN)
    return next(i for i, t in enumerate(times) if t >= max(TIMES_OWN, most / MUCH_MORE))


def errors_by_layer(
    reference: Reference,
    texts: Sequence[Text],
    seen: Sequence[Seen],
    dtype: str,
    choices: Sequence[Choices] | None,
) -> tuple[OperatorError, ...]:
    """How the error grows: after the embedding, then after every decoder layer.

    Args:
        reference: the oracle.
        texts: the texts given to the target.
        seen: for each text, the values of `sites.hidden_states`.
        dtype: the dtype that the target computes in.
        choices: experts that the oracle takes over from the target.
    """
    from qwenport.validate.probe import run_layer
    from qwenport.validate.reference.dual_chunk import of_requests

    oracle = reference.hidden_states(texts, choices=choices)
    embedding, accumulated = _Sum(), _Sum()
    for text, of_text, states in zip(texts, seen, oracle, strict=True):
        embedding.add(of_text[EMBEDDING], reference.embed(text.tokens))
        accumulated.add(of_text[EMBEDDING], states[0])
    found = [OperatorError("embedding", accumulated.value, embedding.value, 0.0)]
    names = hidden_states(reference.num_layers)
    for index in range(reference.num_layers):
        truth: list[Array] = []
        local, own, accumulated = _Sum(), _Sum(), _Sum()
        for kind in (TRUTH, dtype):
            with reference.layer(index, kind) as module, _moving(module, kind):
                for number, text in enumerate(texts):
                    made, given = (seen[number][names[index + n]] for n in (1, 0))
                    agreed = None if choices is None else choices[number]
                    with (
                        reference.agreeing(module, index, agreed),
                        of_requests(text.first_position, text.requests),
                    ):
                        result = run_layer(reference, module, given, text.first_position, kind)
                    if kind == TRUTH:
                        truth.append(result.numpy())
                        local.add(made, truth[number])
                        accumulated.add(made, oracle[number][index + 1])
                    else:
                        own.add(result.double().numpy(), truth[number])
        found.append(OperatorError(f"layer {index}", accumulated.value, local.value, own.value))
    return tuple(found)


def _moving(module: Any, kind: str) -> contextlib.AbstractContextManager[Any]:
    """Codes that experts round to inside their operator cannot be taken over: `own` includes what they may do."""
    from qwenport.validate.reference.rounded_inputs import moving_experts

    return contextlib.nullcontext() if kind == TRUTH else moving_experts(module)


def observed_sites(config: ModelConfig, layer: int, known: Any) -> dict[str, Site]:
    """Graph value -> its site in a layer, for the values that the graph has.

    Args:
        known: whether the graph has a value of that name.
    """
    found = {}
    for site in sites(config, layer):
        names = [f"model.layers.{layer}.{value}" for value in site.values]
        name = next((name for name in names if known(name)), None)
        if name is not None:
            found[name] = site
    return found


def errors_in_layer(
    reference: Reference,
    config: ModelConfig,
    layer: int,
    texts: Sequence[Text],
    seen: Sequence[Seen],
    dtype: str,
    observed: dict[str, Site],
) -> tuple[OperatorError, ...]:
    """How the error grows inside one decoder layer, operator by operator.

    Args:
        seen: for each text, the hidden states before the layer, the values of `observed`, and the experts.
        observed: see `observed_sites`.
        Others as in `errors_by_layer`.
    """
    from qwenport.validate.probe import Probe, run_layer
    from qwenport.validate.reference.dual_chunk import of_requests

    entry = hidden_states(layer + 1)[layer]
    given = [values_by_site(config, of_text, observed, layer) for of_text in seen]
    oracle = [states[layer] for states in reference.hidden_states(texts)]
    all_sites = sites(config, layer)
    local, own, accumulated = ({site.name: _Sum() for site in all_sites} for _ in range(3))
    truth: list[dict[str, Any]] = []
    for kind, forced in ((TRUTH, True), (dtype, True), ("fp32", False)):
        with reference.layer(layer, kind) as module, _moving(module, kind if forced else TRUTH):
            for number, text in enumerate(texts):
                values = given[number]
                probe = Probe(all_sites, values if forced else {}, kind)
                start = seen[number][entry] if forced else oracle[number]
                with probe.attached(module), of_requests(text.first_position, text.requests):
                    run_layer(reference, module, start, text.first_position, kind)
                expected = {n: made.double().numpy() for n, made in probe.expected.items()}
                if kind == TRUTH and forced:
                    truth.append(expected)
                for name, made in values.items():
                    if not forced:
                        accumulated[name].add(made, expected[name])
                    elif kind == TRUTH:
                        local[name].add(made, expected[name])
                    else:
                        own[name].add(expected[name], truth[number][name])
    return tuple(
        OperatorError(s.name, accumulated[s.name].value, local[s.name].value, own[s.name].value)
        for s in all_sites
        if s.name in given[0]
    )


def values_by_site(
    config: ModelConfig, seen: Seen, observed: dict[str, Site], layer: int
) -> dict[str, Array]:
    """Values of one text by site name; a router's weights as [S, experts], zero for experts not chosen."""
    values = {site.name: seen[name] for name, site in observed.items()}
    if ROUTER in values and config.moe is not None:
        # transformers orders a token's equal experts differently: compare them as a set
        weights, experts = values[ROUTER], seen[router_choices(config, layer + 1)[layer]]
        dense = np.zeros((len(weights), config.moe.num_experts), dtype=np.float32)
        np.put_along_axis(dense, experts, weights, axis=1)
        values[ROUTER] = dense
    return values


def fault_in_layer(
    scenario: str,
    config: ModelConfig,
    layer: int,
    whole: OperatorError,
    before: float,
    operators: tuple[OperatorError, ...],
) -> Fault:
    """Name the faulty operator of a bad layer; the layer itself if none of its operators stands out.

    Args:
        whole: the layer's own errors.
        before: the accumulated error of the layer's input.
        operators: see `errors_in_layer`.
    """
    index = worst(operators)
    if index is None:
        return _fault(scenario, layer, WHOLE_LAYER, before, whole, operators)
    bad = operators[index]
    errors = {error.name: error.accumulated for error in operators} | {"": before}
    (site,) = [site for site in sites(config, layer) if site.name == bad.name]
    given = [errors[name] for name in site.inputs if name in errors]
    return _fault(scenario, layer, bad.name, max(given, default=before), bad, operators)


def fault_cut_off(layer: int) -> Fault:
    """The fault of a layer whose result is not used."""
    nan = float("nan")
    text = f"The error starts at layer {layer}: nothing in the graph reads what it computes."
    return Fault("the graph itself", layer, WHOLE_LAYER, nan, nan, nan, nan, text)


def fault_nonfinite(scenario: str, layer: int | None, where: str, theirs: str) -> Fault:
    """The fault of a NaN or infinite value.

    Args:
        layer: the first decoder layer whose result has one; None before the layers.
        where: the same in words.
        theirs: a sentence on whether transformers' own run has one too.
    """
    nan = float("nan")
    text = f"NaN or infinity first appears in the result of {where}; {theirs}"
    operator = "embed_tokens" if layer is None else WHOLE_LAYER
    return Fault(scenario, layer, operator, nan, nan, nan, nan, text)


def fault_outside(scenario: str, operator: str, before: float, error: OperatorError) -> Fault:
    """The fault of an operator before or after the decoder layers."""
    return _fault(scenario, None, operator, before, error, ())


def _fault(
    scenario: str,
    layer: int | None,
    operator: str,
    before: float,
    error: OperatorError,
    operators: tuple[OperatorError, ...],
) -> Fault:
    where = operator if layer is None else f"layer {layer}, {operator}"
    text = (
        f"The error starts at {where}: rel-L2 {before:.2g} goes in and {error.accumulated:.2g} comes out. Given the "
        f"same input, transformers' result is {error.local:.2g} away, where its own rounding is {error.own:.2g}."
    )
    return Fault(
        scenario,
        layer,
        operator,
        before,
        error.accumulated,
        error.local,
        error.own,
        text,
        operators,
    )


def errors_at_the_end(
    reference: Reference,
    texts: Sequence[Text],
    seen: Sequence[Seen],
    logits: Sequence[Array],
    oracle: Sequence[Array],
    dtype: str,
) -> OperatorError:
    """The final norm and the vocabulary projection together, given the target's last hidden states.

    Args:
        logits: the target's, [len(positions), vocab] for each text.
        oracle: transformers' own logits at the same positions.
    """
    import torch

    from qwenport.validate.reference.rounded_inputs import moving_inputs

    last = layer_output(reference.num_layers - 1)
    local, own, accumulated = _Sum(), _Sum(), _Sum()
    truth: list[Array] = []
    for kind in (TRUTH, dtype):
        with contextlib.ExitStack() as stack, torch.inference_mode():
            norm = stack.enter_context(reference.final_norm(kind))
            head = stack.enter_context(reference.head(kind))
            if kind != TRUTH:  # the target's codes are not known: `own` includes what others may do
                stack.enter_context(moving_inputs(head))
            dtype_of = next(head.parameters()).dtype
            for number, text in enumerate(texts):
                rows = torch.from_numpy(seen[number][last][list(text.positions)])
                result = head(norm(rows.to(dtype_of))).double().numpy()
                if kind == TRUTH:
                    truth.append(result)
                    local.add(logits[number], result)
                    accumulated.add(logits[number], oracle[number])
                else:
                    own.add(result, truth[number])
    return OperatorError("final norm and lm_head", accumulated.value, local.value, own.value)
