"""onnxruntime-genai on the CPU, greedy, token ids in and out: decode and prefill times.

Takes the same request and prints the same results as ours_decode.py.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import onnxruntime_genai as og


def generator(model: Any, capacity: int) -> Any:
    """A greedy generator with a cache of `capacity` slots."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=capacity, do_sample=False)
    return og.Generator(model, params)


def main() -> None:
    """Time and print."""
    request = json.loads(sys.argv[1])
    model = og.Model(request["model"])
    prompt, times = request["prompt"], []
    prefills = []
    for _ in range(request["prefills"]):
        fresh = generator(model, request["capacity"])
        start = time.perf_counter()
        fresh.append_tokens(prompt)
        prefills.append(time.perf_counter() - start)
        del fresh
    running = generator(model, request["capacity"])
    running.append_tokens(prompt[: request["context"]])
    running.generate_next_token()  # only chooses: append_tokens has already computed the logits
    for step in range(request["warmup"] + request["tokens"]):
        start = time.perf_counter()
        running.generate_next_token()
        if step >= request["warmup"]:
            times.append(time.perf_counter() - start)
    tokens = [int(token) for token in running.get_sequence(0)[request["context"] :]][:-1]
    print(json.dumps({"decode": times, "prefill": prefills, "tokens": tokens}))


if __name__ == "__main__":
    main()
