"""An engine directory on disk, verified against its manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from qwenport.contract import (
    ATTENTIONS,
    COS_TABLE,
    DIRECT,
    DTYPES,
    E4M3,
    ENGINE_FORMAT,
    ENGINE_VERSION,
    ENGINE_WEIGHTS,
    FP32,
    INPUT_IDS,
    INT8,
    KEY_POSITIONS,
    LOGITS_INDICES,
    MANIFEST,
    MASKED,
    MODEL,
    ONNXRUNTIME,
    PLAN,
    SIN_TABLE,
    SPAN_MULTIPLE,
    TARGETS,
    WITH_QUERIES,
    is_query,
    query,
)
from qwenport.engines.errors import EngineError
from qwenport.engines.text.chat_format import TEXT_SHAPE, check_text
from qwenport.exporter import (
    BINDINGS,
    FILES,
    SOURCE,
    CheckpointError,
    Each,
    PackageError,
    as_dual_chunk,
    check_files,
    check_listed,
    check_shape,
    check_weight_files,
    damaged,
    read_manifest,
    read_safetensors_header,
)

SHAPE = {
    "qwenport_version": str,
    "flavour": str,
    "runtime_version": str,
    "gpus": [str],
    "model": {
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "num_key_value_heads": int,
        "head_dim": int,
        "vocab_size": int,
    },
    "dtype": str,
    "max_seq_len": int,
    "max_batch": int,
    "rope_scaling": (str, NoneType),
    "attention": {"form": str, "span_multiple": int, "slots": int},
    "quantization": (dict, NoneType),
    "text": TEXT_SHAPE,
    "profiles": [Each(Each([int]))],
    "bindings": BINDINGS,
    "aliases": Each(str),
    "layers": int,
    "plugins": [str],
    "plugin_layers": Each(int),
    "package": {
        "source": SOURCE,
        "dtype": str,
        "weight_bytes": int,
        "weight_mode": str,
        "max_seq_len": int,
    },
    "files": FILES,
}
QUANTIZATION_SHAPE = {"weights": str, "activations": str}
"""Shape of `quantization` in the manifest of an engine with quantized weights."""
WEIGHTS_SHAPE = {"bytes": int, "files": Each({"bytes": int, "header_sha256": str})}
"""Shape of `weights` in the manifest of an onnxruntime engine."""


@dataclass(frozen=True)
class Engine:
    """A verified engine directory.

    Attributes:
        path: the directory.
        manifest: what its qwenport.json holds; docs/reference/manifests.md names every key.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def flavour(self) -> str:
        """The target that it was built for."""
        flavour: str = self.manifest["flavour"]
        return flavour

    @property
    def plan(self) -> Path:
        """The serialized TensorRT engine."""
        return self.path / PLAN

    @property
    def model(self) -> Path:
        """The ONNX file of an onnxruntime engine."""
        return self.path / MODEL

    @property
    def activations(self) -> str:
        """What activations are rounded to in products: INT8, E4M3, or the engine's dtype."""
        quantization = self.manifest["quantization"]
        found: str = (quantization or {}).get("activations", self.manifest["dtype"])
        return found

    @property
    def max_step_tokens(self) -> int:
        """Tokens per row that a step takes."""
        return self._most(INPUT_IDS)

    @property
    def max_step_logits(self) -> int:
        """Tokens per row whose logits a step returns."""
        return self._most(LOGITS_INDICES)

    def _most(self, name: str) -> int:
        """The most columns that an input of [batch, columns] has in a profile."""
        return max(profile[name]["max"][1] for profile in self.manifest["profiles"])


def load_engine(path: Path | str) -> Engine:
    """Open an engine directory and check its files against its manifest.

    The weight file of an onnxruntime engine is checked by size and header hash; its values are not read.

    Raises:
        EngineError: no such directory, not an engine, another format version, or a changed file.
    """
    path = Path(path)
    if not path.is_dir():
        raise EngineError(f"{path}: no such engine directory")
    try:
        manifest = read_manifest(path, ENGINE_FORMAT, ENGINE_VERSION, "build the engine again")
        with damaged(path / MANIFEST):
            check_shape(manifest, SHAPE)
            if manifest["flavour"] not in TARGETS:
                raise ValueError(f"flavour is {manifest['flavour']!r}")
            for dtype in (manifest["dtype"], manifest["package"]["dtype"]):
                if dtype not in DTYPES:
                    raise ValueError(f"dtype is {dtype!r}")
            layers = manifest["model"]["num_hidden_layers"]
            if len(manifest["aliases"]) != 2 * layers:
                raise ValueError(f"{layers} layers, but {len(manifest['aliases'])} aliases")
            _check_attention(manifest)
            check_text(manifest["text"], manifest["model"]["vocab_size"])
            if manifest["quantization"] is not None:
                check_shape(manifest["quantization"], QUANTIZATION_SHAPE)
                if manifest["quantization"]["activations"] not in (*DTYPES, INT8, E4M3):
                    raise ValueError("quantization.activations is no known type")
            if manifest["flavour"] == ONNXRUNTIME:
                _check_onnxruntime(path, manifest)
            else:
                check_listed(path, list(manifest["files"]), (PLAN,))
                if not manifest["gpus"]:
                    raise ValueError("gpus is empty")
            check_files(path, manifest["files"])
            for name in manifest["plugins"]:
                if name not in manifest["files"]:
                    raise EngineError(
                        f"{path / MANIFEST}: the plugins {name} are not among its files"
                    )
    except (CheckpointError, PackageError) as error:
        raise EngineError(str(error)) from error
    return Engine(path, manifest)


def _check_attention(manifest: dict[str, Any]) -> None:
    """Check that the form of attention, the cache's slots, the profiles and the bindings agree.

    Raises:
        ValueError: they do not.
    """
    form, multiple, slots = (
        manifest["attention"][key] for key in ("form", "span_multiple", "slots")
    )
    if form not in ATTENTIONS:
        raise ValueError(f"attention.form is {form!r}")
    longest = manifest["max_seq_len"]
    agree = {
        MASKED: multiple == SPAN_MULTIPLE and slots == longest,
        DIRECT: multiple == slots,
    }.get(form, multiple > 0 and slots % multiple == 0)
    if not agree or slots < longest:
        raise ValueError(
            f"attention of form {form} over {slots} slots in spans of {multiple}, "
            f"and max_seq_len {longest}"
        )
    layers = manifest["model"]["num_hidden_layers"] if form in WITH_QUERIES else 0
    outputs = [binding["name"] for binding in manifest["bindings"]["outputs"]]
    if sorted(filter(is_query, outputs)) != sorted(query(layer) for layer in range(layers)):
        raise ValueError(
            f"attention of form {form}, but the outputs of queries are not "
            + ("one per layer" if layers else "none")
        )
    if not manifest["profiles"]:
        raise ValueError("profiles is empty")
    for profile in manifest["profiles"]:
        for name in (INPUT_IDS, LOGITS_INDICES):
            most = profile.get(name, {}).get("max", [])
            if len(most) != 2 or most[0] != manifest["max_batch"] or most[1] < 1:
                raise ValueError(f"a profile's {name} is not of max_batch rows")
    if not any(
        profile[INPUT_IDS].get("min", [])[1:] == [1]
        and profile.get(KEY_POSITIONS, {}).get("max") == [slots]
        for profile in manifest["profiles"]
    ):
        raise ValueError("no profile is for single tokens over all slots")


def _check_onnxruntime(path: Path, manifest: dict[str, Any]) -> None:
    """Check what only an onnxruntime engine's manifest has, and its weight files.

    Raises:
        ValueError, PackageError, CheckpointError: as `load_engine` turns them into an EngineError.
    """
    if "weights" not in manifest:
        raise ValueError("the manifest lacks weights")
    check_shape(manifest["weights"], WEIGHTS_SHAPE, "the manifest.weights")
    if manifest["attention"]["form"] != MASKED:
        raise ValueError(f"an engine for {ONNXRUNTIME} has attention of form {MASKED}")
    if manifest["dtype"] != FP32.name or manifest["gpus"] or manifest["plugins"]:
        raise ValueError(f"an engine for {ONNXRUNTIME} is in fp32, without GPUs and plugins")
    if not re.fullmatch(r"\d{1,6}\.\d{1,6}", manifest["runtime_version"]):
        raise ValueError(f"runtime_version is {manifest['runtime_version']!r:.60}")
    weights = manifest["weights"]["files"]
    check_listed(path, [*manifest["files"], *weights], (MODEL, ENGINE_WEIGHTS))
    check_weight_files(path, weights)
    rows = {
        entry.shape[:1]
        for entry in read_safetensors_header(path / ENGINE_WEIGHTS)[1]
        if entry.name in (COS_TABLE, SIN_TABLE)
    }
    chunks = manifest["model"].get("dual_chunk")
    longest = manifest["max_seq_len"]
    if chunks is not None:
        longest = as_dual_chunk(chunks).rope_rows
    if rows != {(longest,)}:
        raise ValueError(f"max_seq_len is {manifest['max_seq_len']}, and the rope tables differ")
