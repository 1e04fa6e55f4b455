"""Generating text with a session: tokens in, pieces of text out, up to a stop token or a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwenport.engines.generate_options import FinishReason, GenerateOptions
from qwenport.engines.generation import Generation
from qwenport.engines.session import Session
from qwenport.engines.text.stop_strings import StopStrings
from qwenport.engines.text.stream_decoder import Detokenizer, StreamDecoder


@dataclass(frozen=True)
class GeneratedText:
    """What a text generation gave.

    Attributes:
        text: the new text, without special tokens and the stop string.
        tokens: all new tokens but a stop token; those of a stop string too.
        reason: see `Generated`; "stop" also for a stop string.
        stop_token: the one that was drawn, or None.
        stop_string: the index of the one that ended the text, or None.
    """

    text: str
    tokens: list[int]
    reason: FinishReason
    stop_token: int | None
    stop_string: int | None


class TextGeneration:
    """One prompt's generation as text: iterate over it for a piece after each token, which is often empty."""

    def __init__(
        self,
        session: Session,
        tokenizer: Detokenizer,
        prompt: Sequence[int],
        options: GenerateOptions = GenerateOptions(),
        stop_strings: Sequence[str] = (),
    ) -> None:
        """Check the request; nothing runs yet.

        Args:
            session: see `Generation`; row 0 is used.
            tokenizer: decodes the new tokens.
            prompt: token ids.
            options: how tokens are chosen and when to stop.
            stop_strings: texts that end the generation, also across the borders of tokens; see `StopStrings`.

        Raises:
            GenerationError, CapacityError: see `Generation`.
        """
        self._stops = StopStrings(stop_strings)
        self._generation = Generation(session, [prompt], options)
        self._decoder = StreamDecoder(tokenizer)
        self._pieces: list[str] = []
        self._running = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._running

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return self._generation.results[0].tokens

    def result(self) -> GeneratedText:
        """What has come so far."""
        (row,) = self._generation.results
        reason = row.reason if self._stops.found is None else "stop"
        text = "".join(self._pieces)
        return GeneratedText(text, row.tokens, reason, row.stop_token, self._stops.found)

    def _run(self) -> Iterator[str]:
        """Raises SamplingError, GenerationError, CapacityError: see `generate`."""
        for _, token in self._generation:
            yield self._add(self._stops.push(self._decoder.push(token)))
            if self._stops.found is not None:
                return
        yield self.flush()

    def flush(self) -> str:
        """End the text where the iteration was left: what was held back of it. At its end the iteration does that."""
        rest = self._stops.push(self._decoder.flush())
        return self._add(rest if self._stops.found is not None else rest + self._stops.flush())

    def _add(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece
