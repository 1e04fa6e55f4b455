"""The generation loop against a row-at-a-time reference, and streaming text against decode()."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenport import QwenportError
from qwenport.engines.errors import CapacityError
from qwenport.engines.generation import GenerationError, GenerationResult, StreamDecoder, generate
from qwenport.engines.sampling import Sampler, SamplingError, SamplingParams

VOCAB = 11
TABLE = (np.random.default_rng(1).standard_normal((97, VOCAB)) * 2).astype(np.float32)


def model(history: Sequence[int]) -> np.ndarray:
    """float32 [VOCAB] that depends on every token of the history and on their order."""
    state = 1
    for token in history:
        state = (state * 31 + token + 1) % 1_000_003
    return TABLE[state % len(TABLE)]


class FakeSession:
    """The protocol's rules as assertions; returned arrays are spoilt by the next step."""

    vocab_size = VOCAB

    def __init__(self, max_batch: int, capacity: int) -> None:
        self.max_batch, self.capacity = max_batch, capacity
        self.clean = False  # a reset must come first
        self.prefills, self.decodes, self._given = [], [], []

    def reset(self) -> None:
        self.held = [[] for _ in range(self.max_batch)]
        self.clean = True

    def _append(self, tokens: Sequence[Sequence[int]]) -> None:
        assert self.clean
        assert len(tokens) <= self.max_batch
        assert any(len(row) for row in tokens), "a step in which every row idles"
        for old in self._given:
            old[...] = np.nan
        for row, new in zip(self.held, tokens, strict=False):
            assert all(type(t) is int and 0 <= t < VOCAB for t in new)
            assert len(row) + len(new) <= self.capacity
            row.extend(new)

    def prefill(self, tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:  # last logits only
        self._append(tokens)
        self.prefills.append([len(row) for row in tokens])
        self._given = [
            model(held)[None].copy() if len(new) else np.empty((0, VOCAB), np.float32)
            for held, new in zip(self.held, tokens, strict=False)
        ]
        return self._given

    def decode(self, token_ids: Sequence[int | None]) -> np.ndarray:
        self._append([[] if t is None else [t] for t in token_ids])
        self.decodes.append([t is not None for t in token_ids])
        out = np.full((len(token_ids), VOCAB), np.nan, np.float32)  # NaN: idle rows are not read
        for b in [b for b, token in enumerate(token_ids) if token is not None]:
            out[b] = model(self.held[b])
        self._given = [out]
        return out


def reference(
    prompt: list[int], row: int, params: SamplingParams, max_new: int, stop: set[int], capacity: int
) -> tuple[GenerationResult, list[int]]:
    """One row alone: its result and what the cache holds."""
    sampler, new, held = Sampler(params, row=row), [], list(prompt)
    while True:
        token = sampler.sample(model(held), prompt + new)
        if token in stop:
            return GenerationResult(new, "stop", token), held
        new.append(token)
        if len(new) == max_new:
            return GenerationResult(new, "length"), held
        if len(held) == capacity:
            return GenerationResult(new, "capacity"), held
        held.append(token)


tokens = st.integers(0, VOCAB - 1)
temperatures, penalties = st.sampled_from([0.0, 0.8, 3.0]), st.sampled_from([1.0, 1.4])


@given(
    prompts=st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5),
    params=st.builds(SamplingParams, temperature=temperatures, repetition_penalty=penalties),
    max_new=st.integers(1, 14),
    stop=st.sets(tokens, max_size=3),
    chunk=st.one_of(st.none(), st.integers(1, 12)),
    spare=st.integers(0, 12),
)
@settings(max_examples=300, deadline=None)
def test_rows_are_as_if_alone_and_no_step_is_wasted(prompts, params, max_new, stop, chunk, spare):
    longest, steps = max(map(len, prompts)), []
    session = FakeSession(len(prompts) + 1, longest + spare)
    streamed: list[list[int]] = [[] for _ in prompts]
    options = {"params": params, "max_new_tokens": max_new, "stop_ids": stop}
    options["on_token"] = lambda row, token: streamed[row].append(token)
    results = generate(session, prompts, **options, prefill_chunk=chunk)
    for b, prompt in enumerate(prompts):
        want, held = reference(prompt, b, params, max_new, stop, session.capacity)
        assert results[b] == want
        assert session.held[b] == held
        steps.append(len(held) - len(prompt))
    assert streamed == [r.token_ids for r in results]
    assert all(h == [] for h in session.held[len(prompts) :])
    # Each row decodes in its first steps[b] steps and idles after; no step beyond the longest row.
    assert session.decodes == [[i < n for n in steps] for i in range(max(steps))]
    width = chunk or longest
    starts = range(0, longest, width)
    assert session.prefills == [[len(p[i : i + width]) for p in prompts] for i in starts]


def greedy_run(prompt: list[int], n: int) -> list[int]:
    return reference(prompt, 0, SamplingParams(), n, set(), 99)[0].token_ids


def run(session, prompts, **kwargs):
    arguments = {"params": SamplingParams(), "max_new_tokens": 6, "stop_ids": ()} | kwargs
    return generate(session, prompts, **arguments)


def test_finish_reasons_and_their_precedence():
    prompt, want = [4, 2, 7], greedy_run([4, 2, 7], 6)
    assert run(FakeSession(1, 8), [prompt]) == [GenerationResult(want, "length")]
    assert run(FakeSession(1, 7), [prompt]) == [GenerationResult(want[:5], "capacity")]
    assert run(FakeSession(1, 3), [prompt]) == [GenerationResult(want[:1], "capacity")]
    (both,) = run(FakeSession(1, 3), [prompt], max_new_tokens=1)
    assert both == GenerationResult(want[:1], "length")
    assert want[1] != want[0]
    (stopped,) = run(FakeSession(1, 4), [prompt], stop_ids=[want[1]], max_new_tokens=2)
    assert stopped == GenerationResult(want[:1], "stop", want[1])


def test_a_short_row_streams_while_the_others_are_prefilled():
    session, calls, long, short = FakeSession(2, 20), [], [1, 2, 3, 4, 5], [6]

    def on_token(row: int, token: int) -> None:
        calls.append((row, token, len(session.prefills)))

    run(session, [long, short], prefill_chunk=2, max_new_tokens=1, on_token=on_token)
    assert calls == [(1, *greedy_run(short, 1), 1), (0, *greedy_run(long, 1), 3)]


def test_rows_of_the_same_prompt_draw_differently_and_no_seed_is_fresh():
    params = SamplingParams(temperature=2.0)
    two = run(FakeSession(2, 40), [[1, 2]] * 2, params=params, max_new_tokens=30)
    assert two[0].token_ids != two[1].token_ids
    params = SamplingParams(temperature=2.0, seed=None)
    again = [run(FakeSession(1, 40), [[1]], params=params, max_new_tokens=30) for _ in range(2)]
    assert again[0] != again[1]


def test_bad_requests_are_refused_before_anything_runs():
    session = FakeSession(2, 4)
    bad = [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"prefill_chunk": 0}, {"stop_ids": "x"}]
    for kwargs in bad:
        with pytest.raises(
            GenerationError, match=next(iter(kwargs)).replace("stop_ids", "stop id")
        ):
            run(session, [[1]], **kwargs)
    for prompts in ([[1], []], [[1], [VOCAB]], [[1], [-1]], [[1], "text"], [[1], [True]]):
        with pytest.raises(GenerationError, match="prompt 1") as error:
            run(session, prompts)
        assert isinstance(error.value, QwenportError)
    with pytest.raises(GenerationError, match="3 prompts"):
        run(session, [[1]] * 3)
    with pytest.raises(CapacityError, match="prompt 1 has 5 tokens"):
        run(session, [[1], [1, 2, 3, 4, 5]], prefill_chunk=1)
    assert run(session, []) == []
    assert not session.clean


def test_unusable_logits_name_the_row(monkeypatch):
    decode = FakeSession.decode
    monkeypatch.setattr(FakeSession, "decode", lambda *a: decode(*a) * np.float32([[1], [np.nan]]))
    with pytest.raises(SamplingError, match="row 1, new token 1"):
        run(FakeSession(2, 9), [[1], [2]])


# --- StreamDecoder --------------------------------------------------------------------------------

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The quick brown fox, naïve café — 50 €.",
    "你好，世界。你好吗？ 日本語テキスト",
    "👩‍👩‍👧 🇩🇪 😀😀 \u0301e\u0301",
    "a\ufffdb \ufffd\ufffd",
]


def byte_level_tokenizer():
    """Byte-level BPE as Qwen2.5's: 256 bytes, some merges (across characters too), specials."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


TOKENIZER = byte_level_tokenizer()
SPECIAL = TOKENIZER.token_to_id("<|im_end|>")
# Bytes of the euro sign, of an emoji and of "a", and byte-level BPE's stand-ins for them.
STAND_INS = {0xE2: "â", 0x82: "Ĥ", 0xAC: "¬", 0xF0: "ð", 0x9F: "Ł", 0x98: "ĺ", 0x80: "Ģ", 0x61: "a"}


def byte_ids(*values: int) -> list[int]:
    return [TOKENIZER.token_to_id(STAND_INS[v]) for v in values]


def stream(ids: Sequence[int], tokenizer=TOKENIZER) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


byte_or_special = st.sampled_from([SPECIAL, *byte_ids(*STAND_INS)])
any_id = byte_or_special | st.integers(0, TOKENIZER.get_vocab_size() - 1)
id_runs = st.lists(st.tuples(any_id, st.sampled_from([1, 1, 1, 2, 3, 40])), max_size=30)


@given(id_runs.map(lambda runs: [i for i, n in runs for _ in range(n)]))
@settings(max_examples=400, deadline=None)
@example(byte_ids(0xE2) + [SPECIAL] * 80 + byte_ids(0x82, 0xAC, 0x61))
@example(byte_ids(*[0xAC] * 33, 0xE2, 0x82, 0xAC, *[0xE2, 0x82] * 40, 0xAC))
@example(byte_ids(*[0x98] * 30, 0xF0, 0x9F, 0x98, 0x80))
@example([SPECIAL] * 70 + byte_ids(0xE2, 0x82, 0xAC))
@example(TOKENIZER.encode("\ufffd" * 50 + "€").ids)
def test_pieces_of_any_ids_concatenate_to_decode(ids):
    assert "".join(stream(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(TEXTS)).map("".join)))
@settings(max_examples=300, deadline=None)
def test_pieces_of_text_are_never_ahead_of_it_nor_replaced(text):
    ids = TOKENIZER.encode(text).ids
    pieces = stream(ids)
    assert "".join(pieces) == text
    for n in range(len(ids)):  # what is out after n + 1 tokens is all that is certain
        sure = TOKENIZER.decode(ids[: n + 1], skip_special_tokens=True).rstrip("\ufffd")
        assert "".join(pieces[: n + 1]).rstrip("\ufffd") == sure


def test_a_split_character_comes_out_whole_and_an_incomplete_one_at_the_end():
    assert stream(byte_ids(0x61, 0xE2, 0x82, 0xAC, 0x61)) == ["a", "", "", "€", "a", ""]
    assert stream(byte_ids(0x61, 0xE2, 0x82)) == ["a", "", "", "\ufffd"]
    assert stream(byte_ids(0xE2, 0x61, 0xF0, 0x9F)) == ["", "\ufffda", "", "", "\ufffd"]
    decoder = StreamDecoder(TOKENIZER)  # a flush starts anew
    assert [decoder.push(*byte_ids(0xE2)), decoder.flush(), decoder.flush()] == ["", "\ufffd", ""]
    assert [decoder.push(i) for i in byte_ids(0x82, 0xAC, 0x61)] == ["", "", "\ufffd\ufffda"]


UNITS = [[SPECIAL], [SPECIAL, *byte_ids(0xE2)]]
UNITS += [TOKENIZER.encode(text).ids for text in ("\ufffd", TEXTS[1])]
UNITS += [byte_ids(*u) for u in (b"a", b"\xac", b"\xe2\x82\xac", b"\xe2", b"\xf0\x9f\x98")]


@pytest.mark.parametrize("unit", UNITS)
def test_the_cost_is_linear_and_text_is_not_held_back_for_long(unit):
    decoded = []

    class Counting:
        def decode(self, ids, *, skip_special_tokens):
            decoded.append(len(ids))
            return TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = unit * (3000 // len(unit))
    decoder = StreamDecoder(Counting())
    out = "".join(decoder.push(i) for i in ids)
    assert sum(decoded) < 40 * len(ids)  # decoding all at each push: 1500 * len(ids)
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert len(text) - len(out) <= StreamDecoder.WINDOW + 4
    assert out + decoder.flush() == text


def test_a_decoder_that_strips_the_first_space_keeps_the_others():
    class Metaspace:
        words = ("▁a", "▁b", "c", "▁")

        def decode(self, ids, *, skip_special_tokens):
            return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    pieces = ["", " a", " b", "c", " b", " ", " a", " ", " ", "c", " a", ""]
    assert stream([3, 0, 1, 2, 1, 3, 0, 3, 3, 2, 0], Metaspace()) == pieces
