"""tokenizer.json, read for the C++ library: every field is honoured, or makes the tokenizer unrecognised by its name.

What the library computes is byte-level BPE. The pre-tokenizers are those of Qwen2, Llama 3 and GPT-2. Which tokens the
vocabulary has, and what each does, is asked from the `tokenizers` package, which loads the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport.exporter import MOST_OF_A_TOKENIZER, read_json, short

if TYPE_CHECKING:
    import tokenizers


class UnrecognisedError(Exception):
    """The C++ library does not compute what a tokenizer.json asks for; the message names what."""


class Split(IntEnum):
    """A pre-tokenizer, by its number in the file; `Split` in engines/cpp/src/tokenizer/split.hpp."""

    DIGITS = 1
    DIGIT_RUNS = 2
    BY_ONE_DIGIT = 3
    BY_THREE_DIGITS = 4
    GPT2 = 5


class Is(IntFlag):
    """What an added token is; `AddedToken` in engines/cpp/src/tokenizer/data.hpp."""

    NORMALIZED = 1
    LSTRIP = 2
    RSTRIP = 4
    SINGLE_WORD = 8
    SPECIAL = 16


@dataclass(frozen=True)
class Added:
    """A token that is looked for in the text.

    Attributes:
        content: the text that is looked for, which is normalized if the token is.
    """

    id: int
    content: str
    kind: Is


@dataclass(frozen=True)
class TokenizerParts:
    """What a recognised tokenizer.json says.

    Attributes:
        nfc: texts are normalized to NFC.
        splits: pre-tokenizers, which are applied one after the other.
        of_byte: the token of each of the 256 bytes; None for a byte that the vocabulary lacks, which has no token.
        tokens: the bytes of each id, empty for an id without a token.
        words: ids whose bytes, as a piece of a text, become this id alone.
        skipped: ids that decoding leaves out where it skips special tokens.
        merges: (left, right, result), by rank.
        added: added tokens, by id.
        before, after: ids put around a text.
    """

    nfc: bool
    splits: tuple[Split, ...]
    of_byte: tuple[int | None, ...]
    tokens: tuple[bytes, ...]
    words: frozenset[int]
    skipped: frozenset[int]
    merges: tuple[tuple[int, int, int], ...]
    added: tuple[Added, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {
    rf"{_CONTRACTIONS}\p{{N}}{_REST}": Split.BY_ONE_DIGIT,
    rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}": Split.BY_THREE_DIGITS,
}
"""The regular expressions of Qwen2, Qwen2.5 and Qwen3, and of Llama 3."""
MOST_SPLITS = 4
MOST_TOKENS = 1 << 22
_ANY = object()
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


def read_tokenizer(file: Path) -> TokenizerParts:
    """Read a tokenizer.json.

    Raises:
        UnrecognisedError: it is damaged, or asks for something that the C++ library does not compute.
    """
    from tokenizers import Tokenizer

    try:
        content = read_json(file, MOST_OF_A_TOKENIZER, unique=True)
    except (OSError, ValueError) as error:
        raise UnrecognisedError(f"cannot be read: {error}") from error
    _only(content, "", version="1.0", truncation=None, padding=None, **dict.fromkeys(_PARTS, _ANY))
    _check_model(content.get("model"))
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise UnrecognisedError(f"tokenizers does not load it: {error}") from error
    return _parts(content, loaded)


def _parts(content: dict[str, Any], loaded: tokenizers.Tokenizer) -> TokenizerParts:
    nfc = _is_nfc(content.get("normalizer"))
    splits = _splits(content.get("pre_tokenizer"))
    _check_decoder(content.get("decoder"))
    before, after = _around(content.get("post_processor"))
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    strings = {number: string for string, number in vocab.items()}
    of_model = frozenset(strings)
    if len(strings) != len(vocab):
        raise UnrecognisedError("model.vocab: two tokens with one id")
    added = _added(content.get("added_tokens") or [], loaded, strings)
    size = 1 + max([*strings, *(token.id for token in added)], default=-1)
    if size > MOST_TOKENS:
        raise UnrecognisedError(f"model.vocab: the id {size - 1}")
    if not all(0 <= number < size for number in (*before, *after)):
        raise UnrecognisedError("post_processor: a token that does not exist")
    strings |= {token.id: str(loaded.id_to_token(token.id)) for token in added}
    known = [(number, _bytes_of(string)) for number, string in strings.items()]
    tokens = [b""] * size
    for number, found in known:
        tokens[number] = strings[number].encode() if found is None else found
    written = {number for number, found in known if found is not None and number in of_model}
    return TokenizerParts(
        nfc,
        splits,
        _of_byte(model),
        tuple(tokens),
        frozenset(written if model.get("ignore_merges") else _whole(written, strings, loaded)),
        frozenset(token.id for token in added if _is_skipped(token, loaded)),
        tuple(_merges(model["merges"], vocab)),
        tuple(added),
        before,
        after,
    )


def _only(value: Any, where: str, **allowed: Any) -> dict[str, Any]:
    """Check an object of the file: it has no other keys, and where a key has one value that is allowed, that.

    Raises:
        UnrecognisedError: it is no object, or has something else.
    """
    if not isinstance(value, dict):
        raise UnrecognisedError(f"{where}: {short(value)}")
    for key, found in value.items():
        path = f"{where}.{key}" if where else key
        if key not in allowed:
            raise UnrecognisedError(f"{path}: {short(found)}")
        wanted = allowed[key]
        same = found == wanted and type(found) is type(wanted)
        if wanted is not _ANY and not same:
            raise UnrecognisedError(f"{path}: {short(found)}")
    return value


def _flat(value: Any, where: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The components of a Sequence, or the component itself; with the path of each."""
    if value is None:
        return
    if not isinstance(value, dict) or value.get("type") != "Sequence":
        yield where, value
        return
    _only(value, where, type="Sequence", **{key: _ANY})
    for number, inner in enumerate(value[key]):
        yield from _flat(inner, f"{where}.{key}[{number}]", key)


def _unknown(where: str, value: Any) -> UnrecognisedError:
    kind = value.get("type") if isinstance(value, dict) else value
    return UnrecognisedError(f"{where}: {short(kind)}")


def _is_nfc(value: Any) -> bool:
    found = False
    for where, part in _flat(value, "normalizer", "normalizers"):
        if part != {"type": "NFC"}:
            raise _unknown(where, part)
        found = True
    return found


def _splits(value: Any) -> tuple[Split, ...]:
    found = []
    parts = list(_flat(value, "pre_tokenizer", "pretokenizers"))
    if not parts or parts[-1][1].get("type") != "ByteLevel":
        raise UnrecognisedError("pre_tokenizer: it does not end with ByteLevel")
    for where, part in parts[:-1]:
        if part.get("type") == "Digits":
            _only(part, where, type=_ANY, individual_digits=_ANY)
            found.append(Split.DIGITS if part["individual_digits"] else Split.DIGIT_RUNS)
        elif part.get("type") == "Split":
            _only(part, where, type=_ANY, pattern=_ANY, behavior="Isolated", invert=False)
            pattern = _only(part["pattern"], f"{where}.pattern", Regex=_ANY)["Regex"]
            if pattern not in REGEXES:
                raise UnrecognisedError(f"{where}.pattern: {short(pattern)}")
            found.append(REGEXES[pattern])
        else:
            raise _unknown(where, part)
    where, last = parts[-1]
    _only(last, where, type=_ANY, add_prefix_space=False, trim_offsets=_ANY, use_regex=_ANY)
    if last.get("use_regex", True):
        found.append(Split.GPT2)
    if len(found) > MOST_SPLITS:
        raise UnrecognisedError(f"pre_tokenizer: {len(found)} of them")
    return tuple(found)


def _check_decoder(value: Any) -> None:
    parts = list(_flat(value, "decoder", "decoders"))
    if len(parts) != 1 or parts[0][1].get("type") != "ByteLevel":
        raise _unknown("decoder", value)
    where, part = parts[0]  # its settings are for the other uses of ByteLevel
    _only(part, where, type=_ANY, add_prefix_space=_ANY, trim_offsets=_ANY, use_regex=_ANY)


def _around(value: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before and after a text. A template for pairs of texts is not used: there are no pairs."""
    templates: list[dict[str, Any]] = []
    for where, part in _flat(value, "post_processor", "processors"):
        if part.get("type") == "ByteLevel":  # it changes offsets only
            _only(part, where, type=_ANY, add_prefix_space=_ANY, trim_offsets=_ANY, use_regex=_ANY)
        elif part.get("type") == "TemplateProcessing" and not templates:
            _only(part, where, type=_ANY, single=_ANY, pair=_ANY, special_tokens=_ANY)
            templates.append(part)
        else:
            raise _unknown(where, part)
    if not templates:
        return (), ()
    (template,) = templates
    sides: list[list[int]] = [[]]
    for piece in template["single"]:
        if "Sequence" in piece:
            if piece["Sequence"]["id"] != "A" or len(sides) == 2:
                raise UnrecognisedError("post_processor.single: not one text")
            sides.append([])
        else:
            sides[-1] += template["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    if len(sides) != 2:
        raise UnrecognisedError("post_processor.single: not one text")
    return tuple(sides[0]), tuple(sides[1])


def _check_model(model: Any) -> None:
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise _unknown("model", model)
    free = dict.fromkeys(("type", "vocab", "merges", "unk_token", "ignore_merges"), _ANY)
    # an empty prefix or suffix is none; `fuse_unk` matters with `unk_token` only
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        free[key] = "" if model.get(key) == "" else None
    free["dropout"] = 0.0 if model.get("dropout") == 0 else None
    free["fuse_unk"] = _ANY if model.get("unk_token") is None else False
    _only(model, "model", **free, byte_fallback=False)


@cache
def _characters() -> dict[str, int]:
    """The character that stands for each byte -> the byte; bytes that cannot be printed have characters from U+0100."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


def _bytes_of(string: str) -> bytes | None:
    """The bytes that a token's characters stand for; None if one stands for none."""
    characters = _characters()
    if all(character in characters for character in string):
        return bytes(map(characters.__getitem__, string))
    return None


def _of_byte(model: dict[str, Any]) -> tuple[int | None, ...]:
    vocab, unknown = model["vocab"], model.get("unk_token")
    if unknown is not None and unknown not in vocab:
        raise UnrecognisedError(f"model.unk_token: {short(unknown)} is no token")
    instead = None if unknown is None else vocab[unknown]
    found = [instead] * 256
    for character, byte in _characters().items():
        found[byte] = vocab.get(character, instead)
    return tuple(found)


def _merges(merges: list[Any], vocab: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    for merge in merges:
        if isinstance(merge, str) and merge.startswith("#version"):
            continue
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield vocab[left], vocab[right], vocab[left + right]


def _added(
    listed: list[dict[str, Any]], loaded: tokenizers.Tokenizer, strings: dict[int, str]
) -> list[Added]:
    """The added tokens, by id.

    Raises:
        UnrecognisedError: `tokenizers` gives one another id than the file does, or a token shares its id.
    """
    known = loaded.get_added_tokens_decoder()
    for number, entry in enumerate(listed):
        where = f"added_tokens[{number}]"
        kinds = {kind.name.lower(): _ANY for kind in Is if kind.name}
        _only(entry, where, id=_ANY, content=_ANY, **kinds)
        one = known.get(entry["id"])
        if one is None or any(getattr(one, key) != entry[key] for key in ("content", *kinds)):
            raise UnrecognisedError(
                f"{where}: {short(entry['content'])} gets another id or meaning"
            )
        if strings.get(entry["id"], loaded.id_to_token(entry["id"])) != loaded.id_to_token(
            entry["id"]
        ):
            raise UnrecognisedError(
                f"{where}: {short(entry['content'])} has the id of another token"
            )
    if len(known) != len(listed):
        raise UnrecognisedError("added_tokens: one is listed twice")
    found = []
    for number, token in sorted(known.items()):
        content = token.content
        if token.normalized and loaded.normalizer is not None:
            content = loaded.normalizer.normalize_str(content)
        kind = Is(sum(kind for kind in Is if kind.name and getattr(token, kind.name.lower())))
        found.append(Added(number, content, kind))
    return found


def _is_skipped(token: Added, loaded: tokenizers.Tokenizer) -> bool:
    return Is.SPECIAL in token.kind and not loaded.decode([token.id], skip_special_tokens=True)


def _whole(
    written: set[int], strings: dict[int, str], loaded: tokenizers.Tokenizer
) -> Iterator[int]:
    """The tokens whose own text the merges lead back to them."""
    for number in written:
        made = loaded.model.tokenize(strings[number])
        if len(made) == 1 and made[0].id == number:
            yield number
