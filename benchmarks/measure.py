"""One command in one child process: its time, its peak memory, and what it left on disk.

The parent stays small on purpose: on Linux a child's peak RSS starts at its parent's size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "work"
CONTENDERS = ROOT / "benchmarks" / "contenders"


@dataclass(frozen=True)
class Run:
    """A finished child process.

    Attributes:
        seconds: wall time from start to exit, including the interpreter's startup.
        cpu_seconds: CPU time of the process and of those that it waited for.
        peak_rss: in bytes; of the largest single process if the child started others.
        code: exit code, negative for a signal.
        stdout: the whole standard output.
        error: the last line it wrote, if it failed; without paths on this machine.
        load: the 1-minute load average at its start.
        others: how many cores everything else on the machine kept busy meanwhile; None if unknown.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    code: int
    stdout: str
    error: str | None
    load: float
    others: float | None

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object that is its stdout, or the last line of it; empty if the child failed."""
        if self.code:
            return {}
        try:
            data: dict[str, Any] = json.loads(self.stdout)
        except ValueError:
            data = json.loads(last_line(self.stdout))
        return data


def measure(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Run:
    """Run a command to completion. Its stderr goes to `log`, its stdout into the result."""
    log.parent.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    output = log.with_suffix(".out")
    with output.open("wb") as out, log.open("wb") as err:
        busy_before, start = busy_seconds(), time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=dict(environment or child_environment()),
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds, busy = time.perf_counter() - start, busy_seconds()
    child.returncode = code = os.waitstatus_to_exitcode(status)
    others, own = None, usage.ru_utime + usage.ru_stime
    if busy is not None and busy_before is not None:
        others = round(max(0.0, busy - busy_before - own) / seconds, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    stdout = output.read_text(encoding="utf-8", errors="replace")
    error = None
    if code:
        said = log.read_text(encoding="utf-8", errors="replace") + "\n" + stdout
        error = without_paths(last_line(said) or f"exit code {code}")
    return Run(seconds, own, usage.ru_maxrss * unit, code, stdout, error, round(load, 2), others)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_seconds() -> float | None:
    """CPU seconds used by all processes since the machine started; None if unknown."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft, *_ = map(int, line.split()[1:])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def child_environment(own: bool = True) -> dict[str, str]:
    """The environment of a child process: offline, and without our import path unless it is our `own`."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(WORK / "hugging-face"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not own:
        environment.pop("PYTHONPATH", None)
    return environment


def written_bytes(directory: Path, source: Path) -> int:
    """Bytes of disk that `directory` occupies; files that are hard links to `source`'s are not counted.

    If the file system shares extents (reflinks), a clone counts as written although it is not.
    """
    shared = {(s.st_dev, s.st_ino) for s in (p.stat() for p in source.rglob("*") if p.is_file())}
    total = 0
    for path in directory.rglob("*"):
        status = path.lstat()
        if path.is_file() and (status.st_dev, status.st_ino) not in shared:
            total += status.st_blocks * 512
            shared.add((status.st_dev, status.st_ino))
    return total


def file_bytes(directory: Path, pattern: str) -> int:
    """Apparent size of the files that match a pattern."""
    return sum(path.stat().st_size for path in directory.glob(pattern))


def read_once(directory: Path) -> None:
    """Read a directory's files into the page cache, so that every contender finds them there."""
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def last_line(text: str) -> str:
    """The last non-empty line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def without_paths(text: str) -> str:
    """Replace the paths that are specific to this machine."""
    for path, name in ((ROOT, "."), (sys.prefix, "<python>"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text
