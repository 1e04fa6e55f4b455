"""Ending a text at a string, wherever the borders of its tokens are."""

from __future__ import annotations

from collections.abc import Sequence

from qwenport.engines.generate_options import GenerationError
from qwenport.engines.stop_sequences import StopSequences


def _is_half(character: str) -> bool:
    """Whether it is half of a character of UTF-16, which bytes of an argument that are no UTF-8 become."""
    return "\ud800" <= character <= "\udfff"


class StopStrings:
    """Strings that end a text that comes in pieces.

    The text ends before the string that is complete first, as if it came character by character; of several that end
    together the longest counts. What may be the beginning of a string is held back until that is decided.

    Attributes:
        found: the index of the string that has ended the text; None so far.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises GenerationError: the strings are no list, or one is empty or no text."""
        if isinstance(strings, str) or not isinstance(strings, Sequence):
            raise GenerationError(f"stop strings must be a list of texts, got {strings!r:.60}")
        for string in strings:
            if not isinstance(string, str) or not string or any(map(_is_half, string)):
                raise GenerationError(
                    f"a stop string must be a text, not empty, got {string!r:.60}"
                )
        self._strings = list(strings)
        self._matching = StopSequences(self._strings)
        self._held = ""
        self.found: int | None = None

    def push(self, piece: str) -> str:
        """Append to the text; return what is now certain. Nothing more is after one has been found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        for end in range(len(self._held) + 1, len(text) + 1):
            self.found = self._matching.push(text[end - 1])
            if self.found is not None:
                self._held = ""
                return text[: end - len(self._strings[self.found])]
        certain = len(text) - self._matching.undecided
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """End the text: what was held back."""
        held, self._held = self._held, ""
        return held
