"""Packages: what `export` writes, held against onnx, onnxruntime, transformers and safetensors."""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import (
    edit_header,
    library_bytes,
    mini,
    random_tensors,
    tensor_shapes,
    to_bytes,
    write_checkpoint,
    write_sparse_checkpoint,
)
from packaged import (
    DTYPES,
    STATED,
    Exported,
    assert_logits_are_transformers,
    counted_io,
    external,
    graph_of,
    layer_nodes,
    quietly,
    state,
)
from safetensors import safe_open
from safetensors.torch import load_file

from qwenport.exporter import (
    ExportError,
    PackageError,
    TracingError,
    export,
    load_package,
    open_checkpoint,
    parse_config,
    rope_tables,
)
from qwenport.exporter.graph import build_graph
from qwenport.exporter.weights import place_weights
from qwenport.plugins import moe_experts, moe_router, rotary_embedding

MAX_NODES_A_LAYER, MAX_NODES_A_SPARSE_LAYER = 45, 60
OPERATORS = {module.NAME: module for module in (rotary_embedding, moe_router, moe_experts)}


# --- the graph


def test_a_decoder_layer_is_few_nodes(exported: Exported) -> None:
    model, config = graph_of(exported.package), load_package(exported.package).config
    layers = layer_nodes(model)
    assert len(layers.pop("")) <= MAX_NODES_A_LAYER
    assert len(layers) == config.num_hidden_layers
    counts = collections.defaultdict(set)
    for layer, nodes in layers.items():
        counts[config.moe_of(int(layer))].add(len(nodes))
    for moe, (count,) in counts.items():
        assert count <= (MAX_NODES_A_SPARSE_LAYER if moe else MAX_NODES_A_LAYER)


def test_each_operator_has_one_body_and_is_called_where_a_layer_needs_it(
    exported: Exported,
) -> None:
    model, config = graph_of(exported.package), load_package(exported.package).config
    sparse = len(config.moe.layers) if config.moe else 0
    expected = {"RotaryEmbedding": 2 * config.num_hidden_layers}
    if sparse:
        expected |= {"MoERouter": sparse, "MoEExperts": sparse}
    assert [(f.domain, f.name) for f in model.functions] == [("qwenport", n) for n in expected]
    calls = [n.op_type for n in model.graph.node if n.domain == "qwenport"]
    assert collections.Counter(calls) == expected
    assert {o.domain: o.version for o in model.opset_import} == {"": 24, "qwenport": 1}


@pytest.fixture
def registered_schema() -> Iterator[None]:
    schemas = [operator.schema() for operator in OPERATORS.values()]
    for schema in schemas:
        onnx.defs.register_schema(schema)
    yield
    for schema in schemas:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


@pytest.mark.usefixtures("registered_schema")
def test_onnx_s_checker_accepts_the_model(exported: Exported, tmp_path: Path) -> None:
    # a copy, because the checker takes a hard link for an attack
    shutil.copytree(exported.package, tmp_path / "package")
    onnx.checker.check_model(str(tmp_path / "package" / "model.onnx"), full_check=True)


@pytest.mark.usefixtures("registered_schema")
def test_strict_shape_inference_agrees_with_the_declared_outputs(exported: Exported) -> None:
    model = graph_of(exported.package)
    declared = {o.name: o.type.SerializeToString() for o in model.graph.output}
    known = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    options = {"strict_mode": True, "check_type": True, "data_prop": True}
    inferred = onnx.shape_inference.infer_shapes(bare, **options)
    onnx.shape_inference.infer_shapes(model, **options)  # must not contradict what is declared
    for output in inferred.graph.output:
        expected = onnx.TypeProto.FromString(declared[output.name]).tensor_type
        assert output.type.tensor_type.elem_type == expected.elem_type
        ranks = len(output.type.tensor_type.shape.dim), len(expected.shape.dim)
        assert ranks[0] == ranks[1]
        for ours, theirs in zip(expected.shape.dim, output.type.tensor_type.shape.dim, strict=True):
            if theirs.HasField("dim_value"):
                assert ours.dim_value == theirs.dim_value
    for value in inferred.graph.value_info:
        if value.name in known:
            assert value.type.tensor_type.elem_type == known[value.name], value.name


def test_bindings_are_those_of_the_design_and_of_the_manifest(exported: Exported) -> None:
    model, package = graph_of(exported.package), load_package(exported.package)
    config, dtype = package.config, package.dtype

    def described(values: Any) -> list[tuple[str, str, list[Any]]]:
        return [
            (
                value.name,
                onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in values
        ]

    element = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float"}[dtype]
    cache = (element, ["batch", config.num_key_value_heads, "capacity", config.head_dim])
    layers = range(config.num_hidden_layers)
    inputs = [
        ("input_ids", "int64", ["batch", "seq"]),
        ("position_ids", "int64", ["batch", "seq"]),
        ("write_indices", "int64", ["batch"]),
        ("key_positions", "int64", ["span"]),
        ("logits_indices", "int64", ["batch", "n"]),
        *((f"past_key_values.{i}.{p}", *cache) for i in layers for p in ("key", "value")),
    ]
    outputs = [
        ("logits", "float", ["batch", "n", config.vocab_size]),
        *((f"present.{i}.{p}", *cache) for i in layers for p in ("key", "value")),
    ]
    assert described(model.graph.input) == inputs
    assert described(model.graph.output) == outputs
    for direction, expected in (("inputs", inputs), ("outputs", outputs)):
        bindings = package.manifest["bindings"][direction]
        assert [(b["name"], b["dtype"], b["shape"]) for b in bindings] == expected


def test_every_input_is_used_and_every_name_is_given_once(exported: Exported) -> None:
    graph = graph_of(exported.package).graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    given = [i.name for i in graph.input] + [i.name for i in graph.initializer]
    given += [name for node in graph.node for name in node.output]
    assert set(given) <= used
    assert len(given) == len(set(given))
    assert len({node.name for node in graph.node}) == len(graph.node)


def stand_in(raw: dict[str, Any]) -> Callable[[str], ir.TensorProtocol]:
    """Tensors of the right shapes that are nowhere."""
    shapes = tensor_shapes({**raw, "num_hidden_layers": 1})
    table = (raw["max_position_embeddings"], raw["head_dim"] // 2)

    def tensor(name: str) -> ir.TensorProtocol:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = "0"
        shape = shapes.get(".".join(parts), table)
        return ir.ExternalTensor(
            "nowhere", 0, 1, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
        )

    return tensor


def test_tracing_costs_the_same_at_any_depth_and_nodes_grow_by_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwenport.exporter import tracing

    calls, real = [], tracing.trace

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(tracing, "trace", counted)
    nodes, traced = {}, {}
    for depth in (1, 2, 40):
        calls.clear()
        raw = mini("llama", num_hidden_layers=depth)
        nodes[depth] = len(list(build_graph(parse_config(raw), "fp32", stand_in(raw)).graph))
        traced[depth] = len(calls)
    assert traced == {1: 3, 2: 3, 40: 3}
    a_layer = nodes[2] - nodes[1]
    assert nodes[40] - nodes[2] == 38 * a_layer
    assert a_layer <= MAX_NODES_A_LAYER


def test_an_operator_without_translation_leaves_no_package(
    small: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenport.exporter import emission

    monkeypatch.delitem(emission.HANDLERS, torch.nn.functional.silu)
    with pytest.raises(TracingError, match="silu"):
        export(small, out)
    assert not os.listdir(out.parent)


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


# --- the numbers


def test_a_llama_with_every_bias_and_its_own_head_dim_computes_transformers_logits(
    llama: Exported,
) -> None:
    config = load_package(llama.package).config
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert_logits_are_transformers(llama.checkpoint, llama.package)


def test_a_yarn_qwen2_converted_to_fp32_computes_transformers_logits(
    qwen2: Exported, out: Path
) -> None:
    export(qwen2.checkpoint, out, dtype="fp32")
    assert_logits_are_transformers(qwen2.checkpoint, out)


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 16),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            16,
        ),
    ],
)
def test_a_scaled_llama_computes_transformers_logits(
    tmp_path: Path, out: Path, scaling: dict[str, Any], length: int
) -> None:
    raw = mini("llama", rope_scaling=scaling, num_hidden_layers=1, num_key_value_heads=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw)
    export(checkpoint, out, max_seq_len=length)
    assert_logits_are_transformers(checkpoint, out)


# --- another dtype, a copy


def difficult_values() -> torch.Tensor:
    """fp32 values around every rounding decision and limit, none beyond fp16's range."""
    exponents = torch.arange(-30.0, 15.0)
    steps = 1 + torch.arange(0, 64) * 2.0**-13  # ties of fp16 and bf16 and their neighbours
    grid = (2.0 ** exponents[:, None] * steps).reshape(-1)
    grid = torch.cat([grid, grid.nextafter(torch.tensor(0.0)), grid.nextafter(torch.tensor(9e9))])
    limits = torch.tensor([0.0, -0.0, 65504.0, 65519.99, 1e-38, 1e-45, 2.0**-24, 2.0**-25])
    return torch.cat([grid, -grid, limits, -limits])


CHANGES = [(a, b) for a in DTYPES for b in DTYPES if a != b]


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


# --- requests that cannot be met


@pytest.mark.parametrize("existing", ["directory", "file", "dangling link"])
def test_an_output_that_exists_is_refused_and_kept(small: Path, out: Path, existing: str) -> None:
    if existing == "directory":
        out.mkdir()
    elif existing == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = state(out.parent)
    with pytest.raises(ExportError, match="package"):
        export(small, out)
    assert state(out.parent) == before


def test_an_output_without_a_parent_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere"):
        export(small, tmp_path / "nowhere" / "package")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "request_",
    [
        {"max_seq_len": 65},
        {"max_seq_len": 0},
        {"max_seq_len": -1},
        {"max_batch": 0},
        {"max_batch": -2},
        {"dtype": "int8"},
        {"dtype": "float16"},
        {"weights": "symlink"},
        {"rope_scaling": "llama3:2"},
    ],
    ids=str,
)
def test_a_request_that_cannot_be_met_leaves_nothing(
    small: Path, out: Path, request_: dict[str, Any]
) -> None:
    from qwenport import QwenportError

    with pytest.raises(QwenportError):
        export(small, out, **request_)
    assert not os.listdir(out.parent)


def test_an_interruption_leaves_nothing(small: Path, out: Path) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = state(small)
    with pytest.raises(KeyboardInterrupt):
        export(small, out, progress=interrupt)
    assert not os.listdir(out.parent)
    assert state(small) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import onnx_ir, torch
from qwenport.exporter import export, package
checkpoint, out = map(Path, sys.argv[1:])
die = lambda *arguments, **keywords: os.kill(os.getpid(), signal.SIGKILL)

def export_and_die(stage):
    if stage == "manifest":
        package.write_json = die
    elif stage == "rename":
        os.rename = os.replace = Path.rename = Path.replace = die
    keywords = {"progress": die, "dtype": "fp32"} if stage == "convert" else {}
    export(checkpoint, out, **keywords)

for stage in ("convert", "manifest", "rename"):
    child = os.fork()
    if child == 0:
        export_and_die(stage)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(stage, os.WIFSIGNALED(status), os.path.lexists(out))
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_package(small: Path, out: Path) -> None:
    before = state(small)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, small, out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    expected = [f"{stage} True False" for stage in ("convert", "manifest", "rename")]
    assert result.stdout.splitlines() == expected, result.stderr
    assert state(small) == before
    export(small, out)  # what was left beside it is not in the way
    load_package(out)


def other_file_system(path: Path) -> Path | None:
    candidates = [Path("/dev/shm"), Path.home(), Path("/var/tmp")]
    for folder in candidates:
        if os.access(folder, os.W_OK) and folder.stat().st_dev != path.stat().st_dev:
            return folder
    return None


def test_a_link_across_file_systems_is_refused_and_copying_is_proposed(
    small: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_file_system(small)
    with tempfile.TemporaryDirectory(dir=other) as folder:
        target = Path(folder) / "package" if other else out
        if not other:

            def refuse(*arguments: Any, **keywords: Any) -> None:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

            monkeypatch.setattr(os, "link", refuse)
            monkeypatch.setattr(Path, "hardlink_to", refuse)
            monkeypatch.setattr("fcntl.ioctl", refuse)
        with pytest.raises(ExportError, match="--weights copy"):
            export(small, target)
        assert not os.listdir(target.parent)
        export(small, target, weights="copy")
        load_package(target)


# --- the manifest


def test_a_package_opens_as_what_was_exported(llama: Exported) -> None:
    package = load_package(llama.package)
    checkpoint = open_checkpoint(llama.checkpoint)
    assert package.config == checkpoint.config
    assert package.path == llama.package and package.model == llama.package / "model.onnx"
    assert (package.dtype, package.max_batch, package.max_seq_len) == ("fp32", 3, 64)
    assert package.manifest["weights"]["bytes"] == checkpoint.weight_bytes
    assert package.manifest["weights"]["tensors"] == len(checkpoint.tensors)
    config_hash = hashlib.sha256((llama.checkpoint / "config.json").read_bytes()).hexdigest()
    assert package.manifest["source"]["config_sha256"] == config_hash


def test_export_returns_the_package_that_opening_it_gives(small: Path, out: Path) -> None:
    assert export(small, out) == load_package(out)


def test_the_manifest_s_hashes_are_the_files_(exported: Exported) -> None:
    manifest = json.loads((exported.package / "qwenport.json").read_text())
    listed = {"qwenport.json", *manifest["files"], *manifest["weights"]["files"]}
    found = {
        str(p.relative_to(exported.package)) for p in exported.package.rglob("*") if p.is_file()
    }
    assert listed == found
    for name, recorded in manifest["files"].items():
        data = (exported.package / name).read_bytes()
        assert recorded == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_shorter_context_is_recorded_and_tabulated(small: Path, out: Path) -> None:
    package = export(small, out, max_seq_len=17, max_batch=2)
    assert (package.max_seq_len, package.max_batch) == (17, 2)
    assert {len(t) for t in load_file(out / "rope.safetensors").values()} == {17}


def test_a_rope_override_is_in_the_package_s_config_and_tables(small: Path, out: Path) -> None:
    package = export(small, out, rope_scaling="yarn:4")
    assert package.max_seq_len == 4 * 64
    assert load_package(out).config == package.config
    assert package.config.rope.kind == "yarn"
    rope = package.config.rope
    inv_freq, scaling = rope.inverse_frequencies(256), rope.attention_scaling()
    cos = max(load_file(out / "rope.safetensors").values(), key=lambda t: t[0, 0].item())
    torch.testing.assert_close(cos[255], torch.cos(255 * inv_freq) * scaling)


@pytest.fixture
def copied(llama: Exported, tmp_path: Path) -> Path:
    """A package that a test may spoil."""
    return Path(shutil.copytree(llama.package, tmp_path / "package"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def as_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("change", [flip, shorten, lengthen, Path.unlink, as_directory])
@pytest.mark.parametrize("name", ["model.onnx", "rope.safetensors", "config.json"])
def test_a_file_that_was_changed_is_named(
    copied: Path, name: str, change: Callable[[Path], Any]
) -> None:
    change(copied / name)
    with pytest.raises(PackageError, match=name):
        load_package(copied)


@pytest.mark.parametrize("change", [shorten, lengthen, Path.unlink, as_directory])
def test_a_weight_file_of_another_size_is_named(
    copied: Path, change: Callable[[Path], Any]
) -> None:
    file = sorted((copied / "weights").iterdir())[1]
    change(file)
    with pytest.raises(PackageError, match=file.name):
        load_package(copied)


def test_a_weight_file_of_another_header_is_named(copied: Path) -> None:
    file = sorted((copied / "weights").iterdir())[0]

    def exchange(header: dict[str, Any]) -> None:
        pair = [n for n in header if n.endswith(("gate_proj.weight", "up_proj.weight"))][:2]
        first, second = pair if len(pair) == 2 else sorted(header.keys() - {"__metadata__"})[:2]
        header[first], header[second] = header[second], header[first]

    size = file.stat().st_size
    edit_header(file, exchange)
    file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(PackageError, match=file.name):
        load_package(copied)


def rewrite_manifest(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((package / "qwenport.json").read_text())
    change(manifest)
    (package / "qwenport.json").write_text(json.dumps(manifest))


Change = Callable[[dict[str, Any]], Any]

NOT_MANIFESTS: dict[str, Change] = {
    "of an engine": lambda m: m.update(format="qwenport-engine"),
    "of a later version": lambda m: m.update(format_version=m["format_version"] + 1),
    "of version 0": lambda m: m.update(format_version=0),
    "of a version in words": lambda m: m.update(format_version="2"),
    "without format": lambda m: m.pop("format"),
    "without version": lambda m: m.pop("format_version"),
    "without files": lambda m: m.pop("files"),
    "without weights": lambda m: m.pop("weights"),
    "without weight files": lambda m: m["weights"].pop("files"),
    "with a list of files": lambda m: m.update(files=[]),
    "with a file's facts empty": lambda m: m["files"].update({"config.json": {}}),
    "with a file's facts null": lambda m: m["files"].update({"config.json": None}),
    "with unknown rope scaling": lambda m: m.update(rope_scaling="mystery:4"),
    "with a number for rope scaling": lambda m: m.update(rope_scaling=4),
}


@pytest.mark.parametrize("name", NOT_MANIFESTS)
def test_a_manifest_that_is_not_one_is_a_package_error(copied: Path, name: str) -> None:
    rewrite_manifest(copied, NOT_MANIFESTS[name])
    with pytest.raises(PackageError):
        load_package(copied)


OTHER_MODELS: dict[str, Change] = {
    "no model": lambda m: m.pop("model"),
    "another head_dim": lambda m: m["model"].update(head_dim=2),
    "no head_dim": lambda m: m["model"].pop("head_dim"),
    "another theta": lambda m: m["model"]["rope"].update(theta=10000.0),
    "another rope scaling": lambda m: m.update(rope_scaling="yarn:4"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_manifest_whose_model_is_not_the_config_s_is_refused(copied: Path, name: str) -> None:
    rewrite_manifest(copied, OTHER_MODELS[name])
    with pytest.raises(PackageError):
        load_package(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_is_a_package_error(copied: Path, content: bytes) -> None:
    (copied / "qwenport.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"qwenport\.json|package"):
        load_package(copied)


def test_a_directory_that_is_no_package_is_a_package_error(small: Path, tmp_path: Path) -> None:
    for path in (small, tmp_path / "nowhere", small / "config.json"):
        with pytest.raises(PackageError, match=path.name):
            load_package(path)


def test_a_checkpoint_edited_in_place_shows_in_a_linked_package(small: Path, out: Path) -> None:
    export(small, out)
    if not os.path.samefile(small / "model.safetensors", out / "weights" / "model.safetensors"):
        load_package(out)  # a reflink: a copy on write
        return
    with open(small / "model.safetensors", "r+b") as opened:
        opened.seek(20)
        opened.write(b"#")
    with pytest.raises(PackageError, match=r"model\.safetensors"):
        load_package(out)
