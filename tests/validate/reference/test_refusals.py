"""What the oracle refuses, and that it names the culprit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch

from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Reference, Text

from .pairs import TEXTS, Pair


@pytest.mark.parametrize(
    "text",
    [
        Text((), ()),
        Text((1, 2), (2,)),
        Text((1, 2), (-1,)),
        Text((1, 2), (1, 0)),
        Text((1, 2), (1, 1)),
        Text((1, 48), (1,)),
        Text((1, -1), (1,)),
        Text((1, 2), (1,), first_position=-1),
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
        with pytest.raises(ValidationError, match="'nf4'"):
            reference.logits(TEXTS, "nf4")
        for module in (lambda r: r.layer(0, "int4"), lambda r: r.head("int4")):
            with pytest.raises(ValidationError, match="'int4'"), module(reference):
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
