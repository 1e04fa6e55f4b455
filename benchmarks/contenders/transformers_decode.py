"""transformers in fp32 with sdpa attention and its own cache: decode and prefill times.

Takes the same request and prints the same results as ours_decode.py. A plain loop over the model: `generate` would
cost more.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    """Time and print."""
    request = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prompt, times, tokens = torch.tensor([request["prompt"]]), [], []
    prefills = []
    for _ in range(request["prefills"]):
        start = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        prefills.append(time.perf_counter() - start)
    output = model(prompt[:, : request["context"]], use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    for step in range(request["warmup"] + request["tokens"]):
        start = time.perf_counter()
        tokens.append(int(token))
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        if step >= request["warmup"]:
            times.append(time.perf_counter() - start)
    print(json.dumps({"decode": times, "prefill": prefills, "tokens": tokens}))


if __name__ == "__main__":
    main()
