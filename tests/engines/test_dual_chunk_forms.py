"""Dual chunk attention on TensorRT: what is computed, what the builder makes of it, and the steps that engines take."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from chunked import CHUNK as OF_POSITIONS
from chunked import ORIGINAL, make_chunked, run_in_pieces
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.contract import (
    AUTO,
    CHUNK,
    CHUNKED,
    DIRECT,
    INPUT_IDS,
    KEY_POSITIONS,
    MASKED,
    SPLIT,
    TENSORRT,
    TENSORRT_RTX,
)
from qwenport.engines import BuildError, Engine, LoweringError, SessionError, build
from qwenport.engines.attention import attention_of, choose_attention
from qwenport.engines.lowering import change_attention, for_tensorrt
from qwenport.engines.request import Request
from qwenport.engines.spans import Spans
from qwenport.engines.targets import FLAVOURS, serves
from qwenport.engines.tensorrt_builder import (
    MAX_STEP_TOKENS,
    MOST_SCORE_BYTES,
    score_bytes,
    steps_of,
)
from qwenport.engines.tensorrt_session import TensorRTSession
from qwenport.exporter import Package, export
from qwenport.validate import open_target, validate
from qwenport.validate.network import Interpreter, NetworkSession, parse_package
from qwenport.validate.network.parse import parse_model, with_exact_tables
from qwenport.validate.reference import Reference, Text

from . import stand_in_tensorrt
from .layer_list import LayerList, layer_list

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "examples" / "tiny-qwen2.5-1m"
POSITIONS = 700  # three chunks of 256 keys, of which the last is not full
AGREE = 1e-5  # rel-L2 of logits: fp32 on both sides, summed in another order
HUGE = 1e30  # in the slots that nothing was written to
MOST_DECODE_BYTES = 10**9  # at 1,010,000 positions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chunked(tmp_path_factory.mktemp("chunked") / "checkpoint", positions=POSITIONS)


@pytest.fixture(scope="module")
def package(checkpoint: Path) -> Package:
    return export(checkpoint, checkpoint.parent / "package", dtype="bf16", max_batch=3)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, package: Package) -> Reference:
    return Reference(open_target(package.path), checkpoint)


def tokens(count: int, stream: int) -> list[int]:
    return np.random.default_rng(stream).integers(0, 300, count).tolist()


def apart(made: np.ndarray, right: np.ndarray) -> float:
    assert made.shape == right.shape
    return float(np.linalg.norm(made - right) / np.linalg.norm(right))


# ---- the choice


def test_chunks_are_the_form_of_rtx_in_every_dtype_and_on_every_gpu(package: Package) -> None:
    for dtype in ("bf16", "fp16", "fp32"):
        for gpus in (("sm89",), ("sm80", "sm120")):
            given = {"gpus": gpus, "dtype": dtype, "config": package.config}
            assert choose_attention(AUTO, flavour=TENSORRT_RTX, **given) == CHUNKED
            assert choose_attention(AUTO, flavour=TENSORRT, **given) == MASKED
            for form in (MASKED, CHUNKED):
                assert choose_attention(form, flavour=TENSORRT_RTX, **given) == form
            for form in (DIRECT, SPLIT):
                with pytest.raises(BuildError, match=f"attention {form} cannot be had: dual chunk"):
                    choose_attention(form, flavour=TENSORRT_RTX, **given)


def test_turing_which_multiplies_in_half_precision_alone_is_left_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Scores are products in fp32; with plain attention the same checkpoint is for it too."""
    package = export(checkpoint, tmp_path / "package", dtype="fp16", max_batch=1)
    with pytest.raises(BuildError, match="sm75 has no kernels for products in fp32, which dual"):
        build(package.path, tmp_path / "engine", target=TENSORRT_RTX, gpus="sm75,sm86")
    flavour = FLAVOURS[TENSORRT_RTX]
    assert not serves(flavour, "sm75", package.config, "fp16")
    engine = build(package.path, tmp_path / "engine", target=TENSORRT_RTX)
    assert engine.manifest["gpus"] == [gpu for gpu in flavour.gpus if gpu != "sm75"]
    plain = export(checkpoint, tmp_path / "plain", dtype="fp16", max_batch=1, max_seq_len=20)
    assert serves(flavour, "sm75", plain.config, "fp16")


# ---- what is computed


def session(package: Package, form: str) -> NetworkSession:
    """A session whose unused slots hold huge finite values, as after another text."""
    parsed = parse_package(package, POSITIONS, form)
    assert parsed.complaints == ()
    attention = attention_of(form, POSITIONS)
    made = NetworkSession(
        Interpreter(with_exact_tables(parsed, package), exact=True),
        package.config,
        max_batch=3,
        capacity=POSITIONS,
        max_positions=POSITIONS,
        spans=Spans(attention.span_multiple, attention.slots),
    )
    for memory in made._cache.values():
        memory.fill_(HUGE)
    return made


@pytest.mark.parametrize("form", [MASKED, CHUNKED])
@given(
    lengths=st.lists(
        st.one_of(
            st.integers(1, 6 * OF_POSITIONS + 3),
            st.integers(CHUNK - 4, CHUNK + 4),
            st.integers(2 * CHUNK - 4, 2 * CHUNK + 4),
        ),
        min_size=1,
        max_size=3,
    ),
    piece=st.integers(20, 300),
    decodes=st.integers(1, 5),
)
@settings(max_examples=12, deadline=None)
def test_both_forms_are_the_oracle_over_a_cache_of_huge_values(
    package: Package,
    reference: Reference,
    form: str,
    lengths: list[int],
    piece: int,
    decodes: int,
) -> None:
    """Ragged prompts in pieces, then single tokens, across chunks of positions and chunks of keys."""
    run = session(package, form)
    texts = [tokens(length + decodes, row) for row, length in enumerate(lengths)]
    made = run_in_pieces(run, texts, lengths, piece)
    for text, (found, requests) in zip(texts, made, strict=True):
        (right,) = reference.logits([Text(tuple(text), tuple(range(len(text))), 0, requests)])
        assert apart(found, right) < AGREE


@pytest.mark.slow
def test_the_network_of_the_bundled_checkpoint_passes_validate(tmp_path: Path) -> None:
    package = export(BUNDLED, tmp_path / "package", max_batch=2)
    report = validate(package.path, BUNDLED, judged_as="tensorrt-network", budget="quick")
    assert report.passed, report.failures
    assert package.config.dual_chunk is not None


@pytest.mark.slow
def test_the_network_with_masks_passes_validate(checkpoint: Path, package: Package) -> None:
    report = validate(
        package.path, checkpoint, judged_as="tensorrt-network", attention=MASKED, budget="quick"
    )
    assert report.passed, report.failures


# ---- what is refused


def _swapped(model: ir.Model) -> None:
    """The scores for the chunk before are those for older ones, and the other way round."""
    where = next(node for node in model.graph if node.op_type == "Where" and _chooses(node))
    condition, yes, no = where.inputs
    where.replace_input_with(1, no)
    where.replace_input_with(2, yes)
    assert condition is not None


def _chooses(node: ir.Node) -> bool:
    makers = [value.producer() for value in node.inputs[1:] if value is not None]
    return all(maker is not None and maker.op_type == "Split" for maker in makers)


def _unscaled(model: ir.Model) -> None:
    """A scale that depends on the token."""
    scale = next(node for node in model.graph if node.inputs[1:2] and _is_scale(node))
    scale.replace_input_with(1, scale.inputs[0])


def _is_scale(node: ir.Node) -> bool:
    return node.op_type == "Mul" and str(node.inputs[1].name) == "const_scale"  # type: ignore[union-attr]


def _other_values(model: ir.Model) -> None:
    """The second layer attends to the values of the first."""
    slices = [n for n in model.graph if n.op_type == "Slice" and "value" in str(n.inputs[0])]
    slices[1].replace_input_with(0, slices[0].inputs[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swapped, r"a part that starts at \(0, 0, 2, 0, 0\)"),
        (_unscaled, "not a number to scale by"),
        (_other_values, "no dual chunk attention reads present.1.key and present.1.value"),
    ],
)
def test_a_network_that_is_not_as_the_exporter_writes_it_is_refused(
    package: Package, change: Any, words: str
) -> None:
    model, _ = for_tensorrt(
        package.read_model(),
        dtype="bf16",
        capacity=768,
        rope_rows=package.config.rope_rows(POSITIONS),
        kv_heads=2,
    )
    change(model)
    parsed = parse_model(model, package.path, package.dtype)
    with pytest.raises(LoweringError, match=words):
        change_attention(parsed.network, parsed.trt, CHUNKED)


def test_a_form_by_lengths_is_refused_in_the_network_too(package: Package) -> None:
    parsed = parse_package(package, POSITIONS)
    with pytest.raises(LoweringError, match="no attention that could have the form direct"):
        change_attention(parsed.network, parsed.trt, DIRECT)


# ---- what the builder makes of it


def check_decode(decode: LayerList) -> None:
    """The profile for single tokens reads each cache where it lies; of the other branch one chunk of keys is left."""
    caches = {t.name for layer in decode.layers for t in layer.outputs if t.is_cache}
    in_place = [
        tensor.name
        for layer in decode.layers
        if not layer.updates_cache and not layer.copies_cache
        for tensor in layer.inputs
        if tensor.is_cache
    ]
    assert len(in_place) == len(set(in_place)) and set(in_place) <= caches
    fused = [  # the first layer's keys are read by what updates them
        t.name for x in decode.layers if x.updates_cache for t in x.inputs if t.is_cache
    ]
    assert caches <= {*in_place, *fused}
    for layer in decode.layers:
        if layer.copies_cache:
            for tensor in layer.outputs:
                assert -1 not in tensor.dims and CHUNK in tensor.dims, layer
        for tensor in layer.outputs:  # K or V in fp32
            assert (
                tensor.is_cache
                or tensor.dtype != "Float"
                or -1 not in tensor.dims
                or (tensor.dims[-1] in (1, CHUNK) or tensor.dims[-2] == 1)
            ), layer


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["sm80", "sm86", "sm89", "sm120", "sm121"])
def test_a_decode_step_reads_keys_and_values_once(package: Package, gpu: str) -> None:
    decode, *_ = layer_list(package.path, gpu, AUTO, 1)
    check_decode(decode)


@pytest.mark.slow
def test_the_7b_shape_builds_for_a_million_positions(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        shapes = importlib.import_module("shapes")
    checkpoint = shapes.make_checkpoint(
        "qwen2.5-7b-instruct-1m", tmp_path / "checkpoint", sparse=True, layers=2
    )
    package = export(checkpoint, tmp_path / "package")
    assert package.max_seq_len == 1_010_000
    made = layer_list(package.path, "sm89", AUTO, 1)
    decode, *prefills = made
    check_decode(decode)
    assert decode.activation_bytes <= MOST_DECODE_BYTES
    # and a copy of K in fp32, and two of V
    copies = 4 * package.config.num_key_value_heads * 1_010_176 * package.config.head_dim * 2
    for prefill in prefills:
        assert not [layer for layer in prefill.layers if layer.kind == "allocate"]
        assert prefill.activation_bytes <= MOST_SCORE_BYTES + copies
    tables = {
        constant.dims
        for layer in decode.layers
        for constant in layer.constants
        if len(constant.dims) == 2 and constant.dims[1] == package.config.head_dim // 2
    }
    chunks = package.config.dual_chunk
    assert chunks is not None and tables == {(chunks.chunk_size + 1, 64)}


# ---- the steps of an engine


def request(package: Package, capacity: int, batch: int, heads: int) -> Request:
    config = replace(package.config, num_attention_heads=heads)
    return Request(
        replace(package, config=config),
        TENSORRT_RTX,
        capacity=capacity,
        batch=batch,
        gpus=None,
        plugins=None,
        attention=AUTO,
    )


@given(
    capacity=st.one_of(st.integers(1, 4096), st.integers(1, 1 << 22)),
    batch=st.integers(1, 64),
    heads=st.sampled_from([1, 8, 28, 64, 128]),
    form=st.sampled_from([CHUNKED, MASKED]),
)
@settings(max_examples=200, deadline=None)
def test_profiles_narrow_as_spans_grow_within_a_bound(
    package: Package, capacity: int, batch: int, heads: int, form: str
) -> None:
    asked, attention = request(package, capacity, batch, heads), attention_of(form, capacity)
    single, *several = steps_of(asked, attention, several=True)
    assert (single.least, single.most, single.longest) == (1, 1, None)
    per_slot = score_bytes("bf16") * heads * batch
    for wide, narrow in itertools.pairwise(several):
        assert wide.most > narrow.most and wide.longest < narrow.longest  # type: ignore[operator]
    for steps in several:
        assert 2 <= steps.most <= min(MAX_STEP_TOKENS, capacity) and steps.longest is not None
        assert steps.most * steps.longest * per_slot <= MOST_SCORE_BYTES
    if 2 * attention.slots * per_slot <= MOST_SCORE_BYTES and capacity > 1:
        assert several[-1].longest == attention.slots
        wider = several[-1].most + 1  # no step that is wider would fit over all slots
        assert wider * attention.slots * per_slot > MOST_SCORE_BYTES or wider > min(
            MAX_STEP_TOKENS, capacity
        )


@pytest.fixture(scope="module")
def started(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts a session on the stand-in, on an engine whose profiles narrow: 100 tokens up to 256 slots, 9 to 512, 2."""
    folder = tmp_path_factory.mktemp("engines")
    package = export(checkpoint, folder / "package", dtype="fp32", max_batch=3)
    affordable = 100 * 256
    with pytest.MonkeyPatch.context() as patch:
        builder = importlib.import_module("qwenport.engines.tensorrt_builder")
        per_slot = score_bytes("fp32") * package.config.num_attention_heads
        patch.setattr(builder, "MOST_SCORE_BYTES", affordable * per_slot * 3)
        patch.setattr(builder, "MAX_STEP_TOKENS", 100)
        engine = build(package.path, folder / "engine", target=TENSORRT_RTX, gpus="sm89")
    cache = pytest.MonkeyPatch()
    cache.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def start(**options: Any) -> tuple[TensorRTSession, Any]:
        trt = stand_in_tensorrt.stand_in(engine, package)
        return TensorRTSession(engine, tensorrt=trt, gpu=trt.gpu, **options), trt

    yield engine, start, Reference(open_target(package.path), checkpoint)
    cache.undo()


def limits(engine: Engine) -> list[tuple[int, int]]:
    profiles = engine.manifest["profiles"]
    return [(p[INPUT_IDS]["max"][1], p[KEY_POSITIONS]["max"][0]) for p in profiles]


def test_a_session_narrows_its_steps_to_the_profiles(started: Any) -> None:
    engine, start, reference = started
    assert limits(engine) == [(1, 768), (100, 256), (33, 768)]
    session, trt = start(max_batch=3)
    widths: list[tuple[int, int]] = []
    session.on_step = lambda step: widths.append(
        (step.feeds[INPUT_IDS].shape[1], len(step.feeds[KEY_POSITIONS]))
    )
    lengths = [600, 90, 257]
    texts = [tokens(n + 1, row) for row, n in enumerate(lengths)]
    allocations = trt.gpu.allocations
    found = session.prefill([text[:-1] for text in texts])
    decoded = session.decode([text[-1] for text in texts])
    assert trt.gpu.allocations == allocations
    assert len(trt.contexts) == 3
    for width, span in widths:
        assert any(width <= most and span <= longest for most, longest in limits(engine))
    assert widths[:2] == [(100, 256), (100, 256)] and (1, 768) in widths
    for row, text in enumerate(texts):
        n = lengths[row]
        for last, made, requests in ((n, found[row][-1], [n] * n), (n + 1, decoded[row], None)):
            asked = requests or [n] * n + [n + 1]
            (right,) = reference.logits([Text(tuple(text[:last]), (last - 1,), 0, tuple(asked))])
            assert apart(made, right[0]) <= AGREE


def test_a_step_that_no_profile_has_memory_for_is_refused(started: Any) -> None:
    _, start, _ = started
    session, _ = start(max_batch=1)
    session.prefill([tokens(300, 0)])
    with pytest.raises(SessionError, match="a step of 40 tokens needs too much memory so far"):
        session.prefill_choosing([tokens(40, 1)], [[0]])


def test_a_prompt_may_not_continue_keys_with_another_factor(started: Any) -> None:
    _, start, _ = started
    session, _ = start(max_batch=1)
    session.prefill([tokens(ORIGINAL + 5, 0)])
    with pytest.raises(SessionError, match="lengths beyond 40 scale keys"):
        session.prefill([tokens(3, 1)])
    session.decode([7])  # a step of its own factor
