"""TensorRT's network of a quantized package means what transformers computes with the dequantized weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from float_quantized import write_float_quantized
from quantized import quantize, write_pack_quantized
from quantized_words import gptq_dequantized, write_gptq
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwenport.contract import DTYPES
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession
from qwenport.exporter import Package, export
from qwenport.validate.network import Interpreter, NetworkSession, ParsedNetwork, parse_package
from qwenport.validate.network.constants import check_constants
from qwenport.validate.network.parse import with_exact_tables
from qwenport.validate.network.quantized import unpacked
from qwenport.validate.reference.rounded_inputs import by_formula

TRAINED = Path(__file__).parents[2] / "examples" / "tiny-qwen2.5"
MIXTURE = TRAINED.parent / "tiny-qwen2-moe"
GATES = ("lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$")

CAPACITY = 32
TEXTS = [[1, 2, 3, 4, 5, 6, 7], [40, 11, 30]]
EXACT = 3e-6
OWN_ERROR = {False: 1.25, True: 2.0}
"""Times what transformers loses in half precision; corrections add roundings of the weight and of a second product."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,  # three blocks of 32: sums are padded
    "torch_dtype": "bfloat16",
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 32},
}
CASES = [
    ("qwen2", 4, 32, True),
    ("qwen2", 4, 32, False),
    ("qwen2", 4, None, False),
    ("qwen2", 8, None, True),
    ("qwen2", 8, None, False),
    ("qwen2", 8, 32, True),
    ("qwen2", 8, 32, False),
    ("qwen2_moe", 4, 32, True),
    ("qwen2_moe", 4, 32, False),
    ("qwen2_moe", 8, None, True),
    ("qwen2_moe", 8, 32, True),
    ("qwen2_moe", 8, 32, False),
]
ACT_ORDER = [  # of GPTQ, in fp16
    ("qwen2_moe", 4, 16, True),
    ("qwen2_moe", 4, 16, False),
    ("qwen2_moe", 8, 16, True),
    ("qwen3_moe", 8, None, False),
    ("qwen3_moe", 4, 32, True),  # one group in down_proj: only gate and up are in another order
]


def dequantized(
    source: Path, target: Path, of: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """The checkpoint with the weights that a quantized one stands for; `of` makes them, by linear."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = of(name.removesuffix(".weight"), tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(
    scope="module",
    params=[*((False, *case) for case in CASES), *((True, *case) for case in ACT_ORDER)],
    ids=lambda c: "-".join(map(str, c)),
)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Path]:
    """A quantized package, and a checkpoint of its dequantized weights."""
    act_order, kind, bits, group, symmetric = request.param
    folder, sizes = tmp_path_factory.mktemp("quantized"), dict(SIZES)
    dtype = torch.float16 if act_order else torch.bfloat16
    sizes["torch_dtype"] = str(dtype).removeprefix("torch.")
    raw = checkpoints.mini(kind, **sizes | EXPERTS[kind])
    source = checkpoints.write_checkpoint(folder / "source", raw, dtype=dtype)
    if act_order:
        how = {"bits": bits, "group": group or -1, "symmetric": symmetric, "act_order": True}
        quantized = write_gptq(source, folder / "q", **how)
        wanted = dequantized(source, folder / "d", partial(gptq_dequantized, **how))
    else:
        ignore = ["lm_head", r"re:.*\.gate$", r"re:.*shared_expert_gate$"]
        quantized = write_pack_quantized(
            source, folder / "q", bits=bits, group=group, symmetric=symmetric, ignore=ignore
        )

        def of(linear: str, weight: torch.Tensor) -> torch.Tensor:
            return quantize(weight, bits, group, symmetric=symmetric).dequantized()

        wanted = dequantized(source, folder / "d", of)
    return export(quantized, folder / "package", weights="copy"), wanted


def of_transformers(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The logits of all texts, one after the other, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        made = [model(torch.tensor([text])).logits[0].float().numpy() for text in TEXTS]
    return np.concatenate(made)


def logits(parsed: ParsedNetwork, package: Package, *, exact: bool) -> Any:
    network = with_exact_tables(parsed, package) if exact else parsed
    session = NetworkSession(
        Interpreter(network, exact=exact),
        package.config,
        max_batch=2,
        capacity=CAPACITY,
        max_positions=package.max_seq_len,
    )
    return np.concatenate(list(session.prefill(TEXTS, all_logits=True)))


def difference(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_network_computes_with_the_dequantized_weights(case: tuple[Package, Path]) -> None:
    package, checkpoint = case
    parsed = parse_package(package, CAPACITY)
    row = check_constants(parsed, package, False)
    assert row.status == "passed" and row.reason is None
    wanted, rounded = (
        of_transformers(checkpoint, dtype) for dtype in (torch.float32, DTYPES[package.dtype].torch)
    )
    exact, declared = (logits(parsed, package, exact=exact) for exact in (True, False))
    assert difference(exact, wanted) <= EXACT
    corrected = any(weight.correction is not None for weight in parsed.signed.values())
    assert difference(declared, wanted) <= OWN_ERROR[corrected] * difference(rounded, wanted)


FLOAT8: dict[str, dict[str, Any]] = {
    "rows": {},
    "one scale": {"by_row": False},
    "static": {"activations": "static", "by_row": False},
    "dynamic": {"activations": "dynamic"},
    "experts": {"source": MIXTURE, "ignore": GATES},
    "experts, dynamic": {"source": MIXTURE, "ignore": GATES, "activations": "dynamic"},
    "experts, static": {"source": MIXTURE, "ignore": GATES, "activations": "static"},
    "experts, one scale": {"source": MIXTURE, "ignore": GATES, "by_row": False},
}


@pytest.mark.parametrize("scheme", FLOAT8)
def test_the_network_of_fp8_computes_what_the_package_does(tmp_path: Path, scheme: str) -> None:
    """In exact arithmetic, with the codes of inputs: a near-tie would be off by much more."""
    how = {"source": TRAINED, "target": tmp_path / "c"} | FLOAT8[scheme]
    package = export(write_float_quantized(**how), tmp_path / "p")
    parsed = parse_package(package, CAPACITY)
    assert not parsed.complaints
    row = check_constants(parsed, package, False)
    assert row.status == "passed" and row.reason is None
    session = OnnxRuntimeSession(package, max_batch=2, capacity=CAPACITY)
    wanted = np.concatenate(list(session.prefill(TEXTS, all_logits=True)))
    assert difference(logits(parsed, package, exact=True), wanted) <= EXACT


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_inputs_are_rounded_step_by_step_as_compressed_tensors_does(
    tmp_path: Path, activations: str
) -> None:
    """In bf16, bit for bit, given the same inputs."""
    checkpoint = write_float_quantized(TRAINED, tmp_path / "c", activations=activations)
    package = export(checkpoint, tmp_path / "p")
    values = {str(v.name) for node in package.read_model().graph for v in node.outputs}
    rounded = [name for name in values if name.endswith(".rounded")]
    session = NetworkSession(
        Interpreter(parse_package(package, CAPACITY)),
        package.config,
        max_batch=1,
        capacity=CAPACITY,
        max_positions=package.max_seq_len,
        observe=[*rounded, *(name.removesuffix(".rounded") for name in rounded)],
    )
    list(session.prefill(TEXTS[:1], all_logits=True))
    scales = load_file(checkpoint / "model.safetensors")
    for name in rounded:
        made, x = (
            torch.from_numpy(session.observed[n]).bfloat16()
            for n in (name, name.removesuffix(".rounded"))
        )
        options = [t.reshape(()) for n, t in scales.items() if n.endswith("input_scale")] or [None]
        assert any(torch.equal(by_formula({}, x, scale), made) for scale in options), name


def test_a_wrong_code_or_scale_in_fp8_is_found(tmp_path: Path) -> None:
    package = export(
        write_float_quantized(TRAINED, tmp_path / "c", activations="static"), tmp_path / "p"
    )
    parsed = parse_package(package, CAPACITY)
    for part in ("codes", "scales"):
        name = next(name for name in parsed.made if name.endswith(f".{part}"))
        other = parsed.constants[name].clone()
        other.view(-1).view(torch.uint8)[3] ^= 1
        wrong = replace(parsed, constants={**parsed.constants, name: other})
        failed = {c.metric for c in check_constants(wrong, package, False).checks if not c.passed}
        assert "quantized weights with other values" in failed


@pytest.mark.parametrize("part", ["codes", "scales", "correction"])
def test_one_wrong_value_among_the_signed_weights_is_found(
    tmp_path: Path, part: str, tiny_checkpoint: Path
) -> None:
    checkpoint = write_pack_quantized(tiny_checkpoint, tmp_path / "c", group=64, symmetric=False)
    package = export(checkpoint, tmp_path / "package")
    parsed = parse_package(package, CAPACITY)
    name = next(name for name in parsed.made if name.endswith(f".{part}"))
    other = parsed.constants[name].clone()
    other.view(-1).view(torch.uint8)[3] ^= 1
    wrong = replace(parsed, constants={**parsed.constants, name: other})
    failed = {c.metric for c in check_constants(wrong, package, False).checks if not c.passed}
    assert "quantized weights with other values" in failed


@pytest.mark.parametrize("change", ["inverse", "neighbour"])
def test_experts_whose_columns_are_in_a_wrong_order_are_found(tmp_path: Path, change: str) -> None:
    raw = checkpoints.mini("qwen2_moe", **SIZES | EXPERTS["qwen2_moe"])
    source = checkpoints.write_checkpoint(tmp_path / "source", raw, dtype=torch.float16)
    checkpoint = write_gptq(source, tmp_path / "q", group=16, act_order=True)
    package = export(checkpoint, tmp_path / "package")
    parsed = parse_package(package, CAPACITY)
    name = next(name for name in parsed.made if name.endswith("down_proj.columns"))
    columns = parsed.constants[name]
    other = columns.roll(1, 0) if change == "neighbour" else columns.argsort(-1).int()
    wrong = replace(parsed, constants={**parsed.constants, name: other})
    failed = {c.metric for c in check_constants(wrong, package, False).checks if not c.passed}
    assert "quantized weights with other values" in failed


def test_values_of_four_bits_are_unpacked_the_low_half_first() -> None:
    data = torch.arange(256, dtype=torch.uint8)
    pairs = unpacked(data, signed=True).view(256, 2)
    assert pairs.amin() == -8 and pairs.amax() == 7
    assert torch.equal((pairs[:, 0].int() & 15) + 16 * (pairs[:, 1].int() & 15), data.int())
