"""Mistakes in repacking quantized weights, made in the exporter itself, are found: in the weights and in the logits.

A format adds its checkpoints to CHECKPOINTS and its mistakes to DEFECTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from quantized_words import write_awq, write_gptq
from random_model import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from qwenport.contract import MODEL, no_progress
from qwenport.engines import LoweringError, OnnxRuntimeSession
from qwenport.exporter import (
    export,
    graph,
    load_package,
    open_checkpoint,
    weights,
    written_parts,
)
from qwenport.exporter.quantization import awq, gptq, words
from qwenport.exporter.quantization.storage import Repacked
from qwenport.exporter.quantization.words import halves, packed
from qwenport.exporter.safetensors_file import read_safetensors_header
from qwenport.validate.identity import check_identity
from qwenport.validate.reference import Reference, Text
from qwenport.validate.target import open_target
from qwenport.validate.weights_identity import compare_weights

from . import pack_quantized_defects, test_fp8

TEXT = [5, 199, 7, 42, 280, 3, 250, 11]
LEAST = 1e-4
"""Of the relative distance of logits: a hundred times what rounding gives."""

Patch = pytest.MonkeyPatch
Seed = Callable[[Patch], Any]

_CODES, _ZERO_POINTS = gptq.Gptq.codes, gptq.Gptq.zero_points
_PERMUTATION, _GRAPH_INVERSE = weights._permutation, graph._inverse


def _with_positive_weights(source: Path, target: Path) -> Path:
    """A copy in which one matrix has no negative number: its zero points are 0."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].abs_()
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors")
    return target


def _gptq(**how: Any) -> Callable[[Path, Path], Path]:
    def write(source: Path, target: Path) -> Path:
        positive = _with_positive_weights(source, target.with_name("source"))
        return write_gptq(positive, target, **how)

    return write


MIXTURE = "gptq, act-order, mixture"


def _mixture(target: Path) -> Path:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    source = make_checkpoint(
        target.with_name("source"), family=Qwen3MoeConfig, dtype=torch.float16, **sizes
    )
    return write_gptq(source, target, act_order=True)


CHECKPOINTS: dict[str, Callable[[Path, Path], Path]] = {
    "awq": write_awq,
    "gptq": _gptq(),
    "gptq, asymmetric": _gptq(symmetric=False),
    "gptq, v2, asymmetric": _gptq(symmetric=False, version=2),
    "gptq, 8 bits, asymmetric": _gptq(symmetric=False, bits=8),
    "gptq, act-order": _gptq(act_order=True),
    MIXTURE: lambda source, target: _mixture(target),
    **pack_quantized_defects.CHECKPOINTS,
}
"""name -> (source, target) -> a quantized checkpoint."""


def _set(owner: Any, name: str, value: Any) -> Seed:
    return lambda patch: patch.setattr(owner, name, value)


def _after(owner: Any, name: str, change: Callable[[Any], Any]) -> Seed:
    """The method's result, changed."""
    right = getattr(owner, name)
    return _set(owner, name, lambda *args: change(right(*args)))


def _numbers(data: bytes, bits: int = 4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    octets = np.frombuffer(data, np.uint8)[None]
    return (halves(octets) if bits == 4 else octets)[0]


def _added(amount: int, bits: int = 4) -> Callable[[bytes], bytes]:
    """An amount is added to each code."""
    most = (1 << bits) - 1
    return lambda data: packed(
        (_numbers(data, bits) + np.uint8(amount % 256)) & np.uint8(most), bits
    )


def _halves_swapped(data: bytes) -> bytes:
    return packed(_numbers(data).reshape(-1, 2)[:, ::-1], 4)


def _neighbouring_scales(by: int) -> Callable[[bytes, tuple[int, ...]], bytes]:
    """Each scale is the one of the next group (1), or of the same group of the next row (0)."""
    right = words.transposed_scales

    def wrong(data: bytes, shape: tuple[int, ...]) -> bytes:
        return np.roll(np.frombuffer(right(data, shape), np.uint16).reshape(shape), 1, by).tobytes()

    return wrong


def _whole_words_added(self: gptq.Gptq, data: bytes, shape: tuple[int, ...]) -> bytes:
    """One is added to the words as numbers, so that a code of 15 carries into its neighbour."""
    words = np.frombuffer(data, "<u4") + np.uint32(0x11111111)
    return _ZERO_POINTS(replace(self, format=gptq.V2), words.tobytes(), shape)


def _not_transposed(self: gptq.Gptq, data: bytes, shape: tuple[int, ...]) -> bytes:
    return _added(1)(packed(_numbers(data), 4))


def _without_a_permutation(*args: Any) -> None:
    return None


def _inverse(part: Repacked | None) -> Repacked | None:
    if part is None:
        return None
    columns = np.argsort(np.frombuffer(part.repack(()), np.int64)).astype(np.int64).tobytes()
    return replace(part, repack=lambda read: columns)


def _of_the_next_expert(
    checkpoint: Any, storage: Any, linear: str, shape: tuple[int, int]
) -> Repacked | None:
    parts = linear.split(".")
    if "experts" in parts:
        number = parts.index("experts") + 1
        parts[number] = str((int(parts[number]) + 1) % checkpoint.config.moe.num_experts)
    return _PERMUTATION(checkpoint, storage, ".".join(parts), shape)


def _largest_first(builder: Any, permutation: Any) -> Any:
    inverse = _GRAPH_INVERSE(builder, permutation)
    inverse.producer().attributes["largest"] = ir.AttrInt64("largest", 1)
    return inverse


def _one_permutation_per_size(parts: dict[str, Any]) -> dict[str, str]:
    first: dict[Any, str] = {}
    names = [name for name in parts if name.endswith(".permutation")]
    found = {name: first.setdefault(parts[name].shape, name) for name in names}
    return {name: known for name, known in found.items() if name != known}


def _unsorted_codes(self: gptq.Gptq, read: Sequence[bytes], shape: tuple[int, ...]) -> bytes:
    return _CODES(replace(self, act_order=False), read, shape)


def _both(*seeds: Seed) -> Seed:
    return lambda patch: [seed(patch) for seed in seeds]


_REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)

DEFECTS: dict[str, tuple[str, Seed]] = {
    "awq: columns as they come": ("awq", _set(awq, "ORDER", tuple(range(8)))),
    "awq: the order's inverse": ("awq", _set(awq, "ORDER", _REVERSE)),
    "awq: one code of a byte for the other": ("awq", _after(awq.Awq, "codes", _halves_swapped)),
    "awq: zero points less one": ("awq", _after(awq.Awq, "zero_points", _added(-1))),
    "awq: zero points one more": ("awq", _after(awq.Awq, "zero_points", _added(1))),
    "awq: scales not transposed": (
        "awq",
        _set(words, "transposed_scales", lambda data, shape: data),
    ),
    "awq: the next group's scales": (
        "awq",
        _set(words, "transposed_scales", _neighbouring_scales(1)),
    ),
    "awq: all zero points 8": (
        "awq",
        _after(awq.Awq, "zero_points", lambda data: b"\x88" * len(data)),
    ),
    "gptq: zero points of v1 as stored": (
        "gptq, asymmetric",
        _after(gptq.Gptq, "zero_points", _added(-1)),
    ),
    "gptq: zero points of v2 as if v1": (
        "gptq, v2, asymmetric",
        _after(gptq.Gptq, "zero_points", _added(1)),
    ),
    "gptq: one added to whole words": (
        "gptq, asymmetric",
        _set(gptq.Gptq, "zero_points", _whole_words_added),
    ),
    "gptq: zero points not transposed": (
        "gptq, asymmetric",
        _set(gptq.Gptq, "zero_points", _not_transposed),
    ),
    "gptq: one code of a byte for the other": (
        "gptq",
        _after(gptq.Gptq, "codes", _halves_swapped),
    ),
    "gptq: the next row's scales": (
        "gptq",
        _set(words, "transposed_scales", _neighbouring_scales(0)),
    ),
    "gptq: the middle is 7": (
        "gptq",
        lambda patch: patch.setitem(written_parts._MIDDLES, "U4", 0x77),
    ),
    "gptq: words not transposed": (
        "gptq",
        _set(gptq.Gptq, "codes", lambda self, read, shape: bytes(read[0])),
    ),
    "gptq, 8 bits: zero points as stored": (
        "gptq, 8 bits, asymmetric",
        _after(gptq.Gptq, "zero_points", _added(-1, 8)),
    ),
    "gptq, 8 bits: bytes of a word from the top": (
        "gptq, 8 bits, asymmetric",
        _after(
            gptq.Gptq,
            "codes",
            lambda data: np.frombuffer(data, "<u4").byteswap().tobytes(),
        ),
    ),
    "act-order: g_idx not read": (
        "gptq, act-order",
        _both(
            _set(gptq.Gptq, "codes", _unsorted_codes),
            _set(weights, "_permutation", _without_a_permutation),
        ),
    ),
    "act-order: codes sorted, inputs not gathered": (
        "gptq, act-order",
        _set(weights, "_permutation", _without_a_permutation),
    ),
    "act-order: inputs gathered, codes not sorted": (
        "gptq, act-order",
        _set(gptq.Gptq, "codes", _unsorted_codes),
    ),
    "act-order: the permutation's inverse": (
        "gptq, act-order",
        _after(weights, "_permutation", _inverse),
    ),
    "act-order: one permutation for every input of a size": (
        "gptq, act-order",
        _set(written_parts, "_same_permutations", _one_permutation_per_size),
    ),
    "experts: codes sorted, columns not put back": (
        MIXTURE,
        _set(weights, "_permutation", _without_a_permutation),
    ),
    "experts: columns put back, codes not sorted": (
        MIXTURE,
        _set(gptq.Gptq, "codes", _unsorted_codes),
    ),
    "experts: the permutation's inverse": (MIXTURE, _after(weights, "_permutation", _inverse)),
    "experts: the next expert's permutation": (
        MIXTURE,
        _set(weights, "_permutation", _of_the_next_expert),
    ),
    "experts: the permutation for its inverse, in the graph": (
        MIXTURE,
        _set(graph, "_inverse", lambda builder, permutation: permutation),
    ),
    "experts: the order that sorts it downwards": (
        MIXTURE,
        _set(graph, "_inverse", _largest_first),
    ),
    **pack_quantized_defects.DEFECTS,
}
"""name -> (a checkpoint, what is changed in the exporter)."""


_WANTED: dict[Path, Any] = {}
"""Checkpoint -> transformers' logits."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small checkpoint, quantized."""
    made: dict[str, Path] = {}
    source = make_checkpoint(
        tmp_path_factory.mktemp("small"), dtype=torch.float16, tie_word_embeddings=False
    )

    def make(name: str) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp("quantized") / "checkpoint"
            made[name] = CHECKPOINTS[name](source, target)
        return made[name]

    return make


def _judged(checkpoint: Path, package: Path) -> tuple[bool, float]:
    """(whether the weights pass, the relative distance of the logits: infinite if the graph is refused)."""
    export(checkpoint, package)
    target = open_target(package)
    model = onnx.load(package / MODEL, load_external_data=False)
    compared = compare_weights(model, package, open_checkpoint(checkpoint), no_progress)
    if checkpoint not in _WANTED:
        text = Text.ending(TEXT, len(TEXT))
        (_WANTED[checkpoint],) = Reference(target, checkpoint).logits([text])
    wanted = _WANTED[checkpoint]
    passed = all(check.passed for check in compared.checks)
    try:
        session = OnnxRuntimeSession(load_package(package))
    except LoweringError:
        return passed, math.inf
    (found,) = session.prefill([TEXT], all_logits=True)
    return passed, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_without_a_defect_nothing_is_found(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    passed, distance = _judged(checkpoint(name), tmp_path / "package")
    assert passed and distance < LEAST / 10


def test_columns_that_are_gathered_twice_are_no_permutation(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("gptq, act-order")
    package = export(path, tmp_path / "package").path
    file = package / "weights" / written_parts.FILE
    places = {entry.name: entry for entry in read_safetensors_header(file)[1]}
    name = next(name for name in places if name.endswith(".permutation"))
    with file.open("r+b") as stream:
        stream.seek(places[name].offset)
        first = stream.read(8)
        stream.write(first)
    (weights_row, *_) = check_identity(open_target(package), path).rows
    assert any("is no permutation of" in failure for failure in weights_row.failures)


def test_there_are_enough_mistakes_and_some_of_each_kind_of_checkpoint() -> None:
    assert len(DEFECTS) + len(test_fp8.DEFECTS) >= 25
    assert {made for made, _ in DEFECTS.values()} == CHECKPOINTS.keys()


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_in_the_weights_and_in_the_logits(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    made, seed = DEFECTS[name]
    path = checkpoint(made)
    seed(monkeypatch)
    passed, distance = _judged(path, tmp_path / "package")
    assert not passed
    assert distance > LEAST
