"""Streaming text: pieces that together are decode() of all tokens, however characters are cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenport.engines.text.stream_decoder import StreamDecoder

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
