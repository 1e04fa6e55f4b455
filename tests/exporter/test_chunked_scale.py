"""Qwen2.5-7B-Instruct-1M as published, exported whole for a million positions; its weights are holes in a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from checkpoints import PUBLISHED, transformers_config, write_sparse_checkpoint
from safetensors import safe_open
from test_moe_scale import measured
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwenport.contract import REQUEST_LENGTHS
from qwenport.exporter import load_package

RAW = PUBLISHED["qwen2.5-7b-instruct-1m"]


def test_the_7b_model_is_exported_for_its_whole_context(tmp_path: Path) -> None:
    size = write_sparse_checkpoint(tmp_path / "checkpoint", RAW)
    (tmp_path / "checkpoint" / "sparse_attention_config.json").write_text("{}")
    found = measured(tmp_path / "checkpoint", tmp_path / "package", "link")
    package = load_package(tmp_path / "package")
    assert package.max_seq_len == RAW["max_position_embeddings"] == 1_010_000
    assert package.config.num_hidden_layers == RAW["num_hidden_layers"]
    assert package.manifest["weights"]["bytes"] == size > 15e9
    assert any("vLLM" in note for note in package.manifest["source"]["notes"])
    (lengths,) = [b for b in package.manifest["bindings"]["inputs"] if b["name"] == REQUEST_LENGTHS]
    assert (lengths["dtype"], len(lengths["shape"])) == ("int64", 1)
    assert found["peak"] < 1.5e9
    assert found["written"] < 200e6  # rope tables and the graph
    _check_tables(package.path / "rope.safetensors")
    shutil.rmtree(package.path)


def _check_tables(file: Path) -> None:
    """One row for each position that a key or a query is rotated by, as transformers rotates."""
    most = RAW["dual_chunk_attention_config"]["chunk_size"]
    rotary = Qwen2RotaryEmbedding(transformers_config(RAW))
    with safe_open(file, framework="pt") as tables:
        (cos,), (sin,) = ([n for n in tables.keys() if kind in n] for kind in ("cos", "sin"))  # noqa: SIM118
        for position in (0, 1, 253951, most):
            right = rotary(torch.ones(1), torch.tensor([[position]]))
            for name, expected in zip((cos, sin), right, strict=True):
                rows = tables.get_slice(name)
                assert rows.get_shape()[0] == most + 1
                row = rows[position : position + 1]
                assert torch.allclose(row, expected[0, :, : row.shape[1]], atol=1e-6)
