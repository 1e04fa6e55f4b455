"""The CUDA plugins on a GPU, compared with torch: RoPE, the router and the experts of real models' layers.

    python benchmarks/plugins.py                     # where there is a GPU; needs `make cpp`
    python benchmarks/plugins.py --quick

Times are medians of CUDA events around calls on rotating inputs that together exceed the L2 cache. What can be
captured is replayed as one CUDA graph of all turns, so that times are the GPU's and not the launching program's.

The whole takes three minutes at most: a peer is left out where there is no time for it, the plugins never.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from contenders.plugin_calls import PluginCall
from measure import ROOT
from report import Bar, Columns, Report, Result, benchmark, figure, middle, table
from torch.nn import functional

from qwenport.plugins.moe_router import moe_router
from qwenport.plugins.rotary_embedding import rotary_embedding

sys.path.insert(0, str(ROOT / "tests" / "cpp"))
from builds import BuildError, built

Tensors = Sequence[torch.Tensor]
Call = Callable[[Tensors], Any]
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
CALLS = 20  # timed in each repeat, after as many untimed ones
LONGEST = 1.0  # seconds of timed calls of one contender
ALLOWED = 150.0  # seconds for all cases; torch.compile may take some more for the last
OURS = "plugin"
COLUMNS: Columns = {
    "case: contender": lambda row: f"{row['case']}: {row['contender']}",
    "us": figure("microseconds", "{:.1f}"),
    "GB/s": figure("bytes_per_second", "{:.0f}", 1e9),
    "TFLOP/s": figure("flops", "{:.0f}", 1e12),
}


@dataclass(frozen=True)
class Layer:
    """Sizes of a model's layer, as in its config.json."""

    name: str
    hidden: int
    heads: tuple[int, int]
    head_dim: int
    experts: int
    k: int
    inner: int
    normalize: bool


LAYERS = (
    Layer("Qwen1.5-MoE-A2.7B", 2048, (16, 16), 128, 60, 4, 1408, False),
    Layer("Qwen2-57B-A14B", 3584, (28, 4), 128, 64, 8, 2560, False),
    Layer("Qwen3-30B-A3B", 2048, (32, 4), 128, 128, 8, 768, True),
)
TINY = (Layer("tiny", 64, (2, 1), 16, 6, 2, 32, True),)


@dataclass(frozen=True)
class Setup:
    """The device on which the contenders run, and the plugins' libraries."""

    device: str
    calls: Path
    library: Path
    many: Path  # without the kernels for few tokens
    turns_bytes: int  # the minimum total size of the rotating inputs
    timed_calls: int


def setup_on_gpu(timed_calls: int) -> Setup:
    """The setup on the local GPU."""
    build = built("plugins")
    library, many = (
        built(name) / "libqwenport_plugins.so" for name in ("plugins-cuda", "plugins-cuda-many")
    )
    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return Setup("cuda", build / "libplugin_calls.so", library, many, 2 * cache, timed_calls)


def seconds_of(setup: Setup, call: Call, inputs: Sequence[Tensors], *, capture: bool) -> float:
    """Median time of a call, on rotating inputs."""
    for given in inputs:  # compile, load, warm up
        call(given)
    torch.cuda.synchronize()

    def every_input() -> None:
        for given in inputs:
            call(given)

    step: Callable[[], None] = every_input
    if capture:  # all in one graph: launching a graph takes longer than the smallest calls
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every_input()
        step = graph.replay
    times: list[float] = []
    began = time.perf_counter()
    for turn in range(2 * setup.timed_calls):
        if len(times) >= 3 and time.perf_counter() - began > LONGEST:
            break
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if turn >= setup.timed_calls:
            times.append(start.elapsed_time(end) / 1000 / len(inputs))
    median = middle(times)
    assert median is not None
    return median


def turns(setup: Setup, make: Callable[[], Tensors]) -> list[Tensors]:
    """As many inputs as together exceed the cache, at least 2 and at most 64."""
    first = make()
    size = sum(tensor.nbytes for tensor in first)
    return [first, *(make() for _ in range(min(63, max(1, setup.turns_bytes // size))))]


def plugin(
    calls: Path, library: Path, name: str, fields: dict[str, int], inputs: Tensors, outputs: Tensors
) -> Call:
    call = PluginCall(calls, library, name, fields, inputs, outputs)

    def enqueue(given: Tensors) -> Tensors:
        call(given, outputs)
        return outputs

    return enqueue


def by_expert(given: Tensors) -> torch.Tensor:
    """One cuBLAS matmul per chosen expert; the host has to synchronize to learn which."""
    x, indices, weights, gate_up, down = given
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in indices.unique().tolist():
        token, place = torch.where(indices == expert)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        part = functional.linear(functional.silu(gate) * up, down[expert]).float()
        y.index_add_(0, token, part * weights[token, place, None])
    return y.to(x.dtype)


def by_gathering(given: Tensors) -> torch.Tensor:
    """The chosen experts' weights gathered, then batched matmuls."""
    x, indices, weights, gate_up, down = given
    gate, up = torch.einsum("tkih,th->tki", gate_up[indices], x).chunk(2, dim=-1)
    parts = torch.einsum("tkhi,tki->tkh", down[indices], functional.silu(gate) * up)
    return (parts.float() * weights[..., None]).sum(1).to(x.dtype)


def route(layer: Layer, given: Tensors) -> Tensors:
    """softmax, topk and the division, as in the models' code."""
    weights, indices = torch.softmax(given[0].float(), dim=-1).topk(layer.k, dim=-1)
    if layer.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, indices


def rotate(given: Tensors) -> Tensors:
    q, k, cos, sin, positions = given
    return rotary_embedding(q, cos, sin, positions), rotary_embedding(k, cos, sin, positions)


def compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


@dataclass(frozen=True)
class Case:
    """One operator at one size: its rotating inputs, its contenders, and the minimum bytes and FLOPs."""

    name: str
    inputs: list[Tensors]
    contenders: dict[str, tuple[Call, bool]]  # and whether it can be captured
    bytes: int
    flops: int = 0


def rotary_case(setup: Setup, layer: Layer, tokens: int) -> Case:
    def make() -> Tensors:
        draw: dict[str, Any] = {"dtype": torch.bfloat16, "device": setup.device}
        q, k = (torch.randn(1, heads, tokens, layer.head_dim, **draw) for heads in layer.heads)
        cos, sin = (torch.randn(8192, layer.head_dim // 2, **draw) for _ in range(2))
        return q, k, cos, sin, torch.arange(tokens, device=setup.device)[None]

    inputs = turns(setup, make)
    outputs = [torch.empty_like(tensor) for tensor in inputs[0][:2]]
    ours = plugin(setup.calls, setup.library, "RotaryEmbeddingQK", {}, inputs[0], outputs)
    moved = 2 * sum(tensor.nbytes for tensor in outputs)
    who = {
        OURS: (ours, True),
        "torch": (rotate, True),
        "torch.compile": (compiled(rotate), True),
    }
    return Case(f"rope, {layer.name}, {tokens} tokens", inputs, who, moved)


def router_case(setup: Setup, layer: Layer, tokens: int) -> Case:
    def make() -> Tensors:
        return (torch.randn(tokens, layer.experts, dtype=torch.bfloat16, device=setup.device),)

    inputs = turns(setup, make)
    fields = {"k": layer.k, "normalize": int(layer.normalize)}
    weights, indices = moe_router(inputs[0][0], k=layer.k)
    ours = plugin(setup.calls, setup.library, "MoERouter", fields, inputs[0], [weights, indices])

    def theirs(given: Tensors) -> Tensors:
        return route(layer, given)

    who = {
        OURS: (ours, True),
        "torch": (theirs, True),
        "torch.compile": (compiled(theirs), True),
    }
    moved = inputs[0][0].nbytes + weights.nbytes + indices.nbytes
    return Case(f"router, {layer.name}, {tokens} tokens", inputs, who, moved)


def experts_case(setup: Setup, layer: Layer, tokens: int, weights: Tensors) -> Case:
    def make() -> Tensors:
        x = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, device=setup.device)
        scores = torch.rand(tokens, layer.experts, device=setup.device)
        chosen, indices = scores.topk(layer.k)
        return x, indices, chosen, *weights

    # all experts' weights exceed the cache; with few tokens, different inputs choose different experts
    inputs = [make() for _ in range(8)]
    outputs = [torch.empty_like(inputs[0][0])]
    ours, as_many = (
        plugin(setup.calls, library, "MoEExperts", {}, inputs[0], outputs)
        for library in (setup.library, setup.many)
    )
    who: dict[str, tuple[Call, bool]] = {
        OURS: (ours, True),
        "cuBLAS, expert by expert": (by_expert, False),
    }
    if tokens <= 8:  # beyond, it is the same, and the gathered weights take gigabytes
        who["plugin, as for many tokens"] = (as_many, True)
        who["torch"] = (by_gathering, True)
        who["torch.compile"] = (compiled(by_gathering), True)
    read = sum(given[1].unique().numel() for given in inputs) / len(inputs)
    one = 3 * layer.hidden * layer.inner * 2
    flops = tokens * layer.k * 6 * layer.hidden * layer.inner
    return Case(f"experts, {layer.name}, {tokens} tokens", inputs, who, int(read * one), flops)


def cases(setup: Setup, layers: Sequence[Layer], tokens: Sequence[int]) -> Any:
    """All cases, one at a time: the weights of a layer's experts take gigabytes."""
    for layer in layers:
        sizes = (
            (layer.experts, 2 * layer.inner, layer.hidden),
            (layer.experts, layer.hidden, layer.inner),
        )
        weights = [
            torch.randn(size, dtype=torch.bfloat16, device=setup.device) / size[-1] ** 0.5
            for size in sizes
        ]
        for count in tokens:
            yield rotary_case(setup, layer, count)
            yield router_case(setup, layer, count)
            yield experts_case(setup, layer, count, weights)


def ceilings(setup: Setup) -> dict[str, float]:
    """This GPU's measured copy and read bandwidth, in bytes per second, and its bf16 matmul rate."""
    large = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    copy = seconds_of(
        setup, lambda given: given[0].copy_(given[1]), [large, large[::-1]], capture=True
    )
    words = [tensor.view(torch.float32) for tensor in large]
    read = seconds_of(setup, lambda given: given[0].sum(), [words[:1], words[1:]], capture=True)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = seconds_of(setup, lambda given: given[0] @ given[1], [(a, b), (b, a)], capture=True)
    return {
        "copy_bytes_per_second": 2 * large[0].nbytes / copy,
        "read_bytes_per_second": large[0].nbytes / read,
        "bf16_flops": 2 * 8192**3 / product,
    }


def measure_all(
    setup: Setup,
    layers: Sequence[Layer],
    tokens: Sequence[int],
    report: Report,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time our contenders in every case, and the peers in those that are no later than their share of ALLOWED."""
    began, total = clock(), 3 * len(layers) * len(tokens)
    for number, case in enumerate(cases(setup, layers, tokens), 1):
        report.say(case.name)
        ours = {who: each for who, each in case.contenders.items() if who.startswith(OURS)}
        for who, contender in ours.items():
            measure_contender(setup, case, who, contender, report)
        late = clock() - began > ALLOWED * number / total
        for who in [name for name in case.contenders if report.peers and name not in ours]:
            measure_contender(setup, case, who, None if late else case.contenders[who], report)


def measure_contender(
    setup: Setup, case: Case, who: str, contender: tuple[Call, bool] | None, report: Report
) -> None:
    """Record a contender's time; of None, that there was no time for it."""
    facts: dict[str, Any] = {"bytes": case.bytes, "flops": case.flops, "error": None}
    if contender is None:
        report.add_run(f"{case.name}: {who}", seconds=None, left_out="no time", **facts)
        return
    call, capture = contender
    try:
        facts["seconds"] = seconds_of(setup, call, case.inputs, capture=capture)
    except Exception as error:  # a contender that fails becomes a line of the report
        facts = {"error": f"{type(error).__name__}: {error}"}
    report.add_run(f"{case.name}: {who}", **facts)


def summarise(report: Report) -> list[dict[str, Any]]:
    rows = []
    for run in report.data["runs"]:
        case, _, who = run["contender"].rpartition(": ")
        seconds = run.get("seconds")
        rows.append(
            {
                "case": case,
                "contender": who,
                "microseconds": seconds * 1e6 if seconds else None,
                "bytes_per_second": run["bytes"] / seconds if seconds else None,
                "flops": run["flops"] / seconds if seconds and run["flops"] else None,
                "error": run["error"],
            }
        )
    return rows


def bars(rows: list[dict[str, Any]], measured: dict[str, float]) -> list[Bar]:
    """The plugins' goals, each for the layer furthest from it."""
    ours = [row for row in rows if row["contender"] == OURS and row["microseconds"]]

    def worst(operator: str, tokens: Sequence[int], key: str, ceiling: float) -> float | None:
        found = [
            row[key] / ceiling
            for row in ours
            if row["case"].startswith(operator) and int(row["case"].split()[-2]) in tokens
        ]
        return min(found, default=None)

    copy, read, flops = measured.values()
    times = [
        row["microseconds"]
        for row in ours
        if row["case"].startswith("router") and " 512 tokens" in row["case"]
    ]
    return [
        Bar("rope, of copy bandwidth", worst("rope", [4096], "bytes_per_second", copy), 0.9, "at least", ""),
        Bar("experts, 1 to 8 tokens, of read bandwidth",
            worst("experts", [1, 2, 4, 8], "bytes_per_second", read), 0.85, "at least", ""),
        Bar("experts, 4096 tokens, of the bf16 matmul rate",
            worst("experts", [4096], "flops", flops), 0.7, "at least", ""),
        Bar("router, 512 tokens", max(times, default=None), 5, "at most", "us"),
    ]  # fmt: skip


@benchmark("plugins", repeats=1, quick_peers=True)
def main(report: Report) -> Result:
    """Time the CUDA plugins on the local GPU, and torch and cuBLAS doing the same."""
    if not torch.cuda.is_available():
        raise click.ClickException("needs an NVIDIA GPU, and there is none here")
    try:
        setup = setup_on_gpu(3 if report.quick else CALLS * report.settings["repeats"])
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    layers, tokens = (TINY, (1, 16)) if report.quick else (LAYERS, TOKENS)
    measured = ceilings(setup)
    gpu = torch.cuda.get_device_name()
    report.settings |= {"gpu": gpu, "tokens": list(tokens), **measured}
    measure_all(setup, layers, tokens, report)
    rows = summarise(report)
    return Result([table("Medians", COLUMNS, rows)], rows, bars(rows, measured), [OURS])


if __name__ == "__main__":
    main()
