"""Everything that a bare GPU machine needs, compiled and packed beforehand: no network, no TensorRT, no install there.

    python benchmarks/gpu/prepare.py OUT --gpu sm90     # anywhere with `make cpp`'s environment; needs no GPU
    cat gpu-run.tar.gz.* | tar xz && python3 gpu-run/benchmarks/gpu/run.py     # on the GPU machine

It needs Python 3.11 or newer with torch, transformers, onnx-ir, pytest, pytest-xdist and hypothesis there. A wheel that
it lacks can travel with --wheel. The archive is cut into parts that each fit one transfer.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cpp"))
from builds import ROOT, BuildError, built

from qwenport import QwenportError, engines, exporter, validate
from qwenport.contract import GPUS, ONNXRUNTIME, TENSORRT_RTX

NAME = "gpu-run"
ROOMS = ("exporter", "plugins", "engines", "validate")  # links in qwenport/, folders there
CHECKPOINTS = ("tiny-qwen2.5", "tiny-qwen2-moe", "tiny-qwen2.5-1m")
# setting of tests/cpp/builds.py -> target and file of what the GPU machine runs
PLUGINS = {"qwenport_plugins": "libqwenport_plugins.so"}
FILES = {
    "plugins": {"drive_on_gpu": "drive_on_gpu", "plugin_calls": "libplugin_calls.so"},
    "plugins-cuda": PLUGINS,
    "plugins-cuda-many": PLUGINS,
    "plugins-cuda-80": PLUGINS,
    "release": {"cuda_device": "cuda_device", "qwenport": "runtime/libqwenport.so"},
}
FOR_THE_GPU = ("plugins-cuda", "plugins-cuda-many")
QUICK = ("plugins", "plugins-cuda", "release")
MIB = 1 << 20


def copy_sources(bundle: Path) -> None:
    """Our Python, the tests for a GPU and the benchmarks; builds.py only looks for what was compiled here."""
    left_out = shutil.ignore_patterns("__pycache__", "cpp", "results", "work", "requirements")

    def copied(name: str, to: str) -> None:
        shutil.copytree(ROOT / name, bundle / to, ignore=left_out, dirs_exist_ok=True)

    linked = shutil.ignore_patterns("__pycache__", *ROOMS)
    shutil.copytree(ROOT / "qwenport", bundle / "qwenport", ignore=linked)
    for room in ROOMS:
        copied(room, f"qwenport/{room}")
    for name in ("benchmarks", "tests/gpu", *(f"examples/{name}" for name in CHECKPOINTS)):
        copied(name, name)
    (bundle / "tests" / "cpp").mkdir()
    files = (*ROOT.glob("tests/*.py"), *(ROOT / "tests" / "cpp").glob("[_r]*.py"))
    for file in (ROOT / "pyproject.toml", *files):
        if not file.name.startswith("test_"):
            shutil.copy(file, bundle / file.relative_to(ROOT))
    shutil.copy(ROOT / "benchmarks" / "gpu" / "prebuilt.py", bundle / "tests" / "cpp" / "builds.py")


def copy_builds(bundle: Path, gpu: str, quick: bool) -> None:
    """Libraries and programs, where `built` looks for them."""
    for setting in QUICK if quick else FILES:
        click.echo(f"compiling {setting}")
        alone = gpu if setting in FOR_THE_GPU and not quick else None
        folder = built(setting, gpu=alone, targets=tuple(FILES[setting]))
        for name in FILES[setting].values():
            target = bundle / "build" / "cpp" / setting / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, target)


def make_engines(bundle: Path, gpu: str, quick: bool) -> None:
    """An engine of each bundled checkpoint for every target that builds without the GPU and runs on it."""
    targets = [ONNXRUNTIME, *([TENSORRT_RTX] if gpu in GPUS[TENSORRT_RTX] else [])]
    (bundle / "engines").mkdir()
    with TemporaryDirectory() as scratch:
        for name in CHECKPOINTS[:1] if quick else CHECKPOINTS:
            package = exporter.export(ROOT / "examples" / name, Path(scratch) / name)
            for target in targets:
                click.echo(f"building {name} for {target}")
                gpus = gpu if target == TENSORRT_RTX else None
                folder = bundle / "engines" / f"{name}-{target}"
                engines.build(package.path, folder, target=target, gpus=gpus, make_proof=prove)


def prove(package: exporter.Package) -> engines.Proof:
    """Keep a proof in a package, for its engines to carry."""
    kept = validate.keep_proof(package, seconds=validate.PROOF_SECONDS)
    if kept.proof is None:
        raise click.ClickException(kept.note)
    return kept.proof


def pack(bundle: Path, out: Path, part_bytes: int) -> list[Path]:
    """The archive in parts."""
    with TemporaryDirectory(dir=out) as scratch:
        archive = Path(scratch) / "archive"
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(bundle, arcname=NAME)
        parts: list[Path] = []
        with archive.open("rb") as stream:
            while stream.tell() < archive.stat().st_size:
                parts.append(out / f"{NAME}.tar.gz.{len(parts):02}")
                with parts[-1].open("wb") as part:
                    left = part_bytes
                    while left and (block := stream.read(min(left, MIB))):
                        part.write(block)
                        left -= len(block)
    return parts


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--gpu", default="sm90", help="The GPU machine's architecture.")
@click.option(
    "--part-size",
    type=click.FloatRange(min=0.1),
    default=64,
    metavar="MIB",
    help="The most that one transfer takes.",
)
@click.option(
    "--wheel",
    "wheels",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A wheel for the GPU machine's Python, such as onnxruntime-gpu's; may be repeated.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A smoke test: the tests' own builds, for every architecture, and one engine.",
)
def main(out: Path, gpu: str, part_size: float, wheels: tuple[Path, ...], quick: bool) -> None:
    """Compile and pack what benchmarks/gpu/run.py needs on a machine with a GPU; writes OUT/gpu-run.tar.gz.NN."""
    if gpu not in GPUS["plugins"]:
        raise click.BadParameter(
            f"{gpu}: the plugins are for {', '.join(GPUS['plugins'])}", param_hint="--gpu"
        )
    if out.exists() and any(out.iterdir()):
        raise click.BadParameter(f"{out} is not empty", param_hint="OUT")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=out) as scratch:
            bundle = Path(scratch) / NAME
            bundle.mkdir()
            copy_sources(bundle)
            copy_builds(bundle, gpu, quick)
            make_engines(bundle, gpu, quick)
            (bundle / "wheels").mkdir()
            for wheel in wheels:
                shutil.copy(wheel, bundle / "wheels")
            parts = pack(bundle, out, int(part_size * MIB))
            for folder in sorted(bundle.iterdir()):
                files = (
                    [folder] if folder.is_file() else [f for f in folder.rglob("*") if f.is_file()]
                )
                size = sum(file.stat().st_size for file in files)
                click.echo(f"  {folder.name:16} {size / MIB:8.1f} MiB")
    except (BuildError, QwenportError) as error:
        raise click.ClickException(str(error)) from error
    for part in parts:
        click.echo(f"{part}  {part.stat().st_size / MIB:.1f} MiB")
    click.echo(
        f"{len(parts)} transfer{'s' if len(parts) > 1 else ''} of at most {part_size:g} MiB; on the GPU machine:\n"
        f"  cat {NAME}.tar.gz.* | tar xz && python3 {NAME}/benchmarks/gpu/run.py"
    )


if __name__ == "__main__":
    main()
