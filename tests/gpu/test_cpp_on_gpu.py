"""The C++ runtime on a GPU: the tokens of `qwenport generate`, and device memory that stays where it is.

Each case is a process of its own, in which `tensorrt` has loaded the library that the runtime then finds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from able import this_machine

ROOT = Path(__file__).parents[2]

REASON = this_machine().no_target("tensorrt", "fp32") or this_machine().no_builds()

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PROGRAM = """
import json, sys
import tensorrt, torch
sys.path[:0] = [sys.argv[1] + "/tests", sys.argv[1] + "/tests/cpp"]
from pathlib import Path
from builds import built
from cpp.runtime import Library

library = Library(built("release") / "runtime" / "libqwenport.so")
engine = library.load(Path(sys.argv[2]))
"""
GREEDY = """
request = json.loads(sys.argv[3])
for graphs in (0, 1):
    session = engine.session(max_batch=2, cuda_graphs=graphs)
    rows = [request["prompt_ids"], request["prompt_ids"][:3]]
    results = session.generate(rows, stop_tokens=request["stop_ids"], max_new_tokens=40)
    print(json.dumps([result.tokens for result in results]))
"""
STEPS = """
session = engine.session()
free = []
for step in range(10_000):
    if session.lengths[0] == session.capacity:
        session.reset()
    session.decode([1 + step % 1000])
    if step in (2_000, 9_999):
        free.append(torch.cuda.mem_get_info()[0])
print(json.dumps(free))
"""


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["tiny-qwen2.5", "tiny-qwen2-moe", "tiny-qwen2.5-1m"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    qwenport = [sys.executable, "-m", "qwenport"]
    checkpoint = ROOT / "examples" / request.param
    run(*qwenport, "export", checkpoint, folder / "package", "--dtype", "fp32")
    run(*qwenport, "build", folder / "package", folder / "engine", "--target", "tensorrt")
    return folder / "engine"


def test_greedy_tokens_are_those_of_generate(engine: Path) -> None:
    words = ("--prompt", "Once upon a time", "--max-new-tokens", 40, "--json")
    theirs = json.loads(run(sys.executable, "-m", "qwenport", "generate", engine, *words))
    stop = json.loads((engine / "generation_config.json").read_text())["eos_token_id"]
    stop_ids = stop if isinstance(stop, list) else [stop]
    request = json.dumps({"prompt_ids": theirs["prompt_token_ids"], "stop_ids": stop_ids})
    lines = run(sys.executable, "-c", PROGRAM + GREEDY, ROOT, engine, request).splitlines()
    assert len(lines) == 2
    for line in lines:  # with and without graphs
        assert json.loads(line)[0] == theirs["token_ids"]
    assert lines[0] == lines[1]


def test_ten_thousand_steps_take_no_device_memory(engine: Path) -> None:
    before, after = json.loads(run(sys.executable, "-c", PROGRAM + STEPS, ROOT, engine))
    assert after == before
