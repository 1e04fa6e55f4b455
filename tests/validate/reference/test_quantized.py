"""The oracle of a quantized checkpoint is transformers with dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from quantized import quantize, write_pack_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwenport.exporter import export
from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Reference, Text
from qwenport.validate.reference.dequantization import read_quantization
from qwenport.validate.target import Target, open_target

from .pairs import TEXTS, same

ROUTERS = ("lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
SCHEMES: dict[str, dict[str, Any]] = {
    "4 bits, groups": {},
    "4 bits, groups, zero points": {"symmetric": False},
    "4 bits, rows, zero points": {"group": None, "symmetric": False},
    "8 bits, rows": {"bits": 8, "group": None},
    "8 bits, groups, zero points": {"bits": 8, "group": 64, "symmetric": False},
    "4 bits, partly": {"ignore": ("lm_head", "re:.*self_attn.*", "model.layers.2.mlp.up_proj")},
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Made:
    """A quantized checkpoint with the target that its unquantized source became."""

    source: Path
    path: Path
    target: Target
    how: dict[str, Any]

    def both(self, path: Path | None = None) -> tuple[Reference, Reference]:
        """The oracle of it, whole and streamed."""
        whole, streamed = (
            Reference(self.target, path or self.path, streamed=kind) for kind in (False, True)
        )
        return whole, streamed

    def dequantized(self) -> dict[str, torch.Tensor]:
        """The source's tensors, with the weights that the checkpoint has quantized rounded to their codes."""
        stored = load_file(self.path / "model.safetensors").keys()
        how = {"bits": 4, "group": 32, "symmetric": True, **self.how}
        how.pop("ignore", None)
        return {
            name: quantize(tensor, **how).dequantized() if f"{name}_packed" in stored else tensor
            for name, tensor in load_file(self.source / "model.safetensors").items()
        }

    def changed(
        self,
        folder: Path,
        tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
        config: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Path:
        """A copy with other tensors, or another quantization_config."""
        folder.mkdir()
        stored = load_file(self.path / "model.safetensors")
        stated = json.loads((self.path / "config.json").read_text())
        if tensors is not None:
            tensors(stored)
        if config is not None:
            config(stated["quantization_config"])
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(stated))
        return folder


@pytest.fixture(scope="session")
def made(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Made]:
    """The tiny checkpoint in a scheme."""
    done: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in done:
            path = tmp_path_factory.mktemp("quantized") / "checkpoint"
            write_pack_quantized(tiny_checkpoint, path, **SCHEMES[name])
            done[name] = Made(tiny_checkpoint, path, open_target(tiny_package), SCHEMES[name])
        return done[name]

    return make


def plain_logits(source: Path, tensors: dict[str, torch.Tensor], texts: Any) -> list[Any]:
    """transformers' fp32 logits with these tensors, of the texts that start at position 0."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(source), dtype=torch.float32, **EAGER
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    with torch.inference_mode():
        return [
            model(torch.tensor([text.tokens]), use_cache=False).logits[0].numpy() for text in texts
        ]


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_transformers_with_the_dequantized_weights(
    name: str, made: Callable[[str], Made]
) -> None:
    checkpoint = made(name)
    text = TEXTS[0]
    (expected,) = plain_logits(checkpoint.source, checkpoint.dequantized(), [text])
    (unquantized,) = plain_logits(
        checkpoint.source, load_file(checkpoint.source / "model.safetensors"), [text]
    )
    for reference in checkpoint.both():
        (logits,) = reference.logits([text])
        assert same(logits, expected[list(text.positions)])
        assert not np.allclose(logits, unquantized[list(text.positions)], rtol=1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_whole_and_streamed_are_the_same_to_the_last_bit(
    name: str, made: Callable[[str], Made]
) -> None:
    whole, streamed = made(name).both()
    for dtype in ("fp32", "bf16"):
        assert all(map(same, whole.logits(TEXTS, dtype), streamed.logits(TEXTS, dtype)))
    assert same(whole.greedy([5, 6, 7], 3)[1], streamed.greedy([5, 6, 7], 3)[1])
    for index in range(whole.num_layers):
        with whole.layer(index, "fp32") as one, streamed.layer(index, "fp32") as other:
            theirs, ours = one.state_dict(), other.state_dict()
            assert all(torch.equal(weight, ours[key]) for key, weight in theirs.items())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_dequantizes_the_checkpoint_itself_to_the_same_logits(
    name: str, made: Callable[[str], Made]
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    checkpoint = made(name)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        dtype=torch.float32,
        # without it, transformers 5.23 expects zero points that are not packed
        quantization_config=CompressedTensorsConfig(dequantize=True),
        **EAGER,
    ).eval()
    text = TEXTS[0]
    with torch.inference_mode():
        expected = theirs(torch.tensor([text.tokens]), use_cache=False).logits[0].numpy()
    for reference in checkpoint.both():
        (logits,) = reference.logits([text])
        assert same(logits, expected[list(text.positions)])


@pytest.mark.parametrize("streamed", [False, True])
def test_without_the_library_nothing_changes_but_the_note(
    streamed: bool, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = made("4 bits, groups, zero points")
    with_library = Reference(checkpoint.target, checkpoint.path, streamed=streamed)
    expected = with_library.logits(TEXTS)
    monkeypatch.setattr(
        "qwenport.validate.reference.dequantization.pack_quantized._has_library", lambda: False
    )
    without = Reference(checkpoint.target, checkpoint.path, streamed=streamed)
    assert all(map(same, without.logits(TEXTS), expected))
    assert "; dequantized by compressed-tensors " in with_library.weights_note
    assert without.weights_note == "fp32; dequantized by the formula, computed by validate"


def test_dequantized_weights_are_rounded_to_the_target_s_dtype(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    tiny = made("4 bits, groups, zero points")
    tensors = {k: t.float() for k, t in load_file(tiny.source / "model.safetensors").items()}
    raw = json.loads((tiny.source / "config.json").read_text())
    source = checkpoints.write_checkpoint(tmp_path / "fp32", raw, tensors)
    path = write_pack_quantized(source, tmp_path / "quantized", **tiny.how)
    checkpoint = Made(source, path, replace(tiny.target, dtype="fp16"), tiny.how)
    expected = checkpoint.dequantized()[Q_PROJ]
    assert expected.dtype == torch.float32
    assert not torch.equal(expected.half().float(), expected)
    for reference in checkpoint.both():
        with reference.layer(1, "fp32") as layer:
            assert torch.equal(layer.self_attn.q_proj.weight, expected.half().float())


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A mixture in bf16, each expert quantized; some rows do not end with a word."""
    raw = checkpoints.mini(request.param, torch_dtype="bfloat16")
    folder = tmp_path_factory.mktemp("mixture")
    source = checkpoints.write_checkpoint(folder / "source", raw, dtype=torch.bfloat16)
    how = {"group": None, "symmetric": False}
    path = write_pack_quantized(source, folder / "quantized", ignore=ROUTERS, **how)
    target = open_target(export(source, folder / "package").path)
    return Made(source, path, target, how)


def test_experts_are_dequantized_one_by_one(mixture: Made) -> None:
    text = Text.ending(range(3, 24), 21)
    stacked = checkpoints.stack_experts(mixture.dequantized())
    (expected,) = plain_logits(mixture.source, stacked, [text])
    whole, streamed = mixture.both()
    (logits,) = whole.logits([text])
    assert same(logits, expected)
    for dtype in ("fp32", "bf16"):
        assert all(map(same, whole.logits(TEXTS, dtype), streamed.logits(TEXTS, dtype)))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantizes_symmetric_experts_itself_to_the_same_logits(
    mixture: Made, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    path = write_pack_quantized(mixture.source, tmp_path / "symmetric", group=4, ignore=ROUTERS)
    theirs = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        **EAGER,
    ).eval()
    theirs.float()  # it leaves experts in the dtype of the scales
    text = TEXTS[0]
    with torch.inference_mode():
        expected = theirs(torch.tensor([text.tokens]), use_cache=False).logits[0].numpy()
    for reference in mixture.both(path):
        (logits,) = reference.logits([text])
        assert same(logits, expected[list(text.positions)])


@pytest.mark.parametrize("rows_at_once", [1, 12, 4096])
def test_pieces_of_any_length_make_the_same_weights(
    rows_at_once: int, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made("4 bits, groups, zero points")
    monkeypatch.setattr("qwenport.validate.reference.stored.ROWS_AT_ONCE", rows_at_once)
    expected = checkpoint.dequantized()[Q_PROJ].float()
    streamed = Reference(checkpoint.target, checkpoint.path, streamed=True)
    with streamed.layer(1, "fp32") as layer:
        assert torch.equal(layer.self_attn.q_proj.weight, expected)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_an_untied_head_may_be_quantized(prefix: str, tmp_path: Path) -> None:
    raw = checkpoints.mini("qwen2", tie_word_embeddings=False)
    source = checkpoints.write_checkpoint(tmp_path / "source", raw, dtype=torch.bfloat16)
    how = {"group": 8, "symmetric": False}
    path = write_pack_quantized(source, tmp_path / "quantized", ignore=(), **how)
    target = open_target(export(source, tmp_path / "package").path)
    target = replace(target, source={**target.source, "prefix": prefix})
    checkpoint = Made(source, path, target, how)
    text = TEXTS[0]
    (expected,) = plain_logits(source, checkpoint.dequantized(), [text])
    outer = prefix.removesuffix("model.").removesuffix("language_")

    def renamed(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            new = name.replace("model.", prefix, 1) if name.startswith("model.") else outer + name
            stored[new] = stored.pop(name)

    changed = checkpoint.changed(tmp_path / "changed", renamed)
    assert f"{outer}lm_head.weight_packed" in load_file(changed / "model.safetensors")
    for reference in checkpoint.both(changed):
        (logits,) = reference.logits([text])
        assert same(logits, expected[list(text.positions)])


@pytest.mark.parametrize("tensor", ["weight_g_idx", "weight_zero_point", "weight"])
def test_an_unused_tensor_of_a_quantized_weight_is_named(
    tensor: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    checkpoint = made("4 bits, groups")
    name = Q_PROJ.removesuffix("weight") + tensor
    path = checkpoint.changed(
        tmp_path / "changed", lambda stored: stored.update({name: torch.zeros(192, 192)})
    )
    named = name
    for streamed in (False, True):
        with pytest.raises(ValidationError, match=named):
            Reference(checkpoint.target, path, streamed=streamed)


@pytest.mark.parametrize("tensor", ["_scale", "_shape", "_zero_point"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_missing_or_misshapen_tensor_of_a_quantized_weight_is_named(
    tensor: str, streamed: bool, made: Callable[[str], Made], tmp_path: Path
) -> None:
    checkpoint = made("4 bits, groups, zero points")
    name = Q_PROJ + tensor
    missing = checkpoint.changed(tmp_path / "missing", lambda stored: stored.pop(name))
    with pytest.raises(ValidationError, match=f"no tensor {name}"):
        Reference(checkpoint.target, missing, streamed=streamed)

    def cut(stored: dict[str, torch.Tensor]) -> None:
        stored[name] = stored[name][1:].contiguous()

    narrow = checkpoint.changed(tmp_path / "narrow", cut)
    with pytest.raises(ValidationError, match=f"{name} (has shape|is )"):
        Reference(checkpoint.target, narrow, streamed=streamed)


def test_a_quantized_head_beside_a_tied_embedding_is_refused(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    checkpoint, name = made("4 bits, groups"), "lm_head.weight_packed"
    path = checkpoint.changed(
        tmp_path / "changed",
        lambda stored: stored.update({name: torch.zeros(2048, 24, dtype=torch.int32)}),
    )
    for streamed in (False, True):
        with pytest.raises(ValidationError, match=name):
            Reference(checkpoint.target, path, streamed=streamed)


REFUSED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "quant_method": lambda stated: stated.update(quant_method="bitsandbytes"),
    "format": lambda stated: stated.update(format="int-quantized"),
    "quantization_status": lambda stated: stated.update(quantization_status="initialized"),
    "kv_cache_scheme": lambda stated: stated.update(kv_cache_scheme={"num_bits": 8}),
    "transform_config": lambda stated: stated.update(transform_config={"config_groups": {"a": 1}}),
    "input_activations": lambda stated: group(stated).update(input_activations={"num_bits": 8}),
    "num_bits": lambda stated: group(stated)["weights"].update(num_bits=3),
    "type": lambda stated: group(stated)["weights"].update(type="float"),
    "strategy": lambda stated: group(stated)["weights"].update(strategy="block"),
    "group_size": lambda stated: group(stated)["weights"].update(group_size=0),
    "actorder": lambda stated: group(stated)["weights"].update(actorder="group"),
    "config_groups": lambda stated: stated.pop("config_groups"),
    "targets": lambda stated: group(stated).update(targets=["model.layers.0.mlp.up_proj"]),
}


def group(stated: dict[str, Any]) -> dict[str, Any]:
    """The only group of a quantization_config."""
    (found,) = stated["config_groups"].values()
    return found


@pytest.mark.parametrize("key", REFUSED)
def test_another_quantization_is_refused_by_the_key_s_name(
    key: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    checkpoint = made("4 bits, groups")
    path = checkpoint.changed(tmp_path / "changed", config=REFUSED[key])
    for streamed in (False, True):
        with pytest.raises(ValidationError, match=key):
            Reference(checkpoint.target, path, streamed=streamed)


def test_a_group_that_the_library_refuses_is_an_error_of_one_line(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = made("4 bits, groups")
    path = checkpoint.changed(tmp_path / "changed", config=lambda stated: group(stated).update(x=1))
    with pytest.raises(ValidationError, match=r"weight cannot be dequantized: ValidationError"):
        Reference(checkpoint.target, path)
    streamed = Reference(checkpoint.target, path, streamed=True)
    with pytest.raises(ValidationError, match=r"weight cannot be dequantized: ValidationError"):
        streamed.logits(TEXTS)


def test_a_config_that_states_none_has_none(tiny_checkpoint: Path) -> None:
    assert read_quantization(tiny_checkpoint) is None
