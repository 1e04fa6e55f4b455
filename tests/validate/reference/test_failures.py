"""Whatever transformers, torch or safetensors raise on opening, the user is told in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from qwenport import QwenportError
from qwenport.validate.errors import NetworkError, ValidationError
from qwenport.validate.failures import reported
from qwenport.validate.prompts import make_prompts
from qwenport.validate.reference import Reference
from qwenport.wording import cut, one_line

from .pairs import Pair


class PanicException(BaseException):
    """As pyo3 names what a Rust library's panic becomes; it cannot be imported."""


def _refusal(pair: Pair, path: Path, streamed: bool) -> str:
    with pytest.raises(ValidationError) as caught:
        Reference(pair.target, path, streamed=streamed)
    message = str(caught.value)
    assert len(message) <= 300
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert "qwenport-reference-" not in message  # a folder that only we know
    return message


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# --- config.json


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_dropout": None}, "attention_dropout"),
        ({"initializer_range": 0}, "initializer_range"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"use_cache": None}, "use_cache"),
        ({"layer_types": ["x"]}, "validate_layer_type"),
        ({"model_type": "zzz"}, "zzz"),
        ({"model_type": "z" * 5000}, "zzz"),
        ({"hidden_act": "nope"}, "nope"),
        ({"rope_theta": "a\nb"}, "str"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "q" * 900}}, "str"),
    ],
)
def test_config_that_transformers_refuses_is_quoted(
    changes: dict[str, Any],
    said: str,
    streamed: bool,
    pair_of: Callable[[str], Pair],
    tmp_path: Path,
) -> None:
    pair = pair_of("qwen2 fp32 tied")
    path = tmp_path / "checkpoint"
    shutil.copytree(pair.path, path)
    (path / "config.json").write_text(json.dumps({**pair.case.raw, **changes}))
    message = _refusal(pair, path, streamed)
    assert message.startswith(cut(path / "config.json"))
    assert said in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", "[" * 100_000, '{"a": "\\ud800"}'])
def test_config_that_is_no_config_is_refused(
    text: str, streamed: bool, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("qwen2 fp32 tied")
    path = tmp_path / "checkpoint"
    shutil.copytree(pair.path, path)
    (path / "config.json").write_text(text)
    assert "config.json" in _refusal(pair, path, streamed)
    (path / "config.json").unlink()
    assert "has no config.json" in _refusal(pair, path, streamed)


def test_a_long_path_leaves_room_for_what_is_wrong(
    streamed: bool, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("qwen2 fp32 tied")
    path = tmp_path / ("a" * 200) / ("b\n" * 100)
    shutil.copytree(pair.path, path)
    (path / "config.json").write_text(json.dumps({**pair.case.raw, "use_cache": None}))
    message = _refusal(pair, path, streamed)
    assert "config.json: " in message and "use_cache" in message


# --- weights


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b" " * 15],
)
@pytest.mark.parametrize("name", ["qwen2 fp32 tied", "qwen2 fp16 sharded"])
def test_damaged_weights_are_named(
    name: str, content: bytes, streamed: bool, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(name)
    path = tmp_path / "checkpoint"
    shutil.copytree(pair.path, path)
    file = sorted(path.glob("*.safetensors"))[-1]
    file.write_bytes(content)
    assert file.name in _refusal(pair, path, streamed)
    file.write_bytes((pair.path / file.name).read_bytes()[:-1])  # cut off
    assert file.name in _refusal(pair, path, streamed)
    file.unlink()
    assert file.name in _refusal(pair, path, streamed)
    file.mkdir()
    assert file.name in _refusal(pair, path, streamed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.mlp.up_proj.weight", "missing"),
        ("model.layers.1.mlp.up_proj.weight", "narrow"),
        ("model.norm.weight", "missing"),
        ("model.embed_tokens.weight", "narrow"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_in_the_line(
    name: str, change: str, streamed: bool, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("qwen2 fp32 tied")
    tensors = pair.case.tensors()
    tensors[name] = tensors[name][..., :-1].contiguous()
    if change == "missing":
        del tensors[name]
    path = checkpoints.write_checkpoint(tmp_path / "checkpoint", pair.case.raw, tensors)
    assert name in _refusal(pair, path, streamed)


def test_a_long_tensor_name_is_cut(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of("qwen2 fp32 tied")
    tensors = pair.case.tensors() | {f"model.layers.0.{'x' * 5000}\n": torch.zeros(1)}
    path = checkpoints.write_checkpoint(tmp_path / "checkpoint", pair.case.raw, tensors)
    assert "no place for tensor model.layers.0.xx" in _refusal(pair, path, True)


# --- whatever else is raised


@pytest.mark.parametrize(
    "error",
    [RuntimeError("one\n\ntwo" * 100), AssertionError(), OSError(5, "no"), PanicException("index")],
)
def test_any_error_becomes_one_line(
    error: BaseException,
    streamed: bool,
    pair_of: Callable[[str], Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = pair_of("qwen2 fp32 tied")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    assert type(error).__name__ in _refusal(pair, pair.path, streamed)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("of 3 TB")])
def test_interrupts_and_lack_of_memory_pass(
    error: BaseException,
    streamed: bool,
    pair_of: Callable[[str], Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = pair_of("qwen2 fp32 tied")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        Reference(pair.target, pair.path, streamed=streamed)
    assert caught.value is error


def test_errors_of_our_own_stay_what_they_are() -> None:
    for error in (ValidationError("short"), QwenportError("x" * 900), NetworkError("no")):
        with pytest.raises(QwenportError) as caught, reported("a", "b"):
            raise error
        assert caught.value is error
    with pytest.raises(ValidationError, match=r"^x+ \.\.\. x+$") as caught, reported("a", "b"):
        raise ValidationError("x" * 900)
    assert len(str(caught.value)) == 300
    with pytest.raises(NetworkError, match=r"^x+ \.\.\. x+$"), reported("a", "b"):
        raise NetworkError("x" * 900)  # still one that says something about the target


def test_importing_it_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, qwenport.validate.failures\n"
        "raise SystemExit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@given(st.text(max_size=700), st.integers(20, 300))
def test_one_line_is_one_line_and_keeps_what_fits(text: str, most: int) -> None:
    line = one_line(text, most)
    assert len(line) <= most
    assert len(line.splitlines()) <= 1
    assert all(c.isprintable() for c in line)
    assert one_line(line, most) == line
    if len(text) <= most and all(c.isprintable() for c in text):
        assert line == " ".join(text.split())


# --- tokenizers


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The bundled checkpoint's tokenizer and config, to be damaged."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in tiny_checkpoint.glob("*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0"}', "\x00" * 9, "x" * 5000])
def test_a_tokenizer_that_does_not_load_is_one_line(text: str, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text(text)
    file = checkpoint.parent / ("p" * 200)
    file.write_text("some text")
    with pytest.raises(ValidationError, match="the tokenizer does not take it") as caught:
        make_prompts(checkpoint, 2048, file)
    assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()
    random = make_prompts(checkpoint, 2048)
    assert random.description.startswith("random token ids")
    assert "the tokenizer does not load: " in random.description
    assert "NoneType" not in random.description


def test_prompts_that_cannot_be_read_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    for file in (tmp_path / ("n" * 300), tmp_path / "absent", tmp_path, tmp_path / "latin"):
        with pytest.raises(ValidationError, match="cannot be read") as caught:
            make_prompts(checkpoint, 2048, file)
        assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("file", [None, "prompts"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), PanicException("bug")])
def test_a_tokenizer_s_panic_is_an_error_and_an_interrupt_is_none(
    error: BaseException,
    file: str | None,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Tokenizer.from_file(str(checkpoint / "tokenizer.json"))  # it is whole

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    path = tmp_path / file if file else None
    if path:
        path.write_text("text")
    if not isinstance(error, PanicException):
        with pytest.raises(type(error)):
            make_prompts(checkpoint, 2048, path)
    elif path:
        with pytest.raises(ValidationError, match="PanicException: bug"):
            make_prompts(checkpoint, 2048, path)
    else:
        assert "PanicException" in make_prompts(checkpoint, 2048).description
