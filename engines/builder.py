"""package -> engine directory, all or nothing; what is the same for every target.

engine.plan or model.onnx with weights.safetensors, see tensorrt_builder.py and onnxruntime_builder.py
qwenport.json   the manifest: bindings, profiles, the runtime that runs it, hashes
config.json, tokenizer and generation files, as in the package
tokenizer.qwenport   the tokenizer for C++, if it is of a kind that the C++ library computes
proof.safetensors   what the engine must reproduce, if the package has it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwenport import __version__
from qwenport.contract import (
    AUTO,
    E4M3,
    ENGINE_FORMAT,
    ENGINE_VERSION,
    MANIFEST,
    ONNXRUNTIME,
    PROOF,
    TARGETS,
    Progress,
    caches,
    no_progress,
    past,
    present,
)
from qwenport.engines.engine import Engine
from qwenport.engines.errors import BuildError
from qwenport.engines.onnxruntime_builder import check_for_onnxruntime, fill_for_onnxruntime
from qwenport.engines.proof import Proof, kept_proof, write_proof
from qwenport.engines.request import Filled, Request
from qwenport.engines.tensorrt_builder import check_for_tensorrt, fill_for_tensorrt
from qwenport.engines.text.for_engine import write_text
from qwenport.exporter import (
    Package,
    as_json,
    atomic_directory,
    copy_companions,
    load_package,
    sha256,
    write_json,
)


def build(
    package_path: Path | str,
    engine_path: Path | str,
    *,
    target: str,
    gpus: str | None = None,
    max_seq_len: int | None = None,
    max_batch: int | None = None,
    plugins: Path | str | None = None,
    attention: str = AUTO,
    force_clean: bool = False,
    make_proof: Callable[[Package], Proof | None] = kept_proof,
    progress: Progress = no_progress,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Build the engine of a package.

    Args:
        package_path: a package written by `export`.
        engine_path: directory to create; must not exist.
        target: "onnxruntime" (runs on any CPU), "tensorrt-rtx" (builds anywhere) or "tensorrt" (builds on the GPU it
            is for).
        gpus: "sm86,sm89"; see `parse_gpus` for the default. TensorRT only.
        max_seq_len: cache slots, at most (and by default) the package's.
        max_batch: batch rows, at most (and by default) the package's.
        plugins: library of the CUDA plugins to use and copy; without it the custom operators are
            computed from their function bodies. Target tensorrt only.
        attention: form of attention over the cache, one of ATTENTIONS; "auto" takes the one that moves the fewest bytes
            on the GPUs that the engine is for. TensorRT only.
        force_clean: remove scratch directories of builds for the same path, even of builds that may still run.
        make_proof: called with the package once the request is checked; returns the proof that the engine will carry,
            by default the package's.
        progress: called with (what, done, total).
        note: called with messages for the user.

    Raises:
        ProofError: the package's proof is damaged, or of another package.
        PackageError, MissingExtraError, PluginError, LoweringError, BuildError, ExportError: the build failed; nothing
            is left at engine_path.
    """
    engine_path = Path(engine_path)
    if target not in TARGETS:
        raise BuildError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    package = load_package(package_path)
    request = Request(
        package,
        target,
        capacity=_limit("max sequence length", max_seq_len, package.max_seq_len),
        batch=_limit("max batch", max_batch, package.max_batch),
        gpus=gpus,
        plugins=None if plugins is None else Path(plugins),
        attention=attention,
    )
    check, fill = _BUILDERS.get(target, (check_for_tensorrt, fill_for_tensorrt))
    check(request)
    package.check_graph()
    proof = make_proof(package)
    with atomic_directory(engine_path, force_clean=force_clean, note=note) as scratch:
        filled = fill(request, scratch, progress)
        copy_companions(package.path, scratch)
        text = write_text(package.path, scratch, package.config.vocab_size, note)
        if proof is not None:
            write_proof(scratch / PROOF, proof)
        manifest = _manifest(request, filled, text, scratch)
        write_json(scratch / MANIFEST, manifest)
    return Engine(engine_path, as_json(manifest))


_BUILDERS = {ONNXRUNTIME: (check_for_onnxruntime, fill_for_onnxruntime)}
"""Target -> the functions that refuse a request and that write an engine's own files; for other targets TensorRT's."""


def _limit(what: str, asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise BuildError(f"{what} {asked}: the package was exported for 1 to {most}")
    return asked


def _manifest(
    request: Request, filled: Filled, text: dict[str, Any], folder: Path
) -> dict[str, Any]:
    package = request.package
    weights = {} if filled.weights is None else {"weights": filled.weights}
    quantization = package.config.quantization
    apart = filled.weights["files"] if filled.weights else {}
    return {
        "format": ENGINE_FORMAT,
        "format_version": ENGINE_VERSION,
        "qwenport_version": __version__,
        "flavour": request.target,
        "runtime_version": filled.runtime_version,
        "gpus": list(filled.gpus),
        "model": package.manifest["model"],
        "dtype": filled.dtype,
        "max_seq_len": request.capacity,
        "max_batch": request.batch,
        "rope_scaling": package.manifest["rope_scaling"],
        "attention": asdict(filled.attention),
        "quantization": None
        if quantization is None
        else {
            "weights": quantization.in_words(),
            "activations": filled.activations
            or (E4M3 if quantization.rounds_inputs else filled.dtype),
        },
        "text": text,
        "profiles": list(filled.profiles),
        "bindings": filled.bindings,
        "aliases": {
            present(cache): past(cache)
            for layer in range(package.config.num_hidden_layers)
            for cache in caches(layer)
        },
        "layers": filled.layers,
        "plugins": list(filled.plugins),
        "plugin_layers": filled.plugin_layers,
        "package": {
            "manifest_sha256": sha256(package.path / MANIFEST),
            "source": package.manifest["source"],
            "dtype": package.dtype,
            "weight_bytes": package.manifest["weights"]["bytes"],
            "weight_mode": package.manifest["weights"]["mode"],
            "max_seq_len": package.max_seq_len,
        },
        **weights,
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": filled.hashes.get(path.name) or sha256(path),
            }
            for path in sorted(folder.iterdir())
            if path.name not in apart
        },
    }
