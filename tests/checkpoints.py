"""Checkpoints for the tests: shapes and maths from transformers, files from the safetensors library.

Nothing here uses Qwenport, so that what the exporter reads is what others wrote.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Raw = dict[str, Any]

PUBLISHED: dict[str, Raw] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "configs").glob("*.json"))
}

# As small as the structure allows: grouped heads, two layers, every size different.
MINI: dict[str, Raw] = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 64,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 48,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 48,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 48,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 40,
        "initializer_range": 0.02,
        "intermediate_size": 36,
        "max_position_embeddings": 64,
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 48,
    },
    # a dense layer between two sparse ones, a number of experts that is no power of two
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "max_window_layers": 3,
        "mlp_only_layers": [1],
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "shared_expert_intermediate_size": 28,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 48,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 48,
    },
}


def mini(model_type: str, /, **changes: Any) -> Raw:
    """A small config.json as published, with changes; a value of `...` removes the key."""
    raw = {**copy.deepcopy(MINI[model_type]), **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def transformers_config(raw: Raw) -> Any:
    """transformers' own config object for a config.json."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))


def config_fields(model_type: str) -> Mapping[str, Any]:
    """The keys that transformers' config class declares, each with its dataclass field."""
    from transformers import CONFIG_MAPPING

    fields: Mapping[str, Any] = CONFIG_MAPPING[model_type].__dataclass_fields__
    return fields


def bias_switches(model_type: str) -> list[str]:
    """The keys that switch a linear layer's bias."""
    return [key for key in config_fields(model_type) if key.endswith("_bias")]


def has_no_window(model_type: str) -> bool:
    """Whether transformers' model knows no sliding window."""
    return "sliding_window" not in config_fields(model_type)


def published_spelling(raw: Raw) -> Raw:
    """What transformers 5 saves, in the spelling of the files that are published."""
    raw = copy.deepcopy(raw)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype", None)
    raw.pop("layer_types", None)
    if "num_local_experts" in raw:
        raw["num_experts"] = raw.pop("num_local_experts")
    return raw


def meta_model(config: Any) -> Any:
    """transformers' model of its config object, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sparse_layers(config: Any) -> tuple[int, ...]:
    """The layers that have experts in transformers' model."""
    kinds = [type(layer.mlp).__name__ for layer in meta_model(config).model.layers]
    return tuple(index for index, kind in enumerate(kinds) if kind.endswith("SparseMoeBlock"))


def tensor_shapes(raw: Raw, *, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is published for a config.json.

    transformers holds a layer's experts in two stacked tensors, checkpoints have a tensor an expert; `stacked`
    leaves them as transformers holds them.
    """
    model = meta_model(transformers_config(raw))
    tied = {"lm_head.weight"} if raw.get("tie_word_embeddings", False) else set()
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }
    return shapes if stacked else single_experts(shapes)


def single_experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same with each stack of experts as the tensors of single experts."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj"):
            result[name] = shape
            continue
        experts, rows, columns = shape
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert in range(experts):
            for part in parts:
                result[f"{prefix}.{expert}.{part}.weight"] = (rows // len(parts), columns)
    return result


def stack_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with single experts in transformers' two stacks, [gate; up] and down of each."""
    result = {name: t for name, t in tensors.items() if ".experts." not in name}
    layers = {name.split(".experts.")[0] for name in tensors.keys() - result.keys()}
    for prefix in sorted(layers):

        def part(expert: int, name: str, prefix: str = prefix) -> torch.Tensor:
            return tensors[f"{prefix}.experts.{expert}.{name}.weight"]

        experts = range(len(tensors[f"{prefix}.gate.weight"]))
        result |= {
            f"{prefix}.experts.gate_up_proj": torch.stack(
                [torch.cat([part(e, "gate_proj"), part(e, "up_proj")]) for e in experts]
            ),
            f"{prefix}.experts.down_proj": torch.stack([part(e, "down_proj") for e in experts]),
        }
    return result


def random_tensors(
    shapes: Mapping[str, Iterable[int]], dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of a model that is not degenerate: biases and norms are random as well."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(*shape, generator=generator) * 0.2 + 1.0 * ("norm" in name)).to(dtype)
        for name, shape in shapes.items()
    }


def write_checkpoint(
    folder: Path,
    raw: Raw,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Path:
    """Write config.json and weights with the safetensors library, in one file or with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if tensors is None:
        tensors = random_tensors(tensor_shapes(raw), dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """Write a shard index; the total size in it is of no interest."""
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_header(file: Path) -> Raw:
    """The JSON header of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def edit_header(file: Path, change: Callable[[Raw], Any]) -> None:
    """Rewrite a safetensors file with another header and the same data."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    replaced = change(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def write_sparse_checkpoint(folder: Path, raw: Raw) -> int:
    """Write a bf16 checkpoint of any size that takes no disk space; return its apparent bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for name, shape in tensor_shapes(raw).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def library_bytes(file: Path) -> dict[str, bytes]:
    """Every tensor's bytes as the safetensors library reads them."""
    with safe_open(file, framework="pt") as opened:
        return {name: to_bytes(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118


def to_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's memory, whatever its dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
