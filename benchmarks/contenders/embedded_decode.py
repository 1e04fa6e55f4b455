"""An engine directory on its GPU: the time of every decode step, and how device memory grows.

python embedded_decode.py '{"contender": "C++, CUDA graphs", "engine": ..., "library": ..., "tests": ...,
                            "context": 128, "steps": 10000}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def session_of(request: dict[str, Any]) -> tuple[Any, int]:
    """A session with prefill, decode and truncate as in the C API, and its capacity."""
    if request["contender"] == "Python":
        from qwenport.engines import open_session

        session = open_session(Path(request["engine"]))
        return session, session.capacity
    import tensorrt  # noqa: F401 - loads its library into the process, where dlopen finds it

    sys.path.insert(0, request["tests"])
    from cpp.runtime import Library

    engine = Library(Path(request["library"])).load(Path(request["engine"]))
    session = engine.session(cuda_graphs=int(request["contender"] == "C++, CUDA graphs"))
    return session, session.capacity


def main() -> None:
    """Time and print; a full cache is truncated back to the context."""
    import torch

    request = json.loads(sys.argv[1])
    session, capacity = session_of(request)
    context = min(request["context"], capacity // 2)
    prompt = [1 + n % 1000 for n in range(context)]
    times: list[float] = []
    token, held, free = 0, capacity, []
    for step in range(request["steps"]):
        if held == capacity:
            session.reset()
            token = int(np.asarray(session.prefill([prompt])[0]).reshape(-1).argmax())
            held = context
        start = time.perf_counter()
        token = int(np.asarray(session.decode([token])[0]).reshape(-1).argmax())
        times.append(time.perf_counter() - start)
        held += 1
        if step in (request["steps"] // 10, request["steps"] - 1):
            free.append(torch.cuda.mem_get_info()[0])
    print(json.dumps({"seconds": times, "device_growth": free[0] - free[-1]}))


if __name__ == "__main__":
    main()
