"""Choosing a token from a row of logits: the time per draw, ten draws from each of many rows.

python sampling.py '{"contender": "C++", "library": ..., "vocab": 151936, "draws": 50, "temperature": 0.7,
                     "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.0}'
"""

from __future__ import annotations

import ctypes as c
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOGETHER = 10  # draws per request from one row of logits
Draw = Callable[[np.ndarray], list[int]]


def cpp(request: dict[str, Any]) -> Draw:
    """The C++ runtime's sampler, from its test library."""
    call = c.CDLL(request["library"]).test_sample
    numbers = (c.c_double * 3)(
        *(request[k] for k in ("temperature", "top_p", "repetition_penalty"))
    )
    tokens, message = (c.c_int64 * TOGETHER)(), c.create_string_buffer(1024)

    def draw(logits: np.ndarray) -> list[int]:
        code = call(
            c.c_void_p(logits.ctypes.data),
            len(logits),
            tokens,
            c.c_size_t(0),
            numbers,
            c.c_int64(request["top_k"]),
            c.c_uint64(1),
            c.c_uint64(0),
            c.c_size_t(TOGETHER),
            tokens,
            c.byref(c.c_double()),
            message,
        )
        if code:
            raise SystemExit(message.value.decode())
        return tokens[:]

    return draw


def python(request: dict[str, Any]) -> Draw:
    """engines/sampling.py."""
    from qwenport.engines.sampling import Sampler, SamplingParams

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    params = SamplingParams(**{name: request[name] for name in names}, seed=1)

    def draw(logits: np.ndarray) -> list[int]:
        sampler = Sampler(params)
        return [sampler.sample(logits) for _ in range(TOGETHER)]

    return draw


def transformers(request: dict[str, Any]) -> Draw:
    """The processors that transformers' `generate` sets up, then torch's softmax and multinomial, or argmax."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    seen, warpers = torch.zeros(1, 1, dtype=torch.long), []
    if request["temperature"]:
        warpers.append(TemperatureLogitsWarper(request["temperature"]))
        if request["top_k"]:
            warpers.append(TopKLogitsWarper(request["top_k"]))
        if request["top_p"] < 1:
            warpers.append(TopPLogitsWarper(request["top_p"]))

    def one(logits: np.ndarray) -> int:
        scores = torch.from_numpy(logits)[None]
        for warper in warpers:
            scores = warper(seen, scores)
        if not warpers:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1))

    return lambda logits: [one(logits) for _ in range(TOGETHER)]


def main() -> None:
    """Time and print; the first three draws warm up."""
    request = json.loads(sys.argv[1])
    draw = {"C++": cpp, "Python": python, "transformers": transformers}[request["contender"]](
        request
    )
    random, times, tokens = np.random.default_rng(7), [], []
    for step in range(request["draws"] + 3):
        logits = (random.standard_normal(request["vocab"]) * 4).astype(np.float32)
        start = time.perf_counter()
        tokens.extend(draw(logits))
        if step >= 3:
            times.append((time.perf_counter() - start) / TOGETHER)
    print(json.dumps({"seconds": times, "tokens": tokens}))


if __name__ == "__main__":
    main()
