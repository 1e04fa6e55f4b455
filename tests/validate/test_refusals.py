"""What cannot be judged is refused before any work: wrong pairs, no targets, requests without a meaning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, refused
from random_model import make_checkpoint
from safetensors.torch import load_file, save_file

from qwenport.contract import MANIFEST
from qwenport.exporter import PackageError, write_json
from qwenport.validate import ValidationError, open_target, validate

from .bundled import DENSE, WAYS


def test_another_checkpoint_is_refused(dense: Path, tmp_path: Path, capsys: Capture) -> None:
    other = make_checkpoint(tmp_path / "other")
    with pytest.raises(ValidationError, match=r"not made from .*: config.json differs"):
        validate(dense, other)
    assert "config.json differs" in refused(capsys, "validate", dense, "--reference", other)

    renamed = tmp_path / "renamed"
    shutil.copytree(DENSE, renamed)
    file = renamed / "model.safetensors"
    save_file(load_file(file), file, metadata={"other": "header"})
    with pytest.raises(ValidationError, match=r"model.safetensors has another header or size"):
        validate(dense, renamed)


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    refusals = {
        tmp_path / "absent": (PackageError, "no such directory"),
        tmp_path: (PackageError, "neither a package nor an engine"),
        DENSE: (ValidationError, "neither a package nor an engine"),
    }
    for nothing, (error, words) in refusals.items():
        for how in WAYS.values():
            with pytest.raises(error, match=words):
                validate(nothing, DENSE, **how)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"exact": True}, "exact arithmetic .* needs --as tensorrt-network"),
        ({"judged_as": "engine"}, "a package cannot be judged as engine"),
        ({"judged_as": "onnx"}, "a package cannot be judged as onnx"),
        ({"layers": 0}, "layers 0: the model has 1 to 5"),
        ({"layers": 6}, "layers 6: the model has 1 to 5"),
        ({"layers": 2, "streamed": False}, "fewer layers are for streamed validation"),
        ({"streamed": True, "device": "cuda"}, "only what runs on the CPU can be streamed"),
        ({"budget": "endless"}, "budget 'endless' is not one of quick, standard, thorough"),
        ({"thresholds": {"rel_l3": 1.0}}, "rel_l3"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    request_: dict[str, Any], words: str, dense: Path
) -> None:
    with pytest.raises(ValidationError, match=words):
        validate(dense, DENSE, **request_)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exact"], ("exact", "tensorrt-network")),
        (["--as", "package"], ("--as", "tensorrt-network")),
        (["--layers", "0"], ("--layers", "x>=1")),
        (["--layers", "6"], ("layers 6", "1 to 5")),
        (["--prompts", "absent.txt"], ("--prompts", "absent.txt", "does not exist")),
        (["--prompts", "."], ("--prompts", "directory")),
        (["--threshold", "rel_l3=1"], ("rel_l3=1", "rel_l2")),
        (["--threshold", "rel_l2=much"], ("rel_l2", "much", "not a number")),
        (["--threshold", "rel_l2=-1"], ("rel_l2", "-1", "outside")),
        (["--threshold", "rel_l2=inf"], ("rel_l2", "inf", "outside")),
        (["--threshold", "top1=1.1"], ("top1", "1.1", "outside 0..1")),
        (["--budget", "endless"], ("--budget", "endless", "thorough")),
        (["--seed", "-1"], ("--seed", "x>=0")),
        (["--seed", "x"], ("--seed", "x")),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    options: list[str], words: tuple[str, ...], dense: Path, capsys: Capture
) -> None:
    line = refused(capsys, "validate", dense, "--reference", DENSE, *options)
    assert all(word in line for word in words), line


def test_an_engine_is_not_judged_as_a_network(tmp_path: Path, capsys: Capture) -> None:
    """Its manifest alone says that it is one."""
    engine = tmp_path / "engine"
    engine.mkdir()
    write_json(engine / MANIFEST, {"format": "qwenport-engine", "format_version": 2})
    with pytest.raises(ValidationError, match="the network of an engine cannot be read; use --as"):
        open_target(engine, judged_as="tensorrt-network")
    options = ["--reference", DENSE, "--as", "tensorrt-network"]
    assert "the network of an engine cannot be read" in refused(
        capsys, "validate", engine, *options
    )
