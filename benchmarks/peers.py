"""The peers' environments: one virtual environment each, every package pinned, reused when present.

python benchmarks/peers.py            # all of them; the benchmarks make what they need themselves
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from measure import WORK, last_line

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
PEERS = ("genai", "optimum")
STAMP = ".installed"


@dataclass(frozen=True)
class Peer:
    """A peer's environment."""

    name: str
    path: Path

    @property
    def python(self) -> Path:
        """The environment's Python interpreter."""
        return self.path / "bin" / "python"

    def command(self, name: str) -> Path:
        """The path of a command that the peer installs."""
        return self.path / "bin" / name


def ensure(name: str, work: Path = WORK) -> Peer:
    """Return a peer's environment, created first if it is missing or was made from other pins.

    Raises:
        click.ClickException: pip could not install it.
    """
    peer = Peer(name, (work / "envs" / name).resolve())
    requirements = REQUIREMENTS / f"{name}.txt"
    pins, stamp = requirements.read_text(encoding="utf-8"), peer.path / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == pins:
        return peer
    click.echo(f"installing {name} (once)", err=True)
    if not peer.python.exists():
        _run(name, [sys.executable, "-m", "venv", str(peer.path)])
    _run(name, [str(peer.python), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
    stamp.write_text(pins, encoding="utf-8")
    return peer


def _run(name: str, command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise click.ClickException(f"cannot install {name}: {last_line(run.stderr)}")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(PEERS))
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=WORK,
    show_default="benchmarks/work",
    help="The environments go into its folder envs.",
)
def main(names: tuple[str, ...], work: Path) -> None:
    """Install the peers that the benchmarks compare Qwenport with: NAMES, or all."""
    for name in names or PEERS:
        click.echo(f"{name}: {ensure(name, work).python}")


if __name__ == "__main__":
    main()
