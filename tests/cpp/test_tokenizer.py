"""The C++ tokenizer gives the ids and the texts of the `tokenizers` package, for any string."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers

from qwenport import engines, exporter
from qwenport.contract import TOKENIZER
from qwenport.engines.text.tokenizer_file import tokenizer_bytes
from qwenport.engines.text.tokenizer_json import Is, Split, TokenizerParts, read_tokenizer

from . import unicode_tables
from .builds import ROOT, built, run
from .runtime import Error, Library, Tokenizer
from .tokenizer_shapes import BUNDLED, SHAPES, engine_with, tokenizer_json, toy_with_tokenizer
from .tokenizer_strings import CODE_POINTS, around_every_code_point, broken, corpus, strings

NAMES = (*SHAPES, *BUNDLED)
STRINGS = 50_000
FUZZ_RUNS = 10_000


@dataclass(frozen=True)
class Pair:
    """One tokenizer in `tokenizers` and in C++, and the engine directory of the latter."""

    theirs: tokenizers.Tokenizer
    ours: Tokenizer
    engine: Path

    def differences(self, texts: list[str], *, add: bool = True, split: bool = False) -> list[str]:
        """The texts whose ids are not the same."""
        self.theirs.encode_special_tokens = split
        expected = self.theirs.encode_batch(texts, add_special_tokens=add)
        self.theirs.encode_special_tokens = False
        options = {"add_special_tokens": add, "split_special_tokens": split}
        return [
            text
            for text, wanted in zip(texts, expected, strict=True)
            if self.ours.encode(text, **options) != wanted.ids
        ]


Pairs = Callable[[str], Pair]


@pytest.fixture(scope="session")
def pair_of(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The pair of one of NAMES."""
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = tokenizer_json(name, folder)
            engine = engine_with(library, folder / "engine", source)
            theirs = tokenizers.Tokenizer.from_file(str(source))
            made[name] = Pair(theirs, library.tokenizer(engine), engine)
        return made[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_tokenizers(name: str, pair_of: Pairs) -> None:
    texts = [*strings(NAMES.index(name), STRINGS // len(NAMES))]
    half = len(texts) // 2
    pair = pair_of(name)
    assert pair.differences(texts[:half]) == []
    assert pair.differences(texts[half:], add=False, split=True) == []


@pytest.mark.parametrize("name", SHAPES)
def test_code_points_of_every_block_have_the_ids_of_tokenizers(name: str, pair_of: Pairs) -> None:
    """benchmarks/tokenizer.py takes all code points."""
    points = [*CODE_POINTS[:0x3200], *CODE_POINTS[0x3200::16]]
    assert pair_of(name).differences([*around_every_code_point(points)]) == []


def variants_of(parts: TokenizerParts) -> Iterator[TokenizerParts]:
    """The parts of a tokenizer with one setting changed."""
    for kind in Is:
        added = tuple(replace(token, kind=token.kind & ~kind) for token in parts.added)
        if added != parts.added:
            yield replace(parts, added=added)
    for number, split in enumerate(parts.splits):
        for other in {*Split} - {split}:
            splits = (*parts.splits[:number], other, *parts.splits[number + 1 :])
            yield replace(parts, splits=splits)
        yield replace(parts, splits=parts.splits[:number] + parts.splits[number + 1 :])
    yield replace(parts, nfc=not parts.nfc)
    yield replace(parts, merges=parts.merges[: len(parts.merges) // 2], words=frozenset())
    if parts.before:
        yield replace(parts, before=())
    if parts.after:
        yield replace(parts, after=())


@pytest.mark.parametrize(("name", "least"), [("every_rule", 15), ("llama3", 8), ("smollm", 10)])
def test_the_strings_notice_each_setting(
    name: str, least: int, library: Library, pair_of: Pairs, tmp_path: Path
) -> None:
    """Otherwise the tests above would show nothing of it."""
    parts = read_tokenizer(tokenizer_json(name, tmp_path))
    texts = [*strings(2, 3000)]
    count = 0
    for count, variant in enumerate(variants_of(parts), start=1):
        engine = toy_with_tokenizer(library, tmp_path / str(count), tokenizer_bytes(variant))
        pair = replace(pair_of(name), ours=library.tokenizer(engine))
        assert pair.differences(texts) or pair.differences(texts, split=True), variant.splits
    assert count >= least


def test_the_strings_reach_every_rule(pair_of: Pairs) -> None:
    """Otherwise the tests above would show nothing of it."""
    texts = [*strings(1, 4000)]
    seen = {name: set() for name in ("llama3", "every_rule", "qwen25")}
    for name, ids in seen.items():
        for encoding in pair_of(name).theirs.encode_batch(texts):
            ids.update(encoding.ids)
    for name, contents in (
        ("llama3", ["<|begin_of_text|>", "<|reserved_special_token_77|>"]),
        ("every_rule", [f"<t{n}>" for n in range(16)] + ["</s>", " x", "abcde", "的"]),
        ("qwen25", ["<|im_end|>", "<tool_call>", "Ċ", "ĠĠ"]),
    ):
        theirs = pair_of(name).theirs
        assert [c for c in contents if theirs.token_to_id(c) not in seen[name]] == []


@pytest.mark.parametrize("name", ["qwen25", "every_rule", "smollm"])
def test_what_is_no_utf8_is_replaced_as_in_python(name: str, pair_of: Pairs) -> None:
    pair = pair_of(name)
    texts = [*broken(3, 1500)]
    expected = pair.theirs.encode_batch([text.decode(errors="replace") for text in texts])
    assert [
        text
        for text, wanted in zip(texts, expected, strict=True)
        if pair.ours.encode(text) != wanted.ids
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_any_ids_decode_as_in_tokenizers_at_once_and_one_by_one(name: str, pair_of: Pairs) -> None:
    pair, generator = pair_of(name), random.Random(5)
    most = pair.theirs.get_vocab_size() + 20  # some ids have no token
    for _ in range(1500):
        ids = [generator.randrange(most) for _ in range(generator.randrange(12))]
        for skip in (False, True):
            wanted = pair.theirs.decode(ids, skip_special_tokens=skip)
            assert pair.ours.decode(ids, skip_special_tokens=skip) == wanted
            stream = pair.ours.stream(skip_special_tokens=skip)
            pieces = [*map(stream.push, ids), stream.flush()]
            assert "".join(pieces) == wanted
            assert stream.flush() == ""


@pytest.mark.parametrize("name", ["qwen25", "llama3", "gpt2", *BUNDLED])
def test_what_is_encoded_decodes_to_its_normal_form(name: str, pair_of: Pairs) -> None:
    pair = pair_of(name)
    normal = normalizers.NFC().normalize_str if pair.theirs.normalizer else str
    for text in strings(11, 3000):
        ids = pair.ours.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not {*ids} & {*pair.theirs.get_added_tokens_decoder()}:
            assert pair.ours.decode(ids, skip_special_tokens=False) == normal(text)


def test_the_tables_are_those_of_the_installed_tokenizers() -> None:
    """If not, run `python -m tests.cpp.unicode_tables`."""
    assert unicode_tables.FILE.read_text(encoding="utf-8") == unicode_tables.text()


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize(
    "piece", ["a", "<", " ", "\n", "\u0301", "1", "的", "<|im_", "'", "\uac00", " \n", "e\u0301"]
)
@pytest.mark.parametrize("name", ["qwen25", "every_rule"])
def test_long_runs_do_not_take_quadratic_time(name: str, piece: str, pair_of: Pairs) -> None:
    """A megabyte of it: with a step per pair of bytes it would take an hour."""
    ours = pair_of(name).ours
    text = piece * (1_000_000 // len(piece.encode()))
    normal = normalizers.NFC().normalize_str(text)
    ids = ours.encode(text, add_special_tokens=False)
    decoded = ours.decode(ids, skip_special_tokens=False)
    assert decoded == normal or name == "every_rule"


# --- the file


def test_build_writes_the_tokenizer_and_lists_it(library: Library, tmp_path: Path) -> None:
    package = exporter.export(ROOT / "examples" / BUNDLED[0], tmp_path / "package", dtype="fp32")
    engine = engines.build(package.path, tmp_path / "engine", target="onnxruntime")
    assert TOKENIZER in engine.manifest["files"]
    ours = library.tokenizer(engine.path)
    theirs = tokenizers.Tokenizer.from_file(str(engine.path / "tokenizer.json"))
    assert ours.encode(corpus()[0]) == theirs.encode(corpus()[0]).ids

    file = engine.path / TOKENIZER
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(Error, match=f"{TOKENIZER}: changed since it was built") as error:
        library.tokenizer(engine.path)
    assert error.value.kind == "bad engine"


def test_a_tokenizer_that_is_not_recognised_is_left_out_and_the_engine_runs(
    library: Library, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(ROOT / "examples" / BUNDLED[0], tmp_path / "checkpoint"))
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": True}))
    exporter.export(checkpoint, tmp_path / "package", dtype="fp32")
    notes: list[str] = []
    engine = engines.build(
        tmp_path / "package", tmp_path / "engine", target="onnxruntime", note=notes.append
    )
    (told,) = [note for note in notes if TOKENIZER in note]
    assert "split_special_tokens" in told and "\n" not in told
    assert TOKENIZER not in engine.manifest["files"]
    assert len(engines.open_session(engine.path).prefill([[1, 2, 3]])) == 1
    with pytest.raises(Error, match=f"no {TOKENIZER}; `qwenport build` says why"):
        library.tokenizer(engine.path)
    with pytest.raises(Error, match=r"the tokenizer is not known to C\+\+.*split_special") as error:
        library.chat_format(engine.path)
    assert error.value.kind == "bad engine"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file; in its header, numbers of 4 bytes begin at 20."""
    return tokenizer_bytes(
        read_tokenizer(tokenizer_json("llama3", tmp_path_factory.mktemp("file")))
    )


HEADER = {"version": 20, "nfc": 24, "splits": 28, "tokens": 32, "merges": 36, "added": 40}
HEADER |= {"before": 44, "after": 48, "text_bytes": 52, "of_byte": 56, "starts": 56 + 1024}


def put(content: bytes, at: int, number: int) -> bytes:
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        (
            "version",
            2,
            "qwenport-tokenizer format version 2, this runtime reads 1; build the engine",
        ),
        ("nfc", 2, "no such normalizer"),
        ("splits", 6, "no such pre-tokenizer"),
        ("tokens", 1 << 31, "more tokens than any tokenizer has"),
        ("merges", 0xFFFFFFFF, "it ends too early"),
        ("added", 1 << 30, "it ends too early"),
        ("text_bytes", 1, "its text is not of the size that it says"),
        ("of_byte", 1 << 20, "a byte of a token that does not exist"),
        ("starts", 77, "tokens that are not inside its text"),
    ],
)
def test_a_damaged_file_is_refused(
    library: Library, small_file: bytes, tmp_path: Path, field: str, value: int, complaint: str
) -> None:
    damaged = put(small_file, HEADER[field], value)
    with pytest.raises(Error, match=complaint) as error:
        library.tokenizer(toy_with_tokenizer(library, tmp_path / "engine", damaged))
    assert error.value.kind == "bad engine"
    assert str(tmp_path / "engine" / TOKENIZER) in str(error.value)


def test_what_a_file_refers_to_exists(library: Library, small_file: bytes, tmp_path: Path) -> None:
    tokens, merges, added = (
        struct.unpack_from("<I", small_file, HEADER[name])[0]
        for name in ("tokens", "merges", "added")
    )
    first_merge = HEADER["starts"] + 4 * (tokens + 1)
    first_added = first_merge + 12 * merges
    before = first_added + 16 * added
    for at, complaint in (
        (first_merge, "a merge of tokens that do not exist"),
        (first_merge + 8, "a merge of tokens that do not exist"),
        (first_added, "an added token that does not exist"),
        (first_added + 8, "an added token without a text"),
        (first_added + 12, "an added token without a text"),
        (before, "a token around texts that does not exist"),
    ):
        engine = toy_with_tokenizer(library, tmp_path / str(at), put(small_file, at, 1 << 31))
        with pytest.raises(Error, match=complaint):
            library.tokenizer(engine)
    for size in (0, 1, 19, 55, 2000, len(small_file) - 1):
        engine = toy_with_tokenizer(library, tmp_path / f"cut-{size}", small_file[:size])
        with pytest.raises(Error, match="damaged: "):
            library.tokenizer(engine)
    other = b"x" + small_file[1:]
    with pytest.raises(Error, match="not a tokenizer file"):
        library.tokenizer(toy_with_tokenizer(library, tmp_path / "other", other))


def test_no_bytes_of_a_tokenizer_file_do_harm(small_file: bytes, tmp_path: Path) -> None:
    """A short run of the fuzz target under ASan and UBSan."""
    files = tmp_path / "bundled", tmp_path / "llama3"
    files[0].write_bytes(tokenizer_bytes(read_tokenizer(tokenizer_json(BUNDLED[0], tmp_path))))
    files[1].write_bytes(small_file)
    done = run(built("address") / "fuzz_tokenizer_file", FUZZ_RUNS, *files)
    assert f"{FUZZ_RUNS} runs" in done.stdout


@pytest.mark.parametrize("name", ["every_rule", "llama3"])
def test_no_bytes_of_a_text_do_harm(name: str, pair_of: Pairs, tmp_path: Path) -> None:
    """The same of the encoder and the decoders."""
    files = [tmp_path / str(number) for number in range(40)]
    for file, text in zip(files, strings(17, len(files)), strict=True):
        file.write_bytes(text.encode() or b"x")
    environment = {"QWENPORT_FUZZ_ENGINE": str(pair_of(name).engine)}
    done = run(built("address") / "fuzz_tokenizer", FUZZ_RUNS, *files, env=environment)
    assert f"{FUZZ_RUNS} runs" in done.stdout
