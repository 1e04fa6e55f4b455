"""The oracle: streamed and whole agree to the last bit, and what it adds to transformers is what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwenport.exporter import export
from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Choices, Reference, Text
from qwenport.validate.reference.stored import StoredWeights
from qwenport.validate.target import Target, open_target

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Case:
    """A checkpoint: its config, and how it is stored."""

    raw: dict[str, Any]
    dtype: torch.dtype
    stacked: bool = False
    shards: int = 1
    exported_as: str | None = None
    max_seq_len: int | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = checkpoints.random_tensors(checkpoints.tensor_shapes(self.raw), self.dtype)
        return checkpoints.stack_experts(tensors) if self.stacked else tensors


def _case(
    model_type: str, dtype: str = "float32", changes: dict[str, Any] | None = None, **how: Any
) -> Case:
    raw = checkpoints.mini(model_type, torch_dtype=dtype, **(changes or {}))
    return Case(raw, getattr(torch, dtype), **how)


CASES = {
    "qwen2 fp32 tied": _case("qwen2"),
    "qwen2 bf16 tied": _case("qwen2", "bfloat16"),
    "qwen2 bf16 untied": _case("qwen2", "bfloat16", {"tie_word_embeddings": False}),
    "qwen2 fp16 sharded": _case("qwen2", "float16", shards=3),
    "qwen2 fp32 yarn": _case("qwen2", changes={"rope_scaling": YARN}),
    "qwen2 fp32 to fp16": _case("qwen2", exported_as="fp16"),
    "qwen2 bf16 to fp16": _case("qwen2", "bfloat16", exported_as="fp16"),
    "llama fp32": _case("llama"),
    "llama bf16 tied": _case("llama", "bfloat16", {"tie_word_embeddings": True}),
    "llama bf16 llama3": _case("llama", "bfloat16", {"rope_scaling": LLAMA3}),
    "llama fp32 dynamic": _case("llama", changes={"rope_scaling": DYNAMIC}, max_seq_len=100),
    "llama fp32 biases": _case("llama", changes={"attention_bias": True, "mlp_bias": True}),
    "qwen2_moe fp32": _case("qwen2_moe"),
    "qwen2_moe bf16": _case("qwen2_moe", "bfloat16", shards=2),
    "qwen2_moe fp32 stacked": _case("qwen2_moe", stacked=True),
    "qwen3_moe fp32 sharded": _case("qwen3_moe", shards=3),
    "qwen3_moe bf16 stacked": _case("qwen3_moe", "bfloat16", stacked=True, shards=2),
}
MIXTURES = [name for name in CASES if "moe" in name]
DTYPES = ("fp32", "bf16", "fp16", "fp64")
TEXTS = (
    Text(tuple(range(3, 24)), last=21),
    Text((5, 5, 40, 9, 17, 2, 33), last=3, first_position=11),
    Text((8,), last=1, first_position=50),
)


@dataclass(frozen=True)
class Pair:
    """One checkpoint, both ways."""

    case: Case
    path: Path
    target: Target
    whole: Reference
    streamed: Reference

    def both(self) -> tuple[Reference, Reference]:
        return self.whole, self.streamed


def _target(case: Case, path: Path) -> Target:
    lengths = {} if case.max_seq_len is None else {"max_seq_len": case.max_seq_len}
    package = path.with_name(path.name + ".package")
    return open_target(export(path, package, dtype=case.exported_as, **lengths).path)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Checkpoint, package and references of a case, made once."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            case = CASES[name]
            path = tmp_path_factory.mktemp("reference") / "checkpoint"
            checkpoints.write_checkpoint(path, case.raw, case.tensors(), shards=case.shards)
            target = _target(case, path)
            whole = Reference(target, path)
            made[name] = Pair(case, path, target, whole, Reference(target, path, streamed=True))
        return made[name]

    return pair


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    return pair_of(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    return pair_of(request.param)


def _same(first: Any, second: Any) -> bool:
    """Equal shape, dtype and bits."""
    return first.dtype == second.dtype and np.array_equal(first, second)


# --- streamed and whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_same_to_the_last_bit(pair: Pair, dtype: str) -> None:
    whole, streamed = (reference.logits(TEXTS, dtype) for reference in pair.both())
    for text, one, other in zip(TEXTS, whole, streamed, strict=True):
        assert one.shape == (text.last, pair.target.config.vocab_size)
        assert np.isfinite(one).all()
        assert one.dtype == np.float32
        assert _same(one, other)


def test_greedy_is_the_same_to_the_last_bit_and_takes_the_most_likely_token(pair: Pair) -> None:
    prompt, count = list(range(4, 15)), 7
    tokens, logits = pair.whole.greedy(prompt, count)
    streamed_tokens, streamed_logits = pair.streamed.greedy(prompt, count)
    assert tokens == streamed_tokens
    assert _same(logits, streamed_logits)
    assert pair.streamed.greedy(prompt, count)[1] is streamed_logits  # kept, not computed again
    sequence = list(prompt)
    for token in tokens:
        (last,) = pair.whole.logits([Text(tuple(sequence), last=1)])
        assert token == int(last[0].argmax())
        sequence.append(token)
    rounding = pair.whole.own_rounding(prompt, count)
    assert rounding == pair.streamed.own_rounding(prompt, count) < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hidden_states_are_the_same_and_lead_to_the_logits(pair: Pair, dtype: str) -> None:
    whole, streamed = (reference.hidden_states(TEXTS, dtype) for reference in pair.both())
    logits = pair.whole.logits(TEXTS, dtype)
    for reference in pair.both():
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        with reference.final_norm(dtype) as norm, reference.head(dtype) as head, torch.no_grad():
            for text, states, expected in zip(TEXTS, whole, logits, strict=True):
                rows = norm(torch.from_numpy(states[-1]).to(kind)[None])[:, -text.last :]
                assert _same(head(rows)[0].float().numpy(), expected)
    for text, one, other in zip(TEXTS, whole, streamed, strict=True):
        assert len(one) == len(other) == pair.target.config.num_hidden_layers + 1
        assert all(s.shape == (len(text.tokens), pair.case.raw["hidden_size"]) for s in one)
        assert all(_same(a, b) for a, b in zip(one, other, strict=True))
        if dtype == "fp32":
            assert _same(one[0], pair.whole.embed(text.tokens))
            assert _same(one[0], pair.streamed.embed(text.tokens))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_routing_is_the_same_and_what_the_softmax_says(mixture: Pair, dtype: str) -> None:
    whole, streamed = (reference.routing(TEXTS, dtype) for reference in mixture.both())
    moe = mixture.target.config.moe
    assert moe is not None
    for text, one, other in zip(TEXTS, whole, streamed, strict=True):
        assert tuple(one) == tuple(other) == moe.layers
        for layer, (logits, chosen) in one.items():
            assert logits.shape == (len(text.tokens), moe.num_experts)
            assert chosen.shape == (len(text.tokens), moe.experts_per_token)
            assert _same(logits, other[layer][0])
            assert _same(chosen, other[layer][1])
            probabilities = torch.softmax(torch.from_numpy(logits), dim=-1)
            assert torch.equal(
                probabilities.gather(1, torch.from_numpy(chosen)),
                probabilities.topk(moe.experts_per_token).values,
            )


def test_a_dense_model_routes_nothing(pair_of: Callable[[str], Pair]) -> None:
    assert pair_of("llama fp32").streamed.routing(TEXTS) == [{}, {}, {}]


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_are_the_same_and_streamed_weights_are_dropped(pair: Pair, dtype: str) -> None:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, arguments in (
        *(("layer", (index,)) for index in range(pair.whole.num_layers)),
        ("final_norm", ()),
        ("head", ()),
    ):
        with (
            getattr(pair.whole, name)(*arguments, dtype) as one,
            getattr(pair.streamed, name)(*arguments, dtype) as other,
        ):
            assert type(one) is type(other)
            theirs, ours = one.state_dict(), other.state_dict()
            assert theirs.keys() == ours.keys()
            for key, weight in theirs.items():
                assert weight.dtype == kinds.get(dtype, torch.float64)
                assert ours[key].dtype == weight.dtype
                assert torch.equal(weight, ours[key])
            for module in (one, other):
                assert not any(part.training for part in module.modules())
                assert not any(parameter.requires_grad for parameter in module.parameters())
        assert all(parameter.is_meta for parameter in other.parameters())
    with pair.whole.layer(0, "fp32") as first, pair.whole.layer(0, "fp32") as second:
        assert first is second


def test_layers_and_position_embeddings_by_hand_are_the_model(pair: Pair) -> None:
    text = TEXTS[1]
    positions = text.first_position + torch.arange(len(text.tokens))[None]
    mask = torch.full((1, 1, 7, 7), torch.finfo(torch.float32).min).triu(1)
    states = pair.whole.hidden_states([text])[0]
    for reference in pair.both():
        cos_and_sin = reference.position_embeddings(positions, torch.float32)
        for index in range(reference.num_layers):
            with reference.layer(index, "fp32") as layer:
                made = layer(
                    torch.from_numpy(states[index])[None],
                    attention_mask=mask,
                    position_ids=positions,
                    position_embeddings=cos_and_sin,
                )
            assert _same(made[0].numpy(), states[index + 1])


@pytest.mark.parametrize("name", ["qwen2 bf16 tied", "qwen2_moe fp32", "llama fp32 dynamic"])
def test_the_first_layers_only(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    cut = [Reference(pair.target, pair.path, layers=1, streamed=s) for s in (False, True)]
    assert [reference.num_layers for reference in cut] == [1, 1]
    states = pair.whole.hidden_states(TEXTS)
    with pair.whole.final_norm("fp32") as norm, pair.whole.head("fp32") as head, torch.no_grad():
        expected = [
            head(norm(torch.from_numpy(of_text[1]))[None, -text.last :])[0].numpy()
            for text, of_text in zip(TEXTS, states, strict=True)
        ]
    for reference in cut:
        assert all(map(_same, reference.logits(TEXTS), expected))
        assert [len(of_text) for of_text in reference.hidden_states(TEXTS)] == [2, 2, 2]
    assert all(map(_same, *(reference.logits(TEXTS, "bf16") for reference in cut)))
    prompt = list(range(9))
    assert _same(cut[0].greedy(prompt, 4)[1], cut[1].greedy(prompt, 4)[1])
    assert not _same(cut[0].greedy(prompt, 4)[1], pair.whole.greedy(prompt, 4)[1])


def test_a_batch_is_one_pass_with_one_module_s_weights_at_a_time(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("qwen2_moe fp32")
    loaded: list[str] = []
    now: list[str] = []
    original = StoredWeights.loaded

    @contextlib.contextmanager
    def watched(self: StoredWeights, prefix: str, *arguments: Any) -> Iterator[Any]:
        assert not now, f"{prefix} while {now} is in memory"
        loaded.append(prefix)
        now.append(prefix)
        with original(self, prefix, *arguments) as module:
            yield module
        now.pop()

    monkeypatch.setattr(StoredWeights, "loaded", watched)
    calls: list[tuple[str, int, int]] = []
    streamed = Reference(
        pair.target, pair.path, streamed=True, progress=lambda *call: calls.append(call)
    )
    assert loaded == []
    streamed.logits(TEXTS)
    layers = [f"model.layers.{index}." for index in range(3)]
    assert loaded == [*layers, "model.norm.", "lm_head."]
    assert calls == [("logits", done, 9) for done in range(1, 10)]
    calls.clear()
    streamed.greedy([1, 2, 3], 2)
    assert calls == [("greedy", done, 6) for done in range(1, 7)]


def test_progress_of_the_whole_model_counts_the_same(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("qwen2_moe fp32")
    calls: list[tuple[str, int, int]] = []
    whole = Reference(pair.target, pair.path, progress=lambda *call: calls.append(call))
    whole.hidden_states(TEXTS)
    assert calls == [("hidden states", done, 9) for done in range(1, 10)]
    calls.clear()
    whole.greedy([1, 2, 3], 2)
    assert calls == [("greedy", done, 6) for done in range(1, 7)]
    whole.greedy([1, 2, 3], 2)
    assert len(calls) == 6


# --- against transformers used plainly


@pytest.mark.parametrize("name", ["qwen2 bf16 tied", "llama bf16 llama3", "qwen3_moe fp32 sharded"])
def test_positions_do_not_start_at_zero(name: str, pair_of: Callable[[str], Pair]) -> None:
    """The same model with positions from zero, whose rotary module adds the distance itself."""
    pair = pair_of(name)
    plain = AutoModelForCausalLM.from_pretrained(
        pair.path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    rotary = plain.model.rotary_emb
    original = rotary.forward
    text = TEXTS[0]
    for first in (0, 1, 37):
        rotary.forward = lambda x, position_ids, first=first: original(x, position_ids + first)
        with torch.inference_mode():
            expected = plain(torch.tensor([text.tokens]), use_cache=False).logits[0].numpy()
        for reference in pair.both():
            (logits,) = reference.logits([replace(text, first_position=first)])
            assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    (zero,) = pair.whole.logits([text])
    assert not _same(zero, logits)  # of 37: another rounding
    # Rotary embeddings know distances only, so that a mask other than causal would show here.
    assert np.abs(zero - logits).max() <= 1e-4 * np.abs(zero).max()


@pytest.mark.parametrize("name", ["llama fp32", "qwen2 fp32 tied", "qwen2_moe fp32"])
def test_a_later_token_changes_nothing_before_it(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    text = Text(tuple(range(3, 24)), last=21, first_position=9)
    other = replace(text, tokens=(*text.tokens[:12], 40, *text.tokens[13:]))
    for reference in pair.both():
        one, changed = reference.hidden_states([text, other])
        for a, b in zip(one[1:], changed[1:], strict=True):
            assert _same(a[:12], b[:12])
            assert not np.isclose(a[12:], b[12:]).all(axis=1).any()


def test_rounding_to_the_target_s_dtype_comes_first(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("qwen2 fp32 to fp16")
    table = pair.case.tensors()["model.embed_tokens.weight"][[7, 7, 0]]
    for reference in pair.both():
        assert reference.weights_note == "fp32, weights rounded to fp16 first"
        assert _same(reference.embed([7, 7, 0]), table.half().float().numpy())
        assert not _same(reference.embed([7, 7, 0]), table.numpy())
    assert pair_of("qwen2 fp32 tied").whole.weights_note == "fp32"


@pytest.mark.parametrize(
    "name", ["llama fp32 dynamic", "qwen2 fp32 yarn", "llama bf16 llama3", "qwen2 bf16 tied"]
)
def test_rope_tables_are_the_same(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    whole, streamed = (reference.rope_tables(3, 60) for reference in pair.both())
    assert all(map(_same, whole, streamed))
    assert whole[0].shape == (57, pair.target.config.head_dim // 2)


def test_dynamic_rope_is_for_the_target_s_length_and_no_other(
    pair_of: Callable[[str], Pair],
) -> None:
    pair = pair_of("llama fp32 dynamic")
    for streamed in (False, True):
        shorter = Reference(replace(pair.target, rope_length=70), pair.path, streamed=streamed)
        before = shorter.rope_tables(0, 20)
        assert not _same(before[0], pair.whole.rope_tables(0, 20)[0])
        shorter.logits([Text(tuple(range(48)) * 2, last=1)])  # longer than what it is for
        assert all(map(_same, before, shorter.rope_tables(0, 20)))


# --- experts that are chosen for the routers


def _rows(changed: Any, free: Any, tolerance: float) -> list[int]:
    """The rows that differ by more than rounding: an expert rounds by how many tokens it is given at once."""
    return np.flatnonzero(
        np.abs(changed - free).max(axis=1) > tolerance * np.abs(free).max()
    ).tolist()


def _moved(pair: Pair, layer: int, token: int, margin: float = np.inf) -> Choices:
    """The router's own choice for TEXTS[0] in `layer`, but `token` goes to others, one in common."""
    _, chosen = pair.whole.routing(TEXTS[:1])[0][layer]
    moe = pair.target.config.moe
    assert moe is not None
    rest = [e for e in range(moe.num_experts) if e not in chosen[token]]
    experts = chosen.copy()
    experts[token] = [*rest[: moe.experts_per_token - 1], chosen[token][0]]
    return Choices({layer: experts}, margin)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_router_s_own_choice_changes_nothing(mixture: Pair, dtype: str) -> None:
    routing = mixture.whole.routing(TEXTS, dtype)
    own = [
        Choices({layer: chosen[:, ::-1].copy() for layer, (_, chosen) in of_text.items()}, np.inf)
        for of_text in routing
    ]
    free = mixture.whole.logits(TEXTS, dtype)
    for reference in mixture.both():
        before = reference.replayed
        assert all(map(_same, reference.logits(TEXTS, dtype, own), free))
        assert reference.replayed == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_choice_is_the_same_streamed_and_changes_its_token_only(
    mixture: Pair, dtype: str
) -> None:
    moe = mixture.target.config.moe
    assert moe is not None
    layer, token = moe.layers[-1], 6
    texts, choices = [TEXTS[0], TEXTS[0]], [_moved(mixture, layer, token), None]
    free_routes = mixture.whole.routing(TEXTS[:1], dtype)[0][layer]
    if dtype == "bf16":  # its own choices differ in near-ties; nothing but the token is to change
        experts = free_routes[1].copy()
        experts[token] = choices[0].experts[layer][token]
        choices[0] = Choices({layer: experts}, np.inf)
    before = [reference.replayed for reference in mixture.both()]
    whole, streamed = (r.logits(texts, dtype, choices) for r in mixture.both())
    assert [r.replayed - b for r, b in zip(mixture.both(), before, strict=True)] == [1, 1]
    assert all(map(_same, whole, streamed))
    (free,) = mixture.whole.logits(TEXTS[:1], dtype)
    assert _same(whole[1], free)
    tolerance = 1e-5 if dtype == "fp32" else 0.02
    changed = _rows(whole[0], free, tolerance)
    assert changed[0] == token
    if layer == mixture.whole.num_layers - 1:
        assert changed == [token]
    states = [r.hidden_states(texts, dtype, choices) for r in mixture.both()]
    assert all(_same(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))
    free_states = mixture.whole.hidden_states(TEXTS[:1], dtype)[0]
    assert _same(states[0][0][layer], free_states[layer])
    assert _rows(states[0][0][layer + 1], free_states[layer + 1], tolerance) == [token]
    for reference in mixture.both():  # what the router itself would have chosen is what is told
        told = reference.routing(texts, dtype, choices)[0][layer]
        assert all(map(_same, told, free_routes))


def test_a_choice_is_taken_over_in_near_ties_only(mixture: Pair) -> None:
    """The last of the router's choice exchanged for another expert: the distance of their logits decides."""
    moe = mixture.target.config.moe
    assert moe is not None
    layer = moe.layers[-1]
    logits, _ = mixture.whole.routing(TEXTS[:1])[0][layer]
    order = np.argsort(-logits, axis=1)
    k = moe.experts_per_token
    distance = logits[np.arange(21), order[:, k - 1]] - logits[np.arange(21), order[:, k]]
    experts = np.concatenate([order[:, : k - 1], order[:, k : k + 1]], axis=1)
    middle = float(np.sort(distance)[10])
    free = mixture.whole.hidden_states(TEXTS[:1])[0][layer + 1]
    for reference in mixture.both():
        for margin, near in ((middle, 10), (0.0, 0), (np.inf, 21)):
            before = reference.replayed
            choices = [Choices({layer: experts}, margin)]
            states = reference.hidden_states(TEXTS[:1], choices=choices)[0][layer + 1]
            assert reference.replayed - before == near
            assert _rows(states, free, 1e-5) == np.flatnonzero(distance < margin).tolist()


def test_what_is_no_choice_of_the_model_s_is_left_alone(mixture: Pair) -> None:
    moe = mixture.target.config.moe
    assert moe is not None
    layer, k = moe.layers[0], moe.experts_per_token
    free = mixture.whole.logits(TEXTS[:1])
    for experts in (
        np.zeros((21, k), dtype=np.int64),  # one expert k times
        np.tile(np.arange(k - 1), (21, 1)),  # too few
        np.tile(np.arange(k), (20, 1)),  # of another text
    ):
        for reference in mixture.both():
            choices = [Choices({layer: experts, 99: experts}, np.inf)]
            assert all(map(_same, reference.logits(TEXTS[:1], choices=choices), free))


def test_a_token_that_is_sent_elsewhere_gets_what_the_formula_says(mixture: Pair) -> None:
    moe = mixture.target.config.moe
    assert moe is not None
    layer, token = moe.layers[0], 13
    choice = _moved(mixture, layer, token)
    experts = choice.experts[layer][token]
    inputs: list[torch.Tensor] = []
    with mixture.whole.layer(layer, "fp32") as module:
        handle = module.post_attention_layernorm.register_forward_hook(
            lambda norm, given, made: inputs.append((given[0], made))
        )
        states = mixture.whole.hidden_states([TEXTS[0]], "fp32", [choice])[0]
        handle.remove()
        weights = {name: w.double().numpy() for name, w in module.mlp.state_dict().items()}
    residual, x = (part[0, token].double().numpy() for part in inputs[0])

    def swiglu(gate: Any, up: Any, down: Any) -> Any:
        g = gate @ x
        return down @ (g / (1 + np.exp(-g)) * (up @ x))

    logits = weights["gate.weight"] @ x
    probabilities = np.exp(logits) / np.exp(logits).sum()
    total = probabilities[experts].sum() if mixture.case.raw["norm_topk_prob"] else 1.0
    expected = residual.copy()
    for expert in experts:
        gate, up = np.split(weights["experts.gate_up_proj"][expert], 2)
        made = swiglu(gate, up, weights["experts.down_proj"][expert])
        expected += probabilities[expert] / total * made
    if moe.shared_expert_size is not None:
        names = (f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down"))
        share = 1 / (1 + np.exp(-(weights["shared_expert_gate.weight"] @ x)))
        expected += share * swiglu(*(weights[name] for name in names))
    found = states[layer + 1][token]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    free = mixture.whole.hidden_states([TEXTS[0]])[0][layer + 1][token]
    assert np.abs(free - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_single_layer_can_be_made_to_agree(mixture: Pair) -> None:
    moe = mixture.target.config.moe
    assert moe is not None
    layer, token = moe.layers[-1], 6
    choice = _moved(mixture, layer, token)
    text = TEXTS[0]
    free, forced = (mixture.whole.hidden_states([text], choices=c)[0] for c in (None, [choice]))
    positions = torch.arange(len(text.tokens))[None]
    for reference in mixture.both():
        arguments = {
            "attention_mask": torch.full((1, 1, 21, 21), torch.finfo(torch.float32).min).triu(1),
            "position_ids": positions,
            "position_embeddings": reference.position_embeddings(positions, torch.float32),
        }
        entry = torch.from_numpy(free[layer])[None]
        with reference.layer(layer, "fp32") as module:
            with reference.agreeing(module, layer, choice):
                assert _same(module(entry, **arguments)[0].numpy(), forced[layer + 1])
            for other in (Choices({}, np.inf), replace(choice, margin=0.0), None):
                with reference.agreeing(module, layer, other):
                    assert _same(module(entry, **arguments)[0].numpy(), free[layer + 1])
            assert _same(module(entry, **arguments)[0].numpy(), free[layer + 1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_those_of_the_router_s_fp32_softmax(mixture: Pair, dtype: str) -> None:
    moe = mixture.target.config.moe
    assert moe is not None
    layer, token, text = moe.layers[0], 4, TEXTS[0]
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    routes: list[torch.Tensor] = []
    entry = torch.from_numpy(mixture.whole.hidden_states([text], dtype)[0][layer])[None]
    positions = torch.arange(len(text.tokens))[None]
    with mixture.streamed.layer(layer, dtype) as module:
        kind = next(module.parameters()).dtype
        handles = [
            module.mlp.experts.register_forward_pre_hook(
                lambda _, inputs: given.append(inputs[1:])
            ),
            module.mlp.gate.register_forward_hook(lambda _, inputs, made: routes.append(made)),
        ]
        for changed in (False, True):
            choices = None
            if changed:
                (free,) = routes
                experts = free[2].clone().numpy()
                rest = [e for e in range(moe.num_experts) if e not in experts[token]]
                experts[token, 0] = rest[0]
                choices = Choices({layer: experts}, np.inf)
            with mixture.streamed.agreeing(module, layer, choices):
                module(
                    entry.to(kind),
                    attention_mask=torch.full((1, 1, 21, 21), torch.finfo(kind).min)
                    .triu(1)
                    .to(kind),
                    position_ids=positions,
                    position_embeddings=mixture.streamed.position_embeddings(positions, kind),
                )
        for handle in handles:
            handle.remove()
    (_, before), (chosen, after) = given
    others = [index for index in range(21) if index != token]
    assert torch.equal(before[others], after[others])
    assert chosen[token].tolist() == experts[token].tolist()
    expected = routes[0][0][token].float().softmax(-1)[chosen[token]]
    if mixture.case.raw["norm_topk_prob"]:
        expected = expected / expected.sum()
    assert torch.allclose(after[token].float(), expected.to(kind).float(), rtol=1e-6, atol=0)


def test_hooks_are_gone_after_a_call_that_failed(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("qwen3_moe fp32 sharded")
    for streamed in (False, True):
        reference = Reference(pair.target, pair.path, streamed=streamed)
        before = reference.logits(TEXTS)
        choice = _moved(pair, 0, 2)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(reference, "_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            reference.logits(TEXTS, choices=[choice, None, None])
        monkeypatch.undo()
        assert all(map(_same, reference.logits(TEXTS), before))


# --- what is refused


@pytest.mark.parametrize(
    "text",
    [
        Text((), last=0),
        Text((1, 2), last=3),
        Text((1, 2), last=-1),
        Text((1, 48), last=1),
        Text((1, -1), last=1),
        Text((1, 2), last=1, first_position=-1),
    ],
)
def test_what_is_no_text_is_refused(text: Text, pair_of: Callable[[str], Pair]) -> None:
    for reference in pair_of("llama fp32").both():
        for run in (reference.logits, reference.hidden_states, reference.routing):
            with pytest.raises(ValidationError, match="text"):
                run([TEXTS[0], text])


def test_other_dtypes_and_layers_are_refused(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("llama fp32")
    for streamed, reference in enumerate(pair.both()):
        with pytest.raises(ValidationError, match="'fp8'"):
            reference.logits(TEXTS, "fp8")
        for module in (lambda r: r.layer(0, "int8"), lambda r: r.head("int8")):
            with pytest.raises(ValidationError, match="'int8'"), module(reference):
                pass
        for index in (-1, 2):
            with pytest.raises(ValidationError, match="2 layers"), reference.layer(index, "fp32"):
                pass
        for layers in (0, 3):
            with pytest.raises(ValidationError, match="2 layers"):
                Reference(pair.target, pair.path, layers=layers, streamed=bool(streamed))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qwen2 bf16 tied", "model.layers.1.mlp.up_proj.weight"),
        ("qwen2 bf16 tied", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen2 bf16 tied", "model.norm.weight"),
        ("qwen2 bf16 tied", "model.embed_tokens.weight"),
        ("llama fp32", "lm_head.weight"),
        ("qwen3_moe fp32 sharded", "model.layers.1.mlp.experts.4.gate_proj.weight"),
        ("qwen2_moe fp32 stacked", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(
    case: str, name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(case)
    tensors = pair.case.tensors()
    narrow = {**tensors, name: tensors[name][..., :-1].contiguous()}
    # the parts of a stack are asked for by the names of single experts
    named = name.replace("gate_up_proj", "0.gate_proj.weight")
    checkpoints.write_checkpoint(tmp_path / "narrow", pair.case.raw, narrow)
    with pytest.raises(ValidationError, match=f"{name} has shape"):
        Reference(pair.target, tmp_path / "narrow", streamed=True)
    del tensors[name]
    checkpoints.write_checkpoint(tmp_path / "missing", pair.case.raw, tensors)
    with pytest.raises(ValidationError, match=f"no tensor {named}"):
        Reference(pair.target, tmp_path / "missing", streamed=True)
    if "experts" not in name:
        with pytest.raises(ValidationError, match="whole"):
            Reference(pair.target, tmp_path / "missing")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qwen2 bf16 tied", "model.layers.1.self_attn.o_proj.bias"),
        ("qwen3_moe fp32 sharded", "model.layers.0.mlp.experts.5.up_proj.weight"),
        ("qwen2_moe fp32 stacked", "model.layers.2.mlp.experts.0.up_proj.weight"),
    ],
)
def test_a_tensor_that_a_layer_does_not_use_is_named(
    case: str, name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(case)
    tensors = pair.case.tensors() | {name: torch.zeros(3)}
    checkpoints.write_checkpoint(tmp_path / "extra", pair.case.raw, tensors)
    with pytest.raises(ValidationError, match=f"no place for tensor {name}"):
        Reference(pair.target, tmp_path / "extra", streamed=True)


def test_missing_and_damaged_files_are_named(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("qwen2 fp16 sharded")

    def copy(name: str) -> Path:
        return checkpoints.write_checkpoint(
            tmp_path / name, pair.case.raw, pair.case.tensors(), shards=3
        )

    shard = copy("absent") / "model-00002-of-00003.safetensors"
    shard.unlink()
    with pytest.raises(ValidationError, match=shard.name):
        Reference(pair.target, shard.parent, streamed=True)
    shard.write_bytes(b"\x00" * 100)
    with pytest.raises(ValidationError, match=shard.name):
        Reference(pair.target, shard.parent, streamed=True)
    index = copy("index") / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ValidationError, match="index"):
        Reference(pair.target, index.parent, streamed=True)
