"""`export --quantize`: the quantized checkpoint in the package, as compressed-tensors itself reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import mini, random_tensors, stack_experts, tensor_shapes, write_checkpoint
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.utils.match import match_targets
from packaged import state
from quantized import write_pack_quantized
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwenport.exporter import (
    ExportError,
    PackageError,
    export,
    load_package,
    make_recipe,
    open_checkpoint,
)
from qwenport.exporter.quantization.pack_quantized import PackQuantized
from qwenport.exporter.quantizing import Recipe, writing

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
UNTIED = mini("qwen2", tie_word_embeddings=False, hidden_size=64, intermediate_size=96)
SPARSE = mini("qwen2_moe", hidden_size=64, intermediate_size=96) | {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
RECIPES: dict[str, Recipe] = {
    "int4": make_recipe("int4"),
    "int4, asymmetric": make_recipe("int4", symmetric=False),
    "int8": make_recipe("int8"),
    "int8, asymmetric": make_recipe("int8", symmetric=False),
}
recipes = pytest.mark.parametrize("recipe", [*RECIPES.values()], ids=[*RECIPES])
KEPT = ("norm", "mlp.gate.weight", "shared_expert_gate")


def owner_model(path: Path) -> Any:
    """transformers' model of a checkpoint, its weights loaded and dequantized by compressed-tensors."""
    settings = QuantizationConfig.model_validate(
        json.loads((path / "config.json").read_text())["quantization_config"]
    )
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    apply_quantization_config(model, settings, show_progress=False)
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    found = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    tied = config.tie_word_embeddings
    assert found.missing_keys == (["lm_head.weight"] if tied else [])
    assert not found.unexpected_keys
    compressor.decompress_model(model)
    model.tie_weights()
    return model.eval()


def dequantized_by_owner(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, with quantized weights dequantized by the library, in its own choice of scheme."""
    settings = QuantizationConfig.model_validate(
        json.loads((path / "config.json").read_text())["quantization_config"]
    )
    schemes = {target: s for s in settings.config_groups.values() for target in s.targets}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        module = name.removesuffix(".weight_packed")
        kind: Any = torch.nn.Embedding if "embed_tokens" in module else torch.nn.Linear
        target, *_ = match_targets(module, kind(1, 1), schemes)
        held = {
            key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{module}.weight")
        }
        local = {key.removeprefix(f"{module}."): value for key, value in held.items()}
        if "weight_zero_point" in local:  # the library's view of one row of words needs this layout
            local["weight_zero_point"] = local["weight_zero_point"].T.contiguous().T
        tensors[f"{module}.weight"] = compressor.decompress(local, schemes[target])["weight"]
    return tensors


def relative(made: torch.Tensor, original: torch.Tensor) -> float:
    return float((made.double() - original.double()).norm() / original.double().norm())


@recipes
@pytest.mark.parametrize("source", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_the_library_dequantizes_what_the_package_s_graph_is_made_of(
    recipe: Recipe, source: Path, tmp_path: Path
) -> None:
    package = export(source, tmp_path / "package", quantize=recipe)
    original, made = (
        load_file(source / "model.safetensors"),
        dequantized_by_owner(tmp_path / "package" / "checkpoint"),
    )
    assert made.keys() == original.keys()
    for name, tensor in original.items():
        assert made[name].dtype == tensor.dtype
        if tensor.dim() < 2 or any(kept in name for kept in KEPT):
            assert torch.equal(made[name], tensor), name
        else:
            eight = recipe.linears.bits == 8 or name.startswith(("lm_head", "model.embed"))
            assert 0 < relative(made[name], tensor) < (0.02 if eight else 0.13), name
    assert package.config.quantization is not None


@recipes
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_and_the_library_run_the_checkpoint(
    recipe: Recipe, tied: bool, tmp_path: Path
) -> None:
    source = DENSE if tied else write_checkpoint(tmp_path / "source", UNTIED, dtype=torch.bfloat16)
    export(source, tmp_path / "package", quantize=recipe)
    path = tmp_path / "package" / "checkpoint"
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    plain.load_state_dict(dequantized_by_owner(path), strict=not tied)
    plain.tie_weights()
    ids = torch.tensor([[5, 9, 10, 7, 33, 1, 20]])
    with torch.inference_mode():
        found, wanted = owner_model(path)(ids).logits, plain(ids).logits
    assert torch.equal(found, wanted)


def test_a_tied_embedding_is_one_set_of_codes(tmp_path: Path) -> None:
    package = export(DENSE, tmp_path / "package", quantize=make_recipe("int4"))
    stored = load_file(tmp_path / "package" / "checkpoint" / "model.safetensors")
    assert "model.embed_tokens.weight_packed" in stored
    assert not [name for name in stored if name.startswith("lm_head")]
    graph = package.read_model().graph
    (node,) = [n for n in graph if n.name == "model.embed_tokens.DequantizeLinear"]
    assert {n.op_type for n in node.outputs[0].consumers()} == {"Gather", "Transpose"}


@recipes
def test_stacked_experts_are_quantized_as_single_ones_are(recipe: Recipe, tmp_path: Path) -> None:
    single = random_tensors(tensor_shapes(SPARSE), torch.bfloat16)
    made = {}
    for name, tensors in (("single", single), ("stacked", stack_experts(single))):
        source = write_checkpoint(tmp_path / name, SPARSE, tensors)
        export(source, tmp_path / f"{name}.package", quantize=recipe)
        made[name] = load_file(tmp_path / f"{name}.package" / "checkpoint" / "model.safetensors")
    assert made["single"].keys() == made["stacked"].keys()
    assert any("experts.1.up_proj.weight_packed" in name for name in made["single"])
    for name, tensor in made["single"].items():
        assert torch.equal(tensor, made["stacked"][name]), name


@recipes
def test_chunks_of_rows_and_shards_change_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(tensor_shapes(UNTIED), torch.bfloat16)
    for name, shards in (("whole", 1), ("small", 3)):
        source = write_checkpoint(tmp_path / name, UNTIED, tensors, shards=shards)
        if name == "small":
            monkeypatch.setattr(writing, "CHUNK_BYTES", 5 * 64 * 2)  # five rows
        export(source, tmp_path / f"{name}.package", quantize=recipe)
    one, other = (
        load_file(tmp_path / f"{name}.package" / "checkpoint" / "model.safetensors")
        for name in ("whole", "small")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_two_exports_are_the_same_bytes_and_a_package_opens_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(DENSE, tmp_path / name, quantize=make_recipe("int4"))
    one, two = (tmp_path / name / "checkpoint" / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.samefile(tmp_path / "one" / "weights" / "model.safetensors") or (
        one.read_bytes() == (tmp_path / "one" / "weights" / "model.safetensors").read_bytes()
    )
    package = load_package(tmp_path / "one")
    package.check_graph()
    stated = package.manifest["source"]["quantized"]
    assert stated["linears"] == {"bits": 4, "group": 32, "symmetric": True}
    assert stated["files"][0]["bytes"] == (DENSE / "model.safetensors").stat().st_size
    (tmp_path / "one" / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(PackageError, match=r"checkpoint/config\.json"):
        load_package(tmp_path / "one")


def test_another_dtype_is_that_of_scales_and_config(tmp_path: Path) -> None:
    package = export(DENSE, tmp_path / "package", quantize=make_recipe("int8"), dtype="fp16")
    assert package.dtype == "fp16"
    path = tmp_path / "package" / "checkpoint"
    stored = load_file(path / "model.safetensors")
    scales = {t.dtype for name, t in stored.items() if name.endswith("weight_scale")}
    assert scales == {torch.float16}
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "float16"


def test_the_vocabulary_may_be_stored_as_linears_are(tmp_path: Path) -> None:
    storage = PackQuantized(4, 32, True)
    export(DENSE, tmp_path / "package", quantize=Recipe(storage, storage))
    made = dequantized_by_owner(tmp_path / "package" / "checkpoint")
    original = load_file(DENSE / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert 0.05 < relative(made[name], original[name]) < 0.13


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights copied": ({"weights": "copy"}, "--weights copy"),
    "experts packed": ({"weights": "pack"}, "--weights pack"),
    "groups that do not divide": ({"quantize": make_recipe("int4", group=128)}, "--group 64 does"),
}


@pytest.mark.parametrize("name", [*REFUSED])
def test_what_has_no_meaning_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    options, said = REFUSED[name]
    before = state(tmp_path)
    with pytest.raises(ExportError, match=said):
        export(DENSE, tmp_path / "package", **{"quantize": make_recipe("int4"), **options})
    assert state(tmp_path) == before


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    source = write_pack_quantized(DENSE, tmp_path / "source")
    with pytest.raises(ExportError, match="quantized already"):
        export(source, tmp_path / "package", quantize=make_recipe("int4"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": "int3"}, "int8, int4"),
        ({"bits": "int8", "group": 32}, "--group is for int4"),
        ({"bits": "int4", "group": 16}, "32, 64, 128"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        make_recipe(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_that_no_code_can_stand_for_are_refused_and_named(
    value: float, tmp_path: Path
) -> None:
    tensors = random_tensors(tensor_shapes(UNTIED), torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 7] = value
    source = write_checkpoint(tmp_path / "source", UNTIED, tensors)
    shutil.rmtree(tmp_path / "package", ignore_errors=True)
    with pytest.raises(ExportError, match=name):
        export(source, tmp_path / "package", quantize=make_recipe("int4"), dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "quantizing weights" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(DENSE, tmp_path / "package", quantize=make_recipe("int4"), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_counts_the_bytes_of_the_original(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "quantizing weights":
            seen.append((done, total))

    export(MIXTURE, tmp_path / "package", quantize=make_recipe("int4"), progress=progress)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == open_checkpoint(MIXTURE).weight_bytes
