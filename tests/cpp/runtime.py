"""The C API of the runtime, bound with ctypes as any other language would bind it."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenport.engines import FinishReason, Generated, Message, Reply, TokenLogprob

from ._structures import (
    LOAD_MODES,
    ON_LOGITS,
    ON_TEXT,
    ON_TOKEN,
    ChatOptions,
    EncodeOptions,
    EngineInfo,
    EngineOptions,
    GenerateOptions,
    Logprobs,
    SelfTestReport,
    SessionOptions,
    _Generated,
    _Message,
    _Reply,
)

ERRORS = {
    1: "invalid argument",
    2: "bad engine",
    3: "missing library",
    4: "wrong gpu",
    5: "wrong version",
    6: "capacity",
    7: "sampling",
    8: "bad snapshot",
    9: "device",
    10: "internal",
    11: "not proven",
}
REASONS: tuple[FinishReason, ...] = ("stop", "length", "capacity", "cancelled")
IDLE = -1


class Error(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.kind = ERRORS[code]


class Library:
    """libqwenport.so, or the tests' build of it on the stand-in."""

    def __init__(self, path: Path) -> None:
        self.c = c.CDLL(str(path))
        self.c.qwenport_last_error.restype = c.c_char_p
        self.c.qwenport_engine_defaults.restype = EngineOptions
        self.c.qwenport_engine_get_info.restype = EngineInfo
        self.c.qwenport_session_defaults.restype = SessionOptions
        self.c.qwenport_generate_defaults.restype = GenerateOptions
        self.c.qwenport_cancellation_create.restype = c.c_void_p
        self.c.qwenport_encode_defaults.restype = EncodeOptions
        self.c.qwenport_chat_defaults.restype = ChatOptions
        freed = "engine session snapshot cancellation tokenizer stream_decoder tokens text"
        freed += " chat_format chat"
        for name in freed.split():
            getattr(self.c, f"qwenport_{name}_free").argtypes = [c.c_void_p]
        self.c.qwenport_cancellation_request.argtypes = [c.c_void_p]

    def check(self, code: int) -> None:
        if code:
            raise Error(code, self.c.qwenport_last_error().decode())

    def load(
        self,
        directory: Path,
        *,
        threads: int = 0,
        load: str | int = "fast_steps",
        onnxruntime: Path | None = None,
        require_self_test: bool = False,
    ) -> Engine:
        given = self.c.qwenport_engine_defaults()
        given.require_self_test = require_self_test
        given.threads, given.load = threads, LOAD_MODES.get(load, load)  # type: ignore[call-overload]
        given.onnxruntime = str(onnxruntime).encode() if onnxruntime else None
        engine = c.c_void_p()
        self.check(
            self.c.qwenport_engine_load(str(directory).encode(), c.byref(given), c.byref(engine))
        )
        return Engine(self, engine)

    def tokenizer(self, directory: Path) -> Tokenizer:
        tokenizer = c.c_void_p()
        self.check(self.c.qwenport_tokenizer_load(str(directory).encode(), c.byref(tokenizer)))
        return Tokenizer(self, tokenizer)

    def chat_format(self, directory: Path) -> ChatFormat:
        form = c.c_void_p()
        self.check(self.c.qwenport_chat_format_load(str(directory).encode(), c.byref(form)))
        return ChatFormat(self, form)


class ChatFormat:
    def __init__(self, library: Library, handle: c.c_void_p) -> None:
        self.library, self.handle = library, handle

    def __del__(self) -> None:
        self.library.c.qwenport_chat_format_free(self.handle)

    def text(self, messages: Sequence[Message]) -> str:
        given = (_Message * max(len(messages), 1))()
        contents = [message.content.encode() for message in messages]
        for place, message, content in zip(given, messages, contents, strict=False):
            place.role, place.bytes = message.role.encode(), len(content)
            place.content = c.cast(c.c_char_p(content), c.c_void_p)
        text, size = c.c_void_p(), c.c_size_t()
        self.library.check(
            self.library.c.qwenport_chat_format_text(
                self.handle, given, c.c_size_t(len(messages)), c.byref(text), c.byref(size)
            )
        )
        try:
            return c.string_at(text, size.value).decode()
        finally:
            self.library.c.qwenport_text_free(text)


class Tokenizer:
    def __init__(self, library: Library, handle: c.c_void_p) -> None:
        self.library, self.handle = library, handle

    def __del__(self) -> None:
        self.library.c.qwenport_tokenizer_free(self.handle)

    def encode(self, text: str | bytes, **options: bool) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        given = self.library.c.qwenport_encode_defaults()
        for name, value in options.items():
            setattr(given, name, value)
        tokens, count = c.POINTER(c.c_int64)(), c.c_size_t()
        self.library.check(
            self.library.c.qwenport_tokenizer_encode(
                self.handle,
                data,
                c.c_size_t(len(data)),
                c.byref(given),
                c.byref(tokens),
                c.byref(count),
            )
        )
        try:
            return tokens[: count.value]
        finally:
            self.library.c.qwenport_tokens_free(tokens)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        given = (c.c_int64 * len(tokens))(*tokens)
        text, size = c.c_void_p(), c.c_size_t()
        self.library.check(
            self.library.c.qwenport_tokenizer_decode(
                self.handle,
                given,
                c.c_size_t(len(tokens)),
                c.c_int(skip_special_tokens),
                c.byref(text),
                c.byref(size),
            )
        )
        try:
            data = c.string_at(text, size.value + 1)
        finally:
            self.library.c.qwenport_text_free(text)
        assert data[-1] == 0
        return data[:-1].decode()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        decoder = c.c_void_p()
        self.library.check(
            self.library.c.qwenport_stream_decoder_create(
                self.handle, c.c_int(skip_special_tokens), c.byref(decoder)
            )
        )
        return StreamDecoder(self.library, decoder)


class StreamDecoder:
    def __init__(self, library: Library, handle: c.c_void_p) -> None:
        self.library, self.handle = library, handle

    def __del__(self) -> None:
        self.library.c.qwenport_stream_decoder_free(self.handle)

    def _text(self, call: Callable[..., int], *arguments: Any) -> str:
        text, size = c.c_void_p(), c.c_size_t()
        self.library.check(call(self.handle, *arguments, c.byref(text), c.byref(size)))
        return c.string_at(text, size.value).decode()

    def push(self, token: int) -> str:
        return self._text(self.library.c.qwenport_stream_decoder_push, c.c_int64(token))

    def flush(self) -> str:
        return self._text(self.library.c.qwenport_stream_decoder_flush)


class Engine:
    def __init__(self, library: Library, handle: c.c_void_p) -> None:
        self.library, self.handle = library, handle

    def __del__(self) -> None:
        self.library.c.qwenport_engine_free(self.handle)

    def info(self) -> EngineInfo:
        return self.library.c.qwenport_engine_get_info(self.handle)

    def self_test(self) -> SelfTestReport:
        report = SelfTestReport()
        self.library.check(self.library.c.qwenport_engine_self_test(self.handle, c.byref(report)))
        return report

    def session(self, **options: int) -> Session:
        given = self.library.c.qwenport_session_defaults()
        for name, value in options.items():
            setattr(given, name, value)
        session = c.c_void_p()
        self.library.check(
            self.library.c.qwenport_session_create(self.handle, c.byref(given), c.byref(session))
        )
        return Session(self.library, session, self.info().vocab_size)

    def chat(
        self,
        *,
        system: str | None = None,
        stop_strings: Sequence[str] = (),
        drop_oldest: bool = False,
        capacity: int = 0,
        on_logits: Callable[[Any, int], None] | None = None,
        cancellation: c.c_void_p | None = None,
        **generate: float,
    ) -> Chat:
        """on_logits gets the logits, an array to be edited, and how many tokens have been drawn."""
        given = self.library.c.qwenport_chat_defaults()
        given.system = None if system is None else system.encode()
        for name, value in generate.items():
            setattr(given.generate, name, value)
        given.generate.cancellation = cancellation
        stops = [stop.encode() for stop in stop_strings]
        given.stop_strings = (c.c_char_p * max(len(stops), 1))(*stops)
        given.stop_string_count = len(stops)
        given.drop_oldest, given.session.capacity = drop_oldest, capacity
        edit = ON_LOGITS()
        if on_logits is not None:
            edit = ON_LOGITS(
                lambda _, row, logits, vocab, drawn, count: on_logits(
                    np.ctypeslib.as_array(logits, (vocab,)), count
                )
            )
            given.generate.on_logits = edit
        chat = c.c_void_p()
        self.library.check(
            self.library.c.qwenport_chat_create(self.handle, c.byref(given), c.byref(chat))
        )
        return Chat(self.library, chat, edit)


class Chat:
    def __init__(self, library: Library, handle: c.c_void_p, on_logits: Any) -> None:
        self.library, self.handle = library, handle
        self.on_logits = on_logits  # it must live as long

    def __del__(self) -> None:
        self.library.c.qwenport_chat_free(self.handle)

    def send(self, content: str, on_text: Callable[[str], None] | None = None) -> Reply:
        data, reply = content.encode(), _Reply()
        pieces = ON_TEXT()
        if on_text is not None:
            pieces = ON_TEXT(lambda _, text, size: on_text(c.string_at(text, size).decode()))
        self.library.check(
            self.library.c.qwenport_chat_send(
                self.handle, data, c.c_size_t(len(data)), pieces, None, c.byref(reply)
            )
        )
        return Reply(
            c.string_at(reply.text, reply.bytes).decode(),
            REASONS[reply.reason],
            None if reply.stop_string == -1 else reply.stop_string,
            reply.prompt_tokens,
            reply.new_tokens,
            reply.dropped,
        )

    @property
    def history(self) -> list[Message]:
        messages, count = c.POINTER(_Message)(), c.c_size_t()
        self.library.check(
            self.library.c.qwenport_chat_history(self.handle, c.byref(messages), c.byref(count))
        )
        return [
            Message(m.role.decode(), c.string_at(m.content, m.bytes).decode())
            for m in messages[: count.value]
        ]

    def reset(self) -> None:
        self.library.check(self.library.c.qwenport_chat_reset(self.handle))


def _rows(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    arrays = [(c.c_int64 * max(len(row), 1))(*row) for row in rows]
    pointers = (c.POINTER(c.c_int64) * len(rows))(
        *[c.cast(a, c.POINTER(c.c_int64)) for a in arrays]
    )
    return pointers, (c.c_size_t * len(rows))(*map(len, rows))


class Session:
    def __init__(self, library: Library, handle: c.c_void_p, vocab: int) -> None:
        self.library, self.handle, self.vocab = library, handle, vocab

    def __del__(self) -> None:
        self.library.c.qwenport_session_free(self.handle)

    def _logits(self, call: Callable[..., int], count: int, *arguments: Any) -> list[Any]:
        found = (c.POINTER(c.c_float) * count)()
        self.library.check(call(self.handle, *arguments, c.c_size_t(count), found))
        return [np.ctypeslib.as_array(row, (self.vocab,)).copy() if row else None for row in found]

    def prefill(
        self, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
    ) -> list[Any]:
        """A copy of each row's logits, None for a row that was given nothing."""
        stated = None if prompt_lengths is None else (c.c_int * len(rows))(*prompt_lengths)
        call = self.library.c.qwenport_session_prefill
        return self._logits(call, len(rows), *_rows(rows), stated)

    def decode(self, tokens: Sequence[int]) -> list[Any]:
        given = (c.c_int64 * len(tokens))(*tokens)
        return self._logits(self.library.c.qwenport_session_decode, len(tokens), given)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        on_token: Callable[[int, int], None] | None = None,
        stop_tokens: Sequence[int] = (),
        stop_sequences: Sequence[Sequence[int]] = (),
        on_logits: Callable[[int, Any, tuple[int, ...]], None] | None = None,
        logprobs: int | None = None,
        cancellation: c.c_void_p | None = None,
        **options: float,
    ) -> list[Generated]:
        given = self.library.c.qwenport_generate_defaults()
        for name, value in options.items():
            setattr(given, name, value)
        stops = (c.c_int64 * max(len(stop_tokens), 1))(*stop_tokens)
        given.stop_tokens, given.stop_token_count = stops, len(stop_tokens)
        given.stop_sequences, given.stop_sequence_sizes = _rows(stop_sequences)
        given.stop_sequence_count = len(stop_sequences)
        given.cancellation = cancellation
        if on_logits is not None:

            def edit(_, row: int, logits: Any, vocab: int, drawn: Any, count: int) -> None:
                on_logits(row, np.ctypeslib.as_array(logits, (vocab,)), tuple(drawn[:count]))

            given.on_logits = ON_LOGITS(edit)
        given.logprobs = -1 if logprobs is None else logprobs
        tokens = np.full((len(prompts), max(given.max_new_tokens, 1)), -7, dtype=np.int64)
        results = (_Generated * len(prompts))()
        likely = np.full(tokens.shape, np.nan, dtype=np.float32)
        top_tokens = np.full((*tokens.shape, logprobs or 0), -7, dtype=np.int64)
        top_logprobs = np.full(top_tokens.shape, np.nan, dtype=np.float32)
        places = Logprobs(*(array.ctypes.data for array in (likely, top_tokens, top_logprobs)))
        callback = ON_TOKEN(lambda _, row, token: on_token(row, token)) if on_token else ON_TOKEN()
        self.library.check(
            self.library.c.qwenport_generate(
                self.handle,
                *_rows(prompts),
                c.c_size_t(len(prompts)),
                c.byref(given),
                callback,
                None,
                c.c_void_p(tokens.ctypes.data),
                results,
                None if logprobs is None else c.byref(places),
            )
        )
        made = []
        for b, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            count = result.count
            assert (tokens[b, count:] == -7).all()  # nothing is written past the count
            assert np.isnan(likely[b, count:]).all()
            assert (top_tokens[b, count:] == -7).all() and np.isnan(top_logprobs[b, count:]).all()
            drawn = tokens[b, :count].tolist()
            stop = None if result.stop_token == -1 else result.stop_token
            sequence = None if result.stop_sequence == -1 else result.stop_sequence
            said = [*prompt, *drawn, *([] if stop is None else [stop])]
            said += [] if sequence is None else stop_sequences[sequence]
            pairs = [
                [TokenLogprob(*pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
                for ids, values in zip(top_tokens[b, :count], top_logprobs[b, :count], strict=True)
            ]
            made.append(
                Generated(
                    drawn,
                    REASONS[result.reason],
                    stop,
                    said[len(said) - result.pending :],
                    sequence,
                    [] if logprobs is None else likely[b, :count].tolist(),
                    pairs if logprobs else [],
                )
            )
        return made

    def reset(self) -> None:
        self.library.c.qwenport_session_reset(self.handle)

    def truncate(self, length: int, row: int = 0) -> None:
        self.library.check(self.library.c.qwenport_session_truncate(self.handle, length, row))

    @property
    def lengths(self) -> list[int]:
        found = (c.c_int * self.library.c.qwenport_session_max_batch(self.handle))()
        self.library.check(self.library.c.qwenport_session_lengths(self.handle, found))
        return list(found)

    @property
    def capacity(self) -> int:
        return self.library.c.qwenport_session_capacity(self.handle)

    @property
    def cuda_graphs(self) -> bool:
        return bool(self.library.c.qwenport_session_cuda_graphs(self.handle))

    def save(self) -> bytes:
        data, size = c.c_void_p(), c.c_size_t()
        self.library.check(
            self.library.c.qwenport_session_save(self.handle, c.byref(data), c.byref(size))
        )
        try:
            return c.string_at(data, size.value)
        finally:
            self.library.c.qwenport_snapshot_free(data)

    def restore(self, snapshot: bytes) -> None:
        self.library.check(
            self.library.c.qwenport_session_restore(
                self.handle, snapshot, c.c_size_t(len(snapshot))
            )
        )
