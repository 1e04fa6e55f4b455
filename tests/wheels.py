"""The distribution as pip makes and installs it, without network and without settings of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("exporter", "plugins", "engines", "validate")
FOLDERS = {"qwenport": "qwenport", **{f"qwenport.{room}": room for room in ROOMS}}
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")


def copy_sources(copy: Path) -> None:
    """Copy what is packaged, so that nothing is written into the repository."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, copy)


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        env={k: v for k, v in os.environ.items() if not k.startswith("PIP_")},
        capture_output=True,
        text=True,
        check=False,
    )


def make_wheel(copy: Path) -> Path:
    """The wheel of a copy that `copy_sources` made."""
    made = pip("wheel", *OFFLINE, "--wheel-dir", copy / "dist", copy)
    assert made.returncode == 0, made.stderr
    (wheel,) = (copy / "dist").glob("*none-any.whl")
    return wheel


def install(wheel: Path, venv: Path) -> None:
    """Install a wheel, and nothing that it depends on, into a new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    installed = pip("--python", venv, "install", *OFFLINE, wheel)
    assert installed.returncode == 0, installed.stderr
