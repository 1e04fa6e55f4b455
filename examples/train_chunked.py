"""Go on training a tiny Qwen2.5 checkpoint under dual chunk attention, as Qwen2.5-1M has it, on a CPU.

    python examples/train_chunked.py --start examples/tiny-qwen2.5 --out examples/tiny-qwen2.5-1m

Half of the documents are several tales about the same people in a row (500 to 700 tokens), half are those of
`train_tiny.py`. A step reads 256, 384 or 512 tokens of each text under the attention itself
(`chunked_attention.py`), scaled as prompts of that length are. The same `--steps` and `--seed` on the same
machine give the same weights.

At the end it prints the loss on texts that training did not use, twice as long as its longest, by position,
with dual chunk attention and with plain rope, before and after training; and what each tensor does, as
`train_tiny.py` does.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from chunked_attention import attend_in_chunks
from rich.table import Table
from tiny_checkpoint import CONTEXT, QWEN2_5_1M, write_checkpoint
from tiny_tales import cast, chat_document, tale, text_document
from tokenizers import Tokenizer
from torch.nn import functional
from train_tiny import (
    Batches,
    check_tensors,
    console,
    learning_rate_scale,
    loss_of,
    make_optimizers,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

RATE = 0.3  # of the learning rate of `train_tiny.py`
DOCUMENTS, HELD_OUT = 6000, 32
MEASURED = 2 * CONTEXT  # tokens of each text that the loss is measured on
LENGTHS = (CONTEXT // 2, 3 * CONTEXT // 4, CONTEXT)  # few, so that memory is used again
RANGES = ((1, 48), (48, 256), (256, 512), (512, 768), (768, MEASURED))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny checkpoint on, in chunks.")
    add = parser.add_argument
    add("--start", type=Path, required=True, help="the checkpoint to begin with")
    add("--out", type=Path, required=True, help="folder to write; its files are replaced")
    add("--steps", type=int, default=200, help="steps of training (default: %(default)s)")
    add("--batch", type=int, default=4, help="texts per step (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of text and order (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def tales(rng: random.Random, counts: Sequence[int]) -> str:
    """One of these numbers of tales, about the same people."""
    names = cast(rng)
    return "\n\n".join(tale(rng, names) for _ in range(rng.choice(counts)))


def long_document(rng: random.Random) -> str:
    """Three or four tales."""
    return tales(rng, (3, 4))


def make_document(rng: random.Random) -> str:
    """Long in half of the cases, otherwise a chat or a plain passage."""
    makers = (long_document, chat_document, text_document)
    (make,) = rng.choices(makers, (0.5, 0.2, 0.3))
    return make(rng)


def load(folder: Path) -> PreTrainedModel:
    """The model in fp32, whose config asks for dual chunk attention but which does not compute it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.dual_chunk_attention_config = QWEN2_5_1M["dual_chunk_attention_config"]
    return model


def train(model: PreTrainedModel, batches: Batches, options: argparse.Namespace) -> None:
    """Train in place, in bfloat16 autocast over float32 weights."""
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] * RATE for optimizer in optimizers]
    lengths, begin, total = random.Random(options.seed), time.monotonic(), 0.0
    for step in range(options.steps):
        tokens = batches.draw(options.batch, lengths.choice(LENGTHS))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_scale(step / options.steps)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 25 == 0:
            seconds = time.monotonic() - begin
            console.print(f"step {step + 1}, {seconds:.0f} s, mean loss {total / 25:.3f}")
            total = 0.0


@torch.no_grad()
def losses(model: PreTrainedModel, texts: torch.Tensor) -> list[float]:
    """Mean loss in nats per token over each of RANGES, of int64 [texts, MEASURED]."""
    found = []
    for row in texts.split(4):
        logits = model(input_ids=row[:, :-1], use_cache=False).logits
        found.append(functional.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="none"))
    per_position = torch.cat(found).mean(0)
    return [per_position[first - 1 : last - 1].mean().item() for first, last in RANGES]


def report(start: Path, out: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Load what was written, as a user would; print losses by position and the effect of each tensor."""
    rng = random.Random(seed + 1)
    rows: list[list[int]] = []
    while len(rows) < HELD_OUT:
        ids = tokenizer.encode(tales(rng, [8])).ids
        if len(ids) >= MEASURED:
            rows.append(ids[:MEASURED])
    texts = torch.tensor(rows)
    table = Table(
        "weights", "attention", *(f"{a}-{b - 1}" for a, b in RANGES), title="Loss by position"
    )
    for name, folder in (("before", start), ("after", out)):
        model = load(folder)
        for attention in ("plain", "chunks"):
            if attention == "chunks":
                attend_in_chunks(model)
            table.add_row(name, attention, *(f"{loss:.3f}" for loss in losses(model, texts)))
    console.print(table)
    check_tensors(model, texts[:2, : CONTEXT // 2])


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)
    tokenizer = Tokenizer.from_file(str(options.start / "tokenizer.json"))
    batches = Batches(tokenizer, [make_document(rng) for _ in range(DOCUMENTS)], options.seed)
    model = load(options.start)
    attend_in_chunks(model)
    console.print(f"{DOCUMENTS} texts, {len(batches.stream)} tokens")
    train(model, batches, options)
    write_checkpoint(model, QWEN2_5_1M, tokenizer, options.out)
    report(options.start, options.out, tokenizer, options.seed)


if __name__ == "__main__":
    main()
