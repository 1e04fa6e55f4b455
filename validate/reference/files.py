"""The files of a checkpoint that the oracle reads: config.json and the safetensors files, and no others.

transformers' from_pretrained looks for more: an adapter_config.json (and applies the adapter if peft is installed),
a generation_config.json, other weights. It gets a directory that has none of these.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import reported
from qwenport.wording import cut, one_line

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DECODER, HEAD = "model.", "lm_head."  # prefixes of transformers' names
BUFFERS = ".rotary_emb.inv_freq"  # older releases saved them; transformers computes them


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files: model.safetensors, or what the index names if there is one.

    Raises:
        ValidationError: the index cannot be read, or names something that is not a safetensors file below `path`.
    """
    index = path / INDEX
    if not index.is_file():
        return [path / SINGLE_FILE]
    with reported(index, "not a safetensors index"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if not _is_inside(name):
                raise ValidationError(
                    f"{cut(index)} names {cut(repr(name))}, no safetensors file of the checkpoint"
                )
    return [path / name for name in sorted(names)]


def known_name(name: str, prefix: str) -> str:
    """transformers' name of a tensor of a checkpoint that puts `prefix` before the decoder's tensors."""
    for outer in _outer(prefix):
        if name.startswith(outer + HEAD):
            return name.removeprefix(outer)
    return DECODER + name.removeprefix(prefix) if name.startswith(prefix) else name


def key_mapping(prefix: str) -> dict[str, str] | None:
    """The same for `from_pretrained`, which understands names without any prefix itself."""
    if prefix in (DECODER, ""):
        return None
    outer = "|".join(map(re.escape, sorted(_outer(prefix), key=len, reverse=True)))
    return {rf"^(?:{outer}){re.escape(HEAD)}": HEAD, f"^{re.escape(prefix)}": DECODER}


def _outer(prefix: str) -> list[str]:
    """The possible prefixes of the model, given its decoder's: all of it, or leading parts."""
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]


def tensor_files(path: Path) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    """(name, file, shape) of every tensor; for one in several shards, the shard that the index names.

    Raises:
        ValidationError: see `weight_files` and `opened`.
    """
    indexed = None
    if (path / INDEX).is_file():
        with reported(path / INDEX, "not a safetensors index"):
            indexed = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for file in weight_files(path):
        with opened(file) as content:
            for name in content.keys():  # noqa: SIM118  not a dict
                if indexed is None or path / str(indexed.get(name)) == file:
                    yield name, file, tuple(content.get_slice(name).get_shape())


def opened(file: Path) -> Any:
    """A safetensors handle for a file, for torch; a context manager.

    Raises:
        ValidationError: the file is missing or damaged.
    """
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        said = one_line(error, 100)
        raise ValidationError(f"{cut(file)}: cannot be read ({said})") from error


@contextlib.contextmanager
def visible_to_transformers(path: Path) -> Iterator[Path]:
    """A temporary directory with links to the checkpoint's config.json and weights, and nothing else.

    Weights that transformers has memory-mapped stay valid after the directory is removed.

    Raises:
        ValidationError: there is no config.json, or see `weight_files`.
    """
    files = weight_files(path)
    names = [CONFIG, *(str(file.relative_to(path)) for file in files)]
    if files != [path / SINGLE_FILE]:
        names.append(INDEX)
    if not (path / CONFIG).is_file():
        raise ValidationError(f"{cut(path)} has no {CONFIG}")
    with tempfile.TemporaryDirectory(prefix="qwenport-reference-") as folder:
        for name in names:
            link = Path(folder) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.abspath(path / name))
        yield Path(folder)


def _is_inside(name: object) -> bool:
    """Whether a shard name in an index is valid: a safetensors file below the checkpoint directory."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        return False
    parts = PurePosixPath(name)
    return not parts.is_absolute() and ".." not in parts.parts
