"""GPTQ checkpoints: repacked to the same bits, columns sorted by group where they are not, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from changed import changed, set_to
from evaluated import columns_of, dequantized, stack_of
from quantized_words import gptq_dequantized, order_of, write_gptq
from safetensors.torch import load_file

from qwenport import exporter

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
SCHEMES: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, asymmetric": {"symmetric": False},
    "4 bits, v2, asymmetric": {"symmetric": False, "version": 2, "group": 64},
    "4 bits, rows": {"group": -1},
    "4 bits, act-order": {"act_order": True, "symmetric": False},
    "8 bits": {"bits": 8},
    "8 bits, v2": {"bits": 8, "version": 2, "group": -1},
    "8 bits, act-order, asymmetric": {"bits": 8, "act_order": True, "symmetric": False},
}
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gptq(DENSE, tmp_path_factory.mktemp("gptq") / "checkpoint")


@pytest.fixture(scope="module")
def act_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gptq(DENSE, tmp_path_factory.mktemp("gptq") / "checkpoint", act_order=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_package_dequantizes_to_the_same_bits(scheme: str, tmp_path: Path) -> None:
    how = dict(SCHEMES[scheme])
    checkpoint = write_gptq(DENSE, tmp_path / "checkpoint", **how)
    package = exporter.export(checkpoint, tmp_path / "package", weights="copy")
    assert package.dtype == "fp16"
    how.pop("version", None)
    plain = load_file(DENSE / "model.safetensors")
    for linear in ("model.layers.0.self_attn.k_proj", LINEAR, "model.layers.4.mlp.down_proj"):
        wanted = gptq_dequantized(linear, plain[f"{linear}.weight"].half(), **how)
        found = torch.tensor(dequantized(package.path, linear))
        _, columns = columns_of(package.path, linear)
        assert (columns is not None) == how.get("act_order", False)
        if columns is not None:
            found[:, columns] = found.clone()
        assert torch.equal(found, wanted.double())


def test_inputs_are_gathered_once_for_all_linears_with_the_same_order(
    act_order: Path, tmp_path: Path
) -> None:
    package = exporter.export(act_order, tmp_path / "package", weights="copy")
    layer = "model.layers.3"
    q, k, v = (columns_of(package.path, f"{layer}.self_attn.{n}_proj") for n in "qkv")
    gate, up = (columns_of(package.path, f"{layer}.mlp.{n}_proj") for n in ("gate", "up"))
    assert q[0] == k[0] == v[0] != gate[0] == up[0]
    count = len(load_file(DENSE / "model.safetensors")[f"{LINEAR}.weight"][0])
    assert np.array_equal(q[1], _sorted(order_of(f"{layer}.self_attn.q_proj", count)))
    gathers = [n for n in package.read_model().graph if n.op_type == "Gather"]
    assert len(gathers) == 1 + 4 * 5  # the embedding; in each layer q k v, o, gate up, down
    files = package.path / "weights" / "repacked.safetensors"
    assert sum(name.endswith("permutation") for name in load_file(files)) == 4 * 5


def _sorted(columns: torch.Tensor, group: int = 32) -> np.ndarray[Any, Any]:
    """The columns by group, in each group ascending: nothing says in which order a group's columns are."""
    return np.sort(columns.numpy().reshape(-1, group), axis=1).reshape(-1)


def test_other_orders_of_the_same_input_are_gathered_apart(act_order: Path, tmp_path: Path) -> None:
    def reorder(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{LINEAR}.g_idx"] = stored[f"{LINEAR}.g_idx"].flip(0)

    copy = changed(act_order, tmp_path / "checkpoint", tensors=reorder)
    package = exporter.export(copy, tmp_path / "package")
    assert sum(n.op_type == "Gather" for n in package.read_model().graph) == 2 + 4 * 5


def test_no_input_is_gathered_where_the_columns_are_in_their_own_order(
    dense: Path, tmp_path: Path
) -> None:
    copy = changed(dense, tmp_path / "checkpoint", config=set_to(desc_act=True))
    package = exporter.export(copy, tmp_path / "package")
    assert sum(n.op_type == "Gather" for n in package.read_model().graph) == 1


def test_groups_may_be_left_out_and_biases_of_zeros_are_not_needed(tmp_path: Path) -> None:
    checkpoint = write_gptq(DENSE, tmp_path / "checkpoint", zero_biases=True)

    def without(stored: dict[str, torch.Tensor]) -> None:
        for name in [name for name in stored if name.endswith("g_idx")]:
            del stored[name]

    opened = exporter.open_checkpoint(changed(checkpoint, tmp_path / "without", tensors=without))
    assert any("zero, where the model has no bias" in note for note in opened.notes)
    assert not any(name.endswith("mlp.up_proj.bias") for name in opened.tensors)
    assert "model.layers.0.self_attn.q_proj.bias" in opened.tensors


def test_a_quantized_head(tmp_path: Path) -> None:
    raw = checkpoints.mini("qwen2", tie_word_embeddings=False)
    source = checkpoints.write_checkpoint(tmp_path / "source", raw, dtype=torch.float16)
    checkpoint = write_gptq(source, tmp_path / "checkpoint", group=-1, head=True)
    package = exporter.export(checkpoint, tmp_path / "package", weights="copy")
    plain = load_file(source / "model.safetensors")["lm_head.weight"]
    wanted = gptq_dequantized("lm_head", plain, group=-1).double().numpy()
    assert np.array_equal(dequantized(package.path, "lm_head"), wanted)


RULES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a negative rule": (["mlp.down"], {"dynamic": {r"-:.*\.mlp\.down.*": {}}}),
    "modules of a layer": (
        ["self_attn", "mlp.gate"],
        {"modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]]},
    ),
    "the head left out": ([], {"dynamic": {"-:lm_head": {}}}),
}


@pytest.mark.parametrize("rule", RULES)
def test_some_linears_stay(rule: str, tmp_path: Path) -> None:
    kept, stated = RULES[rule]
    checkpoint = write_gptq(DENSE, tmp_path / "checkpoint", kept=kept, **stated)
    package = exporter.export(checkpoint, tmp_path / "package")
    names = [n.name for n in package.read_model().graph if n.op_type == "DequantizeLinear"]
    assert names and not any(part in name for part in kept for name in names)


@pytest.mark.parametrize("act_order", [False, True])
def test_experts_are_stacked_in_their_own_order(tmp_path: Path, act_order: bool) -> None:
    how: dict[str, Any] = {"bits": 8, "act_order": act_order}
    checkpoint = write_gptq(MIXTURE, tmp_path / "checkpoint", **how)
    package = exporter.export(checkpoint, tmp_path / "package", weights="copy")
    model = package.read_model()
    experts = next(node for node in model.graph if node.op_type == "MoEExperts")
    plain = load_file(MIXTURE / "model.safetensors")
    for stack, parts in zip(experts.inputs[3:], (("gate", "up"), ("down",)), strict=True):
        found = stack_of(package.path, stack.name)
        linears = [
            f"{stack.name.rpartition('.')[0]}.{expert}.{part}_proj"
            for expert in range(len(found))
            for part in parts
        ]
        wanted = [gptq_dequantized(n, plain[f"{n}.weight"].half(), **how) for n in linears]
        assert np.array_equal(found, torch.cat(wanted).numpy().reshape(found.shape))


def test_experts_that_share_an_order_share_its_inverse(tmp_path: Path) -> None:
    checkpoint = write_gptq(MIXTURE, tmp_path / "checkpoint", act_order=True)
    package = exporter.export(checkpoint, tmp_path / "package", weights="copy")
    nodes = [*package.read_model().graph]
    stacked = [n for n in nodes if n.op_type == "Gather" and ".experts." in n.name]
    sorts = [n for n in nodes if n.op_type == "TopK"]
    assert 3 * len(sorts) == 2 * len(stacked) > 0  # one for gate and up, one for down


@pytest.mark.parametrize(
    "harmless",
    [
        {"checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32"},
        {"static_groups": True, "is_marlin_format": False, "damp_auto_increment": 0.0025},
        {"meta": {"quantizer": ["gptqmodel:1.4.0"]}, "dynamic": None, "lm_head": False},
        {"model_name_or_path": None, "model_file_base_name": "model", "use_exllama": False},
    ],
)
def test_what_a_tool_notes_for_itself_is_accepted(
    harmless: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    exporter.open_checkpoint(changed(dense, tmp_path / "checkpoint", config=set_to(**harmless)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 3}, "bits 3"),
        ({"bits": 2}, "bits 2"),
        ({"group_size": 48}, "group_size 48"),
        ({"group_size": None}, "group_size null"),
        ({"sym": None}, "sym null"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "format 'gptq_v2'"),
        ({"is_marlin_format": True}, "is_marlin_format true"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic '+:.*down.*'"),
        ({"dynamic": {"-:(": {}}}, "dynamic '-:('"),
        ({"modules_in_block_to_quantize": []}, "modules_in_block_to_quantize"),
        ({"block_name_to_quantize": "vision.blocks"}, "block_name_to_quantize"),
        ({"adapter": {"rank": 8}}, "adapter"),
        ({"lm_head": "yes"}, "lm_head"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(
    change: dict[str, Any], named: str, dense: Path, tmp_path: Path
) -> None:
    copy = changed(dense, tmp_path / "checkpoint", config=set_to(**change))
    with pytest.raises(exporter.ConfigError, match=re.escape(named)):
        exporter.open_checkpoint(copy)


def _with(suffix: str, change: Any) -> Any:
    name = f"{LINEAR}.{suffix}"
    return lambda stored: stored.update({name: change(stored.get(name))})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{LINEAR}.scales"), f"lacks tensor {LINEAR}.scales"),
        (lambda t: t.pop(f"{LINEAR}.g_idx"), f"lacks tensor {LINEAR}.g_idx"),
        (_with("g_idx", lambda t: t.long()), f"{LINEAR}.g_idx has dtype I64"),
        (_with("g_idx", lambda t: t[1:].clone()), f"{LINEAR}.g_idx has shape"),
        (_with("g_idx", lambda t: t.clamp(max=1)), "groups of several sizes"),
        (_with("g_idx", lambda t: t - 1), "does not put the columns in"),
        (_with("g_idx", lambda t: t + 1), "does not put the columns in"),
        (_with("bias", lambda t: torch.ones(512).half()), f"tensor {LINEAR}.bias is not zero"),
        (_with("qzeros", lambda t: t + 1), f"{LINEAR}.qzeros has zero points other than"),
    ],
)
def test_a_tensor_that_the_format_does_not_have_so_is_named(
    change: Any, named: str, act_order: Path, tmp_path: Path
) -> None:
    copy = changed(act_order, tmp_path / "checkpoint", tensors=change)
    with pytest.raises(exporter.CheckpointError, match=re.escape(named)):
        exporter.open_checkpoint(copy)


def test_an_order_that_the_config_denies_is_named(act_order: Path, tmp_path: Path) -> None:
    copy = changed(act_order, tmp_path / "checkpoint", config=set_to(desc_act=False))
    with pytest.raises(exporter.CheckpointError, match="g_idx puts columns in an order of its own"):
        exporter.open_checkpoint(copy)


def test_version_2_under_the_name_of_version_1_is_named(tmp_path: Path) -> None:
    checkpoint = write_gptq(DENSE, tmp_path / "checkpoint", version=2)
    copy = changed(checkpoint, tmp_path / "copy", config=set_to(checkpoint_format="gptq"))
    with pytest.raises(exporter.CheckpointError, match="sym true in format gptq;"):
        exporter.open_checkpoint(copy)
