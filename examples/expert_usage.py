"""Print how a mixture-of-experts checkpoint spreads text over its experts.

    python examples/expert_usage.py examples/tiny-qwen2-moe

The text is made up by `tiny_tales.py`, from a seed that training does not use.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tiny_checkpoint import END_OF_TEXT
from tiny_tales import chat_document, text_document
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SEED = 1
LENGTH = 256


def sparse_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The mixture of experts of each layer that has one, by the layer's number."""
    layers = enumerate(model.model.layers)
    return {number: layer.mlp for number, layer in layers if hasattr(layer.mlp, "experts")}


@torch.no_grad()
def usage_table(model: PreTrainedModel, tokens: torch.Tensor) -> Table:
    """The share of int64 [rows, length] tokens that each expert gets, and more, by layer."""
    gates: dict[int, torch.Tensor] = {}
    layers = sparse_layers(model)
    hooks = [
        mixture.shared_expert_gate.register_forward_hook(
            lambda _module, _inputs, output, number=number: gates.update({number: output})
        )
        for number, mixture in layers.items()
    ]
    routers = model(tokens, output_router_logits=True, logits_to_keep=1).router_logits
    for hook in hooks:
        hook.remove()

    columns: list[list[str]] = []
    for number, router in zip(layers, routers, strict=True):
        weights, chosen = router.softmax(-1).topk(model.config.num_experts_per_tok)
        shares = chosen.flatten().bincount(minlength=router.shape[-1]) / len(chosen)
        gate, kept = gates[number].sigmoid(), weights.sum(-1)
        columns.append(
            [
                *(f"{share:.1%}" for share in shares),
                str(len(chosen.sort().values.unique(dim=0))),
                f"{kept.mean():.2f} ± {kept.std():.2f}",
                f"{gate.mean():.2f} ± {gate.std():.2f}",
            ]
        )
    experts = [f"expert {number}" for number in range(len(columns[0]) - 3)]
    labels = [*experts, "sets of experts", "sum of their weights", "shared expert's gate"]
    title = f"Experts of {tokens.numel()} tokens"
    table = Table("", *(f"layer {number}" for number in layers), title=title)
    for label, *cells in zip(labels, *columns, strict=True):
        table.add_row(label, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how a checkpoint uses its experts.")
    parser.add_argument("checkpoint", type=Path, help="folder of a mixture-of-experts checkpoint")
    checkpoint = parser.parse_args().checkpoint
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if not sparse_layers(model):
        raise SystemExit(f"{checkpoint}: no layer has experts")
    rng = random.Random(SEED)
    documents = [make(rng) for make in (chat_document, text_document) for _ in range(150)]
    rng.shuffle(documents)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    encodings = tokenizer.encode_batch([text + END_OF_TEXT for text in documents])
    stream = [token for encoding in encodings for token in encoding.ids]
    rows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    Console().print(usage_table(model, rows))


if __name__ == "__main__":
    main()
