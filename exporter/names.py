"""What files call tensors: prefixes that tools put before transformers' names, and buffers that old releases saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwenport.exporter.config import ModelConfig
from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.safetensors_file import DTYPE_NAMES, TensorEntry, chunks

PREFIX = "model."  # of transformers' decoder
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PARTS = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")  # of the decoder
# What a whole model may lie in, one in the other: another model, a multimodal one, peft's, DataParallel's,
# torch.compile's.
WRAPPERS = re.compile(r"(model\.|language_model\.|base_model\.model\.|module\.|_orig_mod\.)*")
BUFFER = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
# What rounding leaves: (relative, absolute); fp32: of another order of operations; fp16 has subnormals below 6e-5.
ROUNDED = {"bf16": (2**-8, 0.0), "fp16": (2**-11, 2**-25), "fp32": (2e-6, 0.0)}


def understood(tensors: Mapping[str, TensorEntry]) -> tuple[str, dict[str, TensorEntry]]:
    """Give the tensors transformers' names.

    Args:
        tensors: by the names that the files have.

    Returns:
        (the prefix that the decoder's tensors have in the files, the tensors under transformers' names). If the whole
        checkpoint does not have one prefix, all is as it was.
    """
    found = [name.removesuffix(EMBEDDING) for name in tensors if name.endswith(EMBEDDING)]
    if len(found) != 1 or found[0] == PREFIX or not WRAPPERS.fullmatch(found[0]):
        return PREFIX, dict(tensors)
    (prefix,) = found
    renamed = {}
    for name in tensors:
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(PARTS):
            renamed[name] = PREFIX + name.removeprefix(prefix)
        elif name.endswith(HEAD) and prefix.startswith(name.removesuffix(HEAD)):
            renamed[name] = HEAD  # beside the decoder, at whatever depth
    if len(renamed) != len(tensors) or len(set(renamed.values())) != len(tensors):
        return PREFIX, dict(tensors)
    return prefix, {
        renamed[name]: replace(entry, name=renamed[name]) for name, entry in tensors.items()
    }


def rotary_buffers(
    path: Path, config: ModelConfig, tensors: Mapping[str, TensorEntry]
) -> frozenset[str]:
    """The tensors that are buffers of rotary frequencies, as releases of transformers before 4.31 saved them.

    Args:
        config: of config.json alone, without what `--rope-scaling` adds.

    Raises:
        CheckpointError: one is not what config.json says: the model was trained with other frequencies.
    """
    names = frozenset(name for name in tensors if BUFFER.fullmatch(name))
    if names:
        import torch

        from qwenport.exporter.weights import TORCH

        # where they change with the text, a model begins with those of its original length
        right = config.rope.inverse_frequencies(config.rope.original_max_position_embeddings)
        for name in sorted(names):
            entry, dtype = tensors[name], DTYPE_NAMES[tensors[name].dtype]
            same = entry.shape == tuple(right.shape)
            if same:
                data = bytearray(b"".join(chunks(path, entry)))
                stored = torch.frombuffer(data, dtype=TORCH[dtype]).float()
                relative, absolute = ROUNDED[dtype]
                same = torch.allclose(stored, right, rtol=relative, atol=absolute)
            if not same:
                raise CheckpointError(
                    f"tensor {name} holds other rotary frequencies than config.json gives; "
                    "say in config.json how they are scaled, or remove the buffer"
                )
    return names
