"""The forms of attention: which one an engine gets, and that each computes what transformers computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenport.contract import (
    ATTENTIONS,
    AUTO,
    CHUNKED,
    DIRECT,
    GPUS,
    LOGITS,
    MASKED,
    SPLIT,
    TENSORRT,
    TENSORRT_RTX,
    WITH_QUERIES,
    is_past,
    is_query,
    query,
)
from qwenport.engines import BuildError, LoweringError
from qwenport.engines.attention import attention_of, choose_attention
from qwenport.engines.lowering import change_attention, check_changed
from qwenport.engines.spans import Spans
from qwenport.exporter import Package, export
from qwenport.validate.network import Interpreter, NetworkSession, parse_package
from qwenport.validate.network.parse import with_exact_tables

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = ("tiny-qwen2.5", "tiny-qwen2-moe")
CHANGED = (DIRECT, CHUNKED, SPLIT)
CAPACITY, ROWS = 500, 3  # not a multiple of 256
EXACT = 1e-5  # relative: fp32 on both sides, summed in another order
OWN_ERROR = 1.25  # times what transformers itself loses in bf16
HUGE = 1e30  # in the slots that nothing was written to
TEXTS = np.random.default_rng(3).integers(0, 1000, (ROWS, 310))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the choice


@pytest.fixture(scope="module")
def config() -> Any:
    from qwenport.exporter import parse_config, read_config_json

    return parse_config(read_config_json(EXAMPLES / "tiny-qwen2.5"))


@pytest.mark.parametrize(
    ("flavour", "gpus", "dtype", "form"),
    [
        (TENSORRT_RTX, "sm89", "bf16", DIRECT),
        (TENSORRT_RTX, "sm89 sm120 sm121", "fp16", DIRECT),
        (TENSORRT_RTX, "sm86", "bf16", CHUNKED),
        (TENSORRT_RTX, "sm80 sm89", "bf16", CHUNKED),
        (TENSORRT_RTX, "sm75", "fp16", CHUNKED),
        (TENSORRT_RTX, "sm80 sm86 sm89 sm120 sm121", "bf16", CHUNKED),
        (TENSORRT_RTX, "sm89", "fp32", MASKED),
        (TENSORRT, "sm90", "bf16", MASKED),
    ],
)
def test_the_form_that_moves_the_fewest_bytes(
    config: Any, flavour: str, gpus: str, dtype: str, form: str
) -> None:
    asked = {"flavour": flavour, "gpus": tuple(gpus.split()), "dtype": dtype, "config": config}
    assert choose_attention(AUTO, **asked) == form


@pytest.mark.parametrize(
    ("form", "flavour", "gpus", "dtype", "reason"),
    [
        (DIRECT, TENSORRT_RTX, "sm86 sm89", "bf16", "for sm86 it copies the cache"),
        (SPLIT, TENSORRT_RTX, "sm80", "bf16", "for sm80 it copies the cache"),
        (SPLIT, TENSORRT, "sm89", "bf16", "no attention with lengths"),
        (CHUNKED, TENSORRT_RTX, "sm89", "fp32", "no fused attention in fp32"),
        ("flash", TENSORRT_RTX, "sm89", "bf16", "not one of auto, masked, direct"),
    ],
)
def test_a_form_that_cannot_be_had_is_refused_with_the_reason(
    config: Any, form: str, flavour: str, gpus: str, dtype: str, reason: str
) -> None:
    asked = {"flavour": flavour, "gpus": tuple(gpus.split()), "dtype": dtype, "config": config}
    with pytest.raises(BuildError, match=reason):
        choose_attention(form, **asked)


def test_heads_without_groups_get_chunks_in_place_of_lengths(config: Any) -> None:
    alone = replace(config, num_key_value_heads=config.num_attention_heads)
    asked = {"flavour": TENSORRT_RTX, "gpus": ("sm89",), "dtype": "bf16", "config": alone}
    assert choose_attention(AUTO, **asked) == CHUNKED
    with pytest.raises(BuildError, match="without groups"):
        choose_attention(DIRECT, **asked)


@given(
    flavour=st.sampled_from((TENSORRT, TENSORRT_RTX)),
    gpus=st.sets(st.sampled_from(GPUS[TENSORRT_RTX]), min_size=1),
    dtype=st.sampled_from(("bf16", "fp16", "fp32")),
)
def test_auto_is_a_form_that_may_be_asked_for(
    config: Any, flavour: str, gpus: set[str], dtype: str
) -> None:
    asked = {"flavour": flavour, "gpus": tuple(sorted(gpus)), "dtype": dtype, "config": config}
    form = choose_attention(AUTO, **asked)
    assert choose_attention(form, **asked) == form
    assert choose_attention(MASKED, **asked) == MASKED


@given(form=st.sampled_from(ATTENTIONS), capacity=st.integers(1, 200_000))
def test_slots_hold_the_capacity_and_are_whole_spans(form: str, capacity: int) -> None:
    attention = attention_of(form, capacity)
    assert capacity <= attention.slots < capacity + 256
    if form in (CHUNKED, SPLIT):
        assert attention.slots % 256 == 0 == attention.span_multiple % 256
        assert all(s % 256 == 0 for s in Spans(attention.span_multiple, attention.slots))
    else:
        assert attention.slots == capacity


# ---- what is computed


@dataclass(frozen=True)
class Model:
    package: Package
    reference: Any
    half: Any

    def logits(self, text: Any, *, half: bool = False) -> np.ndarray:
        model = self.half if half else self.reference
        with torch.no_grad():
            return model(torch.tensor([list(map(int, text))])).logits[0].float().numpy()


@pytest.fixture(scope="module", params=CHECKPOINTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import AutoModelForCausalLM

    checkpoint = EXAMPLES / request.param
    folder = tmp_path_factory.mktemp("forms") / "package"
    package = export(checkpoint, folder, max_seq_len=CAPACITY, dtype="bf16")
    both = (
        AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    return Model(package, *both)


def session(package: Package, form: str, *, exact: bool, observe: Sequence[str] = ()) -> Any:
    """A session whose unused slots hold huge finite values, as after another text."""
    parsed = parse_package(package, CAPACITY, form)
    assert parsed.complaints == ()
    parsed = with_exact_tables(parsed, package) if exact else parsed
    attention = attention_of(form, CAPACITY)
    made = NetworkSession(
        Interpreter(parsed, exact=exact),
        package.config,
        max_batch=ROWS,
        capacity=CAPACITY,
        max_positions=package.max_seq_len,
        spans=Spans(attention.span_multiple, attention.slots),
        observe=observe,
    )
    for memory in made._cache.values():
        memory.fill_(HUGE)
    return made


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("form", ATTENTIONS)
def test_every_form_is_transformers_over_a_cache_of_huge_values(model: Model, form: str) -> None:
    """Ragged prefill, single tokens across the edge of a span of 256, a chunk, and the last slot."""
    run = session(model.package, form, exact=True)
    wanted = [model.logits(text) for text in TEXTS]
    given = [TEXTS[0, :254].tolist(), TEXTS[1, :3].tolist(), TEXTS[2, :100].tolist()]
    done = list(map(len, given))
    for row, got in enumerate(run.prefill(given)):
        assert error(got[-1], wanted[row][done[row] - 1]) <= EXACT
    for _ in range(3):
        tokens = [int(TEXTS[row, done[row]]) for row in range(ROWS)]
        got = run.decode(tokens)
        for row in range(ROWS):
            assert error(got[row], wanted[row][done[row]]) <= EXACT
            done[row] += 1
    chunk = [TEXTS[row, done[row] : done[row] + 40].tolist() for row in range(ROWS)]
    for row, got in enumerate(run.prefill(chunk, all_logits=True)):
        assert error(got, wanted[row][done[row] : done[row] + 40]) <= EXACT
    run.truncate(10, row=0)
    got = run.decode([int(TEXTS[0, 10]), None, None])
    assert error(got[0], wanted[0][10]) <= EXACT


@pytest.mark.parametrize("form", CHANGED)
def test_in_the_declared_types_no_form_loses_more_than_transformers(
    model: Model, form: str
) -> None:
    run = session(model.package, form, exact=False)
    right = np.stack([model.logits(text[:154]) for text in TEXTS])
    theirs = np.stack([model.logits(text[:154], half=True) for text in TEXTS])
    prefilled = run.prefill(TEXTS[:, :150].tolist(), all_logits=True)
    decoded = [run.decode(TEXTS[:, position].tolist()) for position in range(150, 154)]
    ours = np.concatenate([np.stack(prefilled), np.stack(decoded, axis=1)], axis=1)
    assert error(ours, right) <= OWN_ERROR * error(theirs, right)


@pytest.mark.parametrize("form", WITH_QUERIES)
def test_the_rotated_queries_are_still_observed_unscaled(model: Model, form: str) -> None:
    name = "model.layers.1.self_attn.rope_q"
    seen = []
    for one in (MASKED, form):
        run = session(model.package, one, exact=True, observe=[name])
        run.prefill([TEXTS[0, :20].tolist()])
        seen.append(run.observed[name])
    assert error(seen[1], seen[0]) <= EXACT


# ---- what is refused


def test_the_network_has_the_outputs_of_its_form(model: Model) -> None:
    layers = model.package.config.num_hidden_layers
    for form in ATTENTIONS:
        parsed = parse_package(model.package, CAPACITY, form)
        outputs = [parsed.network.get_output(i) for i in range(parsed.network.num_outputs)]
        queries = [tensor for tensor in outputs if is_query(tensor.name)]
        expected = [query(layer) for layer in range(layers)] if form in WITH_QUERIES else []
        assert [tensor.name for tensor in queries] == expected
        assert {tuple(tensor.shape)[1::2] for tensor in queries} <= {(6, 32)}
        pasts = filter(is_past, Interpreter(parsed).inputs)
        assert len(list(pasts)) == 2 * layers and LOGITS in [o.name for o in outputs]


def test_a_network_of_another_form_than_stated_is_refused(model: Model) -> None:
    for form in CHANGED:
        parsed = parse_package(model.package, CAPACITY, form)
        other = DIRECT if form == CHUNKED else CHUNKED
        with pytest.raises(LoweringError, match="attention of form"):
            check_changed(parsed.network, parsed.trt, other)


@pytest.mark.parametrize("form", CHANGED)
def test_a_mask_that_a_form_would_replace_by_another_is_refused(model: Model, form: str) -> None:
    parsed = parse_package(model.package, CAPACITY)
    for index in range(parsed.network.num_layers):
        layer = parsed.network.get_layer(index)
        if layer.type == parsed.trt.LayerType.ELEMENTWISE:
            layer.__class__ = parsed.trt.IElementWiseLayer
            if layer.op == parsed.trt.ElementWiseOperation.LESS:
                layer.op = parsed.trt.ElementWiseOperation.GREATER
    with pytest.raises(LoweringError, match=r"mask is not key_positions <= position_ids"):
        change_attention(parsed.network, parsed.trt, form)
