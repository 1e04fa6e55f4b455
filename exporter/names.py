"""Tensor names in files: prefixes that tools put before transformers' names, and buffers that old releases saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwenport.contract import BF16, BY_SAFETENSORS, FP16, FP32
from qwenport.exporter.config import ModelConfig
from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.safetensors_file import TensorEntry, chunks

PREFIX = "model."  # transformers' decoder
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PARTS = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")  # of the decoder
# Wrappers that may enclose a whole model, possibly nested: another model, a multimodal one, peft, DataParallel,
# torch.compile.
WRAPPERS = re.compile(r"(model\.|language_model\.|base_model\.model\.|module\.|_orig_mod\.)*")
BUFFER = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
# Rounding tolerances (relative, absolute); fp32: from another order of operations; fp16 has subnormals below 6e-5.
ROUNDED = {BF16: (2**-8, 0.0), FP16: (2**-11, 2**-25), FP32: (2e-6, 0.0)}


def understood(tensors: Mapping[str, TensorEntry]) -> tuple[str, dict[str, TensorEntry]]:
    """Rename the tensors to transformers' names.

    Args:
        tensors: the tensors under their names in the files.

    Returns:
        (the prefix of the decoder's tensors in the files, the tensors under transformers' names). Without one prefix
        common to the whole checkpoint, nothing is renamed.
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
            renamed[name] = HEAD  # next to the decoder, at any depth
    if len(renamed) != len(tensors) or len(set(renamed.values())) != len(tensors):
        return PREFIX, dict(tensors)
    return prefix, {
        renamed[name]: replace(entry, name=renamed[name]) for name, entry in tensors.items()
    }


def rotary_buffers(
    path: Path, config: ModelConfig, tensors: Mapping[str, TensorEntry]
) -> frozenset[str]:
    """The tensors that are rotary frequency buffers, as transformers before 4.31 saved them.

    Args:
        config: from config.json alone, without `--rope-scaling`.

    Raises:
        CheckpointError: one differs from config.json: the model was trained with other frequencies.
    """
    names = frozenset(name for name in tensors if BUFFER.fullmatch(name))
    if names:
        import torch

        # if they depend on the text's length, a model starts with those of its original length
        right = config.rope.inverse_frequencies(config.rope.original_max_position_embeddings)
        for name in sorted(names):
            entry = tensors[name]
            dtype = BY_SAFETENSORS[entry.dtype]
            same = entry.shape == tuple(right.shape)
            if same:
                data = bytearray(b"".join(chunks(path, entry)))
                stored = torch.frombuffer(data, dtype=dtype.torch).float()
                relative, absolute = ROUNDED[dtype]
                same = torch.allclose(stored, right, rtol=relative, atol=absolute)
            if not same:
                raise CheckpointError(
                    f"tensor {name} holds other rotary frequencies than config.json gives; "
                    "say in config.json how they are scaled, or remove the buffer"
                )
    return names
