"""LoRA adapters beside the weights: merged as peft merges them, or refused. peft writes the adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import mini, random_tensors, tensor_shapes, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwenport.engines import open_session
from qwenport.exporter import CheckpointError, Package, adapter, export, open_checkpoint
from qwenport.validate import ValidationError, validate
from qwenport.validate.reference import adapter as reference

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PACKAGE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def base_model(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' model of the checkpoint alone. With peft installed it would apply what lies beside it."""
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=dtype, attn_implementation="eager"
    )
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model.eval()


def adapt(checkpoint: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    """Have peft write a random adapter beside the weights."""
    torch.manual_seed(7)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **chosen)
    model = get_peft_model(base_model(checkpoint, torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (parameter.data * 0.5).to(dtype)
    model.save_pretrained(checkpoint)
    (checkpoint / "README.md").unlink(missing_ok=True)


def merged_by_peft(checkpoint: Path) -> Any:
    """The model with the adapter in its weights, fp64."""
    model = PeftModel.from_pretrained(base_model(checkpoint), checkpoint).double()
    return model.merge_and_unload()


def tensors_of(package: Package) -> dict[str, torch.Tensor]:
    """The weights as model.onnx refers to them."""
    import onnx

    found = {}
    for tensor in onnx.load(package.model, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place.get("location", "").startswith("weights/"):
            continue
        data = (package.path / place["location"]).read_bytes()
        begin, length = int(place["offset"]), int(place["length"])
        dtype = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}[tensor.data_type]
        values = torch.frombuffer(bytearray(data[begin : begin + length]), dtype=dtype)
        found[tensor.name] = values.view(*tensor.dims)
    return found


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of a family, with peft's adapter beside the weights."""

    def make(family: str = "llama", **settings: Any) -> Path:
        raw = mini(family, torch_dtype="bfloat16")
        tensors = random_tensors(tensor_shapes(raw), torch.bfloat16)
        checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
        adapt(checkpoint, **settings)
        return checkpoint

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16, "r": 1, "lora_alpha": 16},
        {"target_modules": r".*\.(k|o|gate)_proj"},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
    ],
    ids=["list", "bf16", "pattern", "all linear"],
)
@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
def test_every_merged_weight_is_peft_s_rounded_once(
    family: str,
    settings: dict[str, Any],
    dtype: str | None,
    made: Callable[..., Path],
    tmp_path: Path,
) -> None:
    checkpoint = made(family, **settings)
    package = export(checkpoint, tmp_path / "package", dtype=dtype, adapter="merge")
    right = merged_by_peft(checkpoint).state_dict()
    before = load_file(checkpoint / "model.safetensors")
    found = tensors_of(package)
    assert found.keys() == before.keys()
    changed = 0
    for name, values in found.items():
        assert torch.equal(values, right[name].to(PACKAGE_DTYPES[dtype or "bf16"])), name
        changed += not torch.equal(right[name], before[name].double())
    assert changed == package.manifest["source"]["adapter"]["matrices"] > 0


def test_logits_are_those_of_the_model_with_the_adapter_in_place(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made()
    package = export(checkpoint, tmp_path / "package", dtype="fp32", adapter="merge")
    model = PeftModel.from_pretrained(base_model(checkpoint), checkpoint).double()
    right = model(torch.tensor([TOKENS])).logits[0].detach().numpy()
    (logits,) = open_session(package.path).prefill([TOKENS], all_logits=True)
    assert np.linalg.norm(logits - right) <= 1e-5 * np.linalg.norm(right)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        pytest.param({"streamed": True}, marks=pytest.mark.slow),
        pytest.param({"judged_as": "tensorrt-network"}, marks=pytest.mark.slow),
    ],
)
def test_validate_judges_the_merged_model(
    mode: dict[str, Any], made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made("qwen2")
    export(checkpoint, tmp_path / "package", adapter="merge")
    report = validate(tmp_path / "package", checkpoint, budget="quick", **mode)
    assert report.passed, report.failures


@pytest.mark.parametrize("installed", [True, False])
def test_a_merge_that_is_not_peft_s_fails_whether_peft_is_installed_or_not(
    installed: bool, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made()
    if not installed:
        monkeypatch.setattr(reference, "_peft_settings", lambda path: None)
    right = export(checkpoint, tmp_path / "right", adapter="merge")
    report = validate(right.path, checkpoint, budget="quick")
    assert report.passed and ("peft" in report.environment)
    monkeypatch.setattr(adapter, "_rank_and_scale", lambda config: (config["r"], 1.0))
    wrong = export(checkpoint, tmp_path / "wrong", adapter="merge")
    assert not validate(wrong.path, checkpoint, budget="quick").passed


def test_what_peft_adds_and_what_is_computed_without_it_are_the_same(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made()
    with_peft = reference.MergedAdapter(checkpoint)
    monkeypatch.setattr(reference, "_peft_settings", lambda path: None)
    without = reference.MergedAdapter(checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    ours, theirs = without.added(name, 3, 9), with_peft.added(name, 3, 9)
    assert ours is not None and theirs is not None and ours.shape[0] == 6
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-18)
    assert with_peft.added("model.norm.weight", 0, 1) is None


def test_validate_refuses_another_adapter_than_the_package_has(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made()
    export(checkpoint, tmp_path / "package", adapter="merge")
    adapt(checkpoint, lora_alpha=7)
    with pytest.raises(ValidationError, match="another adapter"):
        validate(tmp_path / "package", checkpoint, budget="quick")


def test_a_package_without_the_adapter_is_judged_without_it(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made()
    export(checkpoint, tmp_path / "package", adapter="ignore")
    assert validate(tmp_path / "package", checkpoint, budget="quick").passed


@pytest.mark.parametrize("mode", ["link", "pack"])
def test_single_experts_are_merged_one_by_one(mode: str, tmp_path: Path) -> None:
    """As releases of transformers before 5 had them; peft of today does not write such an adapter."""
    raw = mini("qwen3_moe", torch_dtype="bfloat16")
    tensors = random_tensors(tensor_shapes(raw), torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    generator = torch.Generator().manual_seed(3)
    lora, merged = {}, dict(tensors)
    for name, values in tensors.items():
        if name.endswith("up_proj.weight"):
            rows, columns = values.shape
            a = torch.randn(2, columns, generator=generator) * 0.2
            b = torch.randn(rows, 2, generator=generator) * 0.2
            module = f"base_model.model.{name.removesuffix('.weight')}"
            lora |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            merged[name] = (values.double() + 4 / 2 * b.double() @ a.double()).bfloat16()
    assert lora
    right = export(
        write_checkpoint(tmp_path / "right", raw, merged), tmp_path / "theirs", weights=mode
    )
    save_file(lora, checkpoint / WEIGHTS)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (checkpoint / CONFIG).write_text(json.dumps(said))
    package = export(checkpoint, tmp_path / "package", weights=mode, adapter="merge")
    wanted = tensors_of(right)
    for name, values in tensors_of(package).items():
        assert torch.equal(values, wanted[name]), name
    for streamed in (False, True):
        report = validate(tmp_path / "package", checkpoint, budget="quick", streamed=streamed)
        assert report.passed, report.failures


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora|lora_magnitude"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_more_than_a_product_is_refused(
    settings: dict[str, Any], said: str, made: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(made(**settings), merged=True)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        config = json.loads((checkpoint / CONFIG).read_text())
        config |= changes
        (checkpoint / CONFIG).write_text(
            json.dumps({k: v for k, v in config.items() if v is not ...})
        )

    return change


def change_tensor(end: str, act: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    def change(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / WEIGHTS)
        name = next(name for name in tensors if name.endswith(end))
        values = act(tensors.pop(name))
        if values is not None:
            tensors[name] = values.contiguous()
        save_file(tensors, checkpoint / WEIGHTS)

    return change


def rename(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    save_file(
        {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()}, checkpoint / WEIGHTS
    )


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_text(content) and None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_config(peft_type="IA3"), "peft_type 'IA3'"),
        (change_config(r=8), "has shape .*; r = 8"),
        (change_config(r=0), "r 0"),
        (change_config(r=True), "r true"),
        (change_config(lora_alpha="16"), "lora_alpha '16'"),
        (change_config(lora_alpha=float("inf")), "lora_alpha inf"),
        (change_config(lora_alpha=10**400), "a number of too many digits"),
        (change_config(target_modules="(" * 5000 + ")" * 5000), "target_modules"),
        (change_config(target_modules="(([a-z._0-9]+)+)+!"), "target_modules"),
        (change_config(target_modules=["q_proj"]), "down_proj, which target_modules does not name"),
        (
            change_config(target_modules=["q_proj", "down_proj", "k_proj"]),
            r"names model\.layers\.0\.self_attn\.k_proj",
        ),
        (change_config(target_modules="("), "target_modules"),
        (change_config(target_modules=[3, "q_proj"]), "down_proj, which target_modules"),
        (change_config(target_modules=None), "target_modules None"),
        (change_config(target_modules=...), "no target_modules"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (change_config(some_new_method={"a": 1}), "some_new_method"),
        (change_tensor("lora_A.weight", lambda t: t * float("nan")), "NaN or infinity"),
        (change_tensor("lora_B.weight", lambda t: t[:-1]), "has shape"),
        (change_tensor("lora_B.weight", lambda t: None), "no lora_B"),
        (rename, r"layers\.7\.\S+, which the checkpoint has no matrix for"),
        (text(CONFIG, "{"), "not the settings"),
        (text(CONFIG, "[1]"), "not the settings"),
        (text(CONFIG, "[" * 100_000), "not the settings"),
        (text(WEIGHTS, "no tensors"), "not a safetensors file"),
        (lambda checkpoint: (checkpoint / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda checkpoint: (checkpoint / CONFIG).unlink(), f"no {CONFIG}"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    change: Callable[[Path], None], said: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = made()
    change(checkpoint)
    with pytest.raises(CheckpointError, match=said):
        export(checkpoint, tmp_path / "package", adapter="merge")
    assert not (tmp_path / "package").exists()


def test_a_head_that_repeats_the_embedding_has_no_adapter_of_its_own(tmp_path: Path) -> None:
    raw = mini("qwen2", torch_dtype="bfloat16")
    tensors = random_tensors(tensor_shapes(raw), torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    adapt(checkpoint, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match="lm_head"):
        export(checkpoint, tmp_path / "package", adapter="merge")
