"""The C++ tokenizer against the `tokenizers` package: the same ids for random strings, load, memory and speed.

    python benchmarks/tokenizer.py
    python benchmarks/tokenizer.py --quick
    python benchmarks/tokenizer.py --strings 1000000

Speed is CPU time on one thread, of documents of 10 MB in all: code, prose, Chinese and digits. The vocabularies have
the sizes of published ones. They are trained here, on Python's and the environment's own sources, which takes minutes.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import tokenizers
from measure import ROOT
from report import Bar, Columns, Report, Result, benchmark, figure, middle, table

sys.path.insert(0, str(ROOT))
from tests.cpp import tokenizer_shapes as shapes
from tests.cpp.builds import built
from tests.cpp.runtime import Library, Tokenizer
from tests.cpp.tokenizer_strings import CODE_POINTS, around_every_code_point, broken, strings

SIZES = {"qwen25": 151_643, "llama3": 128_000, "smollm": 49_152}
OURS, PEER = "C++", "tokenizers"
MB = 1e6
FIGURES = ("load_seconds", "load_cpu_seconds", "loaded_bytes", "bytes_per_second")
KEYS = (*FIGURES, "tokens", "sha256")
COLUMNS: Columns = {
    "tokenizer": figure("tokenizer"),
    "who": figure("contender"),
    "load, ms": figure("load_seconds", "{:.1f}", 1e-3),
    "CPU": figure("load_cpu_seconds", "{:.1f}", 1e-3),
    "loaded, MB": figure("loaded_bytes", "{:.1f}", MB),
    "MB/s": figure("bytes_per_second", "{:.1f}", MB),
    "tokens": figure("tokens"),
}
AGREEMENT: Columns = {
    "tokenizer": figure("tokenizer"),
    "strings": figure("strings"),
    "bytes that are no UTF-8": figure("broken"),
    "texts decoded": figure("decoded"),
    "differences": figure("differences"),
}


def sources(seed: int, most: int) -> Iterator[str]:
    """Python files of this machine in random order, up to so many bytes."""
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    files += sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(seed).shuffle(files)
    size = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        size += len(text.encode())
        if size > most:
            return
        yield text


def chinese(seed: int, size: int) -> str:
    """Characters as frequent as if their numbers were ranks, in sentences."""
    generator = random.Random(seed)
    common = [chr(0x4E00 + n * 7919 % 20_000) for n in range(4000)]
    weights = [1 / (10 + rank) for rank in range(len(common))]
    words = [
        "".join(generator.choices(common, weights, k=k))
        for k in (1, 2, 2, 2, 3)
        for _ in range(3000)
    ]
    text, length = [], 0
    while length < size:
        sentence = "".join(generator.choices(words, k=generator.randrange(4, 20)))
        text.append(sentence + generator.choice("，。，。！？\n"))
        length += 3 * len(text[-1])
    return "".join(text)


def documents(size: int) -> list[str]:
    """Code, prose, Chinese and digits in turns, a few thousand characters each."""
    generator = random.Random(7)
    prose = "\n".join(f.read_text(encoding="utf-8") for f in sorted((ROOT / "docs").rglob("*.md")))
    prose += (ROOT / "examples" / "tiny_tales.txt").read_text(encoding="utf-8")
    code = "".join(sources(1, size))
    kinds = [code, prose, chinese(2, size // 4)]
    made: list[str] = []
    total = 0
    while total < size:
        for kind in kinds:
            start = generator.randrange(max(len(kind) - 4000, 1))
            made.append(kind[start : start + generator.randrange(500, 4000)])
        numbers = (generator.randrange(10 ** generator.randrange(1, 12)) for _ in range(200))
        made.append(", ".join(map(str, numbers)))
        total += sum(len(text.encode()) for text in made[-4:])
    return made


def make(name: str, report: Report) -> Path:
    """The folder of a tokenizer.json with the vocabulary's published size, and of a toy engine with it."""
    size = shapes.VOCAB if report.quick else SIZES[name]
    folder = report.work / f"tokenizer-{name}-{size}"
    if not (folder / "tokenizer.json").exists():
        report.say(f"training {name}: {size} tokens")
        training = shapes.usual()
        if not report.quick:
            texts = [*sources(0, 24_000_000), chinese(0, 3_000_000)]
            training = shapes.Training(texts, size, across=False)
        folder.mkdir(parents=True, exist_ok=True)
        shapes.SHAPES[name](training).save(str(folder / "tokenizer.json"))
    return folder


def time_one(name: str, contender: str, request: dict[str, Any], turn: int, report: Report) -> None:
    """Load and encode in one process."""
    done = report.call(contender, "tokenizing.py", {"contender": contender, **request})
    report.add_run(
        contender,
        tokenizer=name,
        turn=turn,
        **{key: done.result.get(key) for key in KEYS},
        load=done.load,
        others=done.others,
        error=done.error,
    )


def differences(
    theirs: tokenizers.Tokenizer, ours: Tokenizer, texts: list[str], *, plain: bool
) -> Iterator[str]:
    """What the two make of texts, where it is not the same; `plain`: special tokens are text, and none are added."""
    theirs.encode_special_tokens = plain
    wanted = theirs.encode_batch_fast(texts, add_special_tokens=not plain)
    for text, encoding in zip(texts, wanted, strict=True):
        found = ours.encode(text, add_special_tokens=not plain, split_special_tokens=plain)
        if found != encoding.ids:
            yield f"encode {text!r}"
        if ours.decode(found, skip_special_tokens=plain) != theirs.decode(
            found, skip_special_tokens=plain
        ):
            yield f"decode {text!r}"


def compare(name: str, seed: int, count: int, library: Library, report: Report) -> dict[str, Any]:
    """Random strings, each code point, and random bytes, in one tokenizer."""
    folder = report.work / f"agreement-{name}"
    source = shapes.tokenizer_json(name, folder)
    ours = library.tokenizer(shapes.engine_with(library, folder / "engine", source))
    theirs = tokenizers.Tokenizer.from_file(str(source))
    batch, wrong = 1000, 0
    few = max(count // 10, 1)
    points = [] if report.quick else CODE_POINTS
    texts = chain(around_every_code_point(points), strings(seed, count))
    plain = True
    while some := [*islice(texts, batch)]:
        plain = not plain
        for difference in differences(theirs, ours, some, plain=plain):
            wrong += 1
            report.say(f"{name}: {difference}")
    theirs.encode_special_tokens = False
    for data in broken(seed, few):
        if ours.encode(data) != theirs.encode(data.decode(errors="replace")).ids:
            wrong += 1
            report.say(f"{name}: encode {data!r}")
    report.say(f"{name}: {count} random strings compared, {wrong} differ")
    return {
        "contender": OURS,
        "tokenizer": name,
        "strings": count,
        "broken": few,
        "decoded": count,
        "differences": wrong,
        "error": None,
    }


@benchmark("tokenizer", repeats=3, quick_peers=True)
@click.option("--strings", "count", default=200_000, help="Random strings, over all tokenizers.")
@click.option("--seed", default=1, help="Of the random strings.")
def main(report: Report, count: int, seed: int) -> Result:
    """Compare the C++ tokenizer with `tokenizers`: ids, load, memory and speed."""
    library_path = built("release", targets=("qwenport_stand_in",)) / "libqwenport_stand_in.so"
    library = Library(library_path)
    names = (*shapes.SHAPES, *shapes.BUNDLED)
    count = 1000 if report.quick else max(count // len(names), 1)
    report.settings |= {"strings": count * len(names), "seed": seed}
    size = 200_000 if report.quick else 10_000_000
    texts = report.work / f"documents-{size}.json"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text(json.dumps(documents(size)), encoding="utf-8")
    requests: dict[tuple[str, str], dict[str, Any]] = {}
    for name in SIZES:
        folder = make(name, report)
        engine = shapes.engine_with(library, folder / "engine", folder / "tokenizer.json")
        given = {"documents": str(texts)}
        requests[name, OURS] = {"library": str(library_path), "engine": str(engine), **given}
        if report.peers:
            requests[name, PEER] = {"tokenizer": str(folder / "tokenizer.json"), **given}
    for turn in report.turns():
        for (name, contender), request in requests.items():
            time_one(name, contender, request, turn, report)

    compared = [
        compare(name, seed + number, count, library, report) for number, name in enumerate(names)
    ]

    def values(name: str, contender: str, key: str) -> list[Any]:
        return [
            run[key]
            for run in report.data["runs"]
            if (run["tokenizer"], run["contender"]) == (name, contender) and run[key] is not None
        ]

    timed = [
        {
            "contender": contender,
            "tokenizer": name,
            **{key: middle(values(name, contender, key)) for key in FIGURES},
            "tokens": next(iter(values(name, contender, "tokens")), None),
            "error": next(iter(values(name, contender, "error")), None)
            or different(values(name, OURS, "sha256") + values(name, PEER, "sha256")),
        }
        for name, contender in requests
    ]
    wrong = sum(row["differences"] for row in compared)
    bars = [Bar("strings with other ids or texts", wrong, 0, "at most", "strings")]
    for name in SIZES:
        ours, peer = (middle(values(name, who, "bytes_per_second")) for who in (OURS, PEER))
        ratio = ours / peer if ours and peer else None
        bars.append(Bar(f"{name}: speed to {PEER}'s", ratio, 1, "at least", "x"))
    keys = ("load_cpu_seconds", "loaded_bytes")
    load, memory = (middle(values("qwen25", OURS, key)) for key in keys)
    bars.append(Bar("CPU time of the load of 151,643 tokens", load, 0.1, "at most", "s"))
    bars.append(Bar("its memory", memory and memory / MB, 60, "at most", "MB"))
    tables = [
        table("Random strings", AGREEMENT, compared),
        table("One thread, CPU time, medians", COLUMNS, timed),
    ]
    return Result(tables, [*compared, *timed], bars, (OURS,))


def different(hashes: list[str]) -> str | None:
    """An error if not all tokens were the same."""
    return "the ids differ" if len({*hashes}) > 1 else None


if __name__ == "__main__":
    main()
