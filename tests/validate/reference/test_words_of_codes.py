"""AWQ and GPTQ: the oracle, the exporter's parts under ONNX's operator, and Python's integers give the same bits.

The tensors are random words, so every code is in every place; and the oracle of whole checkpoints is transformers with
the weights that the tests' writer rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import quantize
from quantized_words import gptq_dequantized, write_awq, write_gptq
from safetensors.torch import load_file, save_file

from qwenport.exporter.quantization import CODES, SCALES, ZEROS, Middle, Storage
from qwenport.exporter.quantization.awq import Awq as ExportedAwq
from qwenport.exporter.quantization.gptq import Gptq as ExportedGptq
from qwenport.exporter.safetensors_file import chunks, read_safetensors_header
from qwenport.validate.errors import ValidationError
from qwenport.validate.reference import Reference
from qwenport.validate.reference.dequantization import Quantization, read_quantization
from qwenport.validate.reference.dequantization.awq import Awq
from qwenport.validate.reference.dequantization.gptq import Gptq
from qwenport.validate.target import open_target

from .pairs import TEXTS, same
from .test_dequantization import InMemory, bits_of
from .test_quantized import plain_logits

L = "model.layers.0.mlp.up_proj"
WEIGHT = f"{L}.weight"
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's AWQ_ORDER


@dataclass(frozen=True)
class Case:
    """A weight's tensors, and how they are to be read."""

    bits: int
    group: int
    tensors: dict[str, torch.Tensor]
    shape: tuple[int, int]
    version: int = 0  # of GPTQ; 0 is AWQ
    act_order: bool = False

    @property
    def oracle(self) -> Quantization:
        if self.version == 0:
            return Awq(Path("checkpoint"), self.group)
        return Gptq(Path("checkpoint"), self.bits, self.group, self.version == 1, self.act_order)

    @property
    def storage(self) -> Storage:
        group = None if self.group == -1 else self.group
        if self.version == 0:
            return ExportedAwq(4, group, symmetric=False)
        name = {1: "gptq", 2: "gptq_v2"}[self.version]
        return ExportedGptq(self.bits, group, False, name, act_order=self.act_order)

    def expected(self) -> torch.Tensor:
        """Each weight from the definition, in Python's integers; fp64 holds the product, which is rounded once."""
        n, k = self.shape
        words, zeros, scales = (
            self.tensors[f"{L}.{name}"].tolist() for name in ("qweight", "qzeros", "scales")
        )
        g_idx = self.tensors.get(f"{L}.g_idx")
        each = k // len(scales)
        groups = [column // each for column in range(k)] if g_idx is None else g_idx.tolist()
        per_word, most = 32 // self.bits, 2**self.bits
        made = np.empty((n, k))
        for row in range(n):
            for column in range(k):
                group = groups[column]
                if self.version == 0:
                    place = AWQ_COLUMNS.index(row % 8)
                    code = (words[column][row // 8] % 2**32) // 16**place % 16
                    zero = (zeros[group][row // 8] % 2**32) // 16**place % 16
                else:
                    code = (words[column // per_word][row] % 2**32) // most ** (column % per_word)
                    zero = (zeros[group][row // per_word] % 2**32) // most ** (row % per_word)
                    code, zero = code % most, (zero + (self.version == 1)) % most
                made[row, column] = (code - zero) * scales[group][row]
        return torch.from_numpy(made).to(self.tensors[f"{L}.scales"].dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    version = draw(st.sampled_from((0, 1, 2)))
    bits = 4 if version == 0 else draw(st.sampled_from((4, 8)))
    group = draw(st.sampled_from((32, 64, -1)))
    n, blocks = 8 * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    k = 8 * draw(st.integers(1, 5)) if group == -1 else group * blocks
    blocks = 1 if group == -1 else blocks
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def words(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(-(2**31), 2**31, shape, dtype=np.int32))

    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    scales = torch.from_numpy(random.standard_normal((blocks, n)) / 64).to(dtype)
    tensors = {f"{L}.scales": scales}
    act_order = False
    if version == 0:
        tensors |= {f"{L}.qweight": words(k, n // 8), f"{L}.qzeros": words(blocks, n // 8)}
    else:
        per_word = 32 // bits
        tensors[f"{L}.qweight"] = words(k // per_word, n)
        tensors[f"{L}.qzeros"] = words(blocks, n // per_word)
        act_order = draw(st.booleans())
        groups = np.arange(k, dtype=np.int32) // (k // blocks)
        if act_order:
            groups = random.permutation(groups)
        if act_order or draw(st.booleans()):
            tensors[f"{L}.g_idx"] = torch.from_numpy(groups)
    return Case(bits, group, tensors, (n, k), version, act_order)


@given(case=cases(), data=st.data())
def test_the_oracle_computes_the_definition(case: Case, data: st.DataObject) -> None:
    assert case.oracle.quantized(case.tensors) == {WEIGHT}
    stored = InMemory(case.tensors)
    assert case.oracle.shape(WEIGHT, stored) == case.shape
    assert case.oracle.tensors(WEIGHT, case.shape, case.tensors) == stored.shapes
    start = data.draw(st.integers(0, case.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, case.shape[0] + 5))
    found = case.oracle.rows(WEIGHT, case.shape, start, stop, stored)
    wanted = case.expected()[start:stop]
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)  # but for the sign of zero, which integers do not have


@given(case=cases())
def test_the_exporter_s_parts_under_onnx_s_operator_are_the_oracle_s_bits(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("words")
    save_file(case.tensors, folder / "model.safetensors")
    entries = {e.name: e for e in read_safetensors_header(folder / "model.safetensors")[1]}
    storage, (n, k) = case.storage, case.shape
    storage.check(L, case.shape, folder, entries)
    parts = storage.parts(L, case.shape, entries, entries[f"{L}.scales"].dtype)
    made = []
    kinds = {
        "U4": onnx.TensorProto.UINT4,
        "U8": onnx.TensorProto.UINT8,
        "F16": onnx.TensorProto.FLOAT16,
        "BF16": onnx.TensorProto.BFLOAT16,
        "F32": onnx.TensorProto.FLOAT,
    }
    for name in (CODES, SCALES, ZEROS):
        part = parts[name]
        assert not isinstance(part, Middle) and hasattr(part, "repack")
        data = part.repack([b"".join(chunks(folder, entry)) for entry in part.sources])
        made.append(onnx.helper.make_tensor(name, kinds[part.dtype], part.shape, data, raw=True))
    blocks = made[1].dims[1]
    node = onnx.helper.make_node(
        "DequantizeLinear", [CODES, SCALES, ZEROS], ["weight"], axis=1, block_size=k // blocks
    )
    value = onnx.helper.make_empty_tensor_value_info("weight")
    graph = onnx.helper.make_graph([node], "weight", [], [value], made)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (weight,) = onnx.reference.ReferenceEvaluator(model).run(None, {})
    found = torch.from_numpy(np.asarray(weight).astype(np.float64)).to(
        case.tensors[f"{L}.scales"].dtype
    )
    wanted = case.oracle.rows(WEIGHT, case.shape, 0, n, InMemory(case.tensors))
    order = storage.order(L, case.shape, folder, entries)
    assert torch.equal(found, wanted if order is None else wanted[:, torch.from_numpy(order)])
    if order is not None:
        assert case.act_order and np.array_equal(np.sort(order), np.arange(k))


@given(case=cases().filter(lambda case: case.version == 0))
def test_compressed_tensors_converts_awq_to_the_same_bits(case: Case) -> None:
    module = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    converter = module.AutoAWQConverter(group_size=case.group)
    codes, scales, zeros = converter._convert_gemm_module(
        *(case.tensors[f"{L}.{name}"] for name in ("qweight", "scales", "qzeros"))
    )
    each = case.shape[1] // scales.shape[1]
    steps = codes.short() - zeros.short().repeat_interleave(each, dim=1)
    theirs = steps.to(scales.dtype) * scales.repeat_interleave(each, dim=1)
    ours = case.oracle.rows(WEIGHT, case.shape, 0, case.shape[0], InMemory(case.tensors))
    assert torch.equal(bits_of(ours), bits_of(theirs))


def one_case(**changes: Any) -> Case:
    tensors = {
        f"{L}.qweight": torch.zeros(8, 8, dtype=torch.int32),
        f"{L}.qzeros": torch.zeros(2, 1, dtype=torch.int32),
        f"{L}.scales": torch.ones(2, 8),
        f"{L}.g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }
    return Case(4, 32, tensors | changes, (8, 64), version=1, act_order=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({f"{L}.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "names groups from 2 to 2"),
        ({f"{L}.g_idx": torch.full((64,), -1, dtype=torch.int32)}, "names groups from -1"),
        ({f"{L}.g_idx": torch.zeros(64)}, r"g_idx is torch\.float32"),
        ({f"{L}.qweight": torch.zeros(8, 8)}, r"qweight is torch\.float32"),
        ({f"{L}.scales": torch.ones(2, 8, dtype=torch.int32)}, r"scales is torch\.int32"),
    ],
)
def test_a_tensor_that_the_format_does_not_have_so_is_named(
    changes: dict[str, torch.Tensor], named: str
) -> None:
    case = one_case(**changes)
    with pytest.raises(ValidationError, match=named):
        case.oracle.rows(WEIGHT, case.shape, 0, 8, InMemory(case.tensors))


def test_shapes_that_the_format_cannot_hold_are_refused() -> None:
    for shape in ((8, 48), (12, 64)):
        for oracle in (one_case().oracle, Awq(Path("checkpoint"), 32)):
            with pytest.raises(ValidationError, match="do not divide"):
                oracle.tensors(WEIGHT, shape, ())


@pytest.mark.parametrize(
    ("write", "change", "named"),
    [
        (write_awq, '"bits": 4', "bits"),
        (write_awq, '"version": "gemm"', "version"),
        (write_awq, '"group_size": 32', "group_size"),
        (write_gptq, '"bits": 4', "bits"),
        (write_gptq, '"group_size": 32', "group_size"),
        (write_gptq, '"desc_act": false', "desc_act"),
    ],
)
def test_another_config_is_refused_by_the_key_s_name(
    write: Callable[..., Path], change: str, named: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = write(tiny_checkpoint, tmp_path / "checkpoint")
    config = (path / "config.json").read_text()
    assert change in config
    (path / "config.json").write_text(config.replace(change, change.partition(":")[0] + ": 2.5"))
    with pytest.raises(ValidationError, match=named):
        read_quantization(path)


WHOLE: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "awq": (write_awq, {"group": 64}),
    "gptq, act-order, biases": (
        write_gptq,
        {"act_order": True, "symmetric": False, "zero_biases": True},
    ),
    "gptq, v2, 8 bits, partly": (
        write_gptq,
        {
            "version": 2,
            "bits": 8,
            "symmetric": False,
            "kept": ["self_attn"],
            "dynamic": {"-:.*self_attn": {}},
        },
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_those_of_transformers_with_the_dequantized_weights(
    name: str, tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    write, how = WHOLE[name]
    path = write(tiny_checkpoint, tmp_path / "checkpoint", **how)
    stored = load_file(path / "model.safetensors")
    tensors = {}
    for key, tensor in load_file(tiny_checkpoint / "model.safetensors").items():
        tensors[key] = tensor.half()
        linear = key.removesuffix(".weight")
        if f"{linear}.qweight" not in stored:
            continue
        if write is write_awq:
            tensors[key] = quantize(tensor.half(), 4, how["group"], symmetric=False).dequantized()
        else:
            named = ("bits", "group", "symmetric", "act_order")
            kind = {key: how[key] for key in named if key in how}
            tensors[key] = gptq_dequantized(linear, tensor.half(), **kind)
    text = TEXTS[0]
    (expected,) = plain_logits(tiny_checkpoint, tensors, [text])
    target = open_target(tiny_package)
    for streamed in (False, True):
        reference = Reference(target, path, streamed=streamed)
        (logits,) = reference.logits([text])
        assert same(logits, expected[list(text.positions)])
        assert reference.weights_note.endswith("the formula, computed by validate")
