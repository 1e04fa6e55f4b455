"""Conversations in C++ are those in Python, in the text and tokens that transformers gives them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TAKEN
from chunked import chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_format import BUNDLED, conversations, directory_with
from transformers import AutoTokenizer

from qwenport import engines, exporter
from qwenport.contract import MANIFEST, ONNXRUNTIME, TOKENIZER
from qwenport.engines import ChatError, ChatFormat, ChatOptions, GenerateOptions, Message
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession
from qwenport.engines.text.tokenizer_file import tokenizer_bytes
from qwenport.engines.text.tokenizer_json import read_tokenizer

from .builds import built_example, run
from .runtime import Engine, Error, Library
from .tokenizer_shapes import toy_with_tokenizer

TURNS = ["Tell me about the moon.", "  And the sea? "]


# The text of conversations


@pytest.fixture(scope="module")
def forms(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Name of a template -> its format in C++ and Python, and transformers' tokenizer."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp("chat")
            checkpoint = directory_with(TAKEN[name], folder / "checkpoint")
            form = ChatFormat.load(checkpoint)
            toy = toy_with_tokenizer(library, folder / "toy", b"")
            manifest = json.loads((toy / MANIFEST).read_text())
            manifest["text"] |= {"chat": form.as_json(), "no_chat": None}
            (toy / MANIFEST).write_text(json.dumps(manifest))
            theirs = AutoTokenizer.from_pretrained(checkpoint)
            made[name] = library.chat_format(toy), form, theirs
        return made[name]

    return make


@pytest.mark.parametrize("name", TAKEN)
@settings(max_examples=100)
@given(messages=conversations())
def test_texts_are_those_of_transformers(forms: Any, name: str, messages: list[Message]) -> None:
    ours, python, theirs = forms(name)
    try:
        python.text(messages)
    except ChatError:
        with pytest.raises(Error) as error:
            ours.text(messages)
        assert error.value.kind == "invalid argument"
        return
    said = [{"role": message.role, "content": message.content} for message in messages]
    expected = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert ours.text(messages) == expected


@given(st.text(st.characters(categories=("Z", "Cc", "Cf", "L")), max_size=6))
def test_white_space_is_python_s(forms: Any, content: str) -> None:
    ours, python, _ = forms("llama-3.1")
    assert ours.text([Message("user", content)]) == python.text([Message("user", content)])


# Stop strings


@pytest.fixture(scope="module")
def scripted(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The toy network with the bundled tokenizer and a chat format."""
    folder = tmp_path_factory.mktemp("scripted")
    toy = toy_with_tokenizer(
        library, folder / "toy", tokenizer_bytes(read_tokenizer(BUNDLED / "tokenizer.json"))
    )
    kept = json.loads((toy / MANIFEST).read_text())["files"]
    manifest = json.loads(library.c.test_toy_manifest(400, 1, 24, 2048))
    manifest["files"] |= {TOKENIZER: kept[TOKENIZER]}
    chat = ChatFormat.load(BUNDLED).as_json()
    manifest["text"] = {"stop_tokens": [2047], "chat": chat, "no_chat": None}
    (toy / MANIFEST).write_text(json.dumps(manifest))
    return library.load(toy)


def ended(text: str, stops: list[str]) -> tuple[str, int | None]:
    """The definition: the string that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        complete = [i for i, stop in enumerate(stops) if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=lambda i: len(stops[i]))
            return text[: end - len(stops[longest])], longest
    return text, None


letters = st.sampled_from("ab é你 \n")


@settings(max_examples=150)
@given(
    text=st.text(letters, max_size=20),
    stops=st.lists(st.text(letters, min_size=1, max_size=4), max_size=3, unique=True),
    data=st.data(),
)
def test_stop_strings_end_a_reply_however_it_is_split(
    scripted: Engine, text: str, stops: list[str], data: Any
) -> None:
    tokenizer = engines.Tokenizer(BUNDLED)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False)]

    def force(logits: Any, drawn: int) -> None:
        logits[:] = float("-inf")
        logits[[*ids, 2047][drawn]] = 0

    chat = scripted.chat(stop_strings=stops, on_logits=force)
    heard: list[str] = []
    reply = chat.send("x", heard.append)
    assert (reply.text, reply.stop_string) == ended(text, stops)
    assert "".join(heard) == reply.text
    assert "" not in heard
    assert reply.reason == "stop"


# The same conversation as in Python


@pytest.fixture(scope="module")
def engine_with_template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a template, or "bundled" -> an onnxruntime engine of the bundled checkpoint with it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("chat")
            checkpoint = BUNDLED
            if name == "chunked":  # dual chunk attention, and keys that scale beyond 70 positions
                checkpoint = chunk(shutil.copytree(BUNDLED, folder / "checkpoint"), 48, 16, 70)
            elif name != "bundled":
                checkpoint = directory_with(TAKEN[name], folder / "checkpoint")
                shutil.copy(BUNDLED / "model.safetensors", checkpoint)
            package = exporter.export(checkpoint, folder / "package", dtype="fp32")
            made[name] = engines.build(package.path, folder / "engine", target=ONNXRUNTIME).path
        return made[name]

    return make


@pytest.fixture(scope="module")
def both(
    release: Path, onnxruntime_library: Path, engine_with_template: Any
) -> Callable[..., tuple[Engine, engines.Engine]]:
    """Name of a template -> its engine, loaded in C++ and in Python."""
    library = Library(release / "runtime" / "libqwenport.so")
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            path = engine_with_template(name)
            ours = library.load(path, onnxruntime=onnxruntime_library, threads=1)
            made[name] = ours, engines.load_engine(path)
        return made[name]

    return make


said = st.sampled_from([*TURNS, "Why?", "", "é 你好\n", "Tell me more. " * 4])


@pytest.mark.parametrize("name", ["bundled", "qwen3", "thoughtful", "chunked"])
@settings(max_examples=12)
@given(
    turns=st.lists(said, min_size=1, max_size=5),
    system=st.sampled_from([None, "Be brief."]),
    stop_strings=st.lists(st.sampled_from(["a", "the", ".", " t", "\n"]), max_size=2),
    drop_oldest=st.booleans(),
    capacity=st.sampled_from([60, 96, 400]),
    generate=st.builds(
        dict,
        max_new_tokens=st.sampled_from([1, 8, 25]),
        temperature=st.sampled_from([0.0, 1.2]),
        seed=st.sampled_from([0, 2**64 - 1]),
    ),
)
def test_replies_are_those_in_python(
    both: Any,
    name: str,
    turns: list[str],
    system: str | None,
    stop_strings: list[str],
    drop_oldest: bool,
    capacity: int,
    generate: dict[str, Any],
) -> None:
    ours, engine = both(name)
    options = ChatOptions(system, GenerateOptions(**generate), stop_strings, drop_oldest)
    session = OnnxRuntimeSession(engine, capacity=capacity, threads=1)
    python = engines.Chat(engine.path, options, session=session)
    chat = ours.chat(
        system=system,
        stop_strings=stop_strings,
        drop_oldest=drop_oldest,
        capacity=capacity,
        **generate,
    )
    for turn in turns:
        theirs, ours_said = list[str](), list[str]()
        expected: Any = None
        refusal = ""
        try:
            expected = python.send(turn, theirs.append)
        except engines.CapacityError as error:
            refusal = str(error)
        if refusal:
            with pytest.raises(Error, match=re.escape(refusal)) as raised:
                chat.send(turn)
            assert raised.value.kind == "capacity"
        else:
            assert chat.send(turn, ours_said.append) == expected
            assert ours_said == theirs
        assert chat.history == python.history


def ids_of(directory: Path, messages: list[Message]) -> list[int]:
    """The ids that transformers gives a conversation, up to where the reply begins."""
    said = [{"role": message.role, "content": message.content} for message in messages]
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    ids: list[int] = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    return ids


def test_a_turn_feeds_only_what_is_new(both: Any) -> None:
    ours, engine = both("bundled")
    chat = ours.chat(max_new_tokens=20)
    held = 0
    for turn in [*TURNS, "Why?"]:
        prompt = ids_of(engine.path, [*chat.history, Message("user", turn)])
        reply = chat.send(turn)
        assert reply.prompt_tokens == len(prompt) - held
        held = len(prompt) + reply.new_tokens - (reply.reason != "stop")


# The example


@pytest.fixture(scope="module")
def example(onnxruntime_library: Path) -> tuple[Path, dict[str, str]]:
    """The program and its environment."""
    environment = {**os.environ, "QWENPORT_ONNXRUNTIME": str(onnxruntime_library)}
    return built_example("chat"), environment


def test_the_example_says_what_a_python_session_says(
    example: tuple[Path, dict[str, str]], both: Any
) -> None:
    """By hand: transformers' ids, a generation, and the text of its tokens, turn by turn."""
    program, environment = example
    _, engine = both("bundled")
    done = run(program, engine.path, env=environment, input="\n".join(TURNS))
    tokenizer, history = engines.Tokenizer(engine.path), list[Message]()
    stops = exporter.stop_ids(engine.path, 2048)
    for number, turn in enumerate(TURNS):
        history.append(Message("user", turn))
        options = GenerateOptions(temperature=0.7, top_p=0.9, seed=number, stop_tokens=stops)
        session = OnnxRuntimeSession(engine)
        (result,) = engines.generate(session, [ids_of(engine.path, history)], options)
        history.append(Message("assistant", tokenizer.decode(result.tokens)))
    assert done.stdout == "".join(f"{message.content}\n" for message in history[1::2])


def test_ctrl_c_ends_a_reply_of_the_example_and_not_the_program(
    example: tuple[Path, dict[str, str]], both: Any
) -> None:
    program, environment = example
    path = both("bundled")[1].path
    whole = run(program, path, env=environment, input=TURNS[0]).stdout
    for _ in range(5):  # a reply may end before the signal comes
        with subprocess.Popen(
            [program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdin and process.stdout
            process.stdin.write(f"{TURNS[0]}\n".encode())
            process.stdin.flush()
            first = os.read(process.stdout.fileno(), 1)
            process.send_signal(signal.SIGINT)
            second, _ = process.communicate(f"{TURNS[1]}\n".encode(), timeout=60)
        assert process.returncode == 0
        replies = (first + second).decode()
        cut = next(i for i, (a, b) in enumerate(zip(whole, replies, strict=False)) if a != b)
        if cut < len(whole) - 1:
            break
    assert replies[cut] == "\n"  # where the first ended, and
    assert len(replies) > cut + 2  # the second was said
    assert replies.endswith("\n")
