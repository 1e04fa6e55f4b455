"""Chat formats against transformers' apply_chat_template, on templates as models have them, and on made-up ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import LEFT_OUT, TAKEN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwenport import engines, exporter
from qwenport.engines import ChatError, ChatFormat, Message, Tokenizer
from qwenport.engines.text.chat_template import CONTENTS, derive_format
from qwenport.engines.text.tokenizer_json import UnrecognisedError

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "examples" / "tiny-qwen2.5"


def directory_with(template: str | None, folder: Path) -> Path:
    """The bundled checkpoint without its weights, with a chat template."""
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUNDLED, folder, ignore=ignored)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    config["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a template -> (its chat format, our tokenizer, transformers')."""
    made: dict[str, tuple[ChatFormat, Tokenizer, Any]] = {}

    def load(name: str) -> tuple[ChatFormat, Tokenizer, Any]:
        if name not in made:
            folder = directory_with(TAKEN[name], tmp_path_factory.mktemp("chat") / "directory")
            theirs = AutoTokenizer.from_pretrained(folder)
            made[name] = ChatFormat.load(folder), Tokenizer(folder), theirs
        return made[name]

    return load


hostile = st.sampled_from(
    [
        *CONTENTS,
        "/",
        "/no_think",
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
        "\x1f",
        "\u2028",
        "\x85",
    ]
)
contents = st.lists(hostile | st.text(max_size=9), max_size=4).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    system = [Message("system", draw(contents))] if draw(st.booleans()) else []
    roles = ["user", "assistant"] * draw(st.integers(0, 5)) + ["user"]
    return system + [Message(role, draw(contents)) for role in roles]


@pytest.mark.parametrize("name", TAKEN)
@settings(max_examples=150)
@given(messages=conversations())
@example(
    [Message("user", ""), Message("assistant", "<think>\na\n</think>\n\nb"), Message("user", "")]
)
@example([Message("user", "<tool_response>a</tool_response>")])
def test_texts_and_ids_are_those_of_transformers(loaded: Any, name: str, messages: Any) -> None:
    form, ours, theirs = loaded(name)
    said = [{"role": message.role, "content": message.content} for message in messages]
    users = [m.content for m in messages if m.role == "user"]
    refused = {
        "qwen3": any(content.startswith("<tool_response>") for content in users),
        "no-system": messages[0].role == "system",
        "commands": any(
            c.strip().startswith("/") or c.strip().endswith("/no_think") for c in users
        ),
    }
    if refused.get(name):
        with pytest.raises(ChatError):
            form.text(messages)
        return
    text = form.text(messages)
    assert text == theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == ids


def test_what_the_templates_do_with_contents_is_found(loaded: Any) -> None:
    rules = {name: {r: c.rule for r, c in loaded(name)[0].contents.items()} for name in TAKEN}
    plain = dict.fromkeys(("system", "user", "assistant"), "verbatim")
    assert rules.pop("qwen3") == {**plain, "assistant": "after_thinking_lines"}
    assert rules.pop("r1") == {**plain, "assistant": "after_thinking"}
    stripped = dict.fromkeys(plain, "strip")
    assert rules.pop("llama-3.1") == rules.pop("thoughtful") == rules.pop("commands") == stripped
    assert all(found == plain for found in rules.values())
    with pytest.raises(ChatError, match=r"the user that starts with '<tool_response>'"):
        loaded("qwen3")[0].text([Message("user", "<tool_response>")])
    with pytest.raises(ChatError, match="takes no system message"):
        loaded("no-system")[0].text([Message("system", ""), Message("user", "")])


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_template_that_does_not_fit_is_left_out_with_the_reason(
    name: str, tmp_path: Path
) -> None:
    template, words = LEFT_OUT[name]
    with pytest.raises(ChatError) as error:
        ChatFormat.load(directory_with(template, tmp_path / "directory"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_template_there_is_no_format(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="there is no chat template"):
        ChatFormat.load(directory_with(None, tmp_path / "directory"))


piece = st.text("[]<|>\n ab:{", max_size=4).map(
    lambda text: "{{ '" + text.replace("\n", "\\n") + "' }}"
)
written = st.sampled_from(
    [
        "m.content",
        "m.content | trim",
        "m.content.strip()",
        "m.content ~ ''",
        "(m.content + ' ') | trim",
        "m.content | replace('a', 'b')",
        "m.content if 'a' in m.content else m.content | trim",
        "m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content",
        "m.content.split('</think>')[0] if '</think>' in m.content else m.content",
    ]
)


@settings(max_examples=150)
@given(st.data(), st.lists(conversations(), min_size=1, max_size=8))
def test_a_made_up_template_is_followed_or_left_out(data: Any, conversations_: Any) -> None:
    """Never a third: a format that writes something else than the template, for a conversation that it takes."""
    parts = ["{% for m in messages %}"]
    for role in ("system", "user", "assistant"):
        before, after = data.draw(piece), data.draw(piece)
        parts.append(
            f"{{% if m.role == '{role}' %}}{before}{{{{ {data.draw(written)} }}}}{after}{{% endif %}}"
        )
    template = "".join([*parts, "{% endfor %}", data.draw(piece)])
    tokenizer = Tokenizer(BUNDLED)
    backend = tokenizer._tokenizer
    backend.settings = replace(backend.settings, chat_template=template)
    try:
        form = derive_format(tokenizer)
    except UnrecognisedError:
        return
    for messages in conversations_:
        try:
            text = form.text(messages)
        except ChatError:
            continue
        said = [{"role": message.role, "content": message.content} for message in messages]
        assert text == tokenizer.render(said)


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ([], "found no message"),
        (["system"], "found 'system'"),
        (["assistant"], "found 'assistant'"),
        (["user", "user"], "in turn"),
        (["user", "system", "user"], "in turn"),
        (["system", "system", "user"], "in turn"),
        (["user", "tool"], "in turn"),
        (["user", "assistant"], "the last message"),
    ],
)
def test_other_orders_of_messages_are_refused(loaded: Any, roles: list[str], words: str) -> None:
    with pytest.raises(ChatError, match=words):
        loaded("smollm2")[0].text([Message(role, "a") for role in roles])


def test_an_engine_says_in_its_manifest_what_python_reads_from_its_files(tmp_path: Path) -> None:
    notes: list[str] = []
    for name, template in (("left out", LEFT_OUT["date"][0]), ("taken", TAKEN["qwen3"])):
        checkpoint = directory_with(template, tmp_path / f"{name}.checkpoint")
        shutil.copy(BUNDLED / "model.safetensors", checkpoint)
        package = exporter.export(checkpoint, tmp_path / f"{name}.package")
        engine = engines.build(
            package.path, tmp_path / name, target="onnxruntime", note=notes.append
        )
        text = engine.manifest["text"]
        assert text["stop_tokens"] == exporter.stop_ids(BUNDLED, 2048)
        if name == "left out":
            assert text["chat"] is None
            assert text["no_chat"] == "the chat template writes the date (strftime_now)"
            assert notes == [
                f"without a chat format, so C++ programs get no Chat: {text['no_chat']}"
            ]
    assert text["chat"] == json.loads(json.dumps(ChatFormat.load(engine.path).as_json()))
    assert text["no_chat"] is None
    assert len(notes) == 1
