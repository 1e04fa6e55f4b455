"""transformers in fp32 with sdpa attention and its own cache: decode and prefill times.

Takes the same request as ours_decode.py and prints the same results and more (usage.py). A plain loop over the model:
`generate` would cost more.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM
from usage import Clock, print_results, resident_bytes


@torch.inference_mode()
def main() -> None:
    """Time and print."""
    request = json.loads(sys.argv[1])
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    load, loaded = clock.read(), resident_bytes()
    prompt, times, tokens = torch.tensor([request["prompt"]]), [], []
    prefills = []
    for _ in range(request["prefills"]):
        clock = Clock()
        model(prompt, use_cache=True, logits_to_keep=1)
        prefills.append(clock.read())
    output = model(prompt[:, : request["context"]], use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    for step in range(request["warmup"] + request["tokens"]):
        clock = Clock()
        tokens.append(int(token))
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        if step >= request["warmup"]:
            times.append(clock.read())
    print_results(load, loaded, prefills, times, tokens)


if __name__ == "__main__":
    main()
