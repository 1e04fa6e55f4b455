"""FP8 on TensorRT: blocks are plain weights in a package, everything else is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, refused
from fine_grained_fp8 import write_fine_grained_fp8
from float_quantized import write_float_quantized

from qwenport import engines
from qwenport.engines import BuildError
from qwenport.engines.targets import code_types
from qwenport.exporter import Package, export

DENSE = Path(__file__).parents[2] / "examples" / "tiny-qwen2.5"
SM = "sm89"
SCHEMES: dict[str, dict[str, Any]] = {
    "rows": {},
    "one scale": {"by_row": False},
    "static": {"activations": "static"},
    "dynamic": {"activations": "dynamic"},
}


@pytest.fixture(scope="module", params=SCHEMES)
def package(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("float8")
    checkpoint = write_float_quantized(DENSE, folder / "checkpoint", **SCHEMES[request.param])
    return export(checkpoint, folder / "package")


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_fp8_is_refused_before_anything_is_written(
    package: Package, tmp_path: Path, target: str
) -> None:
    with pytest.raises(BuildError, match=r"FP8 with a scale per row .*--target onnxruntime runs"):
        engines.build(package.path, tmp_path / "engine", target=target)
    assert not list(tmp_path.iterdir())


def test_its_network_is_not_judged_either(
    package: Package, tmp_path: Path, capsys: Capture
) -> None:
    words = refused(
        capsys, "validate", package.path, "--reference", DENSE, "--as", "tensorrt-network"
    )
    assert "FP8 with a scale per row" in words


def test_an_engine_of_fp8_blocks_is_that_of_plain_weights(tmp_path: Path) -> None:
    checkpoint = write_fine_grained_fp8(DENSE, tmp_path / "checkpoint")
    package = export(checkpoint, tmp_path / "package", max_seq_len=64)
    plain = export(DENSE, tmp_path / "plain", max_seq_len=64)
    assert code_types(package.config.quantization) == ()
    made, wanted = (
        engines.build(p.path, tmp_path / f"{p.path.name}.engine", target="tensorrt-rtx", gpus=SM)
        for p in (package, plain)
    )
    assert made.manifest["layers"] == wanted.manifest["layers"]
