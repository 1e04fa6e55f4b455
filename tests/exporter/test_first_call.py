"""MKL's functions are called once on one thread before anything is computed with them (pytorch/pytorch#188792)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenport.exporter import first_call, open_checkpoint, rope_tables
from qwenport.validate import Options, Sources, Validation, validation

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2.5"


@pytest.mark.parametrize("name", first_call.NAMES)
def test_each_is_a_function_of_torch_on_one_number(name: str) -> None:
    assert getattr(torch, name)(torch.ones(1)).shape == (1,)


def test_tables_of_a_fresh_process_are_those_of_this_one() -> None:
    """Three at once: where the first calls of cos and sin are several threads', one in some tens is wrong."""
    rope = open_checkpoint(TINY).config.rope
    cos, sin = rope_tables(rope, 512)
    script = (
        "import sys, torch\n"
        "from qwenport.exporter import first_call, open_checkpoint, rope_tables\n"
        "torch.set_num_threads(4)\n"
        "rope = open_checkpoint(sys.argv[1]).config.rope\n"
        "sys.stdout.buffer.write(b''.join(t.numpy().tobytes() for t in rope_tables(rope, 512)))\n"
        "assert first_call.settle.cache_info().currsize == 1\n"
    )
    command = [sys.executable, "-c", script, str(TINY)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        written, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert written == cos.numpy().tobytes() + sin.numpy().tobytes()


def test_it_is_the_first_thing_that_a_validation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstError(Exception):
        pass

    def settle() -> None:
        raise FirstError

    monkeypatch.setattr(validation, "settle", settle)
    with pytest.raises(FirstError):
        Validation(None, Sources(TINY), Options())  # type: ignore[arg-type]
