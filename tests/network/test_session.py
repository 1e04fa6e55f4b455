"""A session over the interpreted network: transformers' logits, exactly and in the types that TensorRT declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from onnx import helper

from qwenport.engines import CapacityError, SessionError
from qwenport.exporter import Package, export
from qwenport.validate.network import Interpreter, NetworkSession, ParsedNetwork, parse_package
from qwenport.validate.network.parse import with_exact_tables

from .models import Array, int64, parse, proto

ROWS, CAPACITY = 3, 48
EXACT = 1e-5  # relative: fp32 on both sides, summed in another order
OWN_ERROR = 1.25  # times what transformers itself loses in the model's dtype
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXTS = np.random.default_rng(11).integers(0, 48, (ROWS, 40))


@dataclass(frozen=True)
class Model:
    """A checkpoint's package, TensorRT's network of it as declared and exact, and transformers' model."""

    package: Package
    checkpoint: Path
    parsed: dict[bool, ParsedNetwork]
    reference: Any

    def session(self, *, exact: bool, observe: Sequence[str] = ()) -> NetworkSession:
        return NetworkSession(
            Interpreter(self.parsed[exact], exact=exact),
            self.package.config,
            max_batch=ROWS,
            capacity=CAPACITY,
            max_positions=self.package.max_seq_len,
            observe=observe,
        )

    def logits(self, tokens: Any, first: int = 0) -> Array:
        """transformers' in fp32, of one text that begins at a position: [S, vocab]."""
        return logits_of(self.reference, tokens, first)


def transformers_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def logits_of(model: Any, tokens: Any, first: int = 0) -> Array:
    ids = torch.tensor([list(map(int, tokens))])
    with torch.no_grad():
        positions = first + torch.arange(ids.shape[1])[None]
        result: Array = model(ids, position_ids=positions).logits[0].float().numpy()
    return result


CASES = [(kind, dtype) for kind in checkpoints.MINI for dtype in DTYPES]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    kind, dtype = request.param
    folder = tmp_path_factory.mktemp("network")
    raw = checkpoints.mini(kind, torch_dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype])
    checkpoint = checkpoints.write_checkpoint(folder / "checkpoint", raw, dtype=DTYPES[dtype])
    package = export(checkpoint, folder / "package")
    assert package.dtype == dtype
    declared = parse_package(package, CAPACITY)
    parsed = {False: declared, True: with_exact_tables(declared, package)}
    return Model(package, checkpoint, parsed, transformers_model(checkpoint, torch.float32))


def error(got: Array, want: Array) -> float:
    """rel-L2."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# ---- exact: the network means what transformers computes


def test_prefill_is_transformers(model: Model) -> None:
    session = model.session(exact=True)
    rows = session.prefill(TEXTS.tolist(), all_logits=True)
    for text, got in zip(TEXTS, rows, strict=True):
        assert error(got, model.logits(text)) <= EXACT
    session.reset()
    for text, got in zip(TEXTS, session.prefill(TEXTS.tolist()), strict=True):
        assert error(got, model.logits(text)[-1:]) <= EXACT


def test_token_by_token_after_a_prompt(model: Model) -> None:
    session = model.session(exact=True)
    wanted = [model.logits(text) for text in TEXTS]
    session.prefill(TEXTS[:, :5].tolist())
    for position in range(5, 25):
        got = session.decode(TEXTS[:, position].tolist())
        assert error(got, np.stack([row[position] for row in wanted])) <= EXACT
    assert session.lengths.tolist() == [25, 25, 25]


def test_chunks_and_ragged_rows_and_rows_left_alone(model: Model) -> None:
    session = model.session(exact=True)
    parts: list[list[Array]] = [[], [], []]
    done = [0, 0, 0]
    for widths in ((7, 1, 0), (3, 0, 12), (1, 20, 2), (0, 0, 9), (11, 1, 1)):
        texts = [TEXTS[row, done[row] : done[row] + n].tolist() for row, n in enumerate(widths)]
        for row, got in enumerate(session.prefill(texts, all_logits=True)):
            parts[row].append(got)
            done[row] += widths[row]
    for row, text in enumerate(TEXTS):
        assert error(np.concatenate(parts[row]), model.logits(text[: done[row]])) <= EXACT


def test_fewer_rows_than_the_cache_has(model: Model) -> None:
    session = model.session(exact=True)
    session.prefill(TEXTS.tolist())
    session.reset()
    (got,) = session.prefill([TEXTS[2, :9].tolist()], all_logits=True)
    assert error(got, model.logits(TEXTS[2, :9])) <= EXACT
    assert error(session.decode([int(TEXTS[2, 9])]), model.logits(TEXTS[2, :10])[-1:]) <= EXACT


def test_a_full_cache_and_nothing_beyond(model: Model) -> None:
    text = np.resize(TEXTS[0], CAPACITY)
    session = model.session(exact=True)
    (got,) = session.prefill([text.tolist()], all_logits=True)
    assert error(got, model.logits(text)) <= EXACT
    with pytest.raises(CapacityError):
        session.decode([1])


def test_after_a_reset_nothing_is_left(model: Model) -> None:
    session, fresh = model.session(exact=True), model.session(exact=True)
    session.prefill(TEXTS[::-1].tolist())
    session.reset()
    again = session.prefill(TEXTS[:, :12].tolist(), all_logits=True)
    for got, want in zip(
        again, fresh.prefill(TEXTS[:, :12].tolist(), all_logits=True), strict=True
    ):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("first", [1, 20, 63])
def test_a_text_that_begins_anywhere(model: Model, first: int) -> None:
    """Its keys are turned as there; what was in the cache before is not seen."""
    keys = "present.0.key"
    session = model.session(exact=True, observe=[keys])
    session.prefill(TEXTS.tolist())
    before = session.observed[keys].copy()
    session.reset(first_position=first)
    count = min(17, model.package.max_seq_len - first)
    texts = TEXTS[:, :count]
    for text, got in zip(texts, session.prefill(texts.tolist(), all_logits=True), strict=True):
        assert error(got, model.logits(text, first)) <= EXACT
    turned = session.observed[keys]
    assert np.abs(turned[:, :, :count] - before[:, :, :count]).max() > 0.01
    assert np.array_equal(turned[:, :, count:], before[:, :, count:])


# ---- as declared


def test_as_declared_the_error_is_that_of_the_dtype(model: Model) -> None:
    """transformers loses as much when it computes in bf16; in fp32 both are exact."""
    own = transformers_model(model.checkpoint, DTYPES[model.package.dtype])
    session = model.session(exact=False)
    prefill = session.prefill(TEXTS.tolist(), all_logits=True)
    session.reset()
    session.prefill(TEXTS[:, :1].tolist())
    decoded = [session.decode(TEXTS[:, position].tolist()) for position in range(1, 40)]
    want = np.concatenate([model.logits(text) for text in TEXTS])
    loss = error(np.concatenate([logits_of(own, text) for text in TEXTS]), want)
    bound = max(OWN_ERROR * loss, EXACT)
    assert error(np.concatenate(prefill), want) <= bound
    later = want.reshape(ROWS, 40, -1)[:, 1:]
    assert error(np.stack(decoded, axis=1), later) <= bound
    if model.package.dtype == "bf16":
        assert error(np.concatenate(prefill), want) > 100 * EXACT  # it did round


# ---- what a session shows


def test_observed_tensors_are_transformers_hidden_states(model: Model) -> None:
    layers = model.package.config.num_hidden_layers
    names = ["model.embedding", *(f"model.layers.{i}.residual_2" for i in range(layers - 1))]
    session = model.session(exact=True, observe=names)
    session.prefill([TEXTS[0].tolist()])
    assert set(session.observed) == set(names)
    with torch.no_grad():
        states = model.reference(torch.tensor(TEXTS[:1]), output_hidden_states=True).hidden_states
    for name, state in zip(names, states, strict=False):
        assert error(session.observed[name], state.numpy()) <= EXACT
    session.decode([3])
    assert session.observed[names[0]].shape == (1, 1, model.package.config.hidden_size)


def test_as_declared_observed_halves_are_fp32_arrays(model: Model) -> None:
    name = "model.embedding"
    session = model.session(exact=False, observe=[name])
    session.prefill([TEXTS[0].tolist()])
    table = model.reference.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(session.observed[name][0], table[TEXTS[0]])


def test_a_tensor_that_the_network_has_not_cannot_be_observed(model: Model) -> None:
    with pytest.raises(SessionError, match="no tensor nowhere that could be observed"):
        model.session(exact=True, observe=["nowhere"])


def test_the_outputs_depend_on_what_used_names(model: Model) -> None:
    used = Interpreter(model.parsed[True]).used()
    assert {"logits", "present.0.key", "model.embedding"} <= used
    assert not used & set(Interpreter(model.parsed[True]).inputs)
    assert model.parsed[True].complaints == ()


# ---- a cache that is not updated in place


def test_a_present_that_is_a_tensor_of_its_own_is_copied_into_the_cache() -> None:
    """A network whose present is past + 1: step by step the cache counts, and in the rows at work only."""
    past = np.zeros((2, 1, 4, 3), np.float32)
    inputs = {
        "input_ids": np.zeros((2, 1), np.int64),
        "position_ids": np.zeros((2, 1), np.int64),
        "write_indices": int64(0, 0),
        "key_positions": int64(0),
        "logits_indices": np.zeros((2, 1), np.int64),
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    nodes = [
        helper.make_node("Add", ["past_key_values.0.key", "one"], ["present.0.key"]),
        helper.make_node("Mul", ["past_key_values.0.value", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "one"], ["present.0.value"]),
        helper.make_node("ReduceSum", ["past_key_values.0.key", "axes"], ["keys"], keepdims=0),
        helper.make_node("ReduceMax", ["past_key_values.0.value", "axes"], ["values"], keepdims=0),
        helper.make_node("Concat", ["keys", "values"], ["both"], axis=1),
        helper.make_node("Unsqueeze", ["both", "second"], ["logits"]),
    ]
    constants = {
        "one": np.float32([1]),
        "two": np.float32([2]),
        "axes": int64(2, 3),
        "second": int64(1),
    }
    stated = [(name, axis) for name in inputs if "past" in name for axis in (1, 2, 3)]
    outputs = ["logits", "present.0.key", "present.0.value"]
    parsed = parse(proto(nodes, inputs, outputs, constants=constants, stated=stated))

    class Config:
        vocab_size, dual_chunk = 2, None

    session = NetworkSession(
        Interpreter(parsed),
        Config(),
        max_batch=2,
        capacity=4,
        max_positions=4,  # type: ignore[arg-type]
    )
    for step in range(3):
        got = session.decode([0, 0])
        assert got.tolist() == [[12 * step, 2**step - 1]] * 2
    (alone,) = session.decode([0])
    assert alone.tolist() == [36, 7]
    session.reset()
    assert session.decode([0, 0]).tolist() == [[48, 15], [36, 7]]
