"""Which GPUs a model fits on: a table of common GPUs, and the sum of weights and KV cache."""

from __future__ import annotations

from dataclasses import dataclass

# Activations, the CUDA context and a desktop need memory too.
USABLE = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU model; `memory_mib` as nvidia-smi states it, `architecture` as `build --gpu` takes it."""

    name: str
    architecture: str
    memory_mib: int

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return self.memory_mib << 20


GPUS = (
    Gpu("RTX 2080 Ti", "sm75", 11264),
    Gpu("T4", "sm75", 15360),
    Gpu("A100 40 GB", "sm80", 40960),
    Gpu("A100 80 GB", "sm80", 81920),
    Gpu("RTX 3060", "sm86", 12288),
    Gpu("RTX 3090", "sm86", 24576),
    Gpu("RTX A6000", "sm86", 49140),
    Gpu("RTX 4060", "sm89", 8188),
    Gpu("RTX 4070", "sm89", 12282),
    Gpu("RTX 4090", "sm89", 24564),
    Gpu("L4", "sm89", 23034),
    Gpu("L40S", "sm89", 46068),
    Gpu("H100 80 GB", "sm90", 81559),
    Gpu("H200", "sm90", 143771),
    Gpu("B200", "sm100", 183359),
    Gpu("RTX 5070", "sm120", 12227),
    Gpu("RTX 5080", "sm120", 16303),
    Gpu("RTX 5090", "sm120", 32607),
    Gpu("RTX PRO 6000", "sm120", 97887),
)


@dataclass(frozen=True)
class Fit:
    """How much of the model's context one text may use on a GPU; 0 if not even the weights fit."""

    gpu: Gpu
    context: int
    full: bool


def fits(weight_bytes: int, kv_bytes_per_token: int, max_seq_len: int) -> list[Fit]:
    """Compute the fit for every GPU in the table, at batch size 1.

    Args:
        weight_bytes: bytes resident on the GPU whatever is generated.
        kv_bytes_per_token: bytes of KV cache per token.
        max_seq_len: the full context.
    """
    result = []
    for gpu in GPUS:
        free = int(gpu.memory_bytes * USABLE) - weight_bytes
        context = max(0, min(max_seq_len, free // kv_bytes_per_token))
        result.append(Fit(gpu, context, context == max_seq_len))
    return result
