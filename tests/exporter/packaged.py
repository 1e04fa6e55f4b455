"""What is in a package, read and run without Qwenport; and Qwenport's answers held against that."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch

from qwenport.exporter import load_package

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATED = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}


class Exported(NamedTuple):
    """A checkpoint and what was made of it."""

    checkpoint: Path
    package: Path


def quietly(*arguments: Any) -> None:
    """A progress callback."""


def graph_of(package: Path) -> onnx.ModelProto:
    return onnx.load(package / "model.onnx", load_external_data=False)


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that exporting must not change about a directory tree."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            path.lstat().st_ino,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def layer_nodes(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Nodes by decoder layer; "" for those outside."""
    found = collections.defaultdict(list)
    for node in model.graph.node:
        layer = node.name.split(".")[2] if node.name.startswith("model.layers.") else ""
        found[layer].append(node)
    return found


def counted_io() -> tuple[int, int]:
    """Bytes that this process has read and written."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def run_package(package: Path, steps: list[torch.Tensor], capacity: int) -> list[np.ndarray]:
    """All logits of consecutive steps of token ids [batch, seq], by onnxruntime alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(package / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    batch = steps[0].shape[0]
    caches = {
        i.name: np.full((batch, i.shape[1], capacity, i.shape[3]), np.float32(7))
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }
    held, logits = 0, []
    for ids in steps:
        seq = ids.shape[1]
        positions = np.tile(np.arange(held, held + seq, dtype=np.int64), (batch, 1))
        feeds = {
            "input_ids": ids.numpy(),
            "position_ids": positions,
            "write_indices": np.full(batch, held, np.int64),
            "key_positions": np.arange(held + seq, dtype=np.int64),
            "logits_indices": np.tile(np.arange(seq, dtype=np.int64), (batch, 1)),
        }
        found = dict(zip(names, session.run(None, {**feeds, **caches}), strict=True))
        logits.append(found.pop("logits"))
        caches = {n.replace("present", "past_key_values"): v for n, v in found.items()}
        held += seq
    return logits


def transformers_logits(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # ignored where there are none
    )
    with torch.no_grad():
        return model(ids).logits


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """fp32 logits that differ by rounding alone."""
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= 1e-5, error
    assert np.abs(expected).max() > 0.1


def assert_logits_are_transformers(checkpoint: Path, package: Path) -> None:
    vocab = load_package(package).config.vocab_size
    ids = torch.randint(0, vocab, (2, 11), generator=torch.Generator().manual_seed(0))
    steps = [ids[:, :6], ids[:, 6:7], ids[:, 7:]]  # prefill, decode, several at once
    found = np.concatenate(run_package(package, steps, capacity=16), axis=1)
    assert_close(found, transformers_logits(checkpoint, ids).numpy())
