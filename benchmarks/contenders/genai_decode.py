"""onnxruntime-genai on the CPU, greedy, token ids in and out: decode and prefill times.

Takes the same request as ours_decode.py and prints the same results and more (usage.py).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import onnxruntime_genai as og
from usage import Clock, print_results, resident_bytes


def generator(model: Any, capacity: int) -> Any:
    """A greedy generator with a cache of `capacity` slots."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=capacity, do_sample=False)
    return og.Generator(model, params)


def main() -> None:
    """Time and print."""
    request = json.loads(sys.argv[1])
    clock = Clock()
    model = og.Model(request["model"])
    load, loaded = clock.read(), resident_bytes()
    prompt, times = request["prompt"], []
    prefills = []
    for _ in range(request["prefills"]):
        fresh = generator(model, request["capacity"])
        clock = Clock()
        fresh.append_tokens(prompt)
        prefills.append(clock.read())
        del fresh
    running = generator(model, request["capacity"])
    running.append_tokens(prompt[: request["context"]])
    running.generate_next_token()  # only chooses: append_tokens has already computed the logits
    for step in range(request["warmup"] + request["tokens"]):
        clock = Clock()
        running.generate_next_token()
        if step >= request["warmup"]:
            times.append(clock.read())
    tokens = [int(token) for token in running.get_sequence(0)[request["context"] :]][:-1]
    print_results(load, loaded, prefills, times, tokens)


if __name__ == "__main__":
    main()
