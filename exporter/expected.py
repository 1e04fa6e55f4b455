"""The tensors that a checkpoint must hold, as its config.json implies."""

from __future__ import annotations

from collections.abc import Container, Iterator

from qwenport.contract import BY_SAFETENSORS
from qwenport.exporter.config import ModelConfig
from qwenport.exporter.errors import CheckpointError, ConfigError
from qwenport.exporter.quantization import WEIGHT, Storage
from qwenport.exporter.safetensors_file import TensorEntry
from qwenport.wording import cut

# a sparse layer's experts as two tensors; each expert's gate projection precedes its up projection
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def expected_tensors(
    config: ModelConfig, present: Container[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint with this config must hold, no more and no fewer.

    A sparse layer's experts are separate tensors, as published, unless the stacked tensors are among `present`. A
    quantized weight has the tensors of its format.

    Raises:
        ConfigError: the format cannot store a linear of this size.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters(config, present):
        shapes |= _stored(config, name, shape, present)
    return shapes


def quantized_weights(config: ModelConfig) -> dict[str, tuple[Storage, tuple[int, int]]]:
    """The weights that are quantized -> how they are stored, and their shapes [N, K].

    The experts of a layer are single weights.
    """
    if config.quantization is None:
        return {}
    found = ((name, config.storage(name), shape) for name, shape in parameters(config))
    return {
        name: (storage, (shape[0], shape[1]))
        for name, storage, shape in found
        if storage is not None
    }


def parameters(
    config: ModelConfig, present: Container[str] = ()
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter and its shape; experts are stacked only if the stacks are among `present`."""
    from qwenport.exporter.decoder import parameter_shapes  # imports torch

    for name, shape in parameter_shapes(config).items():
        layer, _, _ = name.rpartition("experts.")
        stacked = any(f"{layer}{stack}" in present for stack in (GATE_UP, DOWN))
        if not name.endswith((GATE_UP, DOWN)) or stacked:
            yield name, shape
            continue
        experts, rows, columns = shape
        parts = expert_parts(name, experts)
        for part in parts:
            yield part, (rows * experts // len(parts), columns)


def _stored(
    config: ModelConfig, name: str, shape: tuple[int, ...], present: Container[str]
) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors of one parameter."""
    storage, linear = config.storage(name), name.removesuffix(WEIGHT)
    if storage is None:
        return {name: shape}
    objection = storage.objection(shape)
    if objection is not None:
        raise ConfigError(f"quantization_config: {linear} cannot be stored so: {objection}")
    stored = {f"{linear}.{suffix}": each for suffix, each in storage.stored(shape).items()}
    optional = {f"{linear}.{suffix}": each for suffix, each in storage.optional(shape).items()}
    return stored | {name: each for name, each in optional.items() if name in present}


def expert_parts(name: str, experts: int) -> list[str]:
    """The single experts' tensors that, concatenated, make up the stacked tensor `name`.

    Args:
        name: "...mlp.experts.gate_up_proj" or "...mlp.experts.down_proj".
        experts: the number of experts.
    """
    prefix, _, kind = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return [f"{prefix}.{expert}.{part}.weight" for expert in range(experts) for part in parts]


def compare(expected: dict[str, tuple[int, ...]], tensors: dict[str, TensorEntry]) -> None:
    missing = [name for name in expected if name not in tensors]
    extra = sorted(tensors.keys() - expected.keys())
    if missing:
        there = f"; it has {name_some(extra)} instead" if extra else ""
        raise CheckpointError(
            f"the checkpoint lacks {name_some(missing)}, which its config.json implies{there}"
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint has {name_some(extra)}, which its config.json does not account for: remove them if they "
            "are not part of the model"
        )
    for name, shape in expected.items():
        found = tensors[name].shape
        if found != shape and not (shape == () and found == (1,)):  # one number
            raise CheckpointError(
                f"tensor {name} has shape {list(found)}; config.json implies {list(shape)}"
            )


def compare_types(config: ModelConfig, tensors: dict[str, TensorEntry]) -> None:
    """Integers and FP8 are where the format has them, and nowhere else."""
    codes = {
        f"{weight.removesuffix(WEIGHT)}.{suffix}": dtype
        for weight, (storage, _) in quantized_weights(config).items()
        for suffix, dtype in storage.integers.items()
    }
    for name, entry in tensors.items():
        wanted = codes.get(name)
        if wanted is None and entry.dtype not in BY_SAFETENSORS:
            raise CheckpointError(
                f"tensor {cut(name)} has dtype {entry.dtype}; supported: {', '.join(BY_SAFETENSORS)}"
            )
        if wanted is not None and entry.dtype != wanted:
            raise CheckpointError(
                f"tensor {cut(name)} has dtype {entry.dtype}; the format needs {wanted}"
            )


def name_some(names: list[str]) -> str:
    return some("tensor", names)


def some(what: str, names: list[str], most_characters: int = 70) -> str:
    """The first names in full, up to a number of characters, and how many more there are."""
    shown = [cut(names[0])]
    for name in names[1:]:
        if len(", ".join([*shown, name])) > most_characters:
            break
        shown.append(name)
    rest = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(shown)}{rest}"
