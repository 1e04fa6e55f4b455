"""Every command and every Python example of the documentation runs, and the manifests' keys are those on their page."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenport.cli import main
from qwenport.engines import build
from qwenport.exporter import SOURCE, DualChunk, Rope, export, make_recipe
from qwenport.exporter.quantization import Storage

ROOT = Path(__file__).parents[1]
OUTSIDE = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
PAGES = sorted([*OUTSIDE, *(ROOT / "docs").rglob("*.md")])
MANIFESTS = ROOT / "docs" / "reference" / "manifests.md"
LONG = ("validate.md", "moe.md")  # several validations
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def examples(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def test_there_is_something_to_run():
    kinds = {kind for page in PAGES for kind, _ in examples(page)}
    assert kinds == {"console", "python"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.relative_to(ROOT).as_posix(),
            marks=[pytest.mark.slow] if page.name in LONG else [],
        )
        for page in PAGES
        if examples(page)
    ],
)
def test_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "qwen").symlink_to(ROOT / "examples" / "tiny-qwen2.5")  # the tutorial's checkpoint
    monkeypatch.chdir(tmp_path)
    for kind, text in examples(page):
        if kind == "python":
            exec(compile(text, f"{page.name}, an example", "exec"), {})
            continue
        lines = text.splitlines()
        typed = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
        for line in lines:
            if line.startswith("$ qwenport "):
                command, _, file = line.removeprefix("$ qwenport ").partition(" > ")
                capsys.readouterr()
                code = main(shlex.split(command))
                said = capsys.readouterr()
                assert code == 0, f"{line}\n{said.err}"
                if command.startswith("chat "):
                    shown = [line for line in lines if not line.startswith(("$ ", "> "))]
                    assert said.out.splitlines() == shown
                if file:
                    Path(file).write_text(said.out)
            elif line.startswith("$ "):
                assert line.startswith(("$ make ", "$ git ", "$ pip ", "$ source ")), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def keys_on_the_page(section: str) -> set[str]:
    """The keys in the first column of a section's tables."""
    text = MANIFESTS.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0].split("\n### ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(.*?)`", cell)}


FREE = re.compile(
    r"(?:.*\.)?files|text\.chat\.contents|ops|profiles\[\]|aliases|plugin_layers|source\.converted"
)  # their keys are names


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The path of each value in a manifest, as the page writes it. Shapes and lists of plain values have no items."""
    if isinstance(value, dict):
        if path in ("model.moe", "model.dual_chunk", "source.adapter", "text.chat"):
            yield path  # may be null
        for key, inner in value.items():
            name = "NAME" if FREE.fullmatch(path) else key
            yield from paths(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from paths(inner, f"{path}[]")
    else:
        yield path


def test_the_page_of_manifests_has_every_key_and_no_other(tmp_path: Path):
    """What none of these has comes from the classes of rope kinds and formats and the shape of an adapter's entry."""
    tiny, sparse = ROOT / "examples" / "tiny-qwen2.5", ROOT / "examples" / "tiny-qwen2-moe"
    packages = [
        export(tiny, tmp_path / "dense", rope_scaling="yarn:4"),
        export(sparse, tmp_path / "sparse", dtype="fp32"),
        export(tiny, tmp_path / "quantized", quantize=make_recipe("int4")),
    ]
    on_cpu = build(tmp_path / "quantized", tmp_path / "on-cpu", target="onnxruntime")
    engine = build(
        tmp_path / "sparse",
        tmp_path / "engine",
        target="tensorrt-rtx",
        gpus="sm89",
        max_seq_len=64,
    )
    both = keys_on_the_page("In both")
    of_classes = set()
    for base, place in (
        (Rope, "model.rope."),
        (Storage, "model.quantization.groups[].storage."),
        (DualChunk, "model.dual_chunk."),
    ):
        of_kinds = {
            f"{place}{field.name}"
            for kind in [base, *base.__subclasses__()]
            for field in dataclasses.fields(kind)
        }
        assert {key for key in both if key.startswith(place)} == of_kinds
        of_classes |= of_kinds
    of_adapters = {f"source.adapter.{key}" for key in SOURCE["adapter"].of}

    def check(manifests: list[Any], section: str) -> None:
        named = keys_on_the_page(section)
        found = {path for manifest in manifests for path in paths(manifest)}
        assert found <= named | both
        assert named <= found
        assert both <= found | of_classes | of_adapters

    check(
        [json.loads((package.path / "qwenport.json").read_text()) for package in packages],
        "Packages",
    )
    manifests = []
    for path in (engine.path, on_cpu.path):
        manifest = json.loads((path / "qwenport.json").read_text())
        manifest["source"] = manifest["package"]["source"]
        manifest["package"]["source"] = None  # the page describes it once
        manifest["plugin_layers"] = {"a plugin": 1}  # plugins are compiled elsewhere
        manifests.append(manifest)
    check(manifests, "Engines")
