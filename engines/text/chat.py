"""A conversation with a model: text in, text out, and only the new turn is computed. C++ has the same in src/chat/.

Each turn's prompt is the whole conversation as the chat template writes it, in the ids that transformers gives it. The
cache keeps what it has of them: all to the end of the reply, unless the template writes that otherwise than it was
drawn, or the model scales keys by the conversation's length: then each turn computes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from qwenport.contract import Progress, no_progress
from qwenport.engines.errors import CapacityError, SessionError
from qwenport.engines.generate_options import FinishReason, GenerateOptions
from qwenport.engines.session import Session
from qwenport.engines.text.chat_format import (
    ASSISTANT,
    SYSTEM,
    USER,
    ChatError,
    ChatFormat,
    Message,
    engine_text,
)
from qwenport.engines.text.stop_strings import StopStrings
from qwenport.engines.text.text_generation import GeneratedText, TextGeneration
from qwenport.engines.text.tokenizer import Tokenizer, check_ids
from qwenport.exporter import Note, stop_ids

OnText = Callable[[str], None]
"""Called with each piece of a reply's text."""


@dataclass(frozen=True)
class ChatOptions:
    """How a chat answers.

    Attributes:
        system: the system message; None leaves it to the chat template, which may have one of its own.
        generate: how tokens are chosen. Its stop tokens are added to the model's. The n-th reply, from 0, draws with
            seed + n. `append` is the chat's own business.
        stop_strings: texts that end a reply, and are not part of it; see `StopStrings`.
        drop_oldest: when the cache is full, forget the oldest turns (a user's message and its reply) until a reply of
            `max_new_tokens`, or of half of the cache if that is less, has room. Without it a full cache is an error.
    """

    system: str | None = None
    generate: GenerateOptions = GenerateOptions()
    stop_strings: Sequence[str] = ()
    drop_oldest: bool = False


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: what the model said, without the stop string.
        reason: see `Generated`; "stop" also for a stop string.
        stop_string: the index of the one that ended it, or None.
        prompt_tokens: how many tokens were fed before the first new one.
        new_tokens: how many were drawn, without the stop token.
        dropped: how many turns have left the history.
    """

    text: str
    reason: FinishReason
    stop_string: int | None
    prompt_tokens: int
    new_tokens: int
    dropped: int


class Chat:
    """A conversation. Each turn feeds its new tokens; the cache keeps the others."""

    def __init__(
        self,
        target: Path | str,
        options: ChatOptions = ChatOptions(),
        *,
        session: Session | None = None,
        progress: Progress = no_progress,
        note: Note = lambda text: None,
    ) -> None:
        """Begin a conversation.

        Args:
            target: a package or an engine directory, with a chat template.
            options: how the chat answers.
            session: an open session on it, of which row 0 is the chat's alone from now on; by default a new one.
            progress, note: of `open_session`.

        Raises:
            ChatError: there is no chat template, one that is not put together from fixed pieces, or one that takes no
                system message.
            GenerationError: a stop string is empty.
            QwenportError: see `open_session` and `Tokenizer`.
        """
        from qwenport.engines.open import open_session

        StopStrings(options.stop_strings)
        self._format = ChatFormat.load(target)
        self._tokenizer = Tokenizer(target)
        self._options = options
        self._system = [] if options.system is None else [Message(SYSTEM, _text(options.system))]
        self._format.text([*self._system, Message(USER, "")])
        self._session = session or open_session(target, progress=progress, note=note)
        text = engine_text(target)
        stops = (
            stop_ids(Path(target), self._session.vocab_size)
            if text is None
            else text["stop_tokens"]
        )
        self._stops = [*stops, *options.generate.stop_tokens]
        self._sending = False
        self.reset()

    @property
    def history(self) -> list[Message]:
        """What the user and the model have said, without what was dropped and the system message."""
        return list(self._history)

    def reset(self) -> None:
        """Begin anew, as after construction."""
        self._check_idle()
        self._session.reset()
        self._history: list[Message] = []
        self._cached: list[int] = []
        self._sent = 0

    def send(self, content: str, on_text: OnText | None = None) -> Reply:
        """Say something; return the reply.

        Args:
            content: the user's message.
            on_text: called with each piece of the reply's text. An exception from it ends the reply.

        Raises:
            ChatError: the content is not valid Unicode, or one that the chat template treats in a way of its own.
            CapacityError: the cache has no room for the message.
            SamplingError, GenerationError, SessionError: see `generate` and `Session.prefill`. After any exception the
                chat is as before the call.
        """
        self._check_idle()
        history = [*self._history, Message(USER, _text(content))]
        prompt, dropped = self._prompt(history)
        common = min(_common(prompt[:-1], self._cached), self._session.reusable(len(prompt)))
        self._sending = True
        try:
            self._session.truncate(common)
            result = self._generate(prompt[common:], on_text)
        except BaseException:
            self._cached = prompt[:common]
            with suppress(SessionError):  # it reports the first error again
                self._session.truncate(common)
            raise
        finally:
            self._sending = False
        self._history = [*history[2 * dropped :], Message(ASSISTANT, result.text)]
        self._cached = [*prompt, *result.tokens][: int(self._session.lengths[0])]
        self._sent += 1
        return Reply(
            result.text,
            result.reason,
            result.stop_string,
            len(prompt) - common,
            len(result.tokens),
            dropped,
        )

    def _prompt(self, history: list[Message]) -> tuple[list[int], int]:
        """All tokens up to where the reply begins, and how many of the oldest turns were left out of them.

        Raises:
            CapacityError, ChatError: see `send`.
        """
        form, capacity = self._format, self._session.capacity
        wanted = min(self._options.generate.max_new_tokens, capacity // 2)
        dropped, turns = 0, (len(history) + 1) // 2
        while True:
            prompt = self._encode(form.text([*self._system, *history[2 * dropped :]]))
            has_room = capacity - len(prompt) + 1 >= wanted
            if has_room or not self._options.drop_oldest or dropped == turns - 1:
                break
            dropped += 1
        if len(prompt) > capacity:
            reset = "reset the chat, or let it drop its oldest turns"
            advice = reset if dropped < turns - 1 else "the message is too long"
            raise CapacityError(
                f"the conversation has {len(prompt)} tokens, the cache room for {capacity}: {advice}"
            )
        return prompt, dropped

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        check_ids(ids, self._session.vocab_size, "the conversation")
        return ids

    def _generate(self, tokens: list[int], on_text: OnText | None) -> GeneratedText:
        options = self._options.generate
        seed = None if options.seed is None else (options.seed + self._sent) % 2**64
        options = replace(options, append=True, seed=seed, stop_tokens=self._stops)
        generation = TextGeneration(
            self._session, self._tokenizer, tokens, options, self._options.stop_strings
        )
        for piece in generation:
            if piece and on_text is not None:
                on_text(piece)
        return generation.result()

    def _check_idle(self) -> None:
        if self._sending:
            raise ChatError("the chat is used by its own on_text")


def _text(content: str) -> str:
    if not isinstance(content, str):
        raise ChatError(f"a message must be a text, got {content!r:.60}")
    try:
        content.encode()
    except UnicodeError:
        raise ChatError(f"a message is not valid Unicode: {content!r:.60}") from None
    return content


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
