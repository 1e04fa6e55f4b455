"""Large GPTQ checkpoints: what exporting them holds in memory."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PUBLISHED, tensor_shapes
from test_moe_scale import measured

GROUP = 128


def write_sparse_gptq(folder: Path, raw: dict[str, Any]) -> int:
    """Write an fp16 checkpoint with act-order, of zeros but for the groups; return the bytes of its codes."""
    folder.mkdir(parents=True)
    stated = {
        "bits": 4,
        "desc_act": True,
        "group_size": GROUP,
        "quant_method": "gptq",
        "sym": False,
    }
    config = raw | {"torch_dtype": "float16", "quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = codes = 0

    def add(name: str, dtype: str, size: int, *shape: int) -> None:
        nonlocal end
        length = size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
        end += length

    for name, shape in tensor_shapes(raw).items():
        if not name.endswith("_proj.weight"):
            add(name, "F16", 2, *shape)
            continue
        (n, k), linear = shape, name.removesuffix(".weight")
        add(f"{linear}.qweight", "I32", 4, k // 8, n)
        add(f"{linear}.qzeros", "I32", 4, k // GROUP, n // 8)
        add(f"{linear}.scales", "F16", 2, k // GROUP, n)
        add(f"{linear}.g_idx", "I32", 4, k)
        codes += n * k // 2
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, fields in header.items():
            if name.endswith("g_idx"):
                (count,) = fields["shape"]
                groups = np.arange(count, dtype="<i4")[::-1] // GROUP
                file.seek(8 + len(text) + fields["data_offsets"][0])
                file.write(groups.tobytes())
    return codes


@pytest.mark.slow
def test_layers_of_72b_are_repacked_in_a_gigabyte_of_memory(tmp_path: Path) -> None:
    raw = PUBLISHED["qwen2.5-72b-instruct"] | {"num_hidden_layers": 2, "max_window_layers": 2}
    codes = write_sparse_gptq(tmp_path / "checkpoint", raw)
    found = measured(tmp_path / "checkpoint", tmp_path / "package", "link")
    assert found["written"] > codes > 800e6
    assert found["peak"] < 1.0e9
    shutil.rmtree(tmp_path / "package")
