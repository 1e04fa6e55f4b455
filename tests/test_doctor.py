"""`qwenport doctor`: its judgement of invented machines, and its output on this one."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwenport.commands import doctor
from qwenport.commands.doctor import BASE, Facts, Gpu, Package, Target, remedies, targets

CPU_PROVIDERS = ("CPUExecutionProvider",)
CUDA_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def machine(
    *installed: str,
    gpu: str | None = None,
    providers: tuple[str, ...] = (),
    nvcc: str | None = None,
) -> Facts:
    """A machine with the distributions `installed` and a GPU of compute capability `gpu`."""
    return Facts(
        qwenport="0.1.0",
        python="3.11.7",
        platform="somewhere",
        packages=tuple(
            Package(name, "1.0" if name in installed else None, purpose, install)
            for name, purpose, install in doctor.PACKAGES
        ),
        onnxruntime_providers=providers,
        onnxruntime_library=None,
        cache=None,
        cuda_driver="13.0" if gpu else None,
        gpus=(Gpu("A GPU", gpu, 24 << 30),) if gpu else (),
        nvcc=nvcc,
    )


def judged(facts: Facts) -> dict[str, Target]:
    return {target.name: target for target in targets(facts)}


def test_laptop_runs_onnxruntime_and_builds_but_does_not_run_tensorrt_rtx() -> None:
    verdict = judged(machine("onnxruntime", "tensorrt-rtx", providers=CPU_PROVIDERS))
    assert verdict["onnxruntime"].runs
    assert not verdict["onnxruntime (CUDA)"].runs
    assert verdict["tensorrt-rtx"].builds
    assert not verdict["tensorrt-rtx"].runs
    assert dict(verdict["tensorrt-rtx"].missing) == dict([doctor.NO_GPU])


def test_complete_gpu_machine_misses_nothing() -> None:
    facts = machine(
        *(name for name, _, _ in doctor.PACKAGES if name != "onnxruntime"),
        gpu="8.9",
        providers=CUDA_PROVIDERS,
        nvcc="13.0.88",
    )
    verdict = targets(facts)
    assert all(target.runs for target in verdict)
    assert remedies(facts, verdict) == {}


def test_tensorrt_builds_only_where_there_is_a_gpu() -> None:
    assert judged(machine("tensorrt", gpu="9.0"))["tensorrt"].builds
    assert not judged(machine("tensorrt"))["tensorrt"].builds
    assert not judged(machine(gpu="9.0"))["tensorrt"].builds


def test_gpu_older_than_turing_does_not_run_engines_but_runs_onnxruntime() -> None:
    verdict = judged(machine("tensorrt", "tensorrt-rtx", gpu="7.0", providers=CUDA_PROVIDERS))
    assert not verdict["tensorrt"].runs
    assert not verdict["tensorrt-rtx"].runs
    assert verdict["onnxruntime (CUDA)"].runs


@pytest.mark.parametrize(
    ("gpu", "rtx", "tensorrt"),
    [("7.5", True, False), ("8.9", True, True)]
    + [(gpu, False, True) for gpu in ("8.7", "9.0", "10.0", "10.3", "11.0")],
)
def test_a_target_runs_on_the_gpus_that_its_builds_serve(
    gpu: str, rtx: bool, tensorrt: bool
) -> None:
    verdict = judged(machine("tensorrt", "tensorrt-rtx", gpu=gpu))
    assert (verdict["tensorrt-rtx"].runs, verdict["tensorrt"].runs) == (rtx, tensorrt)
    assert verdict["tensorrt-rtx"].builds


def test_remedy_for_cuda_removes_the_cpu_onnxruntime_first() -> None:
    facts = machine("onnxruntime", gpu="8.6", providers=CPU_PROVIDERS)
    remedy = remedies(facts, targets(facts))["onnxruntime-gpu"]
    assert remedy == "pip uninstall -y onnxruntime && pip install 'qwenport[gpu]'"


@pytest.mark.parametrize("name", [name for name, _, _ in doctor.PACKAGES])
def test_every_missing_package_has_the_command_that_installs_it(name: str) -> None:
    facts = machine()
    commands = {package: install for package, _, install in doctor.PACKAGES}
    assert commands[name].startswith(BASE.rpartition(" ")[0])
    assert remedies(facts, targets(facts))[name] == commands[name]


def test_json_says_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine("onnxruntime", "tensorrt-rtx", gpu="8.9", providers=CPU_PROVIDERS)
    monkeypatch.setattr(doctor, "collect", lambda: facts)
    run = CliRunner().invoke(doctor.command, ["--json"], catch_exceptions=False)
    report = json.loads(run.stdout)
    assert run.exit_code == 0
    assert report["gpus"] == [
        {"name": "A GPU", "compute_capability": "8.9", "memory_bytes": 24 << 30}
    ]
    assert {t["name"]: t["runs"] for t in report["targets"]} == {
        target.name: target.runs for target in targets(facts)
    }
    assert report["remedies"] == remedies(facts, targets(facts))


def test_tables_name_every_package_target_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine("onnxruntime", providers=CPU_PROVIDERS)
    monkeypatch.setattr(doctor, "collect", lambda: facts)
    run = CliRunner().invoke(doctor.command, [], catch_exceptions=False)
    assert run.exit_code == 0
    for name, _, _ in doctor.PACKAGES:
        assert name in run.stdout
    for target in targets(facts):
        assert target.name in run.stdout
    for remedy in remedies(facts, targets(facts)).values():
        assert remedy in run.stdout


def test_onnxruntime_that_cannot_load_counts_as_no_provider(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    facts = replace(machine("onnxruntime"), onnxruntime_providers=doctor._onnxruntime_providers())
    assert not judged(facts)["onnxruntime"].runs


def test_onnxruntime_builds_everywhere_and_runs_where_it_is_installed() -> None:
    bare, installed = judged(machine()), judged(machine("onnxruntime", providers=CPU_PROVIDERS))
    assert bare["onnxruntime"].builds and not bare["onnxruntime"].runs
    assert dict(bare["onnxruntime"].missing) == {"onnxruntime": doctor.CPU}
    assert installed["onnxruntime"].builds and installed["onnxruntime"].runs


def test_the_library_for_cpp_is_the_one_in_the_environment() -> None:
    path = doctor.collect().onnxruntime_library
    assert path is not None and Path(path).is_file()
    library = ctypes.CDLL(path)
    assert library.OrtGetApiBase


def test_without_onnxruntime_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.onnxruntime_library() is None


def test_this_machine_can_be_described() -> None:
    facts = doctor.collect()
    assert facts.has("torch")
    assert len(targets(facts)) == 4
