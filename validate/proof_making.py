"""Making a package's proof: its logits on the CPU in fp32, and how far a correct engine may be from them.

Two programs run the same sequences, one after the other: the package as `validate` judges it, and the package with
every result rounded to half precision. The second measures what rounding does to this model's logits, and from that
follow the bounds. If weights are quantized, a third program measures what rounding activations does: the package with
activations in int8, or, if the model itself rounds them to FP8, with inputs that choose other codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport import __version__
from qwenport.contract import (
    BF16,
    DTYPES,
    E4M3,
    FP16,
    INT8,
    MANIFEST,
    MOE_ROUTER,
    PROOF,
    Progress,
    no_progress,
)
from qwenport.engines import (
    MOST_PROOF_BYTES,
    PROJECTIONS,
    TOP,
    CachedSession,
    Fingerprints,
    OnnxRuntimeSession,
    Proof,
    kept_proof,
    start_onnxruntime,
    write_proof,
)
from qwenport.engines.onnxruntime_session import MAX_STEP_TOKENS
from qwenport.exporter import Package, sha256
from qwenport.validate.proof_cases import (
    BASIC,
    CONTEXTS,
    Case,
    Mark,
    expert_case,
    make_cases,
    make_sequences,
    operations,
)
from qwenport.validate.proof_chunks import (
    chunk_cases,
    request_prompts,
    scaled_requests,
    unscaled_context,
)
from qwenport.validate.proof_run import Float64, Open, ProofRun, Rounded, Router
from qwenport.validate.streaming import Geometry, Use, stream
from qwenport.validate.thresholds import (
    FP8_LEAST,
    FP8_ROUNDING_MARGIN,
    FP32_REL_L2,
    FP32_REL_L2_MOST_DENSE,
    FP32_TIMES_OWN_ROUNDING,
    HALF_TIMES_OWN,
)

LEAST_BYTES = 48 << 10
SHARE = 0.01  # of the weights
EXPERTS_SHARE = 0.4  # of the proof
BUILD_SECONDS = 60
"""What `qwenport build` may spend on a proof, by estimate."""
FLOPS_A_SECOND = 3e10  # assumed: two slow cores
MARK_BYTES = 8 * TOP + 4 + 4 * PROJECTIONS + 8 + 8

# A fingerprint estimates a relative L2 error from 64 projections: the standard deviation of the estimate is 9%.
ESTIMATE_MARGIN = 1.5
# Rounding errors of the rest of a bf16 or fp16 program, in units of fp32's.
TIMES_FP32 = {BF16.name: 2.0**16, FP16.name: 2.0**13}
# The error of a mark is one draw of rounding's; other correct programs draw others. So many of all positions have less.
HALF_QUANTILE = 0.9
# Of what one program that rounds so measures, this is allowed to others: processors round to int8 in different blocks,
# and a code in FP8 that falls the other way may move one mark more than any in the measurement.
TIMES_OWN = dict.fromkeys((BF16.name, FP16.name, INT8, E4M3), HALF_TIMES_OWN)
# No model's own rounding measured less over many positions; a model of one layer that is exact by chance may.
LEAST = {BF16.name: 2.0**-9, FP16.name: 2.0**-12, INT8: 2.0**-9, E4M3: FP8_LEAST}


@dataclass(frozen=True)
class KeptProof:
    """A package's proof.

    Attributes:
        proof: None if there can be none, or making it would take too long.
        note: why the package keeps none, in a sentence that says what to do; None if it keeps it.
    """

    proof: Proof | None
    note: str | None = None


def make_proof(
    package: Package,
    *,
    streamed: bool = False,
    context: int = CONTEXTS[0],
    progress: Progress = no_progress,
) -> Proof:
    """Make the proof of a package by running it on the CPU.

    Args:
        package: a verified package.
        streamed: load one decoder layer at a time.
        context: tokens of the longest sequence, at most the package's max_seq_len.
        progress: called with (what, done, total).

    Raises:
        ProofError: the logits are not finite.
        PackageError, SessionError, MissingExtraError: the package cannot be run here.
    """
    context = min(context, package.max_seq_len)
    routers, chunks = _routers(package), package.config.dual_chunk
    vocab_size = package.manifest["model"]["vocab_size"]
    sequences = _sequences(package, vocab_size, context)
    prompts = request_prompts(scaled_requests(chunks, context))
    run = ProofRun(sequences, prompts, routers, progress)
    exact = _opener(package, streamed, context, None)
    prints = run.exact(exact)
    dtype = BF16 if package.dtype == "fp32" else DTYPES[package.dtype]
    half = run.rounded(dtype.name, _opener(package, streamed, context, dtype.name), prints)
    activations, quantization = half, package.config.quantization
    if quantization is not None:
        kind = E4M3 if quantization.rounds_inputs else INT8
        activations = run.rounded(kind, _opener(package, streamed, context, kind), prints)
    plain = unscaled_context(chunks, context)
    whole = plain == package.max_seq_len
    wanted, experts = make_cases(plain, package.max_batch, whole=whole), (0, 0)
    if chunks is not None:
        special = chunk_cases(chunks, context, package.max_seq_len, package.max_batch)
        wanted[BASIC:BASIC] = special
    if routers:
        case, experts = _expert_case(run, half.moved, int(EXPERTS_SHARE * _limit(package)))
        wanted.insert(BASIC, case)
    cases = _fitting(wanted, sequences, _limit(package))
    marks = sorted({mark for case in cases for mark in case.marks})
    bounds = _bounds(marks, run, package.dtype, half, activations)
    import onnxruntime

    tokens, starts = _lay_out(sequences)
    return Proof(
        tokens=np.array(tokens, dtype=np.int32),
        sequences=np.array([[s, len(t)] for s, t in zip(starts, sequences, strict=True)], np.int32),
        marks=np.array(marks, dtype=np.int32),
        fingerprints=Fingerprints.join([prints[s].take([n - 1]) for s, n in marks]),
        bounds=bounds,
        operations=tuple(operations(cases)),
        package_sha256=sha256(package.path / MANIFEST),
        dtype=package.dtype,
        vocab_size=vocab_size,
        cases=tuple(case.name for case in cases),
        experts=experts,
        made_by={"qwenport": __version__, "onnxruntime": onnxruntime.__version__},
    )


def keep_proof(
    package: Package,
    *,
    streamed: bool = False,
    seconds: float | None = None,
    progress: Progress = no_progress,
) -> KeptProof:
    """Make a package's proof and keep it in the package, unless it has one.

    Args:
        package: a verified package.
        streamed: load one decoder layer at a time.
        seconds: do nothing if it is estimated to take longer.
        progress: called with (what, done, total).

    Raises:
        ProofError: the package has a proof that is damaged or of another package, or its logits are not finite.
        PackageError, SessionError, MissingExtraError: as `make_proof`.
    """
    kept = kept_proof(package)
    if kept is not None:
        return KeptProof(kept)
    context = CONTEXTS[0] if seconds is None else _longest(package, seconds)
    if context is None:
        return KeptProof(
            None,
            f"no proof for `qwenport selftest`: making it would take more than {seconds:g} s; "
            f"`qwenport validate {package.path}` makes one when parity holds",
        )
    proof = make_proof(package, streamed=streamed, context=context, progress=progress)
    file = package.path / PROOF
    try:
        write_proof(file, proof)
    except OSError as error:
        return KeptProof(
            proof,
            f"the package keeps no proof for `qwenport selftest`: {file} cannot be written ({error.strerror})",
        )
    return KeptProof(proof)


def _longest(package: Package, seconds: float) -> int | None:
    """The longest context that is estimated to take at most `seconds`."""
    weights = package.manifest["weights"]["bytes"] / DTYPES[package.dtype].itemsize
    runs = 2
    if package.config.quantization is not None:
        weights, runs = (
            8 * package.manifest["weights"]["bytes"] / package.config.quantization.least_bits,
            3,
        )
    for context in CONTEXTS:
        sequences = _sequences(package, 2, min(context, package.max_seq_len))
        tokens = sum(map(len, sequences))
        if runs * 2 * weights * tokens / FLOPS_A_SECOND <= seconds:
            return context
    return None


def _sequences(package: Package, vocab_size: int, context: int) -> list[list[int]]:
    """The token sequences for a context, `MAIN` as far as it is not scaled by length."""
    chunks = package.config.dual_chunk
    longer = [request.length for request in scaled_requests(chunks, context)]
    return make_sequences(
        vocab_size,
        unscaled_context(chunks, context),
        experts=package.config.moe is not None,
        longer=longer,
    )


def _lay_out(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The tokens, and where each sequence starts in them; one that begins another lies in it."""
    tokens: list[int] = []
    starts: dict[int, int] = {}
    for number in sorted(range(len(sequences)), key=lambda n: -len(sequences[n])):
        own = list(sequences[number])
        within = [at for at in starts.values() if tokens[at : at + len(own)] == own]
        starts[number] = within[0] if within else len(tokens)
        tokens += [] if within else own
    return tokens, [starts[number] for number in range(len(sequences))]


def _routers(package: Package) -> list[Router]:
    if package.config.moe is None:
        return []
    return [
        Router(str(node.inputs[0].name), str(node.outputs[1].name))
        for node in package.read_model().graph
        if node.op_type == MOE_ROUTER and node.inputs[0] is not None
    ]


def _opener(package: Package, streamed: bool, context: int, rounded: str | None) -> Open:
    """Opens sessions of one row; with `rounded` each result is rounded to it, or for INT8 activations of products.

    For E4M3, inputs are moved before they are rounded.
    """
    from qwenport.engines.lowering import (
        for_onnxruntime_int8,
        for_onnxruntime_moved,
        for_onnxruntime_rounded,
    )
    from qwenport.validate.package_parts import PackageParts, on_cpu

    lower: Callable[[Any], Any] = on_cpu
    if rounded == INT8:
        lower = for_onnxruntime_int8
    elif rounded == E4M3:
        lower = partial(for_onnxruntime_moved, share=FP8_ROUNDING_MARGIN)
    elif rounded is not None:
        lower = partial(for_onnxruntime_rounded, dtype=DTYPES[rounded])
    vocab_size, chunks = package.manifest["model"]["vocab_size"], package.config.dual_chunk

    def open_streamed(act: Callable[[CachedSession], Any], observe: Sequence[str]) -> CachedSession:
        geometry = Geometry(
            1,
            context,
            vocab_size,
            MAX_STEP_TOKENS,
            MAX_STEP_TOKENS,
            package.max_seq_len,
            unscaled_length=None if chunks is None else chunks.original_max_position_embeddings,
        )
        parts = PackageParts(package, package.config.num_hidden_layers, lower=lower)
        (session,) = stream(parts, [Use(geometry, act)], observe)
        return session

    def open_whole(act: Callable[[CachedSession], Any], observe: Sequence[str]) -> CachedSession:
        def load() -> Any:
            if rounded is None:
                return None
            import onnx_ir as ir

            model = lower(package.read_model())
            values = {value.name: value for node in model.graph for value in node.outputs}
            model.graph.outputs.extend(values[name] for name in observe)
            return start_onnxruntime(ir.to_proto(model).SerializeToString(), package.path)

        return OnnxRuntimeSession(package, capacity=context, observe=observe, load=load)

    return open_streamed if streamed else open_whole


def _bounds(
    marks: Sequence[Mark], run: ProofRun, dtype: str, half: Rounded, activations: Rounded
) -> NDArray[np.float32]:
    """The errors allowed at each mark, fp32 [M, 3]: in fp32, in the package's dtype, with rounded activations.

    Args:
        marks: the marks.
        run: knows which tokens may go to other experts.
        dtype: the package's.
        half: what rounding to half precision does.
        activations: what rounding activations does.
    """
    by_half, by_activations = _allowed(marks, run, half), _allowed(marks, run, activations)
    typical, scale = float(np.median(np.concatenate(half.errors))), 1 / TIMES_FP32[half.dtype]
    # in fp32 a bound is far below the effect of a token that went to another expert, so any before counts
    tainted = [
        np.cumsum(run.near_ties(s, FP32_TIMES_OWN_ROUNDING * scale * half.moved)) > 0
        for s in range(len(half.errors))
    ]
    found = []
    for (sequence, n), rounded, with_rounded in zip(marks, by_half, by_activations, strict=True):
        own = float(half.errors[sequence][n - 1])
        single = max(FP32_REL_L2, FP32_TIMES_OWN_ROUNDING * max(own, typical) * scale)
        single = ESTIMATE_MARGIN * min(single, FP32_REL_L2_MOST_DENSE)
        if bool(tainted[sequence][n - 1]):
            single = rounded
        found.append((single, single if dtype == "fp32" else rounded, with_rounded))
    return np.array(found, dtype=np.float32)


def _allowed(marks: Sequence[Mark], run: ProofRun, rounded: Rounded) -> list[float]:
    """The errors allowed at each mark to programs that round so."""
    every = np.concatenate(rounded.errors)
    high, largest = float(np.quantile(every, HALF_QUANTILE)), float(every.max())
    near = [run.near_ties(s, rounded.moved) for s in range(len(rounded.errors))]
    times, least = TIMES_OWN[rounded.dtype], LEAST[rounded.dtype]
    return [
        ESTIMATE_MARGIN
        * times
        * max(float(rounded.errors[s][n - 1]), largest if near[s][n - 1] else high, least)
        for s, n in marks
    ]


def _limit(package: Package) -> int:
    """The most bytes of a package's proof."""
    share = int(SHARE * package.manifest["weights"]["bytes"])
    return min(MOST_PROOF_BYTES, max(LEAST_BYTES, share))


def _fitting(
    cases: Sequence[Case], sequences: Sequence[Sequence[int]], limit: int
) -> tuple[Case, ...]:
    """The cases that fit into `limit` bytes, in their order of importance."""
    found: list[Case] = []
    for case in cases:
        if _bytes([*found, case], sequences) <= limit:
            found.append(case)
    return tuple(found)


def _bytes(cases: Sequence[Case], sequences: Sequence[Sequence[int]]) -> int:
    """The size of a proof, or a bit more."""
    marks = len({mark for case in cases for mark in case.marks})
    names = sum(len(case.name) + 6 for case in cases)
    lengths = 4 * len(_lay_out(sequences)[0]) + 8 * len(sequences)
    return 2048 + names + lengths + MARK_BYTES * marks + 24 * sum(1 for _ in operations(cases))


def _expert_case(run: ProofRun, moved: Float64, limit: int) -> tuple[Case, tuple[int, int]]:
    """Marks whose own tokens together reach every expert, as far as the last sequence does and `limit` bytes allow.

    Returns:
        The case, and how many experts its marks reach, of how many.
    """
    layers, tokens, _ = run.chosen.shape
    reach = [
        {(layer, int(expert)) for layer in range(layers) for expert in run.chosen[layer, token]}
        for token in range(tokens)
    ]
    reached: set[tuple[int, int]] = set()
    ends: list[int] = []
    near = run.near_ties(run.sequence, moved)

    def value(token: int) -> tuple[bool, int]:
        """Tokens whose experts are certain come first: their bounds are tighter."""
        new = len(reach[token] - reached)
        return bool(new and not near[token]), new

    while len(ends) < limit // (MARK_BYTES + 48):
        best = max(range(tokens), key=value)
        if reach[best] <= reached:
            break
        reached |= reach[best]
        ends.append(best + 1)
    return expert_case(run.sequence, sorted(ends)), (len(reached), layers * run.experts)
