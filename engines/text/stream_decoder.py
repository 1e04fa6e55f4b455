"""Turning token ids into text as they arrive."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """The interface that `StreamDecoder` needs; the tokenizers of `transformers` and `tokenizers` have it."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...


class StreamDecoder:
    """Text of a growing token sequence, piece by piece.

    The concatenation of all ``push`` results and of ``flush`` is ``decode`` of all ids, if decoding
    is a concatenation of the tokens' bytes (byte-level BPE, as in Qwen2.5 and Llama-3). A character
    split over tokens is emitted once it is complete, so U+FFFD appears only for bytes that no
    further token can make valid. A tokenizer that treats the first token of a text differently (a
    leading space) works as well, because at least one emitted token stays in the window.

    Each ``push`` decodes a window, not the whole sequence: the tokens since the last place but one where
    the text was complete, not many more than ``WINDOW``. (This scheme of two offsets is the one in
    text-generation-inference and vLLM; the bound for text that never becomes complete is ours.)
    """

    WINDOW = 32

    def __init__(self, tokenizer: Detokenizer) -> None:
        """Start at the beginning of a text."""
        self._tokenizer = tokenizer
        self._restart([], 0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _restart(self, window: list[int], unsent: int) -> None:
        """Continue with this window; the last ``unsent`` characters of its text are yet to be sent."""
        self._window = window
        self._text = self._decode(window) if window else ""
        self._sent = max(len(self._text) - unsent, 0)
        self._whole = 0 if unsent else len(window)  # up to here the text was complete, and is sent

    def push(self, token_id: int) -> str:
        """Append a token; return the text that is now certain, often the empty string."""
        window, before = self._window, self._text
        window.append(token_id)
        text = self._text = self._decode(window)
        if (
            text == before
            and (before or len(window) > self.WINDOW)
            and not self._decode([token_id])
        ):
            window.pop()  # a special token: it has no bytes, so it need not be kept
            return ""
        certain = len(text.rstrip("\ufffd"))
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if certain == len(text):
            if piece:
                self._restart(window[self._whole :], 0)
        elif len(window) > self.WINDOW:
            piece += self._shorten()
        return piece

    def _shorten(self) -> str:
        """Cut a window that does not end in complete text at a point that no character crosses.

        A character has at most 4 bytes, so one of the last 4 boundaries is such a point. There, and
        only there, both sides decode separately to the same text.
        """
        window, text = self._window, self._text
        for cut in range(len(window) - 1, 0, -1):
            head, tail = self._decode(window[:cut]), self._decode(window[cut:])
            if tail and head + tail == text:
                piece = text[self._sent : len(head)]
                self._restart(window[cut:], len(text) - max(self._sent, len(head)))
                return piece
        return ""

    def flush(self) -> str:
        """End the text: return what was held back, with U+FFFD for an incomplete character. Then start anew."""
        piece = self._text[self._sent :]
        self._restart([], 0)
        return piece
