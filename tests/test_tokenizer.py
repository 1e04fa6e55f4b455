"""The tokenizer of `generate`, new and from the cache: ids and texts are transformers' own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from qwenport.engines import cache_folder, clear_cache
from qwenport.engines.text import tokenizer as _text
from qwenport.engines.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ("tiny-qwen2.5", "tiny-qwen2-moe")
TEXTS = ["The quick brown fox, naïve café — 50 €.", "你好，世界。 12345", "👩‍👩‍👧 🇩🇪 é e\u0301"]


def smollm2(folder: Path) -> Path:
    """Digits one by one and no class of its own, as SmolLM2's; the vocabulary is trained on a few texts."""
    write(folder, pre_tokenizers.Digits(individual_digits=True))
    return folder


def rebuilt(folder: Path) -> Path:
    """transformers builds a GPT2Tokenizer without the digits of tokenizer.json."""
    write(folder, pre_tokenizers.Digits(individual_digits=True), tokenizer_class="GPT2Tokenizer")
    return folder


def llama3(folder: Path) -> Path:
    """A BOS by the post-processor, and clean-up of spaces asked for."""
    write(folder, clean_up_tokenization_spaces=True, bos_token="<s>")
    file = folder / "tokenizer.json"
    backend = Backend.from_file(str(file))
    number = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", number)])
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(file))
    return folder


def split_specials(folder: Path) -> Path:
    """Special tokens in a text are text."""
    write(folder, split_special_tokens=True)
    return folder


def chat_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a conversation in which the user says a text."""
    written = tokenizer.render([{"role": "user", "content": text}])
    return tokenizer.encode(written, add_special_tokens=False)


def write(folder: Path, *before: Any, **config: Any) -> None:
    folder.mkdir()
    backend = Backend(BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, words])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    specials = ["<|im_start|>", "<|im_end|>", "<s>"]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    backend.add_tokens([AddedToken("<tool>", lstrip=True)])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    settings_ = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": template
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    (folder / "config.json").write_text('{"model_type": "llama"}')


MADE = (smollm2, rebuilt, llama3, split_specials)
NAMES = (*BUNDLED, *(make.__name__ for make in MADE))


@dataclass(frozen=True)
class Pair:
    """transformers' tokenizer, ours as it is built, and ours from the cache."""

    theirs: Any
    built: Tokenizer
    kept: Tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("tokenizers")
    folders = {name: ROOT / "examples" / name for name in BUNDLED}
    folders |= {make.__name__: make(folder / make.__name__) for make in MADE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        theirs = {name: AutoTokenizer.from_pretrained(path) for name, path in folders.items()}
        built = {name: Tokenizer(path) for name, path in folders.items()}
        patch.setattr(_text, "_load", None)  # the cache has to have it
        kept = {name: Tokenizer(path) for name, path in folders.items()}
    return {name: Pair(theirs[name], built[name], kept[name]) for name in folders}


SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "<tool>"]
SPACES = [" ", "  ", "\n\n", "\t", "\u0085", "\u00a0"]
PIECES = st.sampled_from([*SPECIALS, *SPACES, "'s", "12", "e\u0301", "\ufb01"])
CHARACTERS = st.characters(exclude_categories=("Cs",))
PROMPTS = st.lists(PIECES | st.text(CHARACTERS, max_size=12) | st.sampled_from(TEXTS)).map("".join)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(text=PROMPTS)
@example(text="")
@example(text="a <|im_end|> b<tool> 2024 <s>x")
@example(text="one two three four five six seven eight nine ten")
def test_ids_and_texts_are_those_of_transformers(
    name: str, text: str, pairs: dict[str, Pair]
) -> None:
    pair = pairs[name]
    ids = pair.theirs(text)["input_ids"]
    without = {"clean_up_tokenization_spaces": False}
    messages = [{"role": "user", "content": text}]
    chat = pair.theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for ours in (pair.built, pair.kept):
        assert ours.encode(text) == ids
        assert chat_ids(ours, text) == chat
        for skip in (False, True):
            wanted = pair.theirs.decode(ids, skip_special_tokens=skip, **without)
            assert ours.decode(ids, skip_special_tokens=skip) == wanted


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_ids_decode_as_in_transformers(
    name: str, data: st.DataObject, pairs: dict[str, Pair]
) -> None:
    pair = pairs[name]
    ids = data.draw(st.lists(st.integers(0, len(pair.theirs) - 1), max_size=30))
    for skip in (False, True):
        wanted = pair.theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        assert pair.kept.decode(ids, skip_special_tokens=skip) == wanted


def test_the_made_tokenizers_differ_where_they_should(pairs: dict[str, Pair]) -> None:
    """Otherwise the tests above would show nothing of them."""
    text = "12345 12345 <|im_end|>"
    splits = {
        name: json.loads(pair.theirs.backend_tokenizer.to_str())["pre_tokenizer"]
        for name, pair in pairs.items()
    }
    assert splits["rebuilt"] != splits["smollm2"]  # tokenizer.json is the same
    assert pairs["llama3"].kept.encode(text)[0] == pairs["llama3"].theirs.convert_tokens_to_ids(
        "<s>"
    )
    special = pairs["smollm2"].theirs.convert_tokens_to_ids("<|im_end|>")
    assert special in pairs["smollm2"].kept.encode(text)
    assert special not in pairs["split_specials"].kept.encode(text)


def test_another_file_path_or_release_is_another_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = smollm2(tmp_path / "first")

    def count() -> int:
        return len([*cache_folder().iterdir()])

    Tokenizer(first)
    Tokenizer(first)
    assert count() == 1
    Tokenizer(Path(shutil.copytree(first, tmp_path / "second")))
    assert count() == 2
    config = json.loads((first / "tokenizer_config.json").read_text())
    (first / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "x"}))
    assert Tokenizer(first).render([{"role": "user", "content": "y"}]) == "x"
    assert count() == 3
    monkeypatch.setattr(_text, "version", lambda name: "0.0")
    Tokenizer(first)
    assert count() == 4


def test_a_damaged_entry_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = smollm2(tmp_path / "first")
    ids = Tokenizer(folder).encode("some text")
    (entry,) = cache_folder().iterdir()
    file = entry / "backend.json"
    file.write_bytes(file.read_bytes().replace(b"im_end", b"im_and"))
    assert Tokenizer(folder).encode("some text") == ids
    assert b"im_and" not in file.read_bytes()


def test_what_transformers_alone_can_run_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    class Reversed(PreTrainedTokenizerFast):
        def _decode(self, token_ids: Any, **options: Any) -> str:
            return super()._decode(token_ids, **options)[::-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = smollm2(tmp_path / "first")
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda path, **_: Reversed.from_pretrained(path)
    )
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("abc")) == "cba"
    written = tokenizer.render([{"role": "user", "content": "abc"}])
    assert written == "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"
    assert clear_cache() == (0, 0)


def test_a_kept_tokenizer_needs_no_transformers(tmp_path: Path) -> None:

    script = (
        "import sys; from pathlib import Path; from qwenport.engines.text.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(Path(sys.argv[1])); tokenizer.decode(tokenizer.encode('x'))\n"
        "print({*sys.modules} & {'torch', 'transformers'})"
    )
    command = [sys.executable, "-c", script, str(smollm2(tmp_path / "first"))]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    ]
    assert "transformers" in outputs[0] and outputs[1].strip() == "set()"
