"""Checkpoints of mixtures: experts one by one or stacked; what is missing, extra or misshapen is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    library_bytes,
    mini,
    random_tensors,
    stack_experts,
    tensor_shapes,
    to_bytes,
    transformers_config,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.engines import open_session
from qwenport.exporter import CheckpointError, ExportError, export, open_checkpoint
from qwenport.exporter.families import FAMILIES as EVERY_FAMILY

MOE_TYPES = tuple(name for name, family in EVERY_FAMILY.items() if family.sparse)

RAW = {family: mini(family, torch_dtype="bfloat16") for family in MOE_TYPES}
SINGLE = {f: random_tensors(tensor_shapes(raw), torch.bfloat16) for f, raw in RAW.items()}
STACKED = {family: stack_experts(tensors) for family, tensors in SINGLE.items()}

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0.mlp"  # sparse in both
EXPERT = f"{LAYER}.experts.2"
GATE_UP, DOWN = f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"

FAMILIES = pytest.mark.parametrize("family", MOE_TYPES)
FORMS = pytest.mark.parametrize("form", [SINGLE, STACKED], ids=["single", "stacked"])


def refusal(folder: Path, family: str, tensors: Tensors) -> str:
    """What is said about a checkpoint that must be refused."""
    checkpoint = write_checkpoint(folder / "checkpoint", RAW[family], tensors)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(checkpoint)
    return str(error.value)


# --- what is read


@FAMILIES
@FORMS
@pytest.mark.parametrize("shards", [1, 3])
def test_both_forms_open_and_every_tensor_is_where_the_library_finds_it(
    tmp_path: Path, family: str, form: dict[str, Tensors], shards: int
) -> None:
    folder = write_checkpoint(tmp_path / "c", RAW[family], form[family], shards=shards)
    opened = open_checkpoint(folder)
    shapes = tensor_shapes(RAW[family], stacked=form is STACKED)
    assert {name: entry.shape for name, entry in opened.tensors.items()} == shapes
    assert opened.weight_bytes == sum(len(to_bytes(t)) for t in form[family].values())
    for file in opened.files:
        for name, expected in library_bytes(file.path).items():
            entry = opened.tensors[name]
            assert entry.file == file.name
            assert file.path.read_bytes()[entry.offset : entry.offset + entry.length] == expected


@FAMILIES
@FORMS
def test_both_forms_are_what_transformers_saves(
    tmp_path: Path, family: str, form: dict[str, Tensors]
) -> None:
    from transformers import AutoModelForCausalLM

    config = transformers_config(RAW[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(STACKED[family])
    model.save_pretrained(tmp_path, save_original_format=form is SINGLE)
    saved = library_bytes(tmp_path / "model.safetensors")
    assert saved == {name: to_bytes(tensor) for name, tensor in form[family].items()}
    opened = open_checkpoint(tmp_path)
    assert opened.tensors.keys() == saved.keys()


@settings(max_examples=10)
@given(st.data())
def test_each_layer_has_the_form_that_it_is_stored_in(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    family = data.draw(st.sampled_from(MOE_TYPES))
    tensors: Tensors = {}
    for layer in range(RAW[family]["num_hidden_layers"]):
        form = data.draw(st.sampled_from([SINGLE, STACKED]))
        tensors |= {n: t for n, t in form[family].items() if n.startswith(f"model.layers.{layer}.")}
    tensors |= {n: t for n, t in SINGLE[family].items() if not n.startswith("model.layers.")}
    folder = write_checkpoint(tmp_path_factory.mktemp("mixed"), RAW[family], tensors)
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()


# --- tensors that are missing


@FAMILIES
@FORMS
def test_any_missing_tensor_is_named(tmp_path: Path, family: str, form: dict[str, Tensors]) -> None:
    of_layer = [name for name in form[family] if name.startswith(LAYER)]
    assert any("expert" in name for name in of_layer) and f"{LAYER}.gate.weight" in of_layer
    for number, name in enumerate(of_layer):
        rest = {n: t for n, t in form[family].items() if n != name}
        said = refusal(tmp_path / str(number), family, rest)
        assert f"lacks tensor {name}," in said


@pytest.mark.parametrize(
    "name",
    [
        "gate.weight",
        "shared_expert_gate.weight",
        "shared_expert.gate_proj.weight",
        "shared_expert.up_proj.weight",
        "shared_expert.down_proj.weight",
        "experts.0.gate_proj.weight",
        "experts.5.up_proj.weight",
        "experts.3.down_proj.weight",
    ],
)
def test_a_missing_part_of_a_sparse_layer_is_named(tmp_path: Path, name: str) -> None:
    missing = f"model.layers.2.mlp.{name}"
    rest = {n: t for n, t in SINGLE["qwen2_moe"].items() if n != missing}
    assert len(rest) == len(SINGLE["qwen2_moe"]) - 1
    assert f"lacks tensor {missing}," in refusal(tmp_path, "qwen2_moe", rest)


@FAMILIES
@pytest.mark.parametrize(("left", "missing"), [(GATE_UP, DOWN), (DOWN, GATE_UP)])
def test_half_of_a_stack_is_not_taken_for_single_experts(
    tmp_path: Path, family: str, left: str, missing: str
) -> None:
    rest = {name: tensor for name, tensor in STACKED[family].items() if name != missing}
    said = refusal(tmp_path, family, rest)
    assert f"lacks tensor {missing}," in said and left not in said


@FAMILIES
def test_a_stack_with_the_other_half_as_single_experts_is_refused(
    tmp_path: Path, family: str
) -> None:
    mixed = {**STACKED[family], **{n: t for n, t in SINGLE[family].items() if "down_proj" in n}}
    del mixed[DOWN]
    assert f"lacks tensor {DOWN}," in refusal(tmp_path, family, mixed)


@FAMILIES
@FORMS
def test_a_dense_layer_where_experts_should_be_is_refused_and_the_reverse(
    tmp_path: Path, family: str, form: dict[str, Tensors]
) -> None:
    """One index off in mlp_only_layers."""
    first, second = {"mlp_only_layers": [0]}, {"mlp_only_layers": [1]}
    shapes = tensor_shapes({**RAW[family], **first}, stacked=form is STACKED)
    tensors = random_tensors(shapes, torch.bfloat16)
    folder = write_checkpoint(tmp_path / "c", {**RAW[family], **second}, tensors)
    with pytest.raises(CheckpointError, match=r"lacks tensors model\.layers\.0\.mlp\.gate\.weight"):
        open_checkpoint(folder)


# --- tensors that are too many


@FAMILIES
def test_experts_in_both_forms_at_once_are_refused_and_named(tmp_path: Path, family: str) -> None:
    said = refusal(tmp_path, family, {**SINGLE[family], **STACKED[family]})
    assert "does not account for" in said
    assert f"{LAYER}.experts.0.down_proj.weight" in said


@FAMILIES
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_too_many_is_named(tmp_path: Path, family: str, part: str) -> None:
    count = RAW[family]["num_experts"]
    extra = f"{LAYER}.experts.{count}.{part}.weight"
    tensor = SINGLE[family][f"{EXPERT}.{part}.weight"].clone()
    said = refusal(tmp_path, family, {**SINGLE[family], extra: tensor})
    assert f"has tensor {extra}," in said


@FAMILIES
@pytest.mark.parametrize(
    "extra",
    [
        f"{LAYER}.gate.e_score_correction_bias",
        f"{LAYER}.gate.bias",
        f"{LAYER}.experts.02.up_proj.weight",
        f"{LAYER}.experts.0.up_proj.bias",
        f"{LAYER}.experts.-1.up_proj.weight",
        f"{LAYER}.shared_experts.up_proj.weight",
    ],
)
@FORMS
def test_a_tensor_of_another_kind_of_mixture_is_named(
    tmp_path: Path, family: str, extra: str, form: dict[str, Tensors]
) -> None:
    said = refusal(tmp_path, family, {**form[family], extra: torch.zeros(6, dtype=torch.bfloat16)})
    assert f"has tensor {extra}," in said


@pytest.mark.parametrize("name", ["shared_expert_gate.weight", "shared_expert.up_proj.weight"])
def test_a_shared_expert_that_the_model_has_not_is_named(tmp_path: Path, name: str) -> None:
    extra = {f"{LAYER}.{name}": SINGLE["qwen2_moe"][f"{LAYER}.{name}"].clone()}
    said = refusal(tmp_path, "qwen3_moe", {**SINGLE["qwen3_moe"], **extra})
    assert f"{LAYER}.{name}" in said


# --- tensors of another shape or dtype


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a row less": lambda t: t[1:],
    "a column less": lambda t: t[..., 1:],
    "transposed": lambda t: t.transpose(-1, -2),
    "of another rank": lambda t: t[None],
    "empty": lambda t: t[:0],
}


@FAMILIES
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_unlike_the_others_is_named_with_both_shapes(
    tmp_path: Path, family: str, part: str, change: str
) -> None:
    name = f"{EXPERT}.{part}.weight"
    before = SINGLE[family][name]
    after = CHANGES[change](before).contiguous()
    said = refusal(tmp_path, family, {**SINGLE[family], name: after})
    assert f"tensor {name} has shape {list(after.shape)};" in said
    assert said.endswith(f"implies {list(before.shape)}")


@FAMILIES
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [GATE_UP, DOWN, f"{LAYER}.gate.weight"])
def test_a_misshapen_stack_or_router_is_named_with_both_shapes(
    tmp_path: Path, family: str, name: str, change: str
) -> None:
    before = STACKED[family][name]
    after = CHANGES[change](before).contiguous()
    said = refusal(tmp_path, family, {**STACKED[family], name: after})
    assert f"tensor {name} has shape {list(after.shape)};" in said
    assert said.endswith(f"implies {list(before.shape)}")


@FAMILIES
@FORMS
def test_another_number_of_experts_than_config_json_states_is_refused(
    tmp_path: Path, family: str, form: dict[str, Tensors]
) -> None:
    for number, count in enumerate(
        (RAW[family]["num_experts"] - 1, RAW[family]["num_experts"] + 1)
    ):
        folder = write_checkpoint(tmp_path / str(number), RAW[family], form[family])
        (folder / "config.json").write_text(json.dumps({**RAW[family], "num_experts": count}))
        with pytest.raises(CheckpointError, match=r"model\.layers\.\d\.mlp\."):
            open_checkpoint(folder)


OF_ANOTHER_DTYPE = pytest.mark.parametrize(
    ("form", "name"),
    [
        (SINGLE, f"{EXPERT}.gate_proj.weight"),
        (SINGLE, f"{EXPERT}.down_proj.weight"),
        (STACKED, GATE_UP),
        (STACKED, DOWN),
        (SINGLE, f"{LAYER}.gate.weight"),  # a router is often kept in fp32
    ],
    ids=["gate of one", "down of one", "gates stacked", "downs stacked", "router"],
)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@OF_ANOTHER_DTYPE
def test_an_expert_or_router_of_a_dtype_without_meaning_is_named(
    tmp_path: Path, family: str, form: dict[str, Tensors], name: str, dtype: torch.dtype
) -> None:
    changed = {**form[family], name: form[family][name].to(dtype)}
    assert f"tensor {name} has dtype" in refusal(tmp_path, family, changed)


@FAMILIES
@OF_ANOTHER_DTYPE
def test_an_expert_or_router_in_fp32_is_converted_if_that_loses_nothing(
    tmp_path: Path, family: str, form: dict[str, Tensors], name: str
) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "exact", RAW[family], {**form[family], name: form[family][name].float()}
    )
    package = export(checkpoint, tmp_path / "package")
    assert package.manifest["source"]["converted"] == {"fp32 to bf16": 1}
    plain = write_checkpoint(tmp_path / "plain", RAW[family], form[family])
    logits = [
        open_session(folder).prefill([[3, 1, 4, 1, 5]], all_logits=True)[0]
        for folder in (package.path, export(plain, tmp_path / "expected").path)
    ]
    assert (logits[0] == logits[1]).all()
    changed = {**form[family], name: form[family][name].float() * 1.001}
    checkpoint = write_checkpoint(tmp_path / "inexact", RAW[family], changed)
    with pytest.raises(ExportError, match=rf"{name} is fp32.*--dtype"):
        export(checkpoint, tmp_path / "refused")
