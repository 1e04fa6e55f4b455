"""Text generation on a session whose tokens are pieces of characters, against the text of all tokens."""

from __future__ import annotations

import pytest
from fake_session import VOCAB, FakeSession
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stop_strings import expected

from qwenport.engines import Cancellation, GenerateOptions, StreamDecoder, TextGeneration, generate

BYTES = [
    b"a",
    b"b",
    b" ",
    b"ab",
    b"\xc3",
    b"\xa9",
    "é".encode(),
    b"",
    b"ba b",
    b"\xe4\xbd",
    b"\xa0",
]
assert len(BYTES) == VOCAB
CAPACITY = 60


class Tokens:
    """Token ids as bytes."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str:
        return b"".join(BYTES[token] for token in token_ids).decode(errors="replace")


texts = st.lists(st.sampled_from(["a", "b", " ", "é", "你", "\ufffd"]), min_size=1, max_size=4)


@settings(max_examples=300)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    strings=st.lists(texts.map("".join), max_size=3),
    stop_tokens=st.lists(st.integers(0, VOCAB - 1), max_size=1),
    most=st.integers(1, 40),
)
def test_the_text_is_that_of_the_tokens_up_to_the_stop(
    prompt: list[int], seed: int, strings: list[str], stop_tokens: list[int], most: int
) -> None:
    options = GenerateOptions(most, stop_tokens=stop_tokens, temperature=0.9, seed=seed)
    (without,) = generate(FakeSession(1, CAPACITY), [prompt], options)
    decoder = StreamDecoder(Tokens())
    certain = "".join(map(decoder.push, without.tokens))
    wanted, found = expected(certain, strings)

    session = FakeSession(1, CAPACITY)
    generation = TextGeneration(session, Tokens(), prompt, options, strings)
    pieces = list(generation)
    result = generation.result()
    assert result.text == "".join(pieces)
    assert result.stop_string == found
    assert result.tokens == without.tokens[: len(result.tokens)]
    if found is None:
        assert result.text == Tokens().decode(result.tokens, skip_special_tokens=True)
        assert (result.tokens, result.reason) == (without.tokens, without.reason)
        assert result.stop_token == without.stop_token
        return
    assert result.text == wanted
    assert result.reason == "stop" and result.stop_token is None
    decoder = StreamDecoder(Tokens())
    pushed = [decoder.push(token) for token in result.tokens]
    assert expected("".join(pushed), strings)[1] == found  # the last token completes it
    assert expected("".join(pushed[:-1]), strings)[1] is None
    held = session.held[0]
    assert held == [*prompt, *result.tokens][: len(held)]


def test_text_that_was_held_back_comes_when_the_iteration_is_left() -> None:
    generation = TextGeneration(
        FakeSession(1, CAPACITY), Tokens(), [1], GenerateOptions(9), ["a" * 99]
    )
    pieces = [next(iter(generation)) for _ in range(4)]
    rest = generation.flush()
    tokens = Tokens().decode(generation.tokens, skip_special_tokens=True)
    assert "".join(pieces) + rest == tokens == generation.result().text


@pytest.mark.parametrize("after", [0, 3])
def test_a_cancelled_text_is_what_came(after: int) -> None:
    cancellation = Cancellation()
    options = GenerateOptions(20, temperature=0.9, seed=3, cancellation=cancellation)
    generation = TextGeneration(FakeSession(1, CAPACITY), Tokens(), [1, 2], options)
    if not after:
        cancellation.request()
    for count, _ in enumerate(generation, 1):
        if count == after:
            cancellation.request()
    result = generation.result()
    assert (result.reason, len(result.tokens)) == ("cancelled", after)
    cancellation.reset()
    assert not cancellation.requested()
