"""A package that `export` quantized, judged against the checkpoint before: what is not its rounding is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig

from qwenport.contract import no_progress
from qwenport.exporter import ExportError, Recipe, export, make_recipe, open_checkpoint
from qwenport.validate import ValidationError, check_source, open_target, validate
from qwenport.validate.quantized_origin import QUANTIZATION, compare_with_origin

from .bundled import status

RECIPES: dict[str, Recipe] = {
    "int4": make_recipe("int4"),
    "int4, asymmetric": make_recipe("int4", symmetric=False),
    "int8": make_recipe("int8"),
    "int8, asymmetric": make_recipe("int8", symmetric=False),
}
SPARSE: dict[str, Any] = {
    "family": Qwen2MoeConfig,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MODELS = {"tied": TIED, "untied": UNTIED, "mixture": {**SPARSE, **UNTIED}}
Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("model", "recipe"),
    [("tied", "int4"), ("untied", "int8, asymmetric"), ("mixture", "int4, asymmetric")],
)
def test_parity_holds_with_the_original_and_with_the_quantized_checkpoint(
    model: str, recipe: str, streamed: bool, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **MODELS[model])
    package = export(source, tmp_path / "package", quantize=RECIPES[recipe]).path
    reference = source if streamed else package / "checkpoint"
    report = validate(package, reference, budget="quick", streamed=streamed)
    assert report.passed
    assert status(report)[QUANTIZATION] == ("passed" if streamed else "not run")
    assert status(report)["weights"] == status(report)["embedding"] == "passed"


def test_a_package_that_was_not_quantized_has_no_such_row(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    package = export(source, tmp_path / "package").path
    assert QUANTIZATION not in status(validate(package, source, budget="quick", layers=1))


def test_another_checkpoint_is_neither_of_the_two(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    other = make_checkpoint(tmp_path / "other", positions=32, dtype=torch.bfloat16)
    package = export(source, tmp_path / "package", quantize=RECIPES["int4"]).path
    with pytest.raises(ValidationError, match="was not made from"):
        check_source(open_target(package), other)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Recipe -> (the original, the quantized checkpoint). Tests must not change them."""
    folder = tmp_path_factory.mktemp("origin")
    source = make_checkpoint(folder / "source", dtype=torch.bfloat16, **UNTIED)
    known: dict[str, Path] = {}

    def make(recipe: str) -> tuple[Path, Path]:
        if recipe not in known:
            package = export(source, folder / str(len(known)), quantize=RECIPES[recipe])
            known[recipe] = package.path / "checkpoint"
        return source, known[recipe]

    return make


def compared(original: Path, quantized: Path) -> dict[str, tuple[float, str | None]]:
    checks = compare_with_origin(open_checkpoint(original), open_checkpoint(quantized), no_progress)
    return {check.metric: (check.value, check.where) for check in checks}


@pytest.mark.parametrize("recipe", [*RECIPES])
def test_nothing_is_wrong_with_what_export_writes(recipe: str, made: Any) -> None:
    found = compared(*made(recipe))
    assert [value for value, _ in found.values()] == [0, 0]


def neighbour(stored: Tensors) -> None:
    """Rows of q_proj are those before them."""
    for name in list(stored):
        if name.startswith(Q_PROJ) and not name.endswith(("shape", "zero_point")):
            stored[name] = stored[name].roll(1, dims=0)


def other_weight(stored: Tensors) -> None:
    """Two weights of one shape are exchanged."""
    for kind in ("packed", "scale", "zero_point"):
        one, two = (f"model.layers.{i}.mlp.up_proj.weight_{kind}" for i in (0, 1))
        if one in stored:
            stored[one], stored[two] = stored[two], stored[one]


def one_code(stored: Tensors) -> None:
    """The first code of a row is two steps away."""
    words = stored[f"{DOWN}_packed"]
    bits = 32 * words.shape[1] // 96
    code = int(words[5, 0]) & (2**bits - 1)
    words[5, 0] += 2 if code < 2 ** (bits - 1) else -2


def scales(stored: Tensors) -> None:
    """Scales of a row are a tenth larger."""
    stored[f"{DOWN}_scale"][5] *= 1.1


def not_a_number(stored: Tensors) -> None:
    """A scale is NaN."""
    stored[f"{DOWN}_scale"][5, 0] = float("nan")


def embedding(stored: Tensors) -> None:
    """Two rows of the embedding are exchanged."""
    for kind in ("packed", "scale"):
        rows = stored[f"model.embed_tokens.weight_{kind}"]
        rows[[10, 11]] = rows[[11, 10]]


def norm(stored: Tensors) -> None:
    """One value of a norm is another."""
    stored["model.layers.1.input_layernorm.weight"][3] += 0.5


CHANGES = [neighbour, other_weight, one_code, scales, not_a_number, embedding, norm]


@pytest.mark.parametrize("recipe", [*RECIPES])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_is_not_the_rounding_of_the_original_is_found(
    change: Callable[[Tensors], None], recipe: str, made: Any, tmp_path: Path
) -> None:
    original, quantized = made(recipe)
    shutil.copytree(quantized, tmp_path / "changed")
    stored = load_file(quantized / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    found = compared(original, tmp_path / "changed")
    wrong = "other tensors that differ" if change is norm else "values farther than half a step"
    assert {metric for metric, (value, _) in found.items() if value} == {wrong}


def test_a_stack_of_experts_is_compared_part_by_part(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **SPARSE)
    tensors = load_file(source / "model.safetensors")
    single = [name for name in tensors if ".experts." in name]
    layers = {name.partition(".experts.")[0] for name in single}
    for layer in layers:
        parts = {
            kind: [tensors.pop(f"{layer}.experts.{e}.{kind}_proj.weight") for e in range(4)]
            for kind in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{layer}.experts.down_proj"] = torch.stack(parts["down"])
    assert single
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantized = export(source, tmp_path / "package", quantize=RECIPES["int4"]).path / "checkpoint"
    assert [value for value, _ in compared(source, quantized).values()] == [0, 0]
    with pytest.raises(ExportError, match="quantized already"):
        export(quantized, tmp_path / "again", quantize=RECIPES["int4"])
