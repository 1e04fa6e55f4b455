"""`qwenport generate`: text from a package or an engine, printed as it is generated."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenport import QwenportError
from qwenport.commands._common import PATH, note, output_options, print_json, runnable_kind, stream
from qwenport.commands._progress import progress_bar
from qwenport.commands._sampling import generate_options, sampling_options
from qwenport.contract import ONNXRUNTIME, SPAN_MULTIPLE, Progress

if TYPE_CHECKING:
    from qwenport.engines import GenerateOptions, Session
    from qwenport.engines.text.tokenizer import Tokenizer
    from qwenport.exporter import Note

EXIT_INTERRUPTED = 130


@click.command("generate")
@click.argument("target", type=PATH)
@click.option(
    "--prompt", required=True, metavar="TEXT", help="Text to continue; - reads it from stdin."
)
@click.option(
    "--chat", is_flag=True, help="Send the prompt as a user's turn, in the chat template."
)
@sampling_options(max_new_tokens=128)
@output_options
def command(
    target: Path,
    prompt: str,
    chat: bool,
    stop_strings: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a text with TARGET, a package (on onnxruntime) or an engine directory (on what it was built for).

    The new text goes to stdout as it is generated, a line about speed to stderr. Generation ends at the
    model's end-of-text token, before a --stop, after --max-new-tokens, or at the end of the context.

    \b
    Examples:
      qwenport generate qwen.package --prompt "Once upon a time"
      qwenport generate qwen.engine --chat --prompt "Why is the sky blue?" --temperature 0.7
      qwenport generate qwen.package --prompt - --json < question.txt
    """
    kind = runnable_kind(target)
    from qwenport.engines import StopStrings

    StopStrings(stop_strings)
    asked = generate_options(lambda said: note(said, quiet), **options)
    text = _text_of(prompt)

    start = time.perf_counter()
    notes: list[str] = []
    with progress_bar("loading the model", quiet) as progress:
        tokenizer, ids, stops, session = _prepare(
            target, kind, text, chat, asked.max_new_tokens, progress, notes.append
        )
    for said in notes:
        note(said, quiet)
    asked = replace(asked, stop_tokens=stops)
    load_seconds = time.perf_counter() - start
    run = Run(tokenizer, ids, asked, stop_strings, not as_json, load_seconds)
    run.generate(session)
    if as_json:
        print_json(run.report())
    else:
        note_on_end = f"the context of {session.capacity} positions is full"
        note(note_on_end if run.reason == "capacity" else None, quiet)
        if not quiet:
            click.echo(run.summary(), err=True)
    if run.reason == "interrupted":
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


def _text_of(prompt: str) -> str:
    """The prompt itself; for "-" all of stdin, without the final newline."""
    try:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        text.encode()  # arguments that were not UTF-8 arrive as lone surrogates
    except UnicodeError as error:
        raise QwenportError(f"the prompt is not valid UTF-8: {error}") from error
    return text


def _prepare(
    target: Path,
    kind: str,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    progress: Progress,
    note_: Note,
) -> tuple[Tokenizer, list[int], list[int], Session]:
    """Load what generation needs, with onnxruntime's cache no larger than that."""
    from qwenport.engines import Tokenizer, check_ids, load_engine, open_session
    from qwenport.engines.spans import Spans
    from qwenport.exporter import load_package, stop_ids

    opened = load_engine(target) if kind == "engine" else load_package(target)
    vocabulary = opened.manifest["model"]["vocab_size"]
    # first, so that an error in it is reported before the model is loaded
    stops = stop_ids(target, vocabulary)
    session: Session | None = None
    if opened.manifest.get("flavour", ONNXRUNTIME) != ONNXRUNTIME:  # its cache has a fixed size
        session = open_session(target)
    longest: int = opened.manifest["max_seq_len"]
    tokenizer = Tokenizer(target)
    ids = _chat_ids(tokenizer, prompt) if chat else tokenizer.encode(prompt)
    if not ids:
        raise QwenportError("the prompt is empty")
    check_ids(ids, vocabulary, "the prompt")
    if len(ids) > longest:
        raise QwenportError(f"the prompt has {len(ids)} tokens; {target} has room for {longest}")
    if session is None:
        slots = Spans(SPAN_MULTIPLE, longest).holding(len(ids) + max_new_tokens)
        session = open_session(target, capacity=slots, progress=progress, note=note_)
    return tokenizer, ids, stops, session


def _chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a conversation in which the user says `prompt`, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise QwenportError("the tokenizer has no chat template; leave --chat out")
    text = tokenizer.render([{"role": "user", "content": prompt}])
    return tokenizer.encode(text, add_special_tokens=False)


@dataclass
class Run:
    """One generation: what came out, and when."""

    tokenizer: Tokenizer
    prompt: list[int]
    options: GenerateOptions
    stop_strings: Sequence[str]
    stream: bool
    load_seconds: float
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "interrupted"
    stop_token: int | None = None
    stop_string: int | None = None
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    def generate(self, session: Session) -> None:
        """Run to the end or until Ctrl-C; what was generated until then is printed and kept."""
        from qwenport.engines import TextGeneration

        start = last = time.perf_counter()
        generation = TextGeneration(
            session, self.tokenizer, self.prompt, self.options, self.stop_strings
        )
        ended = False
        try:
            for piece in generation:
                if not self.prompt_seconds:
                    self.prompt_seconds = time.perf_counter() - start
                last = time.perf_counter()
                self._write(piece)
            ended = True
        except KeyboardInterrupt:
            pass
        finally:
            self._write(generation.flush())
            result = generation.result()
            self.tokens, self.text = result.tokens, result.text
            self.stop_token, self.stop_string = result.stop_token, result.stop_string
            if ended:
                self.reason = result.reason
            self._write("\n" if self.tokens else "")
        self.decode_seconds = max(0.0, last - start - self.prompt_seconds)

    def _write(self, text: str) -> None:
        if self.stream:
            stream(text)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens after the first one, which comes from the prompt's own step."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None

    def summary(self) -> str:
        """One line for stderr."""
        speed = self.tokens_per_second
        parts = [
            f"{len(self.tokens)} tokens" + (f", {speed:.1f} tokens/s" if speed else ""),
            f"prompt of {len(self.prompt)} in {self.prompt_seconds:.2f} s",
            f"ended by {self._ending}",
        ]
        if not self.options.sampling.greedy:
            parts.append(f"seed {self.options.seed}")
        return f"[{'; '.join(parts)}]"

    @property
    def _ending(self) -> str:
        return "--stop" if self.stop_string is not None else _ENDINGS[self.reason]

    def report(self) -> dict[str, Any]:
        """The JSON object of --json."""
        speed = self.tokens_per_second
        return {
            "text": self.text,
            "token_ids": self.tokens,
            "prompt_token_ids": self.prompt,
            "finish_reason": self.reason,
            "stop_id": self.stop_token,
            "stop_text": None if self.stop_string is None else self.stop_strings[self.stop_string],
            "seed": None if self.options.sampling.greedy else self.options.seed,
            "seconds": {
                "load": round(self.load_seconds, 4),
                "prompt": round(self.prompt_seconds, 4),
                "decode": round(self.decode_seconds, 4),
            },
            "tokens_per_second": None if speed is None else round(speed, 2),
        }


_ENDINGS = {
    "stop": "the model's stop token",
    "length": "--max-new-tokens",
    "capacity": "the end of the context",
    "interrupted": "Ctrl-C",
}
