"""tokenizer.json for C++: each field is honoured, or makes the tokenizer unrecognised by its name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qwenport.engines.text.tokenizer_json import (
    REGEXES,
    Is,
    Split,
    TokenizerParts,
    UnrecognisedError,
    read_tokenizer,
)

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny-qwen2.5" / "tokenizer.json"
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": True,
}
SPLIT = ("pre_tokenizer", "pretokenizers", 0)
LAST = ("pre_tokenizer", "pretokenizers", 1)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The bundled tokenizer.json."""
    content: dict[str, Any] = json.loads(BUNDLED.read_text())
    return content


def changed(document: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    inner: Any = document
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


def read(document: Any, folder: Path) -> TokenizerParts:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(document))
    return read_tokenizer(file)


def template(*single: Any) -> dict[str, Any]:
    special = {"id": "<|endoftext|>", "ids": [2045], "tokens": ["<|endoftext|>"]}
    pair = [{"Sequence": {"id": id_, "type_id": 0}} for id_ in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {"<|endoftext|>": special},
    }


TRUNCATION = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["a", 1],
    "cls": ["b", 2],
    "trim_offsets": True,
    "add_prefix_space": False,
}
LOWERCASE = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
TWICE = {"type": "Sequence", "processors": [template(TEXT), template(TEXT)]}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("version",), "2.0", "version: '2.0'"),
        (("other",), 1, "other: 1"),
        (("truncation",), TRUNCATION, "truncation: {"),
        (("padding",), PADDING, "padding: {"),
        (("normalizer",), {"type": "NFKC"}, "normalizer: 'NFKC'"),
        (("normalizer",), LOWERCASE, "normalizer.normalizers[1]: 'Lowercase'"),
        (("pre_tokenizer",), None, "pre_tokenizer: it does not end with ByteLevel"),
        (
            ("pre_tokenizer",),
            {"type": "Whitespace"},
            "pre_tokenizer: it does not end with ByteLevel",
        ),
        (
            (*SPLIT, "pattern", "Regex"),
            r"\p{L}+",
            "pre_tokenizer.pretokenizers[0].pattern: '\\\\p{L}+'",
        ),
        ((*SPLIT, "pattern"), {"String": " "}, "pretokenizers[0].pattern.String: ' '"),
        ((*SPLIT, "behavior"), "Removed", "pretokenizers[0].behavior: 'Removed'"),
        ((*SPLIT, "invert"), True, "pretokenizers[0].invert: true"),
        (SPLIT, {"type": "Punctuation", "behavior": "Isolated"}, "pretokenizers[0]: 'Punctuation'"),
        (SPLIT, BYTE_LEVEL, "pretokenizers[0]: 'ByteLevel'"),
        ((*SPLIT, "other"), 1, "pretokenizers[0].other: 1"),
        ((*LAST, "add_prefix_space"), True, "pretokenizers[1].add_prefix_space: true"),
        (("decoder",), None, "decoder: null"),
        (("decoder",), {"type": "Fuse"}, "decoder: 'Fuse'"),
        (
            ("decoder",),
            {"type": "Sequence", "decoders": [{"type": "Fuse"}, BYTE_LEVEL]},
            "decoder: 'Sequence'",
        ),
        (("post_processor",), ROBERTA, "post_processor: 'RobertaProcessing'"),
        (("post_processor",), template(END), "post_processor.single: not one text"),
        (("post_processor",), template(TEXT, TEXT), "post_processor.single: not one text"),
        (("post_processor",), TWICE, "post_processor.processors[1]: 'TemplateProcessing'"),
        (("model", "dropout"), 0.5, "model.dropout: 0.5"),
        (("model", "byte_fallback"), True, "model.byte_fallback: true"),
        (("model", "continuing_subword_prefix"), "a", "model.continuing_subword_prefix: 'a'"),
        (("model", "end_of_word_suffix"), "a", "model.end_of_word_suffix: 'a'"),
        (("model", "unk_token"), "nothing", "model.unk_token: 'nothing' is no token"),
        (("model", "other"), 1, "model.other: 1"),
        (("model", "type"), "WordPiece", "model: 'WordPiece'"),
        (("model", "merges", 0), ["zzz", "a"], "tokenizers does not load it: "),
        (("model", "vocab", "a"), 0, "model.vocab: two tokens with one id"),
        (("model", "vocab", "a"), 1 << 23, f"model.vocab: the id {1 << 23}"),
        (
            ("added_tokens", 0, "id"),
            4000,
            "added_tokens[0]: '<|endoftext|>' gets another id or meaning",
        ),
        (("added_tokens", 0, "other"), 1, "added_tokens[0].other: 1"),
    ],
)
def test_what_is_not_recognised_is_named(
    document: dict[str, Any], tmp_path: Path, path: tuple, value: Any, complaint: str
) -> None:
    with pytest.raises(UnrecognisedError) as error:
        read(changed(document, path, value), tmp_path)
    assert complaint in str(error.value)


def test_unknown_bytes_in_one_token_are_not_recognised(
    document: dict[str, Any], tmp_path: Path
) -> None:
    document = changed(document, ("model", "unk_token"), "a")
    with pytest.raises(UnrecognisedError, match=r"model\.fuse_unk: true"):
        read(changed(document, ("model", "fuse_unk"), True), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"version": "1.0"}', '{"version": "1.0", "version": "1.0"}']
)
def test_what_is_no_tokenizer_is_not_recognised(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(UnrecognisedError):
        read_tokenizer(file)


def test_a_token_that_shares_its_id_is_not_recognised(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """`tokenizers` numbers a new token by the count of the vocabulary, which an id of the vocabulary may have."""
    vocab = dict(document["model"]["vocab"])
    count = len(vocab)
    vocab["<zzz>"] = count + 1
    added = [{**document["added_tokens"][0], "id": count + 1}]
    document = changed(document, ("model", "vocab"), vocab)
    with pytest.raises(UnrecognisedError, match="has the id of another token"):
        read(changed(document, ("added_tokens",), added), tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ((), None, {}),
        (("normalizer",), None, {"nfc": False}),
        (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, {"nfc": True}),
        (("normalizer",), {"type": "Sequence", "normalizers": []}, {"nfc": False}),
        (("pre_tokenizer",), BYTE_LEVEL, {"splits": (Split.GPT2,)}),
        (SPLIT, {"type": "Digits", "individual_digits": False}, {"splits": (Split.DIGIT_RUNS,)}),
        (LAST, BYTE_LEVEL, {"splits": (Split.BY_ONE_DIGIT, Split.GPT2)}),
        (("post_processor",), None, {"before": (), "after": ()}),
        (("post_processor",), template(END, TEXT), {"before": (2045,), "after": ()}),
        (("post_processor",), template(TEXT, END, END), {"before": (), "after": (2045, 2045)}),
        (("model", "dropout"), 0.0, {}),
        (("model", "continuing_subword_prefix"), "", {}),
        (("model", "fuse_unk"), True, {}),
    ],
)
def test_what_is_honoured(
    document: dict[str, Any], tmp_path: Path, path: tuple, value: Any, wanted: dict[str, Any]
) -> None:
    plain = read(document, tmp_path)
    found = read(changed(document, path, value) if path else document, tmp_path)
    names = ("nfc", "splits", "of_byte", "tokens", "merges", "added", "before", "after")
    for name in names:
        assert getattr(found, name) == wanted.get(name, getattr(plain, name)), name


def test_the_parts_are_what_tokenizers_says(tmp_path: Path) -> None:
    parts, theirs = read_tokenizer(BUNDLED), tokenizers.Tokenizer.from_file(str(BUNDLED))
    assert parts.splits == (Split.BY_ONE_DIGIT,) and parts.nfc
    assert len(parts.tokens) == theirs.get_vocab_size()
    for number, content in enumerate(parts.tokens):
        decoded = theirs.decode([number], skip_special_tokens=False)
        assert content.decode(errors="replace") == decoded
    assert {
        *range(len(parts.tokens))
    } - parts.words == parts.skipped  # only merges made this vocabulary
    assert [token.content for token in parts.added] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert all(token.kind == Is.SPECIAL for token in parts.added)


def test_merges_may_be_pairs_or_texts(document: dict[str, Any], tmp_path: Path) -> None:
    texts = ["#version: 0.2", *map(" ".join, document["model"]["merges"])]
    found = read(changed(document, ("model", "merges"), texts), tmp_path)
    assert found.merges == read(document, tmp_path).merges and len(found.merges) > 1000


def test_the_regular_expressions_split_as_published() -> None:
    """Qwen2's takes digits one by one, Llama 3's by three."""
    for regex, split in REGEXES.items():
        pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
        found = [piece for piece, _ in pieces.pre_tokenize_str("it's 1234\n")]
        digits = {Split.BY_ONE_DIGIT: [*"1234"], Split.BY_THREE_DIGITS: ["123", "4"]}[split]
        assert found == ["it", "'s", " ", *digits, "\n"]
