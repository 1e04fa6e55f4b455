"""The C++ reader takes the manifests that `build` writes, and names what is wrong with any other."""

from __future__ import annotations

import copy
import ctypes as c
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chunked import make_chunked
from hypothesis import given
from hypothesis import strategies as st

from qwenport import engines, exporter
from qwenport.engines import EngineError
from qwenport.engines.tensorrt_session import check_version
from qwenport.exporter import ConfigError, as_dual_chunk

from .runtime import ERRORS, Library
from .toy import toy_manifest


def read(
    library: Library, text: str, *, flavour: str = "", version: str = "", gpu: str = ""
) -> tuple[str, str, list[int]]:
    """The reader's error or "", its text, and the numbers that it read."""
    numbers, message = (c.c_int64 * 7)(), c.create_string_buffer(1024)
    data = text.encode("utf-8", "surrogatepass")
    code = library.c.test_manifest(
        data,
        c.c_size_t(len(data)),
        flavour.encode(),
        version.encode(),
        gpu.encode(),
        numbers,
        message,
    )
    return ERRORS.get(code, ""), message.value.decode(), list(numbers)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_build_writes_is_read(
    library: Library, package_in: Callable[[str], engines.Engine], dtype: str
) -> None:
    engine = package_in(dtype)
    manifest = engine.manifest
    error, text, numbers = read(library, (engine.path / "qwenport.json").read_text())
    assert (error, text) == ("", "")
    model = manifest["model"]
    row = model["num_key_value_heads"] * manifest["max_seq_len"] * model["head_dim"]
    element = {"fp32": 4, "fp16": 2, "bf16": 2}[dtype]
    assert numbers == [
        model["vocab_size"],
        manifest["max_seq_len"],
        manifest["max_batch"],
        manifest["profiles"][-1]["input_ids"]["max"][1],
        2 * model["num_hidden_layers"],
        2 * model["num_hidden_layers"] * row * element,
        engine.plan.stat().st_size,
    ]


def test_an_engine_with_dual_chunk_attention_is_read(library: Library, tmp_path: Path) -> None:
    package = exporter.export(make_chunked(tmp_path / "checkpoint"), tmp_path / "package")
    engine = engines.build(package.path, tmp_path / "engine", target="tensorrt-rtx", gpus="sm89")
    assert len(engine.manifest["profiles"]) == 2 and package.config.scales_by_length
    error, text, numbers = read(library, (engine.path / "qwenport.json").read_text())
    assert (error, text) == ("", "") and numbers[3] == package.max_seq_len


@pytest.fixture(scope="module")
def package_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], engines.Engine]:
    from .builds import ROOT

    def make(dtype: str) -> engines.Engine:
        folder = tmp_path_factory.mktemp(dtype)
        exporter.export(ROOT / "examples" / "tiny-qwen2.5", folder / "package", dtype=dtype)
        return engines.build(
            folder / "package", folder / "engine", target="tensorrt-rtx", gpus="sm86"
        )

    return make


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def changed(document: Any, path: tuple, value: Any) -> Any:
    """A copy with one value replaced, or removed if it is `...`."""
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


CHAT: dict[str, Any] = {
    "start_to_system": "a",
    "system_to_user": "b",
    "start_to_user": "c",
    "user_to_assistant": "d",
    "assistant_to_user": "e",
    "user_to_reply": "f",
    "contents": {
        "system": {"rule": "verbatim", "refused": []},
        "user": {"rule": "strip", "refused": [["starts_with", "g"], ["contains", "h"]]},
        "assistant": {"rule": "after_thinking", "refused": [["ends_with", "i"]]},
    },
}
WITH_CHAT = {"stop_tokens": [3, 96], "chat": CHAT, "no_chat": None}


@given(data=st.data())
@pytest.mark.parametrize("text", [{}, {"text": WITH_CHAT}], ids=["no chat", "chat"])
def test_any_value_that_is_removed_or_of_another_kind_is_named(
    library: Library, text: dict[str, Any], data
) -> None:
    document = json.loads(toy_manifest(library)) | text
    path = data.draw(st.sampled_from(list(places(document))))
    value = data.draw(st.sampled_from([..., None, -1, 1.5, [], {}, "x y"]))
    before = document
    for key in path:
        before = before[key]
    error, text, _ = read(library, json.dumps(changed(document, path, value)))
    any_text = path in ANY_TEXT and not (text and path == ("text", "no_chat"))
    no_items = path[-1] in ("stop_tokens", "refused") and value == []
    if value == before or (any_text and isinstance(value, str)) or no_items:
        assert error == ""
    elif path == ("files", "engine.plan", "bytes") and isinstance(value, int):
        assert error == "bad engine"
    else:
        assert error == "bad engine", (path, value)
        assert text.startswith("here/qwenport.json: ")
        assert "\n" not in text


ANY_TEXT = {
    ("runtime_version",),
    ("gpus", 0),
    ("gpus", 1),
    ("text", "no_chat"),
    *(("text", "chat", name) for name in CHAT),
    ("text", "chat", "contents", "user", "refused", 0, 1),
    ("text", "chat", "contents", "user", "refused", 1, 1),
    ("text", "chat", "contents", "assistant", "refused", 0, 1),
}


ORIGINAL = "original_max_position_embeddings"
CHUNKS = {"chunk_size": 48, "local_size": 16, ORIGINAL: 40}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("format",), "qwenport-package", "holds a qwenport-package"),
        (("format_version",), 2, "format version 2, this runtime reads 6; build the engine again"),
        (("dtype",), "int8", "dtype is not one of bf16 fp16 fp32"),
        (("dtype",), "bf16", "bindings.inputs is not what this runtime feeds"),
        (("flavour",), "other", "flavour is not onnxruntime, tensorrt or tensorrt-rtx"),
        (("flavour",), "onnxruntime", "flavour is not that of these files: no model.onnx"),
        (("quantization",), {"weights": "4 bits"}, "no quantization.activations"),
        (
            ("quantization",),
            {"weights": "4 bits", "activations": "int4"},
            "quantization.activations is not a dtype, int8 or fp8",
        ),
        (("quantization",), {"weights": 4, "activations": "int8"}, "quantization.weights is not"),
        (("gpus",), [], "gpus is not a list of GPU architectures"),
        (("max_seq_len",), 2**31, "max_seq_len is not a positive integer"),
        (("max_seq_len",), 161, "attention is not spans and slots of form masked for this max_seq"),
        (("attention", "form"), "other", "form is not masked, direct, chunked or split"),
        (("attention", "slots"), 192, "attention is not spans and slots of form masked"),
        (("attention", "span_multiple"), 32, "attention is not spans and slots of form masked"),
        (
            ("attention",),
            {"form": "direct", "span_multiple": 64, "slots": 192},
            "attention is not spans and slots of form direct",
        ),
        (
            ("attention",),
            {"form": "chunked", "span_multiple": 64, "slots": 160},
            "attention is not spans and slots of form chunked",
        ),
        (
            ("attention",),
            {"form": "split", "span_multiple": 128, "slots": 128},
            "attention is not spans and slots of form split",
        ),
        (
            ("attention",),
            {"form": "direct", "span_multiple": 192, "slots": 192},
            "profiles is not with one for single tokens over all slots",
        ),
        (
            ("attention",),
            {"form": "direct", "span_multiple": 160, "slots": 160},
            "bindings.outputs is not what this runtime reads",
        ),
        (("profiles",), [], "profiles is not a list of profiles"),
        (("max_batch",), 5, "profiles[0].input_ids.max is not of max_batch rows"),
        (("profiles", 0, "input_ids", "max"), [4, 161], "is not within max_seq_len"),
        (("profiles", 0, "input_ids", "min"), [1, 2], "profiles is not with one for single tokens"),
        (("profiles", 0, "input_ids", "min"), [1, 25], "min is not within its maximum"),
        (("profiles", 0, "key_positions", "max"), [128], "profiles is not with one for single tok"),
        (("profiles", 0, "key_positions", "max"), [161], "max is not within the cache's slots"),
        (("model", "head_dim"), 2**31 - 1, "model is not of a size that any machine has"),
        (("model", "dual_chunk"), CHUNKS, "bindings.inputs is not what this runtime feeds"),
        (("model", "dual_chunk"), [48, 16], "model.dual_chunk is not an object"),
        (("model", "dual_chunk"), {"chunk_size": 48}, "no model.dual_chunk.local_size"),
        (("model", "dual_chunk"), CHUNKS | {"chunk_size": 16}, "chunk_size is not larger than loc"),
        (
            ("model", "dual_chunk"),
            CHUNKS | {"local_size": -1},
            "local_size is not an integer that is n",
        ),
        (("model", "dual_chunk"), CHUNKS | {"chunk_size": 2**22 + 1}, "chunk_size is not a number"),
        (
            ("model", "dual_chunk"),
            CHUNKS | {"critical_size": 3},
            "has the unknown setting critical",
        ),
        (("model", "dual_chunk"), CHUNKS | {ORIGINAL: 0}, f"{ORIGINAL} is not a positive integer"),
        (("model", "dual_chunk"), CHUNKS | {ORIGINAL: 40.5}, f"{ORIGINAL} is not a positive int"),
        (("model", "num_hidden_layers"), 3, "a key and a value for each of 3 layers"),
        (("aliases", "present.0.key"), "past_key_values.0.value", "is not a binding of its own"),
        (("bindings", "inputs", 0, "dtype"), "int32", "is not what this runtime feeds"),
        (("bindings", "inputs", 5, "name"), "input_ids", "is not a name of its own"),
        (("bindings", "outputs", 0, "shape", 2), 98, "is not what this runtime reads"),
        (("files", "engine.plan", "sha256"), "A" * 64, "is not a SHA-256"),
        (("files", "engine.plan", "bytes"), -1, "is not a number of bytes"),
        (("plugins",), ["../evil.so"], "plugins[0] is not a file's name"),
        (("plugins",), ["lib.so"], "no files.lib.so"),
        (("text",), ..., "no text"),
        (("text", "stop_tokens"), [97], "text.stop_tokens[0] is not a token of the vocabulary"),
        (("text", "stop_tokens"), [3, -1], "text.stop_tokens[1] is not a token of the vocabulary"),
        (("text", "no_chat"), None, "text.no_chat is not null if, and only if, there is a chat"),
        (("text", "chat"), CHAT, "text.no_chat is not null if, and only if, there is a chat"),
    ],
)
def test_what_is_wrong_is_said(library: Library, path, value, complaint: str) -> None:
    document = changed(json.loads(toy_manifest(library)), path, value)
    error, text, _ = read(library, json.dumps(document))
    assert error == "bad engine"
    assert complaint in text


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("start_to_system",), None, "system_to_user is not null if, and only if, start_to_system"),
        (("system_to_user",), None, "system_to_user is not null if, and only if, start_to_system"),
        (("user_to_reply",), None, "chat.user_to_reply is not a text"),
        (("contents", "user"), ..., "no text.chat.contents.user"),
        (
            ("contents", "user", "rule"),
            "upper",
            "contents.user.rule is not verbatim, strip, after_thinking, after_thinking_lines or after_thinking_strip",
        ),
        (
            ("contents", "user", "refused"),
            [["is", "a"]],
            "user.refused[0][0] is not starts_with, ends_with or contains",
        ),
        (("contents", "user", "refused", 0), ["contains"], "refused[0] is not a place and a text"),
        (("contents", "user", "refused", 0, 1), 3, "user.refused[0][1] is not a text"),
    ],
)
def test_what_is_wrong_with_a_chat_format_is_said(
    library: Library, path, value, complaint: str
) -> None:
    text = WITH_CHAT | {"chat": changed(CHAT, path, value)}
    error, message, _ = read(
        library, json.dumps(json.loads(toy_manifest(library)) | {"text": text})
    )
    assert error == "bad engine"
    assert complaint in message


def with_chunks(document: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A manifest with these settings of dual chunk attention, and an input for the lengths."""
    document = changed(document, ("model", "dual_chunk"), settings)
    binding = {"name": "request_lengths", "dtype": "int64", "shape": ["batch"]}
    document["bindings"]["inputs"].append(binding)
    return document


def test_dual_chunk_attention_is_read(library: Library) -> None:
    toy = json.loads(toy_manifest(library))
    plain = CHUNKS | {ORIGINAL: None}
    for document in (changed(toy, ("model", "dual_chunk"), plain), with_chunks(toy, CHUNKS)):
        assert read(library, json.dumps(document))[0] == ""
    error, text, _ = read(library, json.dumps(with_chunks(toy, plain)))
    assert error == "bad engine"
    assert "bindings.inputs is not what this runtime feeds" in text


@given(
    st.fixed_dictionaries(
        {
            name: st.none() | st.integers(-1, 50) | st.just(2**22 + 1) | st.just("5")
            for name in CHUNKS
        }
    )
)
def test_settings_of_dual_chunk_attention_are_those_of_python(
    library: Library, settings: dict[str, Any]
) -> None:
    if settings[ORIGINAL] == 0:  # config.json's; in a manifest it is null
        settings[ORIGINAL] = None
    toy = json.loads(toy_manifest(library))
    change = changed if settings[ORIGINAL] is None else lambda d, _, s: with_chunks(d, s)
    error, _, _ = read(library, json.dumps(change(toy, ("model", "dual_chunk"), settings)))
    try:
        as_dual_chunk(settings)
    except ConfigError:
        assert error == "bad engine"
    else:
        assert error == ""


@pytest.fixture(scope="module")
def in_onnxruntime(library: Library) -> dict[str, Any]:
    """The toy network's manifest as one of an onnxruntime engine."""
    document = json.loads(toy_manifest(library))
    for binding in (*document["bindings"]["inputs"], *document["bindings"]["outputs"]):
        binding["shape"] = ["capacity" if size == 160 else size for size in binding["shape"]]
    weights = {"bytes": 20, "header_sha256": "a" * 64}
    return document | {
        "flavour": "onnxruntime",
        "runtime_version": "1.26",
        "gpus": [],
        "files": {"model.onnx": {"bytes": 3, "sha256": "b" * 64}},
        "weights": {"bytes": 20, "files": {"weights.safetensors": weights}},
    }


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ((), None, ""),
        (("runtime_version",), "1.26.1", ""),
        (("runtime_version",), "1", "runtime_version is not a release such as 1.26"),
        (("runtime_version",), "1.x", "runtime_version is not a release such as 1.26"),
        (("runtime_version",), "1.26rc", "runtime_version is not a release such as 1.26"),
        (("gpus",), ["sm90"], "gpus is not empty: onnxruntime's engines are for the CPU"),
        (("dtype",), "fp16", "dtype is not fp32, which onnxruntime's engines compute in"),
        (
            ("attention",),
            {"form": "chunked", "span_multiple": 160, "slots": 160},
            "attention.form is not masked, that of onnxruntime's engines",
        ),
        (("bindings", "inputs", 5, "shape", 2), 160, "is not what this runtime feeds"),
        (("files", "model.onnx"), ..., "flavour is not that of these files: no model.onnx"),
        (("flavour",), "tensorrt", "flavour is not that of these files: no engine.plan"),
        (("weights",), ..., "no weights"),
        (("weights", "files", "weights.safetensors"), ..., "no weights.files.weights.safetensors"),
        (
            ("weights", "files", "weights.safetensors", "header_sha256"),
            "x",
            "header_sha256 is not a SHA-256",
        ),
        (("weights", "files", "weights.safetensors", "bytes"), -1, "is not a number of bytes"),
    ],
)
def test_an_onnxruntime_manifest_is_read(
    library: Library, in_onnxruntime: dict[str, Any], path, value, complaint: str
) -> None:
    document = changed(in_onnxruntime, path, value) if path else in_onnxruntime
    error, text, _ = read(library, json.dumps(document))
    assert error == ("bad engine" if complaint else "")
    assert complaint in text


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": "qwenport-engine"', "\ud800"])
def test_what_is_no_manifest_is_refused(library: Library, text: str) -> None:
    assert read(library, text)[0] == "bad engine"


def test_another_machine_is_told_what_to_do(library: Library) -> None:
    text = toy_manifest(library)  # of tensorrt 10.14.1.48 for sm80 and sm90
    assert read(library, text, flavour="tensorrt", version="10.14.1.48", gpu="sm90")[0] == ""

    error, message, _ = read(library, text, flavour="tensorrt-rtx")
    assert error == "wrong version"
    assert "--target tensorrt-rtx" in message
    assert "-DQWENPORT_TENSORRT=ON" in message

    error, message, _ = read(library, text, gpu="sm120")
    assert error == "wrong gpu"
    assert message == (
        "here: built for sm80, sm90, this GPU is sm120; build again with --gpu sm120"
    )


def test_another_version_is_refused_in_pythons_words(library: Library, engine_of) -> None:
    engine = engine_of("tiny-qwen2.5")
    error, message, _ = read(library, json.dumps(engine.manifest), version="1.2.3.4")
    assert error == "wrong version"
    with pytest.raises(EngineError) as theirs:
        check_version(engine, "1.2.3.4")
    assert message.removeprefix("here") == str(theirs.value).removeprefix(str(engine.path))
