"""What quantization cost: figures of our own against torch's, on logits that transformers computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized import write_pack_quantized
from quantized_words import write_gptq
from torch.nn import functional
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qwenport import cli, exporter
from qwenport.validate import ValidationError, validate
from qwenport.validate.constant_shift import constant_shift
from qwenport.validate.prompts import make_prompts

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE = EXAMPLES / "tiny-qwen2.5"
BUNDLED = sorted(file.parent.name for file in EXAMPLES.glob("quantized/*/config.json"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantized checkpoint, and its package."""
    folder = tmp_path_factory.mktemp("quantized")
    checkpoint = write_pack_quantized(DENSE, folder / "checkpoint", group=32)
    return checkpoint, exporter.export(checkpoint, folder / "package").path


def test_the_figures_are_those_of_torch(quantized: tuple[Path, Path]) -> None:
    checkpoint, package = quantized
    report = validate(package, checkpoint, original=DENSE, budget="quick")
    cost = report.cost
    assert report.passed and cost is not None and cost.tokens == 256
    ids = torch.tensor([make_prompts(checkpoint, 2048).take(cost.tokens)])
    logits = []
    for path, how in (
        (DENSE, {}),
        (checkpoint, {"quantization_config": CompressedTensorsConfig(dequantize=True)}),
    ):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **how)
        with torch.inference_mode():
            logits.append(model.float()(ids).logits[0].double())
    before, after = (functional.log_softmax(each, dim=1) for each in logits)
    kl = functional.kl_div(after, before, reduction="batchmean", log_target=True)
    assert cost.kl_mean == pytest.approx(float(kl), rel=1e-3)
    same = (before.argmax(1) == after.argmax(1)).double().mean()
    assert cost.same_top1 == pytest.approx(float(same), abs=1 / 256)
    for found, right in ((cost.original_perplexity, before), (cost.perplexity, after)):
        nll = functional.nll_loss(right[:-1], ids[0, 1:])
        assert found == pytest.approx(float(nll.exp()), rel=1e-3)
    assert report.to_json()["cost"]["original"] == str(DENSE)


def test_an_original_compared_with_itself_costs_nothing(
    quantized: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, package = quantized
    options = ["--reference", str(checkpoint), "--original", str(checkpoint), "--budget", "quick"]
    assert cli.main(["validate", str(package), *options, "--layers", "1"]) == 0
    said = capsys.readouterr().out
    assert f"against {checkpoint}, on 256 tokens: mean KL 0, the same most likely" in said
    assert "in 100.0%" in said


def test_another_model_is_no_original(quantized: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, package = quantized
    other = tmp_path / "other"
    shutil.copytree(DENSE, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValidationError, match="differs in rms_norm_eps"):
        validate(package, checkpoint, original=other)
    with pytest.raises(exporter.ConfigError):
        validate(package, checkpoint, original=tmp_path)
    plain = exporter.export(DENSE, tmp_path / "plain")
    with pytest.raises(ValidationError, match="nothing is quantized"):
        validate(plain.path, DENSE, original=DENSE)


@pytest.mark.parametrize(("written", "read"), [(1, 2), (2, 1)])
def test_zero_points_that_are_read_as_the_other_version_s_are_suspected(
    written: int, read: int, tmp_path: Path
) -> None:
    checkpoint = write_gptq(DENSE, tmp_path / "right", symmetric=False, version=written)
    original = exporter.open_checkpoint(DENSE)
    assert constant_shift(exporter.open_checkpoint(checkpoint), original) is None
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = ("gptq", "gptq_v2")[read - 1]
    (checkpoint / "config.json").write_text(json.dumps(config))
    said = constant_shift(exporter.open_checkpoint(checkpoint), original)
    assert said is not None
    assert "q_proj.weight is moved to one side" in said and "gptq_v2" in said


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_are_not_moved(name: str) -> None:
    checkpoint = exporter.open_checkpoint(EXAMPLES / "quantized" / name)
    source = "tiny-qwen2-moe" if checkpoint.config.moe else "tiny-qwen2.5"
    assert constant_shift(checkpoint, exporter.open_checkpoint(EXAMPLES / source)) is None
