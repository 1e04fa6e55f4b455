"""A package on onnxruntime's CPU provider, through `open_session`: decode and prefill times.

python ours_decode.py '{"model": ..., "capacity": 1024, "prompt": [...], "context": 128,
                        "warmup": 4, "tokens": 48, "prefills": 3}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from qwenport.engines import open_session


def main() -> None:
    """Time and print."""
    request = json.loads(sys.argv[1])
    session = open_session(Path(request["model"]), capacity=request["capacity"])
    prompt, times, tokens = request["prompt"], [], []
    prefills = []
    for _ in range(request["prefills"]):
        session.reset()
        start = time.perf_counter()
        session.prefill([prompt])
        prefills.append(time.perf_counter() - start)
    session.reset()
    (logits,) = session.prefill([prompt[: request["context"]]])
    token = int(logits[-1].argmax())
    for step in range(request["warmup"] + request["tokens"]):
        start = time.perf_counter()
        tokens.append(token)
        token = int(session.decode([token])[0].argmax())
        if step >= request["warmup"]:
            times.append(time.perf_counter() - start)
    print(json.dumps({"decode": times, "prefill": prefills, "tokens": tokens}))


if __name__ == "__main__":
    main()
