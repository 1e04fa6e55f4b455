"""What benchmarks/smollm2.py does to a GGUF's tensors, settings and tokens, without a download."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
HEADS, KV_HEADS, HEAD_DIM, HIDDEN_SIZE = 4, 2, 6, 24
LAYERS = 2


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("smollm2")


@pytest.fixture
def metadata() -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *letters, "Ġa", "12"]
    return {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN_SIZE,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["Ġ a", "1 2"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
    }


@pytest.mark.parametrize(("part", "heads"), [("attn_q", HEADS), ("attn_k", KV_HEADS)])
def test_unpermute_is_what_transformers_does_to_a_gguf(part: str, heads: int, smollm2: Any) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    weight = np.random.default_rng(0).normal(size=(heads * HEAD_DIM, HIDDEN_SIZE))
    expected = LlamaTensorProcessor(config).process(weight, f"blk.0.{part}.weight").weights
    assert np.array_equal(smollm2.unpermute(weight, heads), expected)


def test_rotate_half_after_unpermute_is_rotation_of_neighbours_before_it(smollm2: Any) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = np.random.default_rng(1)
    x = generator.normal(size=HIDDEN_SIZE)
    weights = [generator.normal(size=(n * HEAD_DIM, HIDDEN_SIZE)) for n in (HEADS, KV_HEADS)]
    angles = generator.normal(size=HEAD_DIM // 2)
    half = torch.from_numpy(np.concatenate([angles, angles])).reshape(1, 1, -1)
    q, k = (
        torch.from_numpy(smollm2.unpermute(weight, heads) @ x).reshape(1, heads, 1, HEAD_DIM)
        for weight, heads in zip(weights, (HEADS, KV_HEADS), strict=True)
    )
    rotated = apply_rotary_pos_emb(q, k, half.cos(), half.sin())
    for ours, weight in zip(rotated, weights, strict=True):
        pairs = (weight @ x).reshape(-1, HEAD_DIM // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        expected = np.concatenate([turned.real, turned.imag], axis=-1)
        np.testing.assert_allclose(ours.numpy()[0, :, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_all_those_of_transformers_llama(
    tied: bool, smollm2: Any, metadata: dict[str, Any]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**smollm2.config_of(metadata, tied)))
    names = ["token_embd", "output_norm"] + ([] if tied else ["output"])
    names += [f"blk.{layer}.{part}" for layer in range(LAYERS) for part in smollm2.LAYER_NAMES]
    parameters = {name for name, _ in model.named_parameters()}  # a tied head is listed once
    assert {smollm2.hugging_face_name(f"{name}.weight") for name in names} == parameters


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q.bias", "attn_q.weight", "blk.1.output.weight"]
)
def test_tensor_without_a_name_is_refused(name: str, smollm2: Any) -> None:
    with pytest.raises(click.ClickException, match="no Llama checkpoint has"):
        smollm2.hugging_face_name(name)


def test_config_has_the_decimals_and_refuses_unknown_settings(
    smollm2: Any, metadata: dict[str, Any]
) -> None:
    config = smollm2.config_of(metadata, tied=True)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 1e5)
    assert (config["head_dim"], config["eos_token_id"]) == (HEAD_DIM, 2)
    with pytest.raises(click.ClickException, match=r"rope\.scaling\.factor"):
        smollm2.config_of({**metadata, "llama.rope.scaling.factor": 4.0}, tied=True)


def test_tokenizer_splits_digits_and_keeps_control_tokens(
    smollm2: Any, metadata: dict[str, Any]
) -> None:
    tokenizer = smollm2.tokenizer_of(metadata)
    encoded = tokenizer.encode("<s>b a12é</s>")
    assert encoded.tokens == ["<s>", "b", "Ġa", "1", "2", "Ã", "©", "</s>"]
    assert tokenizer.decode(encoded.ids) == "b a12é"
