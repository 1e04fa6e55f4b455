"""AWQ's and GPTQ's checkpoints for the tests, by rounding to the nearest code.

Nothing here uses Qwenport or a library of either format: a word is made by adding its codes, each times a power of two.
Like the published ones, these checkpoints are in fp16.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from quantized import Quantized, quantize
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ROUTERS = ("mlp.gate", "shared_expert_gate")
Tensors = dict[str, torch.Tensor]


def words(codes: torch.Tensor, bits: int, order: Iterable[int] | None = None) -> torch.Tensor:
    """Neighbours along the last axis in int32; the i-th from the bottom is number order[i] of them."""
    count = 32 // bits
    columns = codes.long().unflatten(-1, (-1, count))
    order = range(count) if order is None else order
    total = sum(columns[..., column] * 2 ** (bits * place) for place, column in enumerate(order))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32).contiguous()


def awq_tensors(linear: str, made: Quantized) -> Tensors:
    """A matrix as AWQ's "gemm" has it."""
    return {
        f"{linear}.qweight": words(made.codes.T, 4, AWQ_ORDER),
        f"{linear}.qzeros": words(made.zeros.T, 4, AWQ_ORDER),
        f"{linear}.scales": made.scales.T.contiguous(),
    }


def gptq_tensors(
    linear: str, made: Quantized, *, version: int, columns: torch.Tensor | None = None
) -> Tensors:
    """A matrix as GPTQ has it.

    Args:
        linear: its name.
        made: the matrix, in which `columns` are sorted by group.
        version: 1 or 2.
        columns: the column of the matrix that each of its columns is; None for act-order false.
    """
    bits, (_, count) = made.bits, made.codes.shape
    columns = torch.arange(count) if columns is None else columns
    codes, groups = torch.empty_like(made.codes), torch.empty(count, dtype=torch.int32)
    codes[:, columns] = made.codes
    groups[columns] = torch.arange(count).int() // (count // made.scales.shape[1])
    zeros = (made.zeros.T.long() - int(version == 1)) % 2**bits
    return {
        f"{linear}.qweight": words(codes, bits).T.contiguous(),
        f"{linear}.qzeros": words(zeros, bits),
        f"{linear}.scales": made.scales.T.contiguous(),
        f"{linear}.g_idx": groups,
    }


def write(
    source: Path,
    target: Path,
    stored: Callable[[str, torch.Tensor], Tensors | None],
    stated: dict[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a checkpoint of one file; `stored` gives the tensors of a linear of this name, or None to leave it."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        is_linear = tensor.dim() == 2 and not linear.endswith(("embed_tokens", *ROUTERS))
        found = stored(linear, tensor.to(dtype)) if is_linear else None
        tensors |= {name: tensor.to(dtype)} if found is None else found
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "quantization_config": stated}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def write_awq(
    source: Path,
    target: Path,
    *,
    group: int = 32,
    zero_point: bool = True,
    unconverted: Iterable[str] | None = None,
) -> Path:
    """Write a checkpoint as AutoAWQ does; `unconverted` are parts of the names of linears that stay."""

    def stored(linear: str, weight: torch.Tensor) -> Tensors | None:
        if any(part in linear for part in (*(unconverted or ()), "lm_head")):
            return None
        made = quantize(weight, 4, None if group == -1 else group, symmetric=not zero_point)
        return awq_tensors(linear, made)

    stated = {
        "bits": 4,
        "group_size": group,
        "modules_to_not_convert": None if unconverted is None else list(unconverted),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": zero_point,
    }
    return write(source, target, stored, stated)


def order_of(linear: str, count: int) -> torch.Tensor:
    """A permutation of a linear's columns; linears with the same input have the same."""
    place, _, kind = linear.rpartition(".")
    together = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    name = f"{place}.{together.get(kind, kind)}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def gptq_made(
    linear: str,
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
) -> tuple[Quantized, torch.Tensor | None]:
    """A linear's matrix with its columns sorted by group, and which column each is."""
    columns = order_of(linear, weight.shape[1]) if act_order else None
    if columns is not None:
        weight = weight[:, columns]
    return quantize(weight, bits, None if group == -1 else group, symmetric=symmetric), columns


def gptq_dequantized(linear: str, weight: torch.Tensor, **how: Any) -> torch.Tensor:
    """What `gptq_made` makes of a matrix, in its own order of columns."""
    made, columns = gptq_made(linear, weight, **how)
    found = made.dequantized()
    if columns is None:
        return found
    restored = torch.empty_like(found)
    restored[:, columns] = found
    return restored


def write_gptq(
    source: Path,
    target: Path,
    *,
    version: int = 1,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    head: bool = False,
    kept: Iterable[str] = (),
    zero_biases: bool = False,
    **stated: Any,
) -> Path:
    """Write a checkpoint as AutoGPTQ (version 1) or GPTQModel (2) does.

    Args:
        head: quantize the head too.
        kept: parts of the names of linears that stay; a dot follows each name.
        zero_biases: write biases for the linears of MLPs, which have none.
        stated: added to what config.json states.
    """
    how = {"bits": bits, "group": group, "symmetric": symmetric, "act_order": act_order}

    def stored(linear: str, weight: torch.Tensor) -> Tensors | None:
        if (linear == "lm_head" and not head) or any(part in f"{linear}." for part in kept):
            return None
        made, columns = gptq_made(linear, weight, **how)
        tensors = gptq_tensors(linear, made, version=version, columns=columns)
        if zero_biases and ".mlp." in linear:
            tensors[f"{linear}.bias"] = torch.zeros(len(weight), dtype=weight.dtype)
        return tensors

    config: dict[str, Any] = {
        "batch_size": 1,
        "bits": bits,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.01,
        "dataset": None,
        "desc_act": act_order,
        "exllama_config": {"version": 1},
        "group_size": group,
        "max_input_length": None,
        "model_seqlen": None,
        "module_name_preceding_first_block": None,
        "modules_in_block_to_quantize": None,
        "pad_token_id": None,
        "quant_method": "gptq",
        "sym": symmetric,
        "tokenizer": None,
        "true_sequential": True,
        "use_cuda_fp16": False,
        "use_exllama": True,
    }
    if version == 2:
        config |= {"checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    if head:
        config["lm_head"] = True
    return write(source, target, stored, config | stated)
