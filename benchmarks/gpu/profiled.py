"""One call of the experts' kernels at the size of Qwen3-30B-A3B's layer, for Nsight Compute to look at.

ncu --profile-from-start off ... python benchmarks/gpu/profiled.py TOKENS
"""

from __future__ import annotations

import sys

import torch
from kernels import PluginCall, cases, outputs_of
from no_gpu import NO_GPU

from plugins import LAYERS, TINY, built


def main() -> int:
    """Call them once untimed and once between the profiler's marks; 2 without a GPU."""
    gpu = torch.cuda.is_available()
    device, layers = ("cuda", LAYERS[-1:]) if gpu else ("cpu", TINY)
    torch.manual_seed(0)
    *_, case = cases(layers, (int(sys.argv[1]),), (torch.bfloat16,), device)
    outputs = [memory.tensor for memory in outputs_of(case, device)]
    library = built("plugins-cuda") / "libqwenport_plugins.so"
    calls = built("plugins") / "libplugin_calls.so"
    call = PluginCall(calls, library, case.plugin, case.fields, case.inputs, outputs)
    if not gpu:
        print(NO_GPU)
        return 2
    call(case.inputs, outputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(case.inputs, outputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
