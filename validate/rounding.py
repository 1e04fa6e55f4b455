"""Half precision, judged where a judgement has power: at every layer and operator, given transformers' own input.

From end to end, two correct programs in bf16 differ by chance as much as many wrong ones differ from them. Inside one
operator they do not: given the same input, the errors at 512 positions are draws from one distribution, and medians of
512 draws can be distinguished. So transformers' own hidden states, in the target's dtype, are fed to each layer of the
network. Its result, and that of every operator in it, is compared with transformers in fp32 on the same input, and the
distribution of those errors with that of transformers' own errors, computed in the same way.

Two numbers per position: the relative error, ||made - right|| / ||right||, and its systematic part,
|<made, right> / <right, right> - 1|. Random roundings cancel in the second; a rounded statistic does not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenport.contract import DTYPES, INPUT_IDS, LOGITS_INDICES, WRITE_INDICES, Progress
from qwenport.exporter import ModelConfig
from qwenport.validate.candidate import Candidate
from qwenport.validate.localisation import WHOLE_LAYER, observed_sites, values_by_site
from qwenport.validate.pieces import as_array
from qwenport.validate.probe import Probe, run_layer
from qwenport.validate.reference import Choices, OpenLayer, Reference
from qwenport.validate.sites import GATED, router_choices, sites
from qwenport.validate.streaming import Feeds, Rehearsal
from qwenport.validate.thresholds import (
    HALF_ROUTER_MARGIN,
    ROUNDING_LEAST,
    ROUNDING_QUANTILES,
    ROUNDING_SYSTEMATIC_TIMES_OWN,
    ROUNDING_TIMES_OWN,
    ROUNDING_Z,
)

if TYPE_CHECKING:
    from qwenport.validate.network.corrections import Subtracted

Array = NDArray[Any]
Float64 = NDArray[np.float64]

END = "final norm and lm_head"
TRUTH = "fp32"  # a thousand times more precise than what is judged
ROWS_AT_ONCE = 64  # positions of the head at once: its logits are wide


@dataclass(frozen=True)
class Spread:
    """The comparison of two error distributions at one quantile.

    Attributes:
        quantile: quantile over the positions.
        made, own: the target's and transformers' errors there, the latter the largest of its attentions.
        times_own: their ratio; `least` is the lower end of its interval.
    """

    quantile: float
    made: float
    own: float
    times_own: float
    least: float


@dataclass(frozen=True)
class RoundingError:
    """The rounding of one operator, or of a whole layer.

    Attributes:
        layer: the decoder layer; None after the layers.
        operator: as in `sites`, WHOLE_LAYER or END.
        positions: number of positions compared.
        nonfinite: number of positions where the target has NaN or infinities and fp32 has none.
        relative, systematic: by quantile.
    """

    layer: int | None
    operator: str
    positions: int
    nonfinite: int
    relative: tuple[Spread, ...]
    systematic: tuple[Spread, ...]

    @property
    def excess(self) -> float:
        """The lower end of the worst ratio in units of its bound; above 1 it fails."""
        if self.nonfinite:
            return math.inf
        return max(
            [s.least / ROUNDING_TIMES_OWN for s in self.relative]
            + [s.least / ROUNDING_SYSTEMATIC_TIMES_OWN for s in self.systematic],
            default=0.0,
        )

    def __str__(self) -> str:
        """The place and its worst number."""
        where = self.operator if self.layer is None else f"layer {self.layer}, {self.operator}"
        if self.nonfinite:
            return f"{where}: NaN or infinity at {self.nonfinite} of {self.positions} positions"
        if not self.relative:
            return f"{where}: zero everywhere"
        kinds = [("relative", s, s.least / ROUNDING_TIMES_OWN) for s in self.relative]
        kinds += [
            ("systematic", s, s.least / ROUNDING_SYSTEMATIC_TIMES_OWN) for s in self.systematic
        ]
        kind, spread, _ = max(kinds, key=lambda each: each[2])
        return (
            f"{where}: {kind} error {spread.made:.2g} at quantile {spread.quantile:g} of {self.positions} "
            f"positions, {spread.times_own:.2g} x transformers' own {spread.own:.2g}"
        )


@dataclass
class _Errors:
    """Errors at one place by position, of the target and of transformers' implementations."""

    relative: list[list[Float64]] = field(default_factory=lambda: [[], [], [], []])
    systematic: list[list[Float64]] = field(default_factory=lambda: [[], [], [], []])
    numbers: int = 1  # in the result at one position
    nonfinite: int = 0

    def add(self, right: Array, made: Array) -> None:
        """Add the target's result and the correct one."""
        self.nonfinite += self._add(0, right, made)

    def add_own(self, right: Array, *results: Array, steps: Sequence[Array] = ()) -> None:
        """Add transformers' own results, by up to three implementations, and the correct one.

        Args:
            steps: [S, N] each, what a correct network rounds on its way to the result, and transformers does not: their
                errors are added to transformers' own, in proportion to their size.
        """
        for index, result in enumerate(results, start=1):
            self._add(index, right, result, steps)

    def _add(self, index: int, right: Array, made: Array, steps: Sequence[Array] = ()) -> int:
        """Record errors by position; return how many positions are not finite and should be."""
        r = np.asarray(right, dtype=np.float32).reshape(len(right), -1)
        m = np.asarray(made, dtype=np.float32).reshape(len(r), -1)
        if m.shape != r.shape:
            m = np.full_like(r, np.nan)
        self.numbers = r.shape[1]
        size = _products(r, r)
        finite = np.isfinite(m).all(axis=1)
        use = np.isfinite(size) & (size > 0) & finite
        if not use.all():
            r, m = r[use], m[use]
        difference = m - r
        added = sum(_products(step[use], step[use]) for step in steps) / size[use]
        more = np.sqrt(1 + added)
        self.relative[index].append(more * np.sqrt(_products(difference, difference) / size[use]))
        self.systematic[index].append(more * np.abs(_products(difference, r)) / size[use])
        return int((np.isfinite(size) & ~finite).sum())

    def result(self, layer: int | None, operator: str, unit: float) -> RoundingError:
        relative, systematic = (
            [np.concatenate(parts) if parts else np.zeros(0) for parts in kind]
            for kind in (self.relative, self.systematic)
        )
        least = ROUNDING_LEAST * unit
        random = [least] * len(ROUNDING_QUANTILES)
        spreads = _spreads(relative[0], relative[1:], random)
        left = [max(least, s.own) / math.sqrt(self.numbers) for s in spreads]
        return RoundingError(
            layer,
            operator,
            len(relative[0]) + self.nonfinite,
            self.nonfinite,
            spreads,
            _spreads(systematic[0], systematic[1:], left),
        )


def _products(a: Array, b: Array) -> Float64:
    """Sums of products by position; in fp32, a thousand times more precise than what they are compared with."""
    return np.einsum("pn,pn->p", a, b).astype(np.float64)


def _spreads(made: Float64, own: Sequence[Float64], least: Sequence[float]) -> tuple[Spread, ...]:
    """Quantiles of two distributions with the order statistics that bound them (Hahn and Meeker, chapter 5)."""
    theirs = [values for values in own if len(values)]
    if not len(made) or not theirs:
        return ()
    found = []
    for quantile, floor in zip(ROUNDING_QUANTILES, least, strict=True):
        low, middle, _ = _order(made, quantile)
        tops = [_order(values, quantile) for values in theirs]
        highest = max(floor, *(top[2] for top in tops))
        typical = max(floor, *(top[1] for top in tops))
        found.append(Spread(quantile, middle, typical, middle / typical, low / highest))
    return tuple(found)


def _order(values: Float64, quantile: float) -> tuple[float, float, float]:
    """(lower end, quantile, upper end)."""
    ordered, count = np.sort(values), len(values)
    middle, half = count * quantile, ROUNDING_Z * math.sqrt(count * quantile * (1 - quantile))
    ends = [
        int(np.clip(x, 0, count - 1)) for x in (math.floor(middle - half), math.ceil(middle + half))
    ]
    return float(ordered[ends[0]]), float(np.quantile(ordered, quantile)), float(ordered[ends[1]])


def worst(errors: Sequence[RoundingError]) -> RoundingError | None:
    """The first place with NaN or infinity; else the one furthest beyond its bound, or nearest to it."""
    broken = [error for error in errors if error.nonfinite]
    if broken:
        return broken[0]
    return max(errors, key=lambda error: error.excess, default=None)


@dataclass(frozen=True)
class _Piece:
    """A text's part in one step: which text, which of its tokens, and the step's inputs."""

    text: int
    start: int
    stop: int
    feeds: Feeds


def judge_rounding(
    candidate: Candidate,
    reference: Reference,
    config: ModelConfig,
    dtype: str,
    texts: Sequence[Sequence[int]],
    progress: Progress,
) -> Iterator[RoundingError]:
    """Judge the rounding of every layer, every operator and the end, in execution order.

    Linears that round their inputs to FP8, and gated products that are rounded, are judged with their layer alone: in
    half precision an input often falls to another code than in fp32, and where one input is most of a result, that is
    most of its error.

    Args:
        candidate: the network in its declared types.
        reference: transformers.
        config: the model's config.
        dtype: "bf16" or "fp16".
        texts: tokens, at least 512 in total.
        progress: called with (what, layers done, all layers).
    """
    entries = [_embedded(reference, tokens, dtype) for tokens in texts]
    unit = float(torch.finfo(DTYPES[dtype].torch).eps) / 2
    geometry = candidate.geometry(1, max(len(text) for text in texts))
    pieces = list(_pieces(Rehearsal(geometry), texts))
    parts, routers = candidate.parts(), router_choices(config, reference.num_layers)
    corrections = candidate.corrections()
    for index in range(reference.num_layers):
        places = observed_sites(config, index, candidate.uses)
        names = [*places, *([routers[index]] if index in routers else [])]
        made: list[list[Array]] = [[] for _ in texts]
        seen: list[dict[str, list[Array]]] = [{name: [] for name in names} for _ in texts]
        with parts.layer(index, [geometry], names) as run:
            for piece in pieces:
                entry = torch.from_numpy(entries[piece.text][piece.start : piece.stop])
                end, values = run(0, piece.feeds, entry[None].to(DTYPES[dtype].torch))
                made[piece.text].append(as_array(end)[0])
                for name in names:
                    value = values[name][0]
                    if name in places and places[name].heads:
                        value = value.swapaxes(0, 1)
                    seen[piece.text][name].append(np.array(value))
        ends = [np.concatenate(found) for found in made]
        values_of = [
            {name: np.concatenate(found) for name, found in of_text.items()} for of_text in seen
        ]
        experts = [
            Choices({index: of_text[routers[index]]}, HALF_ROUTER_MARGIN)
            if index in routers
            else None
            for of_text in values_of
        ]
        given = [values_by_site(config, of_text, places, index) for of_text in values_of]
        rounding = candidate.rounded_inputs(index + 1).get(index, {})
        entries = yield from _judge_layer(
            *(reference, config, index, dtype, unit, entries, ends, given, experts, rounding),
            corrections.get(index, {}),
        )
        progress("judging half precision", index + 1, reference.num_layers + 1)
    yield _judge_end(parts, reference, dtype, unit, entries)
    progress("judging half precision", reference.num_layers + 1, reference.num_layers + 1)


def _pieces(session: Rehearsal, texts: Sequence[Sequence[int]]) -> Iterator[_Piece]:
    for number, tokens in enumerate(texts):
        session.reset()
        session.steps.clear()
        session.prefill([list(tokens)])
        for feeds in session.steps:
            start, width = int(feeds[WRITE_INDICES][0]), feeds[INPUT_IDS].shape[1]
            yield _Piece(number, start, start + width, feeds)


def _judge_layer(
    reference: Reference,
    config: ModelConfig,
    index: int,
    dtype: str,
    unit: float,
    entries: Sequence[Array],
    ends: Sequence[Array],
    given: Sequence[Mapping[str, Array]],
    experts: Sequence[Choices | None],
    rounding: Collection[str],
    corrections: Mapping[str, Subtracted],
) -> Generator[RoundingError, None, list[Array]]:
    """Yield the errors of one layer; return the output of transformers' own layer, the next one's input."""
    places = sites(config, index)
    # transformers shows what such a linear multiplies, after its rounding; a network's value is before it
    gated = {f"{path.removesuffix('down_proj')}{GATED}" for path in rounding}
    judged = given[0].keys() - set(rounding) - gated
    errors = {site.name: _Errors() for site in places if site.name in judged}
    whole, following = _Errors(), []

    def probed(layer: OpenLayer, number: int, values: Mapping[str, Array], kind: str) -> Probe:
        probe = Probe(places, values, kind)
        with probe.attached(layer.module):
            probe.result = run_layer(reference, layer.module, entries[number], 0, kind)
        return probe

    own: list[dict[str, Array]] = []
    others: list[dict[str, list[Array]]] = []
    with reference.opened_layer(index, dtype) as layer:
        for number, entry in enumerate(entries):
            probe = probed(layer, number, {}, dtype)
            own.append(_arrays(probe.expected))
            others.append({n: [_array(t) for t in ts] for n, ts in probe.others.items()})
            if experts[number] is None:
                following.append(probe.result.float().numpy())
            else:
                following.append(_alone(layer, entry, experts[number]))
    with reference.opened_layer(index, TRUTH) as layer:
        biases = {name: _bias(layer.module, name) for name in errors}
        for number, entry in enumerate(entries):
            # transformers' own results on its own inputs, the target's on its own: both rounded, and close together
            true = probed(layer, number, own[number], TRUTH)
            right = _arrays(true.expected)
            theirs = {n: (own[number][n], *others[number].get(n, ())) for n in errors}
            expected = _arrays(probed(layer, number, given[number], TRUTH).expected)
            for name, found in errors.items():
                found.add(expected[name], given[number][name])
                taken = corrections.get(name)
                steps = _steps(
                    right[name],
                    biases[name],
                    None if taken is None else taken.of(_array(true.inputs[name])),
                )
                found.add_own(right[name], *theirs[name], steps=steps)
            truth = _alone(layer, entry, experts[number])
            whole.add(truth, ends[number])
            whole.add_own(truth, following[number])
    for name, found in errors.items():
        yield found.result(index, name, unit)
    yield whole.result(index, WHOLE_LAYER, unit)
    return following


def _steps(right: Array, bias: Array | None, subtracted: Array | None) -> list[Array]:
    """What a network rounds before a linear's result: the product without its bias, and both products of a correction.

    transformers adds a bias before it rounds, and has no correction.

    Args:
        right: the result [S, N].
        bias: [N].
        subtracted: the second product [S, N].
    """
    product = right if bias is None else right - bias
    steps = [] if bias is None else [product]
    return steps if subtracted is None else [*steps, product + subtracted, subtracted]


def _bias(module: Any, name: str) -> Array | None:
    """The bias of the linear of that name in a decoder layer; None if the name is not a linear's."""
    try:
        bias = module.get_submodule(name).bias
    except AttributeError:
        return None
    return None if bias is None else bias.float().numpy()


def _alone(layer: OpenLayer, entry: Array, experts: Choices | None) -> Array:
    result: Array = layer.run(entry, queries_at_once=len(entry), choices=experts)
    return result


def _embedded(reference: Reference, tokens: Sequence[int], dtype: str) -> Array:
    rows: Array = torch.from_numpy(reference.embed(tokens)).to(DTYPES[dtype].torch).float().numpy()
    return rows


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.float().numpy()
    return array


def _judge_end(
    parts: Any, reference: Reference, dtype: str, unit: float, states: Sequence[Array]
) -> RoundingError:
    """The final norm and the projection to the vocabulary, given transformers' own last hidden states."""
    errors = _Errors()
    rows = np.concatenate(states)
    blocks = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    made, right = [], []
    with parts.epilogue([]) as run:
        for block in blocks:
            wanted = {LOGITS_INDICES: np.arange(len(block), dtype=np.int64)[None]}
            logits, _ = run(0, wanted, torch.from_numpy(block)[None].to(DTYPES[dtype].torch))
            made.append(logits[0])
    for kind in (TRUTH, dtype):
        with (
            reference.final_norm(kind) as norm,
            reference.head(kind) as head,
            torch.inference_mode(),
        ):
            type_of = next(head.parameters()).dtype
            for number, block in enumerate(blocks):
                result = head(norm(torch.from_numpy(block).to(type_of)))
                if kind == TRUTH:
                    right.append(result.float().numpy())
                else:
                    errors.add(right[number], made[number])
                    errors.add_own(right[number], result.float().numpy())
    return errors.result(None, END, unit)
