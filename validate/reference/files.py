"""The files of a checkpoint that the oracle reads: config.json and the safetensors files, and no other.

transformers' from_pretrained looks for more: an adapter_config.json (and applies the adapter if peft is installed),
a generation_config.json, other weights. It is shown a directory that has none of these.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from qwenport.validate.errors import ValidationError
from qwenport.validate.failures import cut, one_line, reported

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files: model.safetensors, or what the index names if there is one.

    Raises:
        ValidationError: the index cannot be read, or names what is no safetensors file below `path`.
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


def opened(file: Path) -> Any:
    """safetensors' handle of a file, for torch; a context manager.

    Raises:
        ValidationError: it is missing or damaged.
    """
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        said = one_line(error, 100)
        raise ValidationError(f"{cut(file)}: cannot be read ({said})") from error


@contextlib.contextmanager
def visible_to_transformers(path: Path) -> Iterator[Path]:
    """A temporary directory with links to the checkpoint's config.json and weights, and nothing beside them.

    Weights that transformers has memory-mapped stay valid when the directory is gone.

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
    """Whether a shard's name in an index is one: a safetensors file below the checkpoint directory."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        return False
    parts = PurePosixPath(name)
    return not parts.is_absolute() and ".." not in parts.parts
