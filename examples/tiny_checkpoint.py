"""The files of the tiny checkpoints: configs, the tokenizer, and how they are written."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedModel

VOCAB_SIZE = 2048
CONTEXT = 512
END_OF_TEXT, IM_START, IM_END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_ID, _, EOS_ID = range(VOCAB_SIZE - len(SPECIAL), VOCAB_SIZE)

# The pre-tokenizer expression of Qwen2: contractions, words, single digits, punctuation, space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Field for field the spelling of the published files, which predates transformers 5.
COMMON: dict[str, object] = {
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "max_position_embeddings": CONTEXT,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}
QWEN2_5: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "intermediate_size": 640,
    "max_window_layers": 5,
    "model_type": "qwen2",
    "num_hidden_layers": 5,
    "rope_theta": 50000.0,
    "sliding_window": CONTEXT,
    "tie_word_embeddings": True,
}
# As in Qwen1.5-MoE-A2.7B, but one layer is dense, and three query heads share a key head.
QWEN2_MOE: dict[str, object] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "intermediate_size": 448,
    "max_window_layers": 4,
    "mlp_only_layers": [1],
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 96,
    "norm_topk_prob": False,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 160,
    "tie_word_embeddings": False,
}
CONFIGS = {
    name: dict(sorted((COMMON | own).items()))
    for name, own in {"Qwen2.5": QWEN2_5, "Qwen2-MoE": QWEN2_MOE}.items()
}
# As Qwen2.5-7B-Instruct-1M is to Qwen2.5-7B: a longer context, of which 400 tokens cross a dozen borders of chunks.
QWEN2_5_1M: dict[str, object] = dict(
    sorted(
        {
            **CONFIGS["Qwen2.5"],
            "dual_chunk_attention_config": {
                "chunk_size": 48,
                "local_size": 16,
                "original_max_position_embeddings": 256,
            },
            "max_position_embeddings": 2 * CONTEXT,
        }.items()
    )
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE as Qwen2 has it; as there, special tokens follow the ordinary vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    plain = (piece for text in texts for piece in special.split(text))
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"{tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: add text")
    return tokenizer


def json_files(config: dict[str, object], tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """The content of each JSON file by its name, except tokenizer.json."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL
    }
    return {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": BOS_ID,
            "do_sample": True,
            "eos_token_id": [EOS_ID, BOS_ID],
            "pad_token_id": BOS_ID,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": [IM_START, IM_END],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "errors": "replace",
            "model_max_length": config["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }


def write_checkpoint(
    model: PreTrainedModel, config: dict[str, object], tokenizer: Tokenizer, out: Path
) -> None:
    """Write into a temporary folder first; then each file appears in `out` by one rename.

    transformers writes the tensors, since in memory it stacks the experts of a layer that the file
    has one by one. Its config is replaced by `config`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in json_files(config, tokenizer).items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)
            copied = Path(shutil.copy(path, out / f".{path.name}.new"))  # may cross file systems
            copied.replace(out / path.name)
