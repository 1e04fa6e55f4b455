"""The oracle of FP8 checkpoints: transformers with dequantized weights, whose linears round their inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_grained_fp8 import write_fine_grained_fp8
from float_quantized import write_float_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwenport.exporter import export
from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Choices, Reference, Text
from qwenport.validate.reference.dequantization import read_quantization
from qwenport.validate.reference.rounded_inputs import RoundsInput, by_formula, by_library
from qwenport.validate.target import Target, open_target

from .pairs import TEXTS, same

EXAMPLES = Path(__file__).parents[3] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
GATES = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
EXPERTS = r"re:.*\.experts\..*"
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
SCHEMES: dict[str, tuple[Path, Any, dict[str, Any]]] = {
    "rows": (DENSE, write_float_quantized, {}),
    "static": (DENSE, write_float_quantized, {"activations": "static", "by_row": False}),
    "dynamic": (DENSE, write_float_quantized, {"activations": "dynamic"}),
    "blocks": (DENSE, write_fine_grained_fp8, {}),
    "experts": (MIXTURE, write_float_quantized, {"ignore": ("lm_head", *GATES)}),
    "mixture, dynamic": (
        MIXTURE,
        write_float_quantized,
        {"activations": "dynamic", "ignore": ("lm_head", *GATES, EXPERTS)},
    ),
}
TEXT = Text.ending([*range(3, 50), 1, 900, 11], 50)
LINEAR = "model.layers.1.mlp.up_proj"

Made = tuple[Path, Target]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """(scheme) -> a checkpoint in it, and its package as a target."""
    folder, done = tmp_path_factory.mktemp("fp8"), {}

    def make(name: str) -> Made:
        if name not in done:
            source, write, how = SCHEMES[name]
            path = write(source, folder / name, **how)
            done[name] = path, open_target(export(path, folder / f"{name}.package").path)
        return done[name]

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_whole_and_streamed_are_the_same_to_the_last_bit(
    name: str, made: Callable[[str], Made]
) -> None:
    path, target = made(name)
    whole, streamed = (Reference(target, path, streamed=kind) for kind in (False, True))
    assert (
        whole.rounds_inputs
        == streamed.rounds_inputs
        == (name in ("static", "dynamic", "mixture, dynamic"))
    )
    for dtype in ("fp32", "bf16"):
        assert all(map(same, whole.logits(TEXTS, dtype), streamed.logits(TEXTS, dtype)))
    assert same(whole.greedy([5, 6, 7], 3)[1], streamed.greedy([5, 6, 7], 3)[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["rows", "static", "dynamic"])
def test_logits_are_those_of_the_checkpoint_as_transformers_runs_it_quantized(
    name: str, made: Callable[[str], Made]
) -> None:
    """With compressed-tensors' own modules, which round inputs as they go.

    In the checkpoint's dtype: in fp32 transformers takes the scales to fp32 first, and no weight is rounded to bf16.
    """
    path, target = made(name)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **EAGER).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([TEXT.tokens]), use_cache=False).logits[0].float().numpy()
    (logits,) = Reference(target, path).logits([TEXT], "bf16")
    assert same(logits, expected)


@pytest.mark.parametrize("name", ["rows", "static", "dynamic"])
def test_without_the_library_nothing_changes_but_the_note(
    name: str, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = made(name)
    expected = Reference(target, path).logits([TEXT])
    for module in ("dequantization.float_quantized", "rounded_inputs"):
        monkeypatch.setattr(f"qwenport.validate.reference.{module}._has_library", lambda: False)
    without = Reference(target, path)
    assert all(map(same, without.logits([TEXT]), expected))
    assert "by the formula" in without.weights_note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_formula_rounds_as_the_library_does(dynamic: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 257, generator=generator)
    x = (x * torch.exp(2 * torch.randn(1, 64, 1, generator=generator))).to(dtype)
    x[0, 3] = 0
    scale = None if dynamic else (x.abs().max() / 900).reshape(1)
    stated = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic}
    stated["strategy"] = "token" if dynamic else "tensor"
    assert torch.equal(by_formula(stated, x, scale), by_library(stated, x, scale))


def test_a_token_s_scale_does_not_depend_on_the_other_tokens() -> None:
    """The library would make one scale for all rows of a matrix, which the modules of a mixture get."""
    stated = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    hook = RoundsInput(stated, None)
    tokens = torch.tensor([[1.0, 0.3], [1000.0, 700.0]])
    (both,) = hook(None, (tokens,))
    for index in range(2):
        (alone,) = hook(None, (tokens[index : index + 1],))
        assert torch.equal(both[index], alone[0])


def test_a_code_is_taken_over_only_where_it_is_as_near() -> None:
    scale = torch.tensor([1.0])
    stated = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    hook, counts = RoundsInput(stated, scale), []
    hook.taken = counts.append
    x = torch.tensor([[17.00001, 17.1, 17.0, 460.0, 3.0]])  # 16 and 18 are neighbours
    (own,) = hook(None, (x,))
    assert own.tolist() == [[18.0, 18.0, 16.0, 448.0, 3.0]]
    hook.given = np.array([[16.0, 16.0, 20.0, 480.0, 3.0000001]], dtype=np.float32)
    (made,) = hook(None, (x,))
    assert made.tolist() == [[16.0, 18.0, 16.0, 448.0, 3.0]]
    assert counts == [1]


def test_an_exact_choice_of_the_oracle_s_own_codes_changes_nothing(
    made: Callable[[str], Made],
) -> None:
    path, target = made("dynamic")
    reference = Reference(target, path)
    (expected,) = reference.logits([TEXT])
    empty = Choices({}, 0.0, {0: {"mlp.up_proj": np.zeros((1, 1), np.float32)}})
    assert same(reference.logits([TEXT], choices=[empty])[0], expected)
    assert reference.replayed == 0


@pytest.mark.parametrize("name", ["static", "dynamic", "mixture, dynamic"])
def test_own_rounding_is_that_of_equal_codes(name: str, made: Callable[[str], Made]) -> None:
    """With codes of their own, fp32 and fp64 are thousands of times further apart."""
    path, target = made(name)
    reference = Reference(target, path)
    assert 0 < reference.own_rounding(TEXT.tokens) < 2e-6
    (single,), (double,) = (reference.logits([TEXT], dtype) for dtype in ("fp32", "fp64"))
    assert np.linalg.norm(single - double) > 1e-4 * np.linalg.norm(double)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("static", lambda t, c: t.pop(f"{LINEAR}.input_scale"), "input_scale"),
        (
            "dynamic",
            lambda t, c: t.update({f"{LINEAR}.input_scale": torch.ones(1)}),
            "input_scale",
        ),
        ("rows", lambda t, c: t.update({f"{LINEAR}.weight": torch.ones(640, 192)}), "float32"),
        ("rows", lambda t, c: c.update(format="int-quantized"), "format"),
        ("rows", lambda t, c: c["config_groups"].update(other={}), "2 groups"),
        (
            "dynamic",
            lambda t, c: c["config_groups"]["group_0"]["input_activations"].update(
                strategy="group"
            ),
            "strategy",
        ),
        ("blocks", lambda t, c: c.update(activation_scheme="static"), "activation_scheme"),
        (
            "blocks",
            lambda t, c: t.update({f"{LINEAR}.weight_scale_inv": torch.ones(2, 5)}),
            "scale_inv",
        ),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_not_the_format_is_named(
    name: str,
    change: Any,
    named: str,
    streamed: bool,
    made: Callable[[str], Made],
    tmp_path: Path,
) -> None:
    path, target = made(name)
    tensors = load_file(path / "model.safetensors")
    stated = json.loads((path / "config.json").read_text())
    change(tensors, stated["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValidationError, match=named):
        Reference(target, tmp_path, streamed=streamed).logits([TEXT])


def test_a_checkpoint_in_blocks_must_state_its_dtype(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    stated = json.loads((made("blocks")[0] / "config.json").read_text())
    del stated["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValidationError, match="its dtype"):
        read_quantization(tmp_path)
