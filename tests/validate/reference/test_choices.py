"""Experts that are chosen for the routers, in near-ties and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qwenport.validate.reference import Choices, Reference

from .pairs import TEXTS, Pair, same


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
        assert all(map(same, reference.logits(TEXTS, dtype, own), free))
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
    assert all(map(same, whole, streamed))
    (free,) = mixture.whole.logits(TEXTS[:1], dtype)
    assert same(whole[1], free)
    tolerance = 1e-5 if dtype == "fp32" else 0.02
    changed = _rows(whole[0], free, tolerance)
    assert changed[0] == token
    if layer == mixture.whole.num_layers - 1:
        assert changed == [token]
    states = [r.hidden_states(texts, dtype, choices) for r in mixture.both()]
    assert all(same(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))
    free_states = mixture.whole.hidden_states(TEXTS[:1], dtype)[0]
    assert same(states[0][0][layer], free_states[layer])
    assert _rows(states[0][0][layer + 1], free_states[layer + 1], tolerance) == [token]
    for reference in mixture.both():  # what the router itself would have chosen is what is told
        told = reference.routing(texts, dtype, choices)[0][layer]
        assert all(map(same, told, free_routes))


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
            assert all(map(same, reference.logits(TEXTS[:1], choices=choices), free))


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
                assert same(module(entry, **arguments)[0].numpy(), forced[layer + 1])
            for other in (Choices({}, np.inf), replace(choice, margin=0.0), None):
                with reference.agreeing(module, layer, other):
                    assert same(module(entry, **arguments)[0].numpy(), free[layer + 1])
            assert same(module(entry, **arguments)[0].numpy(), free[layer + 1])


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
        assert all(map(same, reference.logits(TEXTS), before))
