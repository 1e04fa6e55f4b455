"""Engines built without a GPU: what is in the directory, and what happens when a build cannot be."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport import engines, exporter
from qwenport.contract import DTYPES, GPUS
from qwenport.engines.targets import FLAVOURS, parse_gpus

RTX = FLAVOURS["tensorrt-rtx"]
RTX_GPUS = GPUS["tensorrt-rtx"]


@given(
    st.lists(st.sampled_from(RTX_GPUS), min_size=1, unique=True), st.sampled_from(sorted(DTYPES))
)
def test_gpu_lists_are_taken_as_written_unless_a_gpu_lacks_the_dtype(gpus, dtype):
    text = ",".join(gpu.upper() for gpu in gpus)
    if "sm75" in gpus and dtype != "fp16":
        with pytest.raises(engines.BuildError, match="sm75 has no kernels"):
            parse_gpus(text, RTX, dtype)
    else:
        assert parse_gpus(text, RTX, dtype) == tuple(gpus)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sm999", "no TensorRT has kernels for 'sm999'; tensorrt-rtx serves sm75, "),
        ("sm70", "no TensorRT has kernels for 'sm70'"),
        ("89", r"no TensorRT has kernels for '89' \(did you mean sm89\?\)"),
        ("", "an empty name in the list of GPUs"),
        ("sm86,,sm89", "an empty name"),
        *[
            (
                gpu,
                f"tensorrt-rtx has no kernels for {gpu}, it serves .*sm121; `build --target tensorrt` has",
            )
            for gpu in ("sm87", "sm90", "sm100", "sm103", "sm110")
        ],
        ("sm86,sm86", "named twice"),
    ],
)
def test_gpus_that_cannot_be_served_are_named(text, complaint):
    with pytest.raises(engines.BuildError, match=complaint):
        parse_gpus(text, RTX, "fp16")


def test_the_gpus_of_tensorrt_rtx_are_those_that_its_builder_knows() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert set(RTX_GPUS) == known


@pytest.mark.parametrize(
    ("gpu", "complaint"),
    [
        *[(gpu, None) for gpu in GPUS["tensorrt"]],
        (
            "sm75",
            "tensorrt has no kernels for sm75, it serves sm80, .*; `build --target tensorrt-rtx` has, in fp16",
        ),
        ("sm70", "tensorrt has no kernels for sm70, it serves sm80, "),
    ],
)
def test_tensorrt_judges_the_local_gpu_whether_it_is_named_or_not(gpu, complaint, monkeypatch):
    monkeypatch.setattr("qwenport.engines.targets.current_gpu", lambda: gpu)
    for text in (None, gpu):
        if complaint is None:
            assert parse_gpus(text, FLAVOURS["tensorrt"], "bf16") == (gpu,)
        elif text is None or gpu == "sm75":
            with pytest.raises(engines.BuildError, match=complaint):
                parse_gpus(text, FLAVOURS["tensorrt"], "bf16")


def test_tensorrt_is_built_where_its_gpu_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(engines.BuildError, match="build on a machine with an sm87 GPU"):
        parse_gpus("sm87", FLAVOURS["tensorrt"], "fp16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_directory_says_what_it_holds(engine_of, package_of, dtype):
    engine, package = engine_of(dtype), package_of(dtype)
    manifest = json.loads((engine.path / "qwenport.json").read_text())
    assert manifest == engine.manifest
    assert manifest["gpus"] == [g for g in RTX_GPUS if g != "sm75" or dtype == "fp16"]
    assert manifest["flavour"] == "tensorrt-rtx"
    assert manifest["max_batch"] == 3
    assert manifest["files"]["engine.plan"] == {
        "bytes": engine.plan.stat().st_size,
        "sha256": exporter.sha256(engine.plan),
    }
    names = {b["name"] for b in manifest["bindings"]["inputs"]}
    decode, prefill = manifest["profiles"]
    assert names == set(decode) == set(prefill)
    for name in ("input_ids", "position_ids"):
        assert decode[name] == {"min": [1, 1], "opt": [1, 1], "max": [3, 2]}
        assert prefill[name] == {"min": [1, 1], "opt": [1, 512], "max": [3, 512]}  # the whole cache
    assert decode["logits_indices"]["max"] == [3, 2]
    assert all("capacity" not in b["shape"] for b in manifest["bindings"]["outputs"])
    assert {path.name for path in engine.path.iterdir()} == {
        "engine.plan",
        "qwenport.json",
        "tokenizer.qwenport",
        *(name for name in exporter.COMPANIONS if (package.path / name).is_file()),
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])  # fp32 has no fused attention
def test_a_decoder_layer_is_at_most_240_tensorrt_layers(engine_of, package_of, dtype):
    layers = package_of(dtype).config.num_hidden_layers
    assert engine_of(dtype).manifest["layers"] / layers <= 240


def test_an_engine_holds_each_weight_once(engine_of, package_of):
    """Beside them, kernels for five GPUs in two profiles: 1.6 times the size of a model this small."""
    weights = package_of("bf16").manifest["weights"]["bytes"]
    assert weights < engine_of("bf16").plan.stat().st_size < 2.8 * weights


def test_a_package_is_the_same_after_a_build(engine_of, package_of):
    engine_of("bf16")
    package = package_of("bf16")
    assert exporter.load_package(package.path) == package  # every file is hashed


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_seq_len": 513}, "max sequence length 513"),
        ({"max_seq_len": 0}, "max sequence length 0"),
        ({"max_batch": 9}, "max batch 9"),
        ({"gpus": "sm42"}, "no TensorRT has kernels"),
        ({"target": "tpu"}, "target 'tpu'"),
    ],
)
def test_a_refused_build_leaves_nothing(package_of, tmp_path, options, complaint):
    options = {"target": "tensorrt-rtx", **options}
    with pytest.raises(engines.BuildError, match=complaint):
        engines.build(package_of("bf16").path, tmp_path / "engine", **options)
    assert not list(tmp_path.iterdir())


def test_a_build_that_tensorrt_refuses_gives_its_reason_and_leaves_nothing(
    package_of, tmp_path, monkeypatch
):
    monkeypatch.setattr("qwenport.engines.targets.FP16_ONLY", ())
    with pytest.raises(engines.BuildError, match="Turing"):
        engines.build(
            package_of("fp32").path, tmp_path / "engine", target="tensorrt-rtx", gpus="sm75"
        )
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_stops_and_leaves_nothing(package_of, tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        assert what.startswith("TensorRT: ")
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engines.build(
            package_of("bf16").path, tmp_path / "engine", target="tensorrt-rtx", progress=interrupt
        )
    assert not list(tmp_path.iterdir())


def test_a_plan_that_cannot_be_written_fails_the_build_and_leaves_nothing(
    package_of, tmp_path, monkeypatch
):
    """An exception inside TensorRT's callback once left a damaged engine behind."""
    real_open = Path.open

    class FullDisk:
        def __init__(self, stream):
            self.stream, self.room = stream, 100_000

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(data)

        def close(self):
            self.stream.close()

    def opened(path, mode="r", *args, **kwargs):
        stream = real_open(path, mode, *args, **kwargs)
        return FullDisk(stream) if path.name == "engine.plan" and "w" in mode else stream

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        engines.build(
            package_of("bf16").path, tmp_path / "engine", target="tensorrt-rtx", gpus="sm89"
        )
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(package_of, tmp_path):
    (tmp_path / "engine").mkdir()
    with pytest.raises(exporter.ExportError, match="exists already"):
        engines.build(package_of("bf16").path, tmp_path / "engine", target="tensorrt-rtx")
    assert not list((tmp_path / "engine").iterdir())


def test_a_missing_tensorrt_is_named_with_its_extra(package_of, tmp_path, monkeypatch):
    import sys

    from qwenport import MissingExtraError

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"qwenport\[rtx\]"):
        engines.build(package_of("bf16").path, tmp_path / "engine", target="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied_engine(engine_of, tmp_path):
    import shutil

    shutil.copytree(engine_of("bf16").path, tmp_path / "copy")
    return tmp_path / "copy"


def edit_manifest(path, **changes):
    manifest = json.loads((path / "qwenport.json").read_text())
    (path / "qwenport.json").write_text(json.dumps(manifest | changes))


def test_a_changed_plan_is_noticed(copied_engine):
    with (copied_engine / "engine.plan").open("r+b") as plan:
        plan.seek(5000)
        byte = plan.read(1)
        plan.seek(5000)
        plan.write(bytes([byte[0] ^ 1]))
    with pytest.raises(engines.EngineError, match=r"engine\.plan does not match the manifest"):
        engines.load_engine(copied_engine)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format_version": 99}, "format version 99.*build the engine again"),
        ({"format": "something-else"}, "holds a something-else"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(copied_engine, changes, complaint):
    edit_manifest(copied_engine, **changes)
    with pytest.raises(engines.EngineError, match=complaint):
        engines.load_engine(copied_engine)


@pytest.mark.parametrize("name", ["tokenizer.json", "engine.plan"])
def test_a_missing_file_is_named(copied_engine, name):
    (copied_engine / name).unlink()
    with pytest.raises(engines.EngineError, match=f"{name} is missing"):
        engines.open_session(copied_engine)
