"""The C++ library refuses an engine's files that were changed since it was built, and what is no file."""

from __future__ import annotations

import ctypes as c
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from .runtime import ERRORS, Library


def files_checked(library: Library, directory: Path) -> tuple[str, str]:
    message = c.create_string_buffer(1024)
    code = library.c.test_files(str(directory).encode(), message)
    return ERRORS.get(code, ""), message.value.decode()


def test_a_plan_or_plugin_that_was_changed_is_refused(
    library: Library, engine_of, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(engine_of("tiny-qwen2.5").path, engine)
    assert files_checked(library, engine) == ("", "")

    plugin = engine / "libplugins.so"
    plugin.write_bytes(b"a plugin")
    manifest = json.loads((engine / "qwenport.json").read_text())
    manifest["plugins"] = [plugin.name]
    digest = hashlib.sha256(b"a plugin").hexdigest()
    manifest["files"][plugin.name] = {"bytes": 8, "sha256": digest}
    (engine / "qwenport.json").write_text(json.dumps(manifest))
    assert files_checked(library, engine) == ("", "")

    for path, complaint in ((plugin, "libplugins.so"), (engine / "engine.plan", "engine.plan")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        error, text = files_checked(library, engine)
        assert error == "bad engine"
        assert f"{complaint}: changed since it was built" in text
        path.write_bytes(content + b"x")
        error, text = files_checked(library, engine)
        assert error == "bad engine"
        assert f"{len(content) + 1} bytes, the manifest says {len(content)}" in text
        path.unlink()
        error, text = files_checked(library, engine)
        assert error == "bad engine"
        assert f"{complaint}: cannot be read: No such file or directory" in text
        path.write_bytes(content)


def put_instead(file: Path, kind: str) -> None:
    """Replace a file by something that is none."""
    content = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        elsewhere = file.with_name("elsewhere")
        elsewhere.write_bytes(content)
        file.symlink_to(elsewhere)


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("name", ["qwenport.json", "engine.plan"])
@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("directory", "not a regular file"),
        ("pipe", "not a regular file"),
        ("device", "a symbolic link; an engine directory holds files only"),
        ("link", "a symbolic link; an engine directory holds files only"),
    ],
)
def test_what_is_no_file_is_refused(
    library: Library, engine_of, tmp_path: Path, name: str, kind: str, complaint: str
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(engine_of("tiny-qwen2.5").path, engine)
    put_instead(engine / name, kind)
    assert files_checked(library, engine) == ("bad engine", f"{engine / name}: {complaint}")
