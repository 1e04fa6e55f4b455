"""Weights by reference, in another dtype, copied."""

from __future__ import annotations

import collections
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checkpoints import (
    library_bytes,
    mini,
    random_tensors,
    tensor_shapes,
    to_bytes,
    write_checkpoint,
    write_sparse_checkpoint,
)
from exported import CHANGES
from packaged import (
    DTYPES,
    STATED,
    Exported,
    counted_io,
    external,
    graph_of,
    quietly,
    state,
)
from safetensors import safe_open
from safetensors.torch import load_file

from qwenport.exporter import (
    ExportError,
    export,
    load_package,
    open_checkpoint,
    rope_tables,
)
from qwenport.exporter.weights import place_weights

# --- weights by reference


def test_every_checkpoint_tensor_is_one_initializer_with_the_bytes_the_library_reads(
    exported: Exported,
) -> None:
    graph = graph_of(exported.package).graph
    initializers = collections.defaultdict(list)
    for tensor in graph.initializer:
        initializers[tensor.name].append(tensor)
    expected: dict[str, bytes] = {}
    for file in sorted(exported.checkpoint.glob("*.safetensors")):
        expected |= library_bytes(file)
    assert expected
    for name, content in expected.items():
        (tensor,) = initializers[name]
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        place = external(tensor)
        offset, length = int(place["offset"]), int(place["length"])
        data = (exported.package / place["location"]).read_bytes()
        assert data[offset : offset + length] == content, name
    places = [tuple(external(t).items()) for t in graph.initializer if t.external_data]
    assert len(places) == len(set(places)) == len(expected) + 2  # and the two rotary tables


def test_dims_and_dtype_of_an_initializer_are_the_checkpoint_s(exported: Exported) -> None:
    initializers = {t.name: t for t in graph_of(exported.package).graph.initializer}
    dtypes = {
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.float32: onnx.TensorProto.FLOAT,
    }
    for file in exported.checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tuple(initializers[name].dims) == tuple(tensor.shape)
            assert initializers[name].data_type == dtypes[tensor.dtype]


def test_only_a_few_shape_constants_are_stored_in_the_graph(exported: Exported) -> None:
    inline = [t for t in graph_of(exported.package).graph.initializer if not t.external_data]
    assert {t.data_type for t in inline} == {onnx.TensorProto.INT64}
    assert sum(t.ByteSize() for t in inline) < 2000


def test_onnx_s_own_reader_of_external_data_finds_the_bytes(tiny_package: Path) -> None:
    model = onnx.load(tiny_package / "model.onnx", load_external_data=True)
    expected = library_bytes(tiny_package / "weights" / "model.safetensors")
    found = {t.name: t.raw_data for t in model.graph.initializer}
    assert {name: found[name] for name in expected} == expected


def test_a_tied_head_is_the_embedding_and_not_a_tensor_of_its_own(
    qwen2: Exported, llama: Exported
) -> None:
    for exported, tied in ((qwen2, True), (llama, False)):
        graph = graph_of(exported.package).graph
        names = [t.name for t in graph.initializer]
        assert ("lm_head.weight" in names) is not tied
        (head,) = [n for n in graph.node if n.op_type == "MatMul" and "layers" not in n.name]
        (weight,) = [n.input[0] for n in graph.node if n.output[0] == head.input[1]]
        assert weight == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_rotary_tables_in_the_package_are_the_config_s(exported: Exported) -> None:
    package = load_package(exported.package)
    tables = load_file(exported.package / "rope.safetensors")
    cos, sin = rope_tables(package.config.rope, package.max_seq_len)
    by_name = {t.name: t for t in graph_of(exported.package).graph.initializer}
    data = (exported.package / "rope.safetensors").read_bytes()
    for name, expected in (("rope.cos", cos), ("rope.sin", sin)):
        place = external(by_name[name])
        assert place["location"] == "rope.safetensors"
        offset, length = int(place["offset"]), int(place["length"])
        assert data[offset : offset + length] == to_bytes(expected)
    assert len(tables) == 2


def test_linked_weights_are_the_checkpoint_s_own_files(llama: Exported, qwen2: Exported) -> None:
    for exported in (llama, qwen2):
        for file in exported.checkpoint.glob("*.safetensors"):
            link = exported.package / "weights" / file.name
            assert not link.is_symlink(), "onnxruntime refuses symbolic links"
            assert os.path.samefile(link, file) or reflinked(link)
        assert load_package(exported.package).manifest["weights"]["mode"] == "link"


def reflinked(file: Path) -> bool:
    """Whether the first extent of a file is shared with another (FIEMAP)."""
    import fcntl
    import struct

    request = struct.pack("=QQLLLL", 0, 2**64 - 1, 1, 0, 1, 0) + bytes(56)
    with open(file, "rb") as opened:
        answer = fcntl.ioctl(opened, 0xC020660B, request)
    *_, flags = struct.unpack("=QQQQQLLLL", answer[32:88])[:6]
    return bool(flags & 0x2000)


HUGE = mini(
    "qwen2", num_hidden_layers=1, vocab_size=16_000_000, hidden_size=32768, num_attention_heads=256
)


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of a terabyte, and no leave to write a file of more than 100 MB beside it."""
    checkpoint = tmp_path / "huge"
    assert write_sparse_checkpoint(checkpoint, HUGE) > 2**39
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, hard))
    yield checkpoint
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shutil.rmtree(checkpoint)


def test_a_terabyte_is_exported_and_opened_without_being_read_or_written(
    huge: Path, out: Path, llama: Exported
) -> None:
    read, written = counted_io()
    package = export(huge, out)
    assert package.manifest["weights"]["bytes"] > 2**39
    read, written = counted_io()[0] - read, counted_io()[1] - written
    assert read < 30_000_000, "more than the model's graph and Python's modules was read"
    assert written < 5_000_000
    assert load_package(out).config.vocab_size == HUGE["vocab_size"]


@pytest.mark.parametrize("request_", [{"weights": "copy"}, {"dtype": "fp32"}], ids=str)
def test_a_copy_that_does_not_fit_the_disk_is_refused_at_once(
    huge: Path, out: Path, request_: dict[str, Any]
) -> None:
    if shutil.disk_usage(huge).free > (huge / "model.safetensors").stat().st_size:
        pytest.skip("this disk has a terabyte free")
    with pytest.raises(ExportError, match="space"):
        export(huge, out, **request_)
    assert not os.listdir(out.parent)


# --- another dtype, a copy


def difficult_values() -> torch.Tensor:
    """fp32 values around every rounding decision and limit, none beyond fp16's range."""
    exponents = torch.arange(-30.0, 15.0)
    steps = 1 + torch.arange(0, 64) * 2.0**-13  # ties of fp16 and bf16 and their neighbours
    grid = (2.0 ** exponents[:, None] * steps).reshape(-1)
    grid = torch.cat([grid, grid.nextafter(torch.tensor(0.0)), grid.nextafter(torch.tensor(9e9))])
    limits = torch.tensor([0.0, -0.0, 65504.0, 65519.99, 1e-38, 1e-45, 2.0**-24, 2.0**-25])
    return torch.cat([grid, -grid, limits, -limits])


@pytest.mark.parametrize(("source", "target"), CHANGES)
def test_a_dtype_change_is_torch_s_bit_for_bit(tmp_path: Path, source: str, target: str) -> None:
    # an embedding of more than two of the chunks that are converted at a time
    sizes = {"vocab_size": 150_000, "num_hidden_layers": 1, "hidden_size": 128}
    raw = mini("qwen2", torch_dtype=STATED[source], **sizes)
    tensors = random_tensors(tensor_shapes(raw), torch.float32)
    values = difficult_values()
    tensors["model.embed_tokens.weight"].view(-1)[-len(values) :] = values
    tensors = {name: tensor.to(DTYPES[source]) for name, tensor in tensors.items()}
    if source == "fp16":
        tensors = {n: t.where(t.isfinite(), torch.zeros_like(t)) for n, t in tensors.items()}
    if target == "fp16":  # bf16 rounds the largest fp16 numbers up
        tensors = {n: t.clamp(-65504, 65504) for n, t in tensors.items()}
        tensors = {
            n: t.where(t.to(torch.float16).isfinite(), torch.zeros_like(t))
            for n, t in tensors.items()
        }
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    (tmp_path / "package").mkdir()
    plan = place_weights(
        open_checkpoint(checkpoint), tmp_path / "package", target, "link", quietly, lossless=False
    )
    assert plan.entries.keys() == tensors.keys()
    found: dict[str, bytes] = {}
    for file in (tmp_path / "package").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert opened.get_slice(name).get_shape() == list(tensors[name].shape)
        found |= library_bytes(file)
    for name, tensor in tensors.items():
        assert found[name] == to_bytes(tensor.to(DTYPES[target])), name


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        ("fp32", "fp16", 65520.0),
        ("fp32", "fp16", -1e5),
        ("bf16", "fp16", 3e38),
        ("bf16", "fp16", -65536.0),
        ("fp32", "bf16", 3.4e38),  # rounds up to infinity
    ],
)
def test_a_value_that_the_dtype_cannot_hold_is_refused_with_its_tensor_s_name(
    tmp_path: Path, out: Path, source: str, target: str, value: float
) -> None:
    raw = mini("qwen2", num_hidden_layers=1, torch_dtype=STATED[source])
    tensors = random_tensors(tensor_shapes(raw), DTYPES[source])
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][-1, -1] = value
    assert tensors[name].isfinite().all()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    with pytest.raises(ExportError, match=name):
        export(checkpoint, out, dtype=target)
    assert not os.listdir(out.parent)


def test_a_package_in_another_dtype_says_so_everywhere(small: Path, out: Path) -> None:
    package = export(small, out, dtype="fp16")
    assert package.dtype == "fp16"
    assert package.manifest["source"]["dtype"] == "bf16"
    floats = {
        t.data_type
        for t in graph_of(out).graph.initializer
        if t.external_data and not t.name.startswith("rope.")
    }
    assert floats == {onnx.TensorProto.FLOAT16}
    cache = {
        i.type.tensor_type.elem_type
        for i in graph_of(out).graph.input
        if i.name.startswith("past_key_values")
    }
    assert cache == {onnx.TensorProto.FLOAT16}


def test_a_copied_package_does_not_change_with_its_checkpoint(small: Path, out: Path) -> None:
    package = export(small, out, weights="copy")
    assert package.manifest["weights"]["mode"] == "copy"
    source, copy = small / "model.safetensors", out / "weights" / "model.safetensors"
    assert not os.path.samefile(source, copy)
    before = state(out)
    with open(source, "r+b") as opened:  # in place, as a link would see it
        opened.write(bytes(source.stat().st_size))
    assert state(out) == before
    shutil.rmtree(small)
    load_package(out)


def test_a_copied_package_can_be_moved(small: Path, out: Path, tmp_path: Path) -> None:
    package = export(small, out, weights="copy")
    out.rename(tmp_path / "elsewhere")
    assert load_package(tmp_path / "elsewhere").config == package.config


def test_exporting_changes_nothing_about_the_checkpoint(small: Path, out: Path) -> None:
    before = state(small)
    export(small, out)
    export(small, out.with_name("converted"), dtype="fp32")
    with pytest.raises(ExportError):
        export(small, out)
    assert state(small) == before


def test_tokenizer_and_configuration_files_are_taken_along(
    tiny_checkpoint: Path, tiny_package: Path
) -> None:
    for file in tiny_checkpoint.glob("*.json"):
        assert (tiny_package / file.name).read_bytes() == file.read_bytes()
        assert not (tiny_package / file.name).is_symlink()


def test_companions_that_are_links_become_files(qwen2: Exported) -> None:
    mode = (qwen2.package / "config.json").lstat().st_mode
    assert stat.S_ISREG(mode)
