"""Requests that export cannot meet, and manifests that are none."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    edit_header,
)
from packaged import (
    Exported,
    state,
)
from safetensors.torch import load_file

from qwenport.exporter import (
    ExportError,
    PackageError,
    export,
    load_package,
    open_checkpoint,
)

# --- requests that cannot be met


@pytest.mark.parametrize("existing", ["directory", "file", "dangling link"])
def test_an_output_that_exists_is_refused_and_kept(small: Path, out: Path, existing: str) -> None:
    if existing == "directory":
        out.mkdir()
    elif existing == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = state(out.parent)
    with pytest.raises(ExportError, match="package"):
        export(small, out)
    assert state(out.parent) == before


def test_an_output_without_a_parent_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere"):
        export(small, tmp_path / "nowhere" / "package")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "request_",
    [
        {"max_seq_len": 65},
        {"max_seq_len": 0},
        {"max_seq_len": -1},
        {"max_batch": 0},
        {"max_batch": -2},
        {"dtype": "int8"},
        {"dtype": "float16"},
        {"weights": "symlink"},
        {"rope_scaling": "llama3:2"},
    ],
    ids=str,
)
def test_a_request_that_cannot_be_met_leaves_nothing(
    small: Path, out: Path, request_: dict[str, Any]
) -> None:
    from qwenport import QwenportError

    with pytest.raises(QwenportError):
        export(small, out, **request_)
    assert not os.listdir(out.parent)


def test_an_interruption_leaves_nothing(small: Path, out: Path) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = state(small)
    with pytest.raises(KeyboardInterrupt):
        export(small, out, progress=interrupt)
    assert not os.listdir(out.parent)
    assert state(small) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import onnx_ir, torch
from qwenport.exporter import export, exporting
checkpoint, out = map(Path, sys.argv[1:])
die = lambda *arguments, **keywords: os.kill(os.getpid(), signal.SIGKILL)

def export_and_die(stage):
    if stage == "manifest":
        exporting.write_json = die
    elif stage == "rename":
        os.rename = os.replace = Path.rename = Path.replace = die
    keywords = {"progress": die, "dtype": "fp32"} if stage == "convert" else {}
    export(checkpoint, out, **keywords)

for stage in ("convert", "manifest", "rename"):
    child = os.fork()
    if child == 0:
        export_and_die(stage)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(stage, os.WIFSIGNALED(status), os.path.lexists(out))
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_package(small: Path, out: Path) -> None:
    before = state(small)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, small, out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    expected = [f"{stage} True False" for stage in ("convert", "manifest", "rename")]
    assert result.stdout.splitlines() == expected, result.stderr
    assert state(small) == before
    export(small, out)  # what was left beside it is not in the way
    load_package(out)


def other_file_system(path: Path) -> Path | None:
    candidates = [Path("/dev/shm"), Path.home(), Path("/var/tmp")]
    for folder in candidates:
        if os.access(folder, os.W_OK) and folder.stat().st_dev != path.stat().st_dev:
            return folder
    return None


def test_a_link_across_file_systems_is_refused_and_copying_is_proposed(
    small: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_file_system(small)
    with tempfile.TemporaryDirectory(dir=other) as folder:
        target = Path(folder) / "package" if other else out
        if not other:

            def refuse(*arguments: Any, **keywords: Any) -> None:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

            monkeypatch.setattr(os, "link", refuse)
            monkeypatch.setattr(Path, "hardlink_to", refuse)
            monkeypatch.setattr("fcntl.ioctl", refuse)
        with pytest.raises(ExportError, match="--weights copy"):
            export(small, target)
        assert not os.listdir(target.parent)
        export(small, target, weights="copy")
        load_package(target)


# --- the manifest


def test_a_package_opens_as_what_was_exported(llama: Exported) -> None:
    package = load_package(llama.package)
    checkpoint = open_checkpoint(llama.checkpoint)
    assert package.config == checkpoint.config
    assert package.path == llama.package and package.model == llama.package / "model.onnx"
    assert (package.dtype, package.max_batch, package.max_seq_len) == ("fp32", 3, 64)
    assert package.manifest["weights"]["bytes"] == checkpoint.weight_bytes
    assert package.manifest["weights"]["tensors"] == len(checkpoint.tensors)
    config_hash = hashlib.sha256((llama.checkpoint / "config.json").read_bytes()).hexdigest()
    assert package.manifest["source"]["config_sha256"] == config_hash


def test_export_returns_the_package_that_opening_it_gives(small: Path, out: Path) -> None:
    assert export(small, out) == load_package(out)


def test_the_manifest_s_hashes_are_the_files_(exported: Exported) -> None:
    manifest = json.loads((exported.package / "qwenport.json").read_text())
    listed = {"qwenport.json", *manifest["files"], *manifest["weights"]["files"]}
    found = {
        str(p.relative_to(exported.package)) for p in exported.package.rglob("*") if p.is_file()
    }
    assert listed == found
    for name, recorded in manifest["files"].items():
        data = (exported.package / name).read_bytes()
        assert recorded == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_shorter_context_is_recorded_and_tabulated(small: Path, out: Path) -> None:
    package = export(small, out, max_seq_len=17, max_batch=2)
    assert (package.max_seq_len, package.max_batch) == (17, 2)
    assert {len(t) for t in load_file(out / "rope.safetensors").values()} == {17}


def test_a_rope_override_is_in_the_package_s_config_and_tables(small: Path, out: Path) -> None:
    package = export(small, out, rope_scaling="yarn:4")
    assert package.max_seq_len == 4 * 64
    assert load_package(out).config == package.config
    assert package.config.rope.kind == "yarn"
    rope = package.config.rope
    inv_freq, scaling = rope.inverse_frequencies(256), rope.attention_scaling()
    cos = max(load_file(out / "rope.safetensors").values(), key=lambda t: t[0, 0].item())
    torch.testing.assert_close(cos[255], torch.cos(255 * inv_freq) * scaling)


@pytest.fixture
def copied(llama: Exported, tmp_path: Path) -> Path:
    """A package that a test may spoil."""
    return Path(shutil.copytree(llama.package, tmp_path / "package"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def as_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("change", [flip, shorten, lengthen, Path.unlink, as_directory])
@pytest.mark.parametrize("name", ["model.onnx", "rope.safetensors", "config.json"])
def test_a_file_that_was_changed_is_named(
    copied: Path, name: str, change: Callable[[Path], Any]
) -> None:
    change(copied / name)
    with pytest.raises(PackageError, match=name):
        load_package(copied)


@pytest.mark.parametrize("change", [shorten, lengthen, Path.unlink, as_directory])
def test_a_weight_file_of_another_size_is_named(
    copied: Path, change: Callable[[Path], Any]
) -> None:
    file = sorted((copied / "weights").iterdir())[1]
    change(file)
    with pytest.raises(PackageError, match=file.name):
        load_package(copied)


def test_a_weight_file_of_another_header_is_named(copied: Path) -> None:
    file = sorted((copied / "weights").iterdir())[0]

    def exchange(header: dict[str, Any]) -> None:
        pair = [n for n in header if n.endswith(("gate_proj.weight", "up_proj.weight"))][:2]
        first, second = pair if len(pair) == 2 else sorted(header.keys() - {"__metadata__"})[:2]
        header[first], header[second] = header[second], header[first]

    size = file.stat().st_size
    edit_header(file, exchange)
    file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(PackageError, match=file.name):
        load_package(copied)


def rewrite_manifest(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((package / "qwenport.json").read_text())
    change(manifest)
    (package / "qwenport.json").write_text(json.dumps(manifest))


Change = Callable[[dict[str, Any]], Any]


NOT_MANIFESTS: dict[str, Change] = {
    "of an engine": lambda m: m.update(format="qwenport-engine"),
    "of a later version": lambda m: m.update(format_version=m["format_version"] + 1),
    "of version 0": lambda m: m.update(format_version=0),
    "of a version in words": lambda m: m.update(format_version="2"),
    "without format": lambda m: m.pop("format"),
    "without version": lambda m: m.pop("format_version"),
    "without files": lambda m: m.pop("files"),
    "without weights": lambda m: m.pop("weights"),
    "without weight files": lambda m: m["weights"].pop("files"),
    "with a list of files": lambda m: m.update(files=[]),
    "with a file's facts empty": lambda m: m["files"].update({"config.json": {}}),
    "with a file's facts null": lambda m: m["files"].update({"config.json": None}),
    "with unknown rope scaling": lambda m: m.update(rope_scaling="mystery:4"),
    "with a number for rope scaling": lambda m: m.update(rope_scaling=4),
}


@pytest.mark.parametrize("name", NOT_MANIFESTS)
def test_a_manifest_that_is_not_one_is_a_package_error(copied: Path, name: str) -> None:
    rewrite_manifest(copied, NOT_MANIFESTS[name])
    with pytest.raises(PackageError):
        load_package(copied)


OTHER_MODELS: dict[str, Change] = {
    "no model": lambda m: m.pop("model"),
    "another head_dim": lambda m: m["model"].update(head_dim=2),
    "no head_dim": lambda m: m["model"].pop("head_dim"),
    "another theta": lambda m: m["model"]["rope"].update(theta=10000.0),
    "another rope scaling": lambda m: m.update(rope_scaling="yarn:4"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_manifest_whose_model_is_not_the_config_s_is_refused(copied: Path, name: str) -> None:
    rewrite_manifest(copied, OTHER_MODELS[name])
    with pytest.raises(PackageError):
        load_package(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_is_a_package_error(copied: Path, content: bytes) -> None:
    (copied / "qwenport.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"qwenport\.json|package"):
        load_package(copied)


def test_a_directory_that_is_no_package_is_a_package_error(small: Path, tmp_path: Path) -> None:
    for path in (small, tmp_path / "nowhere", small / "config.json"):
        with pytest.raises(PackageError, match=path.name):
            load_package(path)


def test_a_checkpoint_edited_in_place_shows_in_a_linked_package(small: Path, out: Path) -> None:
    export(small, out)
    if not os.path.samefile(small / "model.safetensors", out / "weights" / "model.safetensors"):
        load_package(out)  # a reflink: a copy on write
        return
    with open(small / "model.safetensors", "r+b") as opened:
        opened.seek(20)
        opened.write(b"#")
    with pytest.raises(PackageError, match=r"model\.safetensors"):
        load_package(out)
