"""Conversations on the bundled checkpoint: what is fed is what transformers' chat template writes, once."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import LEFT_OUT, TAKEN
from chunked import chunk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat_format import BUNDLED, directory_with
from transformers import AutoTokenizer

from qwenport import engines, exporter
from qwenport.engines import (
    Cancellation,
    CapacityError,
    Chat,
    ChatError,
    ChatOptions,
    GenerateOptions,
    GenerationError,
    Message,
    generate,
    open_session,
)

CAPACITY = 200
SAID = [
    "Tell me about the sea.",
    "And the moon?",
    "Why?",
    "Who are you?",
    "  two\nlines ",
    "é 你好",
]


class Recorded:
    """A session that notes what it is fed."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.fed: list[int] = []
        self.held: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def __hash__(self) -> int:
        return id(self)

    def prefill(self, tokens: Any, **options: Any) -> Any:
        (row,) = tokens
        self.fed += row
        self.held += row
        return self.session.prefill(tokens, **options)

    def decode(self, tokens: Any) -> Any:
        self.held += tokens
        return self.session.decode(tokens)

    def truncate(self, length: int, row: int = 0) -> None:
        del self.held[length:]
        self.session.truncate(length, row)

    def reset(self) -> None:
        self.held.clear()
        self.session.reset()


@pytest.fixture(scope="module")
def package_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a template -> a package of the bundled checkpoint with it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            template = TAKEN[name] if name in TAKEN else LEFT_OUT[name][0]
            folder = tmp_path_factory.mktemp("chat")
            checkpoint = directory_with(template, folder / "checkpoint")
            shutil.copy(BUNDLED / "model.safetensors", checkpoint)
            made[name] = exporter.export(checkpoint, folder / "package").path
        return made[name]

    return make


@pytest.fixture(scope="module")
def session(package_with: Callable[[str], Path]) -> Any:
    return open_session(package_with("qwen2.5"), capacity=CAPACITY)


@pytest.fixture
def recorded(session: Any) -> Recorded:
    return Recorded(session)


def options(most: int = 24, **others: Any) -> ChatOptions:
    return ChatOptions(generate=GenerateOptions(most), **others)


def ids_of(package: Path, messages: list[Message]) -> list[int]:
    """The ids that transformers gives a conversation, up to where the reply begins."""
    said = [{"role": message.role, "content": message.content} for message in messages]
    tokenizer: Any = AutoTokenizer.from_pretrained(package)
    ids: list[int] = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    return ids


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_turn_continues_what_transformers_writes(
    package_with: Any, recorded: Recorded, name: str, system: str | None
) -> None:
    package = package_with(name)
    if system and name == "no-system":
        with pytest.raises(ChatError, match="takes no system message"):
            Chat(package, options(system=system), session=recorded)
        return
    chat = Chat(package, options(8, system=system), session=recorded)
    before = [Message("system", system)] if system else []
    for said in SAID[:4]:
        messages = [*before, *chat.history, Message("user", said)]
        prompt = ids_of(package, messages)
        recorded.fed.clear()
        reply = chat.send(said)
        assert recorded.held[: len(prompt)] == prompt
        assert reply.prompt_tokens == len(recorded.fed)
        assert chat.history[-2:] == [Message("user", said), Message("assistant", reply.text)]
        stops = exporter.stop_ids(package, 2048)
        alone = open_session(package, capacity=CAPACITY)
        (result,) = generate(alone, [prompt], GenerateOptions(8, stop_tokens=stops))
        tokenizer = engines.Tokenizer(package)
        assert reply.text == tokenizer.decode(result.tokens)
        assert (reply.reason, reply.new_tokens) == (result.reason, len(result.tokens))


def test_a_turn_feeds_its_new_tokens_only(package_with: Any, recorded: Recorded) -> None:
    package = package_with("qwen2.5")
    chat = Chat(package, options(), session=recorded)
    for said in SAID:
        recorded.fed.clear()
        held = list(recorded.held)
        chat.send(said)
        prompt = ids_of(package, [*chat.history[:-2], Message("user", said)])
        assert held + recorded.fed == prompt


def test_a_reply_that_the_template_changes_is_fed_as_the_template_writes_it(
    package_with: Any, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_with("qwen3")
    chat = Chat(package, options(12), session=recorded)
    tokenizer = chat._tokenizer
    thought = tokenizer.encode("<think>\nhm\n</think>\n\nYes.")
    forced = iter([*thought, *exporter.stop_ids(package, 2048)[:1]])

    def force(row: int, logits: Any, tokens: Any) -> None:
        if (token := next(forced, None)) is not None:
            logits[:] = float("-inf")
            logits[token] = 0

    asked = replace(chat._options.generate, max_new_tokens=40, on_logits=force)
    monkeypatch.setattr(chat, "_options", replace(chat._options, generate=asked))
    assert chat.send("Is it?").text == "<think>\nhm\n</think>\n\nYes."
    chat.send("Sure?")
    said = [Message("user", "Is it?"), Message("assistant", "Yes."), Message("user", "Sure?")]
    prompt = ids_of(package, said)
    assert recorded.held[: len(prompt)] == prompt


def stops_inside(reply: str) -> Iterator[str]:
    """Strings of a reply, which begin and end in the middle of tokens."""
    for start in range(2, len(reply) - 5, 7):
        yield reply[start : start + 4]


def test_stop_strings_end_a_reply_and_the_conversation_goes_on(
    package_with: Any, recorded: Recorded
) -> None:
    package = package_with("qwen2.5")
    whole = Chat(package, options(), session=recorded).send(SAID[0]).text
    for stop in stops_inside(whole):
        chat = Chat(package, options(stop_strings=["never there", stop]), session=recorded)
        pieces: list[str] = []
        reply = chat.send(SAID[0], pieces.append)
        assert reply.text == "".join(pieces) == whole[: whole.index(stop)]
        assert (reply.reason, reply.stop_string) == ("stop", 1)
        chat.send(SAID[1])
        prompt = ids_of(package, [*chat.history[:2], Message("user", SAID[1])])
        assert recorded.held[: len(prompt)] == prompt


def test_each_reply_draws_anew_and_a_reset_begins_anew(
    package_with: Any, recorded: Recorded
) -> None:
    package = package_with("qwen2.5")
    drawn = GenerateOptions(12, temperature=1.5, seed=2**64 - 1)
    chat = Chat(package, ChatOptions(generate=drawn), session=recorded)
    first = [chat.send(said).text for said in SAID[:3]]
    chat.reset()
    assert chat.history == []
    assert [chat.send(said).text for said in SAID[:3]] == first
    chat.reset()
    stops = exporter.stop_ids(package, 2048)
    for number, said in enumerate(SAID[:2]):
        prompt = ids_of(package, [*chat.history, Message("user", said)])
        alone = open_session(package, capacity=CAPACITY)
        asked = replace(drawn, seed=(2**64 - 1 + number) % 2**64, stop_tokens=stops)
        (result,) = generate(alone, [prompt], asked)
        assert chat.send(said).text == engines.Tokenizer(package).decode(result.tokens)


def test_a_full_cache_is_an_error_or_forgets_the_oldest_turns(package_with: Any) -> None:
    package = package_with("qwen2.5")
    capacity = 96
    strict = Chat(package, options(30), session=open_session(package, capacity=capacity))
    while len(ids_of(package, [*strict.history, Message("user", "Why?")])) <= capacity:
        strict.send("Why?")
    kept = strict.history
    with pytest.raises(CapacityError, match=r"room for 96: reset the chat, or let it drop"):
        strict.send("Why?")
    assert strict.history == kept

    recorded = Recorded(open_session(package, capacity=capacity))
    chat = Chat(package, options(30, system="Short.", drop_oldest=True), session=recorded)
    dropped = 0
    for said in SAID * 3:
        before = chat.history
        reply = chat.send(said)
        dropped += reply.dropped
        kept = [*before[2 * reply.dropped :], Message("user", said)]
        assert chat.history == [*kept, Message("assistant", reply.text)]
        prompt = ids_of(package, [Message("system", "Short."), *kept])
        assert recorded.held[: len(prompt)] == prompt
        assert len(kept) == 1 or capacity - len(prompt) + 1 >= 30
        if reply.dropped:  # no more than needed
            more = [*before[2 * (reply.dropped - 1) :], Message("user", said)]
            assert capacity - len(ids_of(package, [Message("system", "Short."), *more])) + 1 < 30
    assert dropped > 3
    kept = chat.history
    with pytest.raises(CapacityError, match="the message is too long"):
        chat.send("word " * 100)
    assert chat.history == kept
    assert chat.send("Why?").dropped >= 0


class StopError(Exception):
    pass


def test_a_conversation_that_passes_the_length_from_which_keys_are_scaled_begins_again(
    tmp_path: Path,
) -> None:
    """Each reply is that of a new session, and before that length only new tokens are fed."""
    original = 70
    checkpoint = chunk(shutil.copytree(BUNDLED, tmp_path / "checkpoint"), 48, 16, original)
    package = exporter.export(checkpoint, tmp_path / "package").path
    recorded = Recorded(open_session(package, capacity=CAPACITY))
    chat = Chat(package, options(12), session=recorded)
    stops = exporter.stop_ids(package, 2048)
    all_fed: list[bool] = []

    def fail(piece: str) -> None:
        raise StopError

    for said in [*SAID, SAID[0]]:
        prompt = ids_of(package, [*chat.history, Message("user", said)])
        held = len(recorded.held)
        for hear in (fail, None):  # the second finds what the first has left
            recorded.fed.clear()
            with contextlib.suppress(StopError):
                reply = chat.send(said, hear)
        assert recorded.held[: len(prompt)] == prompt
        all_fed.append(recorded.fed == prompt)
        assert reply.prompt_tokens == len(recorded.fed)
        assert all_fed[-1] or len(prompt) <= original
        assert held == 0 or all_fed[-1] == (len(prompt) > original)
        alone = open_session(package, capacity=CAPACITY)
        (result,) = generate(alone, [prompt], GenerateOptions(12, stop_tokens=stops))
        assert reply.text == engines.Tokenizer(package).decode(result.tokens)
    assert all_fed[:2] == [True, False] and all(all_fed[-3:])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["send", "raise", "cancel", "cancel at once", "reset", "too long", "nested"]
        ),
        max_size=8,
    ),
    st.data(),
)
def test_after_whatever_happened_a_turn_is_that_of_a_new_chat(
    package_with: Any, session: Any, calls: list[str], data: Any
) -> None:
    """A conversation in which replies failed goes on as one in which they were not asked for."""
    package = package_with("qwen2.5")
    recorded = Recorded(session)
    cancellation = Cancellation()
    asked = GenerateOptions(10, cancellation=cancellation)
    chat = Chat(package, ChatOptions(generate=asked, drop_oldest=True), session=recorded)
    for call in [*calls, "send"]:
        cancellation.reset()
        history = chat.history
        said = data.draw(st.sampled_from(SAID))
        pieces: list[str] = []

        def hear(piece: str, call: str = call, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            if call == "raise" and len(pieces) == 3:
                raise StopError
            if call == "cancel" and len(pieces) == 3:
                cancellation.request()
            if call == "nested":
                chat.send("inside")

        if call == "reset":
            chat.reset()
            assert chat.history == []
        elif call == "too long":
            with pytest.raises(CapacityError):
                chat.send("word " * 300, hear)
            assert chat.history == history
        elif call in ("raise", "nested"):
            with contextlib.suppress(StopError, ChatError):
                chat.send(said, hear)
                assert len(pieces) < 3
                history = chat.history
            assert chat.history == history
        else:
            if call == "cancel at once":
                cancellation.request()
            reply = chat.send(said, hear)
            assert reply.text == "".join(pieces)
            assert (reply.reason == "cancelled") <= call.startswith("cancel")
            prompt = ids_of(package, [*chat.history[:-2], Message("user", said)])
            if call != "cancel at once":
                assert recorded.held[: len(prompt)] == prompt
        assert int(session.lengths[0]) == len(recorded.held)


def test_what_a_chat_cannot_use_is_refused(package_with: Any, session: Any) -> None:
    package = package_with("qwen2.5")
    with pytest.raises(GenerationError, match="stop string"):
        Chat(package, ChatOptions(stop_strings=[""]), session=session)
    with pytest.raises(ChatError, match="not valid Unicode"):
        Chat(package, ChatOptions(system="\ud800"), session=session)
    chat = Chat(package, session=session)
    for wrong in ("\ud800", b"bytes", None):
        with pytest.raises(ChatError, match="a message"):
            chat.send(wrong)  # type: ignore[arg-type]
    with pytest.raises(ChatError, match=re.escape("writes the date")):
        Chat(package_with("date"))
