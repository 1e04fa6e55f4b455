"""Large mixtures of experts: what exporting them holds in memory and writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import PUBLISHED, mini, tensor_shapes, write_sparse_checkpoint

from qwenport.exporter import load_package
from qwenport.exporter.weights import PACKED

# Memory is the high-water mark of this process; getrusage's also counts the process that forked it.
MEASURED = """
import json, sys
from pathlib import Path
from qwenport.exporter import export

def fact(name, file):
    (line,) = [l for l in Path(f"/proc/self/{file}").read_text().splitlines() if l.startswith(name)]
    return int(line.split()[1])

warm, checkpoint, package, mode = sys.argv[1:]
if warm:
    export(Path(warm), Path(package + ".warm"))  # whatever is imported late is imported now
held, read, written = fact("VmRSS", "status"), fact("rchar", "io"), fact("wchar", "io")
export(Path(checkpoint), Path(package), weights=mode)
print(json.dumps({
    "peak": fact("VmHWM", "status") * 1024,
    "growth": (fact("VmHWM", "status") - held) * 1024,
    "read": fact("rchar", "io") - read,
    "written": fact("wchar", "io") - written,
}))
"""


def measured(
    checkpoint: Path, package: Path, mode: str, warm: Path | None = None
) -> dict[str, int]:
    """Bytes that an export in a process of its own held, read and wrote."""
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(warm or ""), checkpoint, package, mode],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, int] = json.loads(result.stdout)
    return found


def test_packing_holds_less_than_a_layer_in_memory(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 64}
    raw = mini("qwen3_moe", torch_dtype="bfloat16", **sizes)
    layer = 2 * 3 * 512 * 1024 * 64  # bf16; gate, up and down
    stacks = layer * raw["num_hidden_layers"]
    assert stacks > 400e6
    small = tmp_path / "small"
    write_sparse_checkpoint(small, mini("qwen3_moe", torch_dtype="bfloat16"))
    write_sparse_checkpoint(tmp_path / "large", raw)
    found = measured(tmp_path / "large", tmp_path / "package", "pack", warm=small)
    assert found["written"] > stacks < found["read"]
    assert (tmp_path / "package" / "weights" / PACKED).stat().st_size > stacks
    assert found["growth"] < layer / 2
    shutil.rmtree(tmp_path / "package")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, raw in PUBLISHED.items() if raw["model_type"].endswith("_moe")]
)
def test_a_published_mixture_is_exported_without_being_read_or_written(
    name: str, tmp_path: Path
) -> None:
    size = write_sparse_checkpoint(tmp_path / "checkpoint", PUBLISHED[name])
    found = measured(tmp_path / "checkpoint", tmp_path / "package", "link")
    assert found["peak"] < 1.5e9
    assert found["written"] < 200e6
    package = load_package(tmp_path / "package")
    assert package.manifest["weights"]["bytes"] == size
    assert package.manifest["weights"]["tensors"] == len(tensor_shapes(PUBLISHED[name]))
