"""The judged target: a package or an engine directory, reduced to what the scenarios need to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport.contract import (
    AUTO,
    CHECKPOINT,
    E4M3,
    ENGINE,
    FP32,
    MANIFEST,
    NETWORK,
    ONNXRUNTIME,
    PACKAGE,
    TENSORRT_RTX,
)
from qwenport.exporter import (
    ConfigError,
    ModelConfig,
    Package,
    kind_of,
    load_package,
    open_checkpoint,
    parse_config,
    read_config_json,
    sha256,
)
from qwenport.validate.errors import ValidationError

if TYPE_CHECKING:
    from qwenport.engines import Engine


@dataclass(frozen=True)
class Target:
    """A verified package or engine directory.

    Attributes:
        path: the directory.
        judged_as: "package" (run by onnxruntime), "tensorrt-network" (of a package) or "engine".
        dtype: dtype of the package's weights: "bf16", "fp16" or "fp32". An onnxruntime engine has their values in
            fp32.
        compute_dtype: the dtype in which scenarios are judged: onnxruntime on the CPU always computes in fp32, and a
            network's arithmetic is judged exactly. INT8 and E4M3 are fp32 with activations of products rounded to
            them, E4M3 of what does not show all its codes: engines, experts, and heads.
        rounds: whether the rounding of the types that a network declares is judged as well.
        device: where it runs.
        config: the model's config, as exported.
        capacity: the most cache slots.
        max_batch: the most rows.
        attention: a network's form of attention, one of ATTENTIONS; None for other targets.
        gpus: the architectures that the network is judged for; empty for other targets.
        rope_length: positions that the rope tables were made for.
        rope_scaling: "KIND:FACTOR" that the export added to the checkpoint's config, or None.
        source: the checkpoint that its weights are: dtype, config_sha256, files with header_sha256; and, if `export`
            quantized it, what that one was made from.
        package: the package itself; None for an engine.
        engine: the engine itself; None for a package.
    """

    path: Path
    judged_as: str
    dtype: str
    compute_dtype: str
    rounds: bool
    device: str
    config: ModelConfig
    capacity: int
    max_batch: int
    attention: str | None
    gpus: tuple[str, ...]
    rope_length: int
    rope_scaling: str | None
    source: dict[str, Any]
    package: Package | None
    engine: Engine | None

    @property
    def for_onnxruntime(self) -> Package | Engine | None:
        """What onnxruntime runs; None for what TensorRT runs or parses."""
        if self.judged_as == NETWORK:
            return None
        if self.engine is not None and self.engine.flavour != ONNXRUNTIME:
            return None
        return self.package or self.engine

    @property
    def merged(self) -> bool:
        """Whether the checkpoint's adapter was merged into its weights."""
        return self.source["adapter"] is not None

    def hashes(self) -> dict[str, str]:
        """Hashes of what exactly was judged: the manifest, which holds the hashes of the rest, and the source."""
        hashes = {
            "manifest": sha256(self.path / MANIFEST),
            "source config.json": self.source["config_sha256"],
        }
        for file in self.source["files"]:
            hashes[f"source {file['name']} header"] = file["header_sha256"]
        if self.merged:
            hashes["source adapter"] = self.source["adapter"]["sha256"]
        return hashes


def open_target(
    path: Path,
    *,
    judged_as: str | None = None,
    exact: bool = False,
    gpus: str | None = None,
    attention: str = AUTO,
    device: str = "cpu",
) -> Target:
    """Open a target to judge.

    Args:
        path: a package or an engine directory.
        judged_as: "tensorrt-network" to judge the network that TensorRT's parser makes from a package; by default a
            package is run by onnxruntime and an engine by what it was built for.
        exact: judge a network's arithmetic only, not the rounding of the types it declares.
        gpus: judge the network of the engine that `build` with this option makes for tensorrt-rtx.
        attention: the same of its option for the form of attention.
        device: "cpu" or "cuda", where a package would run.

    Raises:
        PackageError, EngineError: neither a package nor an engine, damaged, changed, or of another format version.
        ValidationError: it is a checkpoint, or cannot be judged in that way.
        BuildError: there is no such engine for tensorrt-rtx.
    """
    if exact and judged_as != NETWORK:
        raise ValidationError(f"exact arithmetic (--exact) needs --as {NETWORK}")
    for asked, option in (
        (gpus is not None, "GPUs (--gpu)"),
        (attention != AUTO, "attention (--attention)"),
    ):
        if asked and judged_as != NETWORK:
            raise ValidationError(f"a choice of {option} needs --as {NETWORK}")
    kind = kind_of(path)
    if kind == "engine":
        if judged_as not in (None, ENGINE):
            raise ValidationError(
                f"{path}: the network of an engine cannot be read; use --as {NETWORK} on its package"
            )
        return _engine(path)
    if judged_as not in (None, PACKAGE, NETWORK):
        raise ValidationError(f"{path}: a package cannot be judged as {judged_as}")
    if kind == "checkpoint":
        raise ValidationError(f"{path}: neither a package nor an engine (no {MANIFEST})")
    package = load_package(path)
    judged_as = judged_as or PACKAGE
    in_fp32 = judged_as == NETWORK or device == "cpu"
    form: str | None = None
    architectures: tuple[str, ...] = ()
    if judged_as == NETWORK:
        form, architectures = _form(package, gpus, attention)
    return Target(
        path=path,
        judged_as=judged_as,
        dtype=package.dtype,
        compute_dtype=_compute_dtype(package.config) if in_fp32 else package.dtype,
        rounds=judged_as == NETWORK and not exact and package.dtype != "fp32",
        device=device,
        config=package.config,
        capacity=package.max_seq_len,
        max_batch=package.max_batch,
        attention=form,
        gpus=architectures,
        rope_length=package.max_seq_len,
        rope_scaling=package.manifest["rope_scaling"],
        source=package.manifest["source"],
        package=package,
        engine=None,
    )


def _compute_dtype(config: ModelConfig) -> str:
    """Of a target in fp32, where some codes cannot be observed: what experts round, and the head at few positions."""
    return E4M3 if config.rounds_experts or config.rounds_head else FP32.name


def _form(package: Package, gpus: str | None, attention: str) -> tuple[str, tuple[str, ...]]:
    """The form of attention that `build` gives an engine for tensorrt-rtx, and the architectures that it is for.

    Raises:
        BuildError: there is no such engine.
    """
    from qwenport.engines.attention import choose_attention
    from qwenport.engines.targets import FLAVOURS, parse_gpus, product_types

    types = product_types(package.config)
    architectures = parse_gpus(gpus, FLAVOURS[TENSORRT_RTX], package.dtype, types)
    form = choose_attention(
        attention,
        flavour=TENSORRT_RTX,
        gpus=architectures,
        dtype=package.dtype,
        config=package.config,
    )
    return form, architectures


def _engine(path: Path) -> Target:
    from qwenport.engines import load_engine

    engine = load_engine(path)
    manifest, on_cpu = engine.manifest, engine.flavour == ONNXRUNTIME
    try:
        config = parse_config(
            read_config_json(path), manifest["rope_scaling"], manifest["max_seq_len"]
        )
        return Target(
            path=path,
            judged_as=ENGINE,
            dtype=manifest["package"]["dtype"],
            compute_dtype=engine.activations
            if manifest["dtype"] == FP32.name
            else manifest["dtype"],
            rounds=False,
            device="cpu" if on_cpu else "cuda",
            config=config,
            capacity=manifest["max_seq_len"],
            max_batch=manifest["max_batch"],
            attention=None,
            gpus=(),
            rope_length=manifest["package"]["max_seq_len"],
            rope_scaling=manifest["rope_scaling"],
            source=manifest["package"]["source"],
            package=None,
            engine=engine,
        )
    except (KeyError, ConfigError) as error:
        raise ValidationError(f"{path}: not an engine that can be judged ({error})") from error


@dataclass(frozen=True)
class Sources:
    """What a target is compared with.

    Attributes:
        checkpoint: what its weights are, value for value: the oracle's source.
        original: what `export` quantized into `checkpoint`; None if it did not, or it was not given.
    """

    checkpoint: Path
    original: Path | None = None


def check_source(target: Target, checkpoint_path: Path) -> Sources:
    """Compare the reference checkpoint with the one that the target was made from.

    A package that `export` quantized holds its quantized checkpoint; given the original one, both are compared with.
    Names, sizes and headers of the weight files are compared, not their values: finding other values under
    the same headers is up to the scenarios.

    Raises:
        ConfigError, CheckpointError: not a checkpoint.
        ValidationError: it is another checkpoint; says what differs.
    """
    quantized = target.source["quantized"]
    config = checkpoint_path / "config.json"
    if quantized is None or not config.is_file() or sha256(config) != quantized["config_sha256"]:
        _check_source(target, checkpoint_path, target.source)
        return Sources(checkpoint_path)
    _check_source(target, checkpoint_path, {**quantized, "adapter": None})
    own = target.path / CHECKPOINT
    if target.package is None:
        raise ValidationError(
            f"{target.path}: quantized; --reference must be the quantized checkpoint, {CHECKPOINT}/ in its package"
        )
    _check_source(target, own, target.source)
    return Sources(own, checkpoint_path)


def _check_source(target: Target, checkpoint_path: Path, source: Mapping[str, Any]) -> None:
    checkpoint = open_checkpoint(
        checkpoint_path, target.rope_scaling, max_seq_len=target.rope_length, merged=target.merged
    )
    made_from = f"{target.path} was not made from {checkpoint_path}"
    if sha256(checkpoint_path / "config.json") != source["config_sha256"]:
        raise ValidationError(f"{made_from}: config.json differs")
    recorded = {f["name"]: (f["bytes"], f["header_sha256"]) for f in source["files"]}
    found = {f.name: (f.size, f.header_sha256) for f in checkpoint.files}
    if recorded.keys() != found.keys():
        odd = sorted(recorded.keys() ^ found.keys())
        raise ValidationError(f"{made_from}: only one of them has {odd[0]}")
    for name, identity in recorded.items():
        if found[name] != identity:
            raise ValidationError(f"{made_from}: {name} has another header or size")
    if checkpoint.adapter is not None and checkpoint.adapter.describe() != source["adapter"]:
        raise ValidationError(f"{made_from}: another adapter is next to the weights")
