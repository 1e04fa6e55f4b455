"""The bundled quantized checkpoints: made by their script, exported, judged, built, proven and run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qwenport import cli, engines, exporter
from qwenport.contract import E4M3, INT8
from qwenport.exporter import ConfigError
from qwenport.validate import validate

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "quantized"
NAMES = sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").is_file())
MOST_BYTES = 3_000_000
POSITIONS = (
    128  # enough for two sizes of what attention sees of a cache; weights do not depend on it
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/quantized/make.py."""
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("make", None)
    import make  # type: ignore[import-not-found]

    return make


def test_there_is_one_in_each_format(script: Any) -> None:
    assert sorted(script.FORMATS) == NAMES
    formats = {
        storage.format
        for name in NAMES
        for storage in _storages(exporter.open_checkpoint(FOLDER / name).config)
    }
    assert formats == {"awq", "gptq", "pack-quantized", "float-quantized", "fp8"}


def _storages(config: exporter.ModelConfig) -> list[Any]:
    assert config.quantization is not None
    return [group.storage for group in config.quantization.groups]


@pytest.mark.parametrize("name", NAMES)
def test_the_script_makes_it(name: str, script: Any, tmp_path: Path) -> None:
    made = script.make(name, tmp_path / name)
    files = sorted(path.name for path in made.iterdir())
    assert files == sorted(path.name for path in (FOLDER / name).iterdir())
    for file in files:
        assert (made / file).read_bytes() == (FOLDER / name / file).read_bytes(), file
    assert sum((made / file).stat().st_size for file in files) <= MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_parity_holds_from_the_checkpoint_to_an_engine(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = FOLDER / name
    package = exporter.export(checkpoint, tmp_path / "package", max_seq_len=POSITIONS)
    report = validate(package.path, checkpoint, budget="quick")
    assert report.passed, report.failures
    assert (
        cli.main(["build", str(package.path), str(tmp_path / "engine"), "--target", "onnxruntime"])
        == 0
    )
    engine = engines.load_engine(tmp_path / "engine")
    assert engine.activations == {"fp8-blocks": "fp32", "fp8-dynamic": E4M3}.get(name, INT8)
    assert engines.self_test(engine.path).passed
    judged = validate(engine.path, checkpoint, budget="quick")
    assert judged.passed, judged.failures
    capsys.readouterr()
    prompt = ["--prompt", "Once upon a time", "--max-new-tokens", "24", "--temperature", "0"]
    assert cli.main(["generate", str(engine.path), *prompt]) == 0
    assert len(capsys.readouterr().out.split()) >= 10


def test_what_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    for method in ("bitsandbytes", "gguf", "modelopt", "hqq"):
        raw = exporter.read_config_json(FOLDER / "awq")
        with pytest.raises(ConfigError, match=method):
            exporter.parse_config(raw | {"quantization_config": {"quant_method": method}})
