"""`qwenport doctor`: what is installed, which targets work here, and how to get the rest.

Nothing heavy is imported: versions come from package metadata and the GPUs from the CUDA driver
itself. Only onnxruntime is loaded, to ask for its execution providers.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from qwenport import __version__
from qwenport.contract import ONNXRUNTIME

CUDA_TOOLKIT = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Package:
    """A distribution, its version (None: not installed) and what installs it."""

    name: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as the driver describes it."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Facts:
    """What was found on this machine. Versions are None for what is missing."""

    qwenport: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    onnxruntime_providers: tuple[str, ...]
    onnxruntime_library: str | None
    cache: str | None
    cuda_driver: str | None
    gpus: tuple[Gpu, ...]
    nvcc: str | None

    def has(self, *names: str) -> bool:
        """Whether at least one of the distributions `names` is installed."""
        return any(p.name in names and p.version is not None for p in self.packages)


@dataclass(frozen=True)
class Target:
    """Whether a target can be built and run here.

    `builds` is None if there is nothing to build. `missing` pairs what is absent with the
    command, or the sentence, that says how to get it.
    """

    name: str
    builds: bool | None
    runs: bool
    missing: tuple[tuple[str, str], ...]


BASE = "pip install qwenport"
CPU = "pip install 'qwenport[cpu]'"
RTX = "pip install 'qwenport[rtx]'"
GPU = "pip install 'qwenport[gpu]'"

# distribution, purpose, command that installs it
PACKAGES = (
    ("torch", "traces the model and is the reference", BASE),
    ("transformers", "reference model, tokenizer", BASE),
    ("onnx", "package format", BASE),
    ("onnx-ir", "graph construction", BASE),
    ("polygraphy", "engine builder and runner", BASE),
    ("onnxruntime", "target onnxruntime on the CPU", CPU),
    ("onnxruntime-gpu", "target onnxruntime on CUDA", GPU),
    ("tensorrt-rtx", "target tensorrt-rtx", RTX),
    ("tensorrt", "target tensorrt", GPU),
)

NO_GPU = ("NVIDIA GPU", "run on a machine with one and its driver")


def collect() -> Facts:
    """Inspect this machine."""
    driver, gpus = cuda_devices()
    return Facts(
        qwenport=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=tuple(
            Package(name, _version(name), purpose, install) for name, purpose, install in PACKAGES
        ),
        onnxruntime_providers=_onnxruntime_providers(),
        onnxruntime_library=onnxruntime_library(),
        cache=_cache(),
        cuda_driver=driver,
        gpus=gpus,
        nvcc=_nvcc_version(),
    )


def targets(facts: Facts) -> tuple[Target, ...]:
    """Judge every target by `facts`."""
    from qwenport.engines import FLAVOURS

    no_gpu = () if facts.gpus else (NO_GPU,)
    names = {"sm" + gpu.compute_capability.replace(".", "") for gpu in facts.gpus}

    def unserved(target: str) -> tuple[tuple[str, str], ...]:
        """What is missing if the target has no kernels for any GPU here; else empty."""
        served = FLAVOURS[target].gpus
        if names & set(served):
            return ()
        return ((f"GPU for {target}", f"it serves {', '.join(served)}"),) if names else no_gpu

    cpu = "CPUExecutionProvider" in facts.onnxruntime_providers
    cuda = "CUDAExecutionProvider" in facts.onnxruntime_providers
    # Both distributions provide the module `onnxruntime`, and the one installed last wins.
    swap = "pip uninstall -y onnxruntime && " if facts.has("onnxruntime") else ""
    rtx, tensorrt = facts.has("tensorrt-rtx"), facts.has("tensorrt")
    no_rtx_gpu, no_tensorrt_gpu = unserved("tensorrt-rtx"), unserved("tensorrt")
    whole = tensorrt and not no_tensorrt_gpu
    return (
        Target(ONNXRUNTIME, True, cpu, () if cpu else (("onnxruntime", CPU),)),
        Target(
            "onnxruntime (CUDA)",
            None,
            cuda and not no_gpu,
            (() if cuda else (("onnxruntime-gpu", swap + GPU),)) + no_gpu,
        ),
        Target(
            "tensorrt-rtx",
            rtx,
            rtx and not no_rtx_gpu,
            (() if rtx else (("tensorrt-rtx", RTX),)) + no_rtx_gpu,
        ),
        Target(
            "tensorrt",
            whole,
            whole,
            (() if tensorrt else (("tensorrt", GPU),)) + no_tensorrt_gpu,
        ),
    )


def remedies(facts: Facts, judged: tuple[Target, ...]) -> dict[str, str]:
    """What is missing, each with the command or sentence that says how to get it, in reading order."""
    missing = {p.name: p.install for p in facts.packages if not p.version and p.install == BASE}
    for target in judged:
        missing.update(target.missing)
    return missing


def cuda_devices() -> tuple[str | None, tuple[Gpu, ...]]:
    """Ask libcuda for the CUDA version that the driver supports and for its devices.

    Returns (None, ()) without a driver, and no devices if the driver reports none.
    """
    library = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None, ()
    number = ctypes.c_int()
    driver = None
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        driver = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return driver, ()
    return driver, tuple(_device(cuda, index) for index in range(number.value))


def _device(cuda: ctypes.CDLL, index: int) -> Gpu:
    """Describe device `index`; libcuda must be initialised."""
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", memory.value)


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _onnxruntime_providers() -> tuple[str, ...]:
    """Execution providers that the installed onnxruntime was built with; () if it cannot load."""
    try:
        return tuple(importlib.import_module("onnxruntime").get_available_providers())
    except (ImportError, AttributeError):  # a half-removed onnxruntime imports as an empty package
        return ()


def onnxruntime_library() -> str | None:
    """The path of the shared library in the installed onnxruntime, which C and C++ programs load."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted((Path(folder) / "capi").glob("libonnxruntime.so.*")):
            return str(file)
    return None


def _cache() -> str | None:
    """The folder of the cache, which need not exist; None if this user has no home directory."""
    from qwenport.engines import CacheError, cache_folder

    with contextlib.suppress(CacheError):
        return str(cache_folder())
    return None


def _nvcc_version() -> str | None:
    """Version of nvcc on the PATH or in the toolkit's usual location."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_TOOLKIT)
    if nvcc is None:
        return None
    try:
        text = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"V(\d[\d.]*)", text)
    return match[1] if match else None


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(as_json: bool) -> None:
    """Show what is installed, which targets work here, and how to get the rest.

    Nothing is changed and nothing is fetched. Each thing that is missing is listed with the command,
    or the sentence, that remedies it.

    \b
    Examples:
      qwenport doctor
      qwenport doctor --json
    """
    facts = collect()
    judged = targets(facts)
    if as_json:
        report = asdict(facts)
        report["targets"] = [
            {"name": t.name, "builds": t.builds, "runs": t.runs, "missing": dict(t.missing)}
            for t in judged
        ]
        report["remedies"] = remedies(facts, judged)
        click.echo(json.dumps(report, indent=2))
    else:
        _print(facts, judged)


def _print(facts: Facts, judged: tuple[Target, ...]) -> None:
    """Print the tables, then one remedy per line, unwrapped so that it can be copied."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    absent = "[dim]not found[/]"
    console = Console(highlight=False)

    software = Table(box=box.SIMPLE_HEAD, title="Installed", title_justify="left")
    for heading in ("", "version", "for"):
        software.add_column(heading)
    software.add_row("python", facts.python, facts.platform)
    software.add_row("qwenport", facts.qwenport, "")
    for package in facts.packages:
        software.add_row(package.name, package.version or absent, package.purpose)
    software.add_row("nvcc", facts.nvcc or absent, "compiles the plugins and the C++ library")
    software.add_row("CUDA driver", facts.cuda_driver or absent, "runs anything on a GPU")
    console.print(software)

    if facts.onnxruntime_providers:
        click.echo("onnxruntime providers: " + ", ".join(facts.onnxruntime_providers))
    if facts.onnxruntime_library:
        click.echo(f"onnxruntime library, for C++: {facts.onnxruntime_library}")
    if facts.cache:
        click.echo(f"cache: {facts.cache} (`qwenport cache list`)")
    for index, gpu in enumerate(facts.gpus):
        click.echo(
            f"GPU {index}: {gpu.name}, compute capability {gpu.compute_capability}, "
            f"{gpu.memory_bytes / 2**30:.1f} GiB"
        )
    if not facts.gpus:
        click.echo("GPUs: none")
    click.echo()

    answer = {True: "[green]yes[/]", False: "[red]no[/]", None: "[dim]nothing to build[/]"}
    table = Table(box=box.SIMPLE_HEAD, title="Targets on this machine", title_justify="left")
    for heading in ("target", "build", "run", "missing"):
        table.add_column(heading)
    for target in judged:
        missing = ", ".join(what for what, _ in target.missing)
        table.add_row(target.name, answer[target.builds], answer[target.runs], missing)
    console.print(table)

    missing_here = remedies(facts, judged)
    if missing_here:
        click.echo("To get what is missing:")
        width = max(map(len, missing_here))
        for what, remedy in missing_here.items():
            click.echo(f"  {what:<{width}}  {remedy}")
