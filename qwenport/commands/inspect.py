"""`qwenport inspect`: what a checkpoint, a package or an engine holds, and which GPUs it fits."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenport.commands._common import PATH, note, print_json, runtime_of
from qwenport.commands._gpus import USABLE, fits
from qwenport.contract import (
    CHUNKED,
    DIRECT,
    DTYPES,
    E4M3,
    INPUT_IDS,
    INT8,
    KEY_POSITIONS,
    MASKED,
    ONNXRUNTIME,
    PROOF,
    SPLIT,
)
from qwenport.wording import counted, size

if TYPE_CHECKING:
    from qwenport.engines import Engine
    from qwenport.exporter import ModelConfig, Package

LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@click.command("inspect")
@click.argument("target", type=PATH)
@click.option("--brief", is_flag=True, help="Leave out bindings, operators and GPUs.")
@click.option("-q", "--quiet", is_flag=True, help="No notes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(target: Path, brief: bool, quiet: bool, as_json: bool) -> None:
    """Show what TARGET holds: a checkpoint, a package or an engine directory.

    The model, its bindings and operators, the bytes of its weights and of its KV cache, and (unless it is
    an engine for onnxruntime) which GPUs have the memory for them. Files are first checked against the
    manifest; no GPU is needed.

    \b
    Examples:
      qwenport inspect Qwen2.5-0.5B-Instruct
      qwenport inspect qwen.package
      qwenport inspect qwen.engine --json
    """
    from qwenport.commands import _tables
    from qwenport.exporter import kind_of

    kind = kind_of(target)
    describe = {"checkpoint": checkpoint, "package": package, "engine": engine}[kind]
    facts = {"kind": kind, "path": str(target), **describe(target)}
    if as_json:
        print_json(facts)
        return
    for text in facts["notes"]:
        note(text, quiet)
    for line in headline(facts):
        click.echo(line)
    if not brief:
        _tables.show(facts)


def checkpoint(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint, including what its package would need."""
    from qwenport.exporter import open_checkpoint

    opened = open_checkpoint(path)
    config = opened.config
    return {
        "model": dataclasses.asdict(config),
        "dtype": opened.dtype,
        "max_seq_len": config.max_context,
        "quantization": quantization_of(config),
        "weights": {"bytes": opened.weight_bytes, "tensors": len(opened.tensors)},
        "notes": [
            *opened.notes,
            *([config.context_note] if config.context_note else []),
            *(
                ["there is an adapter next to the weights (--adapter)"]
                if opened.has_adapter
                else []
            ),
        ],
        **memory(config, opened.dtype, config.max_context, opened.weight_bytes),
    }


def package(path: Path) -> dict[str, Any]:
    """Facts about a package."""
    from qwenport.commands.export import notes_on
    from qwenport.exporter import load_package

    opened = load_package(path)
    manifest = opened.manifest
    weight_bytes = manifest["weights"]["bytes"]
    return {
        "model": dataclasses.asdict(opened.config),
        "dtype": opened.dtype,
        "max_seq_len": opened.max_seq_len,
        "max_batch": opened.max_batch,
        "qwenport_version": manifest["qwenport_version"],
        "opset": manifest["opset"],
        "quantization": quantization_of(opened.config),
        "weights": {key: manifest["weights"][key] for key in ("bytes", "tensors", "mode")},
        "notes": notes_on(opened),
        "bindings": manifest["bindings"],
        "operators": operators(opened),
        **memory(opened.config, opened.dtype, opened.max_seq_len, weight_bytes),
    }


def engine(path: Path) -> dict[str, Any]:
    """Facts about an engine directory."""
    from qwenport.engines import load_engine
    from qwenport.exporter import parse_config, read_config_json

    opened = load_engine(path)
    manifest = opened.manifest
    config = parse_config(read_config_json(path), manifest["rope_scaling"], manifest["max_seq_len"])
    same = ("dtype", "max_seq_len", "max_batch", "qwenport_version", "flavour", "runtime_version")
    facts = {
        "model": dataclasses.asdict(config),
        **{key: manifest[key] for key in same},
        "runtime": runtime_of(manifest),
        "proof": proof_of(opened),
        "notes": [],
        "quantization": quantization_of(config),
        "activations": opened.activations,
        "bindings": manifest["bindings"],
        "attention": manifest["attention"],
        "profiles": manifest["profiles"],
    }
    if opened.flavour == ONNXRUNTIME:
        weight_bytes = manifest["weights"]["bytes"]
        kv = kv_cache(config, manifest["dtype"], manifest["max_seq_len"])
        return {
            **facts,
            "weights": {"bytes": weight_bytes},
            "graph": {"bytes": opened.model.stat().st_size, "nodes": manifest["layers"]},
            "kv_cache": kv,
            "memory_bytes": weight_bytes + kv["bytes_per_text"],
        }
    plan_bytes = opened.plan.stat().st_size
    return {
        **facts,
        "architectures": manifest["gpus"],
        "weights": {"bytes": manifest["package"]["weight_bytes"]},
        "plan": {"bytes": plan_bytes, "layers": manifest["layers"]},
        "plugins": {
            "libraries": {name: manifest["files"][name]["sha256"] for name in manifest["plugins"]},
            "layers": manifest["plugin_layers"],
        },
        **memory(config, manifest["dtype"], manifest["max_seq_len"], plan_bytes, manifest),
    }


def quantization_of(config: ModelConfig) -> str | None:
    """How quantized weights are stored, in words; None if there are none."""
    return None if config.quantization is None else config.quantization.in_words()


def proof_of(opened: Engine) -> dict[str, Any] | None:
    """What the proof of an engine holds; None if it carries none."""
    from qwenport.engines import engine_proof, fitting_cases

    proof = engine_proof(opened)
    if proof is None:
        return None
    return {
        "bytes": opened.manifest["files"][PROOF]["bytes"],
        "cases": len(proof.cases),
        "cases_that_fit": len(fitting_cases(opened, proof)),
        "marks": len(proof.marks),
        "experts": list(proof.experts),
        "made_by": dict(proof.made_by),
    }


def _proof_line(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "proof     none: `qwenport selftest` cannot check it; validate the package and build again"
    reached, experts = proof["experts"]
    of_experts = f", {reached} of {experts} experts" if experts else ""
    cases, fit = counted(proof["cases"], "case"), proof["cases_that_fit"]
    room = "" if fit == proof["cases"] else f", {fit} of which fit its batch and slots"
    return f"proof     {cases}{room}, {proof['marks']} fingerprints{of_experts} (qwenport selftest)"


def operators(package: Package) -> dict[str, Any]:
    """Node counts by operator, in total and per decoder layer; the weights are not opened.

    `per_layer` counts the first decoder layer; `layers_alike` says whether all layers are the same.
    """
    total: Counter[str] = Counter()
    layers: dict[int, Counter[str]] = {}
    for node in package.check_graph().graph:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        total[name] += 1
        if match := LAYER.match(node.name or ""):
            layers.setdefault(int(match[1]), Counter())[name] += 1
    first = layers.get(0, Counter())
    return {
        "nodes": sum(total.values()),
        "nodes_per_layer": sum(first.values()),
        "layers_alike": all(counts == first for counts in layers.values()),
        "total": dict(total.most_common()),
        "per_layer": dict(first.most_common()),
    }


def memory(
    config: ModelConfig,
    dtype: str,
    max_seq_len: int,
    resident: int,
    engine_manifest: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """KV cache and GPUs. `resident` bytes stay on the GPU whatever is generated.

    An engine runs with its own TensorRT on the GPUs it was built for, and its cache has a fixed number of slots.
    """
    slots = max_seq_len if engine_manifest is None else engine_manifest["attention"]["slots"]
    kv = kv_cache(config, dtype, slots)
    gpus = []
    for fit in fits(resident, kv["bytes_per_token"], slots):
        context, targets = fit.context, targets_of(fit.gpu.architecture, config, dtype)
        if engine_manifest is not None:
            if fit.gpu.architecture not in engine_manifest["gpus"]:
                continue
            context, targets = max_seq_len if fit.full else 0, [engine_manifest["flavour"]]
        gpus.append(
            {
                "name": fit.gpu.name,
                "architecture": fit.gpu.architecture,
                "memory_bytes": fit.gpu.memory_bytes,
                "targets": targets,
                "fits": fit.full,
                "max_context": context,
            }
        )
    return {
        "kv_cache": kv,
        "usable_gpu_memory": USABLE,
        "gpus": gpus,
    }


def kv_cache(config: ModelConfig, dtype: str, slots: int) -> dict[str, int]:
    """Bytes of the KV cache, per token and for one text that may fill all slots."""
    per_token = config.kv_bytes_per_token(DTYPES[dtype].itemsize)
    return {"bytes_per_token": per_token, "bytes_per_text": per_token * slots}


def targets_of(architecture: str, config: ModelConfig, dtype: str) -> list[str]:
    """The TensorRT targets that serve an architecture in a dtype and with the codes of quantized weights."""
    from qwenport.engines import FLAVOURS, serves

    return [
        name for name, flavour in FLAVOURS.items() if serves(flavour, architecture, config, dtype)
    ]


def _experts_line(moe: dict[str, Any], layers: int) -> str:
    shared = (
        ""
        if moe["shared_expert_size"] is None
        else f" and a shared one of {moe['shared_expert_size']}"
    )
    return (
        f"experts   {moe['experts_per_token']} of {moe['num_experts']} a token, each of {moe['expert_size']}"
        f"{shared}, in {len(moe['layers'])} of {layers} layers"
    )


def _attention(attention: dict[str, Any]) -> str:
    """The form of attention in words."""
    told = {
        MASKED: "over a copy of the cache's active span, with a mask",
        DIRECT: "over the cache in place, by lengths",
        CHUNKED: "one token over the cache in place, in chunks; more over a copy of the active span",
        SPLIT: "one token over the cache in place, in chunks; more over the cache in place, by lengths",
    }
    form: str = attention["form"]
    return f"{form}: {told[form]}; {attention['slots']} slots"


def _steps(profiles: list[dict[str, Any]], slots: int) -> str:
    """How many tokens a step takes, by the span, in words."""
    told, reached = [], 0
    for profile in profiles[1:]:
        (rows, tokens), (reached,) = (profile[name]["max"] for name in (INPUT_IDS, KEY_POSITIONS))
        told.append(f"{tokens} tokens of {rows} rows up to {reached} slots")
    if reached < slots:
        told.append("one token beyond; fewer rows (build --max-batch) take more")
    return ", ".join(told)


def _chunks(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return ""
    return f", dual chunk attention in chunks of {settings['chunk_size'] - settings['local_size']}"


def headline(facts: dict[str, Any]) -> list[str]:
    """The first lines: what it is, and what it needs."""
    model, kv = facts["model"], facts["kv_cache"]
    lines = [
        f"{facts['path']}: {facts['kind']}, {model['model_type']}",
        f"model     {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads ({model['num_key_value_heads']} for keys and values) "
        f"of {model['head_dim']}, vocabulary {model['vocab_size']}",
        f"runs      {facts['dtype']}, {facts['max_seq_len']} positions "
        f"(rope {model['rope']['kind']}{_chunks(model['dual_chunk'])})"
        + (f", batch {facts['max_batch']}" if "max_batch" in facts else ""),
    ]
    if model["moe"] is not None:
        lines.append(_experts_line(model["moe"], model["num_hidden_layers"]))
    weights = f"weights   {size(facts['weights']['bytes'])}"
    if "tensors" in facts["weights"]:
        weights += f" in {facts['weights']['tensors']} tensors"
    lines.append(weights)
    if facts["quantization"] is not None:
        stored = f"quantized {facts['quantization']}"
        if facts.get("activations") in (INT8, E4M3):
            stored += f"; products by them round activations to {facts['activations']}"
        lines.append(stored)
    if "plan" in facts:
        lines.append(
            f"engine    {size(facts['plan']['bytes'])}, {facts['plan']['layers']} layers, by "
            f"{facts['runtime']}"
        )
        lines.append(f"attention {_attention(facts['attention'])}")
        if len(facts["profiles"]) > 2:  # with dual chunk attention
            lines.append(f"steps     {_steps(facts['profiles'], facts['attention']['slots'])}")
        used = [f"{name} x {count}" for name, count in facts["plugins"]["layers"].items()]
        lines.append(
            f"plugins   {', '.join(used) or 'none; operators by their definitions in ONNX'}"
        )
    if "graph" in facts:
        lines.append(f"engine    graph of {facts['graph']['nodes']} nodes, by {facts['runtime']}")
    if "proof" in facts:
        lines.append(_proof_line(facts["proof"]))
    lines.append(
        f"KV cache  {size(kv['bytes_per_token'])} per token, "
        f"{size(kv['bytes_per_text'])} per text of {facts['max_seq_len']}"
    )
    if "memory_bytes" in facts:
        lines.append(
            f"memory    {size(facts['memory_bytes'])} for the weights and the cache of one text"
        )
    return lines
